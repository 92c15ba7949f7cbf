# SPDX-License-Identifier: Apache-2.0
"""The superblock: what must survive a crash besides the bits themselves.

Two copies, written in turn; each names its sequence, the newest valid one counts.  Reading is stricter than
"newest valid": when a copy that may have been newer is *lost* (not merely interrupted), the older one is
refused, because it may lack a generation id or claim to be Consistent when it is not any more.

A `Superblock` is a value.  A change is `dataclasses.replace`, `encode`, one durable write.  Values that no
node could have written are refused on the way in (FormatError) and are a broken invariant on the way out.
Format: docs/disk-format.md.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

from replicator.core import activity, sealed
from replicator.core.geometry import (
    ACTIVITY_OFFSET,
    BLOCK_SHIFT,
    EXTENT_SHIFT,
    FIXED_BYTES,
    PAGE,
    SECTOR,
    SLOTS_MAX,
    SUPERBLOCK_OFFSETS,
    slot_bytes_for,
)
from replicator.errors import FormatError

MAGIC = b"RPLSUPER"
FORMAT_VERSION = 1
HISTORY_MAX = 32
NO_NODE = 255  #: node id of a free peer slot
UNKNOWN_RESOURCE = bytes(16)  #: resource id before a peer or create-md has given one

_FIXED = struct.Struct(">HBB16sHBBLLQQQQqQqQB7s")
_HISTORY = struct.Struct(f">{HISTORY_MAX}Q")
_PEER = struct.Struct(">BB6sQ")
_ID_MAX = (1 << 64) - 1

_FLAGS = {"consistent": 1, "was_up_to_date": 2, "primary_indicator": 4, "crashed_primary": 8}
_PEER_FLAGS = {"full_sync": 1, "outdated": 2, "survivor": 4}

_RECREATE = "recreate it with `replicator create-md --force`, then let the peer make a full sync"


@dataclass(frozen=True, slots=True, kw_only=True)
class PeerSlot:
    """What is remembered of one peer; its place in `Superblock.peers` is the number of its bitmap slot."""

    node_id: int = NO_NODE
    bitmap_id: int = 0  #: the generation at which this peer stopped getting our writes; 0 = no fork point
    full_sync: bool = False  #: every bit counts as set until the whole bitmap has been written once
    outdated: bool = False
    #: When this peer was lost as Primary, we held, stable, all that it had acknowledged.
    survivor: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Area:
    """A reserved metadata area; offset (may be negative) relative to the fixed part.  Empty in version 1."""

    offset: int = 0
    size: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Superblock:
    """One volume on one node; sizes in bytes, ids 64 bit (0 = none)."""

    resource_id: bytes
    volume: int
    node_id: int
    size_bytes: int  #: agreed size of the volume; 0 = not agreed yet
    device_bytes: int  #: size of the data device at the last attach, internal metadata taken off
    slot_bytes: int  #: size of one bitmap slot: fixes where the slots are
    current: int
    peers: tuple[PeerSlot, ...]
    history: tuple[int, ...] = ()  #: newest first
    consistent: bool = False
    was_up_to_date: bool = False
    primary_indicator: bool = False
    crashed_primary: bool = False
    al_extents: int = activity.ACTIVITY_DEFAULT
    format_version: int = FORMAT_VERSION
    block_shift: int = BLOCK_SHIFT
    extent_shift: int = EXTENT_SHIFT
    checksum_area: Area = Area()
    undo_area: Area = Area()

    @property
    def slot_count(self) -> int:
        """How many peers this volume can remember."""
        return len(self.peers)

    @property
    def outdated(self) -> bool:
        """Whether the copy is one moment's data, but known to be old (not a stored flag: it follows)."""
        return self.consistent and not self.was_up_to_date

    def slot_of(self, node_id: int) -> int | None:
        """Return the slot of a peer, or None when it has none."""
        return next((slot for slot, peer in enumerate(self.peers) if peer.node_id == node_id), None)

    def pack(self) -> bytes:
        """Return the body of the sealed block.  Impossible values are a broken invariant."""
        faults = _faults(self)
        assert not faults, "; ".join(faults)
        fixed = _FIXED.pack(
            self.format_version,
            self.block_shift,
            self.extent_shift,
            self.resource_id,
            self.volume,
            self.node_id,
            len(self.peers),
            sum(bit for name, bit in _FLAGS.items() if getattr(self, name)),
            self.al_extents,
            self.size_bytes,
            self.device_bytes,
            self.slot_bytes,
            self.current,
            self.checksum_area.offset,
            self.checksum_area.size,
            self.undo_area.offset,
            self.undo_area.size,
            len(self.history),
            bytes(7),
        )
        history = _HISTORY.pack(*self.history, *(0,) * (HISTORY_MAX - len(self.history)))
        return b"".join((fixed, history, *(_pack_peer(peer) for peer in self.peers)))


@dataclass(frozen=True, slots=True)
class Chosen:
    """The superblock that counts, and the sequence to count on from: the next write uses `sequence` + 1.

    After an interrupted write `sequence` is higher than that of the copy that was read.
    """

    superblock: Superblock
    sequence: int
    notes: tuple[str, ...]

    @property
    def next_sequence(self) -> int:
        """The sequence of the next write."""
        return self.sequence + 1


def unpack(body: bytes) -> Superblock:
    """Return the superblock that a body describes.

    Raises FormatError for an unknown version, unknown flags, impossible values, or bytes too few or many.
    """
    if len(body) < 2:
        raise FormatError(f"a superblock of {len(body)} bytes is too short")
    version = int.from_bytes(body[:2], "big")
    if version != FORMAT_VERSION:
        raise FormatError(
            f"the metadata has format version {version}, this program knows version {FORMAT_VERSION}",
            hint="use the program version that wrote it, or recreate the metadata",
        )
    history_at = _FIXED.size
    peers_at = history_at + _HISTORY.size
    if len(body) < peers_at:
        raise FormatError(f"a superblock of {len(body)} bytes is too short")
    values = _FIXED.unpack_from(body)
    flags, slots, ids_count = values[7], values[6], values[17]
    ids = _HISTORY.unpack_from(body, history_at)
    faults = []
    if len(body) != peers_at + slots * _PEER.size:
        faults.append(f"{len(body)} bytes do not hold {slots} peers")
    if flags & ~sum(_FLAGS.values()):
        faults.append(f"unknown flags {flags:#x}")
    if ids_count > HISTORY_MAX or any(ids[ids_count:]) or any(values[18]):
        faults.append("bytes that must be zero are not")
    if faults:
        raise FormatError(f"the superblock is impossible: {'; '.join(faults)}", hint=_RECREATE)
    peers = tuple(_unpack_peer(body, peers_at + slot * _PEER.size) for slot in range(slots))
    superblock = Superblock(
        format_version=version,
        block_shift=values[1],
        extent_shift=values[2],
        resource_id=values[3],
        volume=values[4],
        node_id=values[5],
        al_extents=values[8],
        size_bytes=values[9],
        device_bytes=values[10],
        slot_bytes=values[11],
        current=values[12],
        checksum_area=Area(offset=values[13], size=values[14]),
        undo_area=Area(offset=values[15], size=values[16]),
        history=ids[:ids_count],
        peers=peers,
        **{name: bool(flags & bit) for name, bit in _FLAGS.items()},
    )
    faults = _faults(superblock)
    if faults:
        raise FormatError(f"the superblock is impossible: {'; '.join(faults)}", hint=_RECREATE)
    return superblock


def encode(superblock: Superblock, sequence: int) -> bytes:
    """Return the 4096 bytes of the copy with that sequence; write them at `copy_offset(sequence)`."""
    return sealed.seal(MAGIC, sequence, superblock.pack())


def copy_offset(sequence: int) -> int:
    """Return where the copy with that sequence lies, relative to the fixed part."""
    return SUPERBLOCK_OFFSETS[sequence % 2]


def choose(copy0: bytes, copy1: bytes) -> Chosen:
    """Return the superblock that counts.

    Raises FormatError when there is none, when it belongs to something else, or when a copy that may have
    been newer is lost; the hint says what to do.
    """
    result = sealed.newest(MAGIC, (copy0, copy1))
    said = ", ".join(f"copy {n} is {_describe(verdict)}" for n, verdict in enumerate(result.verdicts))
    best = result.sealed
    if best is None:
        if all(isinstance(verdict, sealed.Blank) for verdict in result.verdicts):
            raise FormatError("there is no metadata", hint="run `replicator create-md`")
        if any(isinstance(verdict, sealed.Foreign) for verdict in result.verdicts):
            raise FormatError(
                f"the metadata area holds something else: {said}",
                hint="check the configured device; if it is right, run `replicator create-md --force`",
            )
        raise FormatError(f"no superblock can be used: {said}", hint=_RECREATE)
    if result.damaged_newer:
        raise FormatError(
            f"a superblock newer than sequence {best.sequence} may be lost: {said}",
            hint=f"the older one may forget a generation or that the data is Inconsistent; {_RECREATE}",
        )
    notes = [
        f"superblock copy {n} is {_describe(verdict)}, the other one (sequence {best.sequence}) is used"
        for n, verdict in enumerate(result.verdicts)
        if n != result.index and not isinstance(verdict, sealed.Sealed)
    ]
    return Chosen(unpack(best.body), result.next_sequence - 1, tuple(notes))


def fresh_fixed_part(superblock: Superblock) -> bytes:
    """Return the 64 KiB fixed part as create-md writes it: both copies (sequences 1, 2), an empty log."""
    ring, _ = activity.fresh_ring(0)
    copies = encode(superblock, 2) + encode(superblock, 1)
    assert ACTIVITY_OFFSET == 2 * PAGE
    return (copies + ring).ljust(FIXED_BYTES, b"\0")


def _pack_peer(peer: PeerSlot) -> bytes:
    flags = sum(bit for name, bit in _PEER_FLAGS.items() if getattr(peer, name))
    return _PEER.pack(peer.node_id, flags, bytes(6), peer.bitmap_id)


def _unpack_peer(body: bytes, at: int) -> PeerSlot:
    node_id, flags, reserved, bitmap_id = _PEER.unpack_from(body, at)
    if flags & ~sum(_PEER_FLAGS.values()) or any(reserved):
        raise FormatError(f"the superblock is impossible: unknown flags {flags:#x} of peer {node_id}", hint=_RECREATE)
    return PeerSlot(
        node_id=node_id,
        bitmap_id=bitmap_id,
        **{name: bool(flags & bit) for name, bit in _PEER_FLAGS.items()},
    )


def _faults(sb: Superblock) -> list[str]:
    """Return what no node could have written; empty for a possible superblock."""
    nodes = [peer.node_id for peer in sb.peers if peer.node_id != NO_NODE]
    free = PeerSlot()
    reserved = (sb.checksum_area, sb.undo_area)
    checks = (
        (sb.format_version == FORMAT_VERSION, f"format version {sb.format_version}"),
        (sb.block_shift == BLOCK_SHIFT, f"block shift {sb.block_shift}"),
        (sb.extent_shift == EXTENT_SHIFT, f"extent shift {sb.extent_shift}"),
        (len(sb.resource_id) == 16, f"resource id of {len(sb.resource_id)} bytes"),
        (0 <= sb.volume < 1 << 16, f"volume {sb.volume}"),
        (0 <= sb.node_id < NO_NODE, f"node id {sb.node_id}"),
        (1 <= len(sb.peers) <= SLOTS_MAX, f"{len(sb.peers)} peers"),
        (len(set(nodes)) == len(nodes) and sb.node_id not in nodes, f"peers {nodes} of node {sb.node_id}"),
        (all(0 <= node < NO_NODE for node in nodes), f"peers {nodes}"),
        (all(peer.node_id != NO_NODE or peer == free for peer in sb.peers), "a free slot in use"),
        (all(0 <= peer.bitmap_id <= _ID_MAX for peer in sb.peers), "a bitmap id out of range"),
        (0 < sb.current <= _ID_MAX, f"current id {sb.current}"),
        (len(sb.history) <= HISTORY_MAX, f"{len(sb.history)} history ids"),
        (all(0 < old <= _ID_MAX for old in sb.history), "a history id out of range"),
        (activity.ACTIVITY_MIN <= sb.al_extents <= activity.ACTIVITY_MAX, f"al_extents {sb.al_extents}"),
        (0 <= sb.size_bytes <= sb.device_bytes < 1 << 63, f"size {sb.size_bytes} on {sb.device_bytes} bytes"),
        (sb.size_bytes % SECTOR == 0 and sb.device_bytes % SECTOR == 0, "a size that is not whole sectors"),
        (sb.slot_bytes % PAGE == 0 and 0 < sb.slot_bytes < 1 << 63, f"bitmap slots of {sb.slot_bytes} bytes"),
        (sb.slot_bytes >= slot_bytes_for(sb.size_bytes), f"slots of {sb.slot_bytes} for {sb.size_bytes}"),
        (all(area == Area() for area in reserved), "an area that version 1 does not know"),
    )
    return [fault for right, fault in checks if not right]


def _describe(verdict: sealed.Verdict) -> str:
    match verdict:
        case sealed.Sealed(sequence=sequence):
            return f"valid (sequence {sequence})"
        case sealed.Blank():
            return "blank"
        case sealed.Torn():
            return "torn (an interrupted write)"
        case sealed.Damaged():
            return "damaged"
        case _:
            return "not ours"
