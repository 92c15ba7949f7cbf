# SPDX-License-Identifier: Apache-2.0
"""Roles, disks, connections, replication: the states an operator sees, and the legal moves as tables.

The words are DRBD's.  A table maps (state, what happened) to the next state; what is absent is illegal, and
asking for it is a broken invariant.  docs/states.md is generated from these tables, so the
diagrams cannot disagree with the program.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import Enum, IntEnum
from typing import Any, Final, TypeVar


class Role(Enum):
    """Who may write."""

    SECONDARY = "Secondary"  #: takes the peer's writes; serves nobody
    PRIMARY = "Primary"  #: serves its clients


class Disk(IntEnum):
    """How far this node's copy of a volume can be trusted; the numbers order trust and travel on the wire."""

    DISKLESS = 0  #: no backing device is attached
    ATTACHING = 1  #: the metadata is being read and, after a crash, repaired
    DETACHING = 2  #: the last writes are being finished
    FAILED = 3  #: the device gave an error; it is being let go
    NEGOTIATING = 4  #: (wire only) reserved
    INCONSISTENT = 5  #: a copy into this disk is unfinished: a mixture of old and new
    OUTDATED = 6  #: of one moment, but the peer is known to have gone on without us
    DUNKNOWN = 7  #: (peer's disk only) no connection
    CONSISTENT = 8  #: of one moment; whether the peer is newer is not known
    UP_TO_DATE = 9  #: nobody is newer

    @property
    def word(self) -> str:
        """DRBD's word for it."""
        return _DISK_WORDS[self]


_DISK_WORDS: Final = {
    Disk.DISKLESS: "Diskless",
    Disk.ATTACHING: "Attaching",
    Disk.DETACHING: "Detaching",
    Disk.FAILED: "Failed",
    Disk.NEGOTIATING: "Negotiating",
    Disk.INCONSISTENT: "Inconsistent",
    Disk.OUTDATED: "Outdated",
    Disk.DUNKNOWN: "DUnknown",
    Disk.CONSISTENT: "Consistent",
    Disk.UP_TO_DATE: "UpToDate",
}


class Connection(Enum):
    """The link to one peer."""

    STANDALONE = "StandAlone"  #: no connection is tried, until an operator says `connect`
    UNCONNECTED = "Unconnected"  #: a connection ended; the next attempt waits for its turn
    CONNECTING = "Connecting"  #: dialing, or waiting for the peer to dial
    CONNECTED = "Connected"  #: both sides agreed on who they are


class Replication(Enum):
    """What happens to one volume over one connection."""

    OFF = "Off"  #: nothing is mirrored; writes become dirty bits
    ESTABLISHED = "Established"  #: every write is mirrored
    WF_BITMAP_S = "WFBitMapS"  #: source: waiting until the target is durably Inconsistent
    WF_BITMAP_T = "WFBitMapT"  #: target: bitmaps are being merged
    SYNC_SOURCE = "SyncSource"  #: the peer copies from here
    SYNC_TARGET = "SyncTarget"  #: copying from the peer
    PAUSED_SYNC_S = "PausedSyncS"  #: source of a resync that somebody paused
    PAUSED_SYNC_T = "PausedSyncT"  #: target of a resync that somebody paused


class RoleMove(Enum):
    """What happens to a role."""

    PROMOTED = "promoted"
    DEMOTED = "demoted"


class DiskMove(Enum):
    """What happens to a local disk."""

    ATTACH = "attach asked for"
    FOUND_INCONSISTENT = "metadata says Inconsistent"
    FOUND_OUTDATED = "metadata says Outdated"
    FOUND_CONSISTENT = "metadata says Consistent"
    FOUND_UP_TO_DATE = "metadata says UpToDate"
    BECOME_TARGET = "becomes target of a resync"
    SYNC_DONE = "last block copied and stable"
    INVALIDATED = "operator threw the data away"
    PEER_NOT_NEWER = "handshake: the peer is not newer"
    PEER_IS_NEWER = "the peer goes on alone"
    TRUSTED = "operator declared the data good"
    IO_ERROR = "a write or flush failed"
    DETACH = "detach asked for"
    CLOSED = "device closed"


class ConnectionMove(Enum):
    """What happens to a connection."""

    CONNECT = "connect asked for"
    AGREED = "both agreed"
    LOST = "link lost"
    RETRY = "next attempt"
    DISCONNECT = "disconnect asked for"
    REFUSED = "peer or data do not fit"


class ReplicationMove(Enum):
    """What happens between two copies of a volume."""

    NO_SYNC = "nothing differs"
    BE_SOURCE = "we are source"
    BE_TARGET = "we are target"
    TARGET_READY = "target is durably Inconsistent"
    SOURCE_READY = "source may be asked"
    FINISHED = "resync finished"
    PAUSE = "resync paused"
    RESUME = "resync resumed"
    ROUND = "a new round begins"
    LOST = "link or disk lost"


ROLE_MOVES: Final[dict[tuple[Role, RoleMove], Role]] = {
    (Role.SECONDARY, RoleMove.PROMOTED): Role.PRIMARY,
    (Role.PRIMARY, RoleMove.DEMOTED): Role.SECONDARY,
}

_ATTACHED: Final = (Disk.INCONSISTENT, Disk.OUTDATED, Disk.CONSISTENT, Disk.UP_TO_DATE)

DISK_MOVES: Final[dict[tuple[Disk, DiskMove], Disk]] = {
    (Disk.DISKLESS, DiskMove.ATTACH): Disk.ATTACHING,
    (Disk.ATTACHING, DiskMove.FOUND_INCONSISTENT): Disk.INCONSISTENT,
    (Disk.ATTACHING, DiskMove.FOUND_OUTDATED): Disk.OUTDATED,
    (Disk.ATTACHING, DiskMove.FOUND_CONSISTENT): Disk.CONSISTENT,
    (Disk.ATTACHING, DiskMove.FOUND_UP_TO_DATE): Disk.UP_TO_DATE,
    (Disk.ATTACHING, DiskMove.IO_ERROR): Disk.FAILED,
    (Disk.ATTACHING, DiskMove.CLOSED): Disk.DISKLESS,
    **{(state, DiskMove.BECOME_TARGET): Disk.INCONSISTENT for state in _ATTACHED},
    **{(state, DiskMove.INVALIDATED): Disk.INCONSISTENT for state in _ATTACHED},
    (Disk.INCONSISTENT, DiskMove.SYNC_DONE): Disk.UP_TO_DATE,
    **{(state, DiskMove.TRUSTED): Disk.UP_TO_DATE for state in _ATTACHED},
    (Disk.OUTDATED, DiskMove.PEER_NOT_NEWER): Disk.UP_TO_DATE,
    (Disk.CONSISTENT, DiskMove.PEER_NOT_NEWER): Disk.UP_TO_DATE,
    (Disk.UP_TO_DATE, DiskMove.PEER_NOT_NEWER): Disk.UP_TO_DATE,
    (Disk.OUTDATED, DiskMove.PEER_IS_NEWER): Disk.OUTDATED,
    (Disk.CONSISTENT, DiskMove.PEER_IS_NEWER): Disk.OUTDATED,
    (Disk.UP_TO_DATE, DiskMove.PEER_IS_NEWER): Disk.OUTDATED,
    **{(state, DiskMove.IO_ERROR): Disk.FAILED for state in _ATTACHED},
    **{(state, DiskMove.DETACH): Disk.DETACHING for state in _ATTACHED},
    (Disk.DETACHING, DiskMove.IO_ERROR): Disk.FAILED,
    (Disk.DETACHING, DiskMove.CLOSED): Disk.DISKLESS,
    (Disk.FAILED, DiskMove.CLOSED): Disk.DISKLESS,
}

CONNECTION_MOVES: Final[dict[tuple[Connection, ConnectionMove], Connection]] = {
    (Connection.STANDALONE, ConnectionMove.CONNECT): Connection.CONNECTING,
    (Connection.CONNECTING, ConnectionMove.AGREED): Connection.CONNECTED,
    (Connection.UNCONNECTED, ConnectionMove.AGREED): Connection.CONNECTED,
    (Connection.CONNECTING, ConnectionMove.LOST): Connection.UNCONNECTED,
    (Connection.CONNECTED, ConnectionMove.LOST): Connection.UNCONNECTED,
    (Connection.UNCONNECTED, ConnectionMove.RETRY): Connection.CONNECTING,
    **{
        (state, ConnectionMove.DISCONNECT): Connection.STANDALONE
        for state in (Connection.UNCONNECTED, Connection.CONNECTING, Connection.CONNECTED)
    },
    **{
        (state, ConnectionMove.REFUSED): Connection.STANDALONE
        for state in (Connection.UNCONNECTED, Connection.CONNECTING, Connection.CONNECTED)
    },
}

_SOURCES: Final = (Replication.WF_BITMAP_S, Replication.SYNC_SOURCE, Replication.PAUSED_SYNC_S)
_TARGETS: Final = (Replication.WF_BITMAP_T, Replication.SYNC_TARGET, Replication.PAUSED_SYNC_T)

REPLICATION_MOVES: Final[dict[tuple[Replication, ReplicationMove], Replication]] = {
    (Replication.OFF, ReplicationMove.NO_SYNC): Replication.ESTABLISHED,
    (Replication.OFF, ReplicationMove.BE_SOURCE): Replication.WF_BITMAP_S,
    (Replication.OFF, ReplicationMove.BE_TARGET): Replication.WF_BITMAP_T,
    (Replication.WF_BITMAP_S, ReplicationMove.TARGET_READY): Replication.SYNC_SOURCE,
    (Replication.WF_BITMAP_T, ReplicationMove.SOURCE_READY): Replication.SYNC_TARGET,
    (Replication.SYNC_SOURCE, ReplicationMove.PAUSE): Replication.PAUSED_SYNC_S,
    (Replication.PAUSED_SYNC_S, ReplicationMove.RESUME): Replication.SYNC_SOURCE,
    (Replication.SYNC_TARGET, ReplicationMove.PAUSE): Replication.PAUSED_SYNC_T,
    (Replication.PAUSED_SYNC_T, ReplicationMove.RESUME): Replication.SYNC_TARGET,
    (Replication.SYNC_SOURCE, ReplicationMove.FINISHED): Replication.ESTABLISHED,
    (Replication.PAUSED_SYNC_S, ReplicationMove.FINISHED): Replication.ESTABLISHED,
    (Replication.SYNC_TARGET, ReplicationMove.FINISHED): Replication.ESTABLISHED,
    (Replication.PAUSED_SYNC_T, ReplicationMove.FINISHED): Replication.ESTABLISHED,
    **{(state, ReplicationMove.ROUND): Replication.OFF for state in Replication},
    **{(state, ReplicationMove.LOST): Replication.OFF for state in Replication},
}

State = TypeVar("State")
Move = TypeVar("Move")


def move(table: dict[tuple[State, Move], State], state: State, happened: Move) -> State:
    """The next state.  A move that the table does not name is a broken invariant (AssertionError)."""
    following = table.get((state, happened))
    assert following is not None, f"illegal move: {state} when {happened}"
    return following


def is_source(state: Replication) -> bool:
    """The peer copies from here (or is about to)."""
    return state in _SOURCES


def is_target(state: Replication) -> bool:
    """Copying from the peer (or about to)."""
    return state in _TARGETS


def word(state: Enum) -> str:
    """The operator's word for a state of any machine."""
    return state.word if isinstance(state, Disk) else str(state.value)


MACHINES: Final[tuple[tuple[str, type[Enum], Mapping[tuple[Any, Any], Enum]], ...]] = (
    ("Role", Role, ROLE_MOVES),
    ("Disk", Disk, DISK_MOVES),
    ("Connection", Connection, CONNECTION_MOVES),
    ("Replication", Replication, REPLICATION_MOVES),
)
