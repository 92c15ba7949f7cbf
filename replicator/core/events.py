# SPDX-License-Identifier: Apache-2.0
"""Everything that can happen to a resource.

A driver (or the simulator) turns what it sees into one of these and hands it to `Resource.step(event, now)`.
Offsets and sizes are bytes unless a name says otherwise.  `token` is an int that pairs an answer with the
action that asked; a completion with an unknown token is a broken invariant.

Records of the hot path are plain slots dataclasses (frozen ones cost five times more to make).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from replicator.core.wire import Frame

Buffer = bytes | bytearray | memoryview


class Io(Enum):
    """What a request asks of a volume."""

    READ = "read"
    WRITE = "write"
    FLUSH = "flush"
    TRIM = "trim"  #: contents become undefined-but-equal; read back as zeroes here
    ZERO = "zero"  #: contents become zeroes; may punch a hole unless `keep` is set


@dataclass(slots=True)
class ClientRequest:
    """An NBD client asks; already validated: inside the volume, sector aligned, at most `IO_MAX` bytes.

    The answer is `actions.Reply` with the same token (chosen by the frontend, unique per process).
    """

    volume: int
    token: int
    io: Io
    offset: int
    size: int
    data: Buffer = b""
    fua: bool = False
    keep: bool = False  # ZERO: do not punch a hole


@dataclass(slots=True)
class ClientOpened:
    """A client finished its NBD handshake and may send requests."""

    volume: int
    client: int
    writable: bool
    who: str  # for the operator: "pid 4711 /usr/bin/qemu-nbd"


@dataclass(slots=True)
class ClientClosed:
    """The client is gone; no request of it will follow."""

    volume: int
    client: int


@dataclass(slots=True)
class DiskDone:
    """A data or metadata operation ended.  `error` is an errno, 0 for success; `data` only for reads."""

    token: int
    error: int
    data: Buffer = b""


@dataclass(slots=True)
class DiskOpened:
    """`actions.OpenDisk` succeeded; what the metadata area holds, as raw bytes.

    `size` is what the device offers for data (metadata already taken off).  `fixed` is the 64 KiB fixed part
    (docs/disk-format.md), `bitmaps` maps slot index to the raw on-disk bitmap of that slot.
    """

    volume: int
    size: int
    fixed: bytes
    bitmaps: Mapping[int, bytes]


@dataclass(slots=True)
class DiskOpenFailed:
    """`actions.OpenDisk` failed; `error` is a sentence for the operator."""

    volume: int
    error: str


@dataclass(slots=True)
class DiskClosed:
    """`actions.CloseDisk` is done; nothing of that disk is in flight any more."""

    volume: int


@dataclass(slots=True)
class LinkUp:
    """A connection to a configured peer is authenticated (TLS: the certificate pinned for `peer`).

    `peer` is None on a clear link: then HELLO says who it is.  `dialed`: we opened it.
    """

    link: int
    peer: int | None
    dialed: bool
    nonce: bytes  # 32 random bytes for our HELLO


@dataclass(slots=True)
class LinkFrames:
    """Whole, checksum-verified frames that arrived in this turn, in order."""

    link: int
    frames: Sequence[Frame]


@dataclass(slots=True)
class LinkDown:
    """The connection ended (any reason); no frame of it will follow."""

    link: int
    reason: str


@dataclass(slots=True)
class DialFailed:
    """`actions.Dial` did not lead to a connection."""

    peer: int
    reason: str


@dataclass(slots=True)
class Command:
    """An operator asks (control socket).  Answered by `actions.CommandDone` with the same token."""

    token: int
    verb: str
    args: Mapping[str, Any] = field(default_factory=dict)


@dataclass(slots=True)
class Tick:
    """Time has passed (at `Resource.deadline` or later)."""


Event = (
    ClientRequest
    | ClientOpened
    | ClientClosed
    | DiskDone
    | DiskOpened
    | DiskOpenFailed
    | DiskClosed
    | LinkUp
    | LinkFrames
    | LinkDown
    | DialFailed
    | Command
    | Tick
)
