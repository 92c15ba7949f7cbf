# SPDX-License-Identifier: Apache-2.0
"""What is inside the payloads: HELLO, VOLUME_STATE and the small control payloads.

The specification is docs/wire-format.md.  `pack*` asserts (a value out of bounds is our own bug) and never
makes a payload that `unpack*` refuses; `unpack*` returns a value whose every field is in bounds, or raises
`ProtocolError`.  Nothing may follow the last field, and there is exactly one encoding of each value.

Strings a peer sends end up in logs and on terminals, so only printable characters pass.  Whether the values
make sense here (our resource, our node id, a known volume) is for the state machine to say.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Final

from replicator.core.wire import (
    BLOCK,
    DISK_STATE_MIN,
    DISK_STATE_RANGES_MAX,
    GOODBYE_MAX,
    HANDSHAKE_MAX,
    OFFSET_END,
    RANGE_SIZE,
    RANGES_MAX,
    SECTOR,
    SEQUENCE_SIZE,
    SEQUENCES_MAX,
    Buffer,
)
from replicator.errors import ProtocolError

FEATURE_DIGESTS: Final = 1  # RESYNC_REQUEST may carry a digest
FEATURE_TWO_PRIMARIES: Final = 2
STRING_MAX: Final = 64  # bytes of UTF-8 in one string of HELLO
HISTORY_MAX: Final = 32  # generation ids in one VOLUME_STATE
DISK_STATE_LAST: Final = 9  # UpToDate, the highest disk state number
GENERATION_MIN: Final = 8  # lower ids have a meaning of their own (none, just created)

_HELLO = struct.Struct("!HHQ16s32sBB")
_VOLUME_STATE = struct.Struct("!BBQQQQQB")
_RANGE = struct.Struct("!QI")
_DISK_STATE = struct.Struct("!BI")
_GENERATION = struct.Struct("!QB")
_ID = struct.Struct("!Q")
_ERRNO = struct.Struct("!I")
# bit 0 first
_STATE_FLAGS: Final = ("crashed_primary", "survived", "full_sync", "primary", "discard", "paused")


class _Reader:
    """Takes a payload apart from the front; running out of bytes is the peer's fault."""

    def __init__(self, payload: Buffer, what: str) -> None:
        self._rest = bytes(payload)
        self._what = what

    def fail(self, message: str) -> ProtocolError:
        return ProtocolError(f"the peer sent a {self._what} {message}")

    def take(self, count: int) -> bytes:
        if len(self._rest) < count:
            raise self.fail(f"that ends {count - len(self._rest)} bytes early")
        taken, self._rest = self._rest[:count], self._rest[count:]
        return taken

    def number(self, size: int) -> int:
        return int.from_bytes(self.take(size), "big")

    def choice(self, last: int) -> int:
        """One byte, 0 to `last`."""
        value = self.number(1)
        if value > last:
            raise self.fail(f"with the value {value}, the highest is {last}")
        return value

    def string(self) -> str:
        size = self.number(1)
        if size > STRING_MAX:
            raise self.fail(f"with a string of {size} bytes, at most {STRING_MAX} are allowed")
        return self.text(size)

    def text(self, size: int) -> str:
        raw = self.take(size)
        try:
            text = raw.decode("utf-8")
        except UnicodeDecodeError:
            raise self.fail(f"with text that is not UTF-8: {raw!r}") from None
        if not text.isprintable():
            raise self.fail(f"with unprintable text: {text!r}")
        return text

    def rest(self) -> int:
        return len(self._rest)

    def end(self) -> None:
        if self._rest:
            raise self.fail(f"with {len(self._rest)} bytes behind its end")


@dataclass(frozen=True, slots=True, kw_only=True)
class Hello:
    """Who the sender is, whom it expects, and the settings that must be equal on both sides.

    An all-zero `resource_id` means that no metadata of the sender knows one yet.
    """

    version_min: int
    version_max: int
    features: int  #: `FEATURE_…` bits; unknown ones are kept, the result is what both have
    resource_id: bytes
    nonce: bytes
    node_id: int
    peer_node_id: int
    resource: str
    node: str
    options: tuple[tuple[str, str], ...]
    volumes: tuple[int, ...]

    def pack(self) -> bytes:
        """The payload; the caller bounds names, options and volumes (`HANDSHAKE_MAX` bytes in all)."""
        assert self.version_min <= self.version_max, (self.version_min, self.version_max)
        assert len(self.resource_id) == 16 and len(self.nonce) == 32
        assert len(dict(self.options)) == len(self.options) <= 255, "an option appears twice, or too many"
        assert len(set(self.volumes)) == len(self.volumes) <= 255, "a volume appears twice, or too many"
        parts = [
            _HELLO.pack(
                self.version_min, self.version_max, self.features, self.resource_id, self.nonce,
                self.node_id, self.peer_node_id,
            ),
            _pack_string(self.resource),
            _pack_string(self.node),
            bytes([len(self.options)]),
            *(_pack_string(text) for option in self.options for text in option),
            struct.pack(f"!B{len(self.volumes)}H", len(self.volumes), *self.volumes),
        ]  # fmt: skip
        payload = b"".join(parts)
        assert len(payload) <= HANDSHAKE_MAX, f"HELLO of {len(payload)} bytes"
        return payload

    @classmethod
    def unpack(cls, payload: Buffer) -> Hello:
        """The value of a payload; raises ProtocolError if it is malformed."""
        reader = _Reader(payload, "HELLO")
        if len(payload) > HANDSHAKE_MAX:
            raise reader.fail(f"of {len(payload)} bytes, at most {HANDSHAKE_MAX} are allowed")
        version_min, version_max, features, resource_id, nonce, node_id, peer_node_id = _HELLO.unpack(
            reader.take(_HELLO.size)
        )
        if version_min > version_max:
            raise reader.fail(f"whose lowest version {version_min} is above its highest {version_max}")
        resource = reader.string()
        node = reader.string()
        options = tuple((reader.string(), reader.string()) for _ in range(reader.number(1)))
        if len(dict(options)) != len(options):
            raise reader.fail("that names an option twice")
        volumes = tuple(reader.number(2) for _ in range(reader.number(1)))
        if len(set(volumes)) != len(volumes):
            raise reader.fail("that names a volume twice")
        reader.end()
        return cls(
            version_min=version_min, version_max=version_max, features=features, resource_id=resource_id,
            nonce=nonce, node_id=node_id, peer_node_id=peer_node_id, resource=resource, node=node,
            options=options, volumes=volumes,
        )  # fmt: skip


def _pack_string(text: str) -> bytes:
    raw = text.encode("utf-8")
    assert len(raw) <= STRING_MAX and text.isprintable(), repr(text)
    return bytes([len(raw)]) + raw


def agree_hash(dialer_hello: bytes, acceptor_hello: bytes) -> bytes:
    """The payload of AGREE: equal on both sides only if each saw what the other sent (32 bytes)."""
    return hashlib.sha256(dialer_hello + acceptor_hello).digest()


@dataclass(frozen=True, slots=True, kw_only=True)
class VolumeState:
    """The state of the sender's copy of one volume, as the sync decision needs it."""

    disk: int  #: 0 Diskless … 9 UpToDate
    crashed_primary: bool = False
    survived: bool = False  #: this process was connected to the receiver before
    full_sync: bool = False
    primary: bool = False  #: Primary now
    discard: bool = False  #: discard my data
    paused: bool = False  #: the resync is paused here
    size_bytes: int = 0  #: 0 when diskless
    current: int = 0  #: generation id
    bitmap_id: int = 0  #: towards the receiver; 0 is none
    dirty_count: int = 0  #: dirty blocks towards the receiver
    exposed: int = 0  #: the generation our clients have seen, if it is not this copy's; 0 is none
    history: tuple[int, ...] = ()  #: generation ids, newest first

    def pack(self) -> bytes:
        """The payload; AssertionError if a field is out of bounds."""
        assert 0 <= self.disk <= DISK_STATE_LAST and len(self.history) <= HISTORY_MAX, self
        assert not _bad_size(self.disk, self.size_bytes), self
        bits = sum(1 << bit for bit, name in enumerate(_STATE_FLAGS) if getattr(self, name))
        head = _VOLUME_STATE.pack(
            self.disk, bits, self.size_bytes, self.current, self.bitmap_id, self.dirty_count,
            self.exposed, len(self.history),
        )  # fmt: skip
        return head + struct.pack(f"!{len(self.history)}Q", *self.history)

    @classmethod
    def unpack(cls, payload: Buffer) -> VolumeState:
        """The value of a payload; raises ProtocolError if it is malformed."""
        reader = _Reader(payload, "VOLUME_STATE")
        disk, bits = reader.choice(DISK_STATE_LAST), reader.number(1)
        if bits >> len(_STATE_FLAGS):
            raise reader.fail(f"with unknown bits {bits:#x}")
        size_bytes, current, bitmap_id, dirty_count, exposed = (reader.number(8) for _ in range(5))
        if _bad_size(disk, size_bytes):
            raise reader.fail(f"with disk state {disk} and a size of {size_bytes} bytes")
        history_count = reader.choice(HISTORY_MAX)
        history = tuple(reader.number(8) for _ in range(history_count))
        reader.end()
        crashed_primary, survived, full_sync, primary, discard, paused = (
            bool(bits >> bit & 1) for bit in range(len(_STATE_FLAGS))
        )
        return cls(
            disk=disk, crashed_primary=crashed_primary, survived=survived, full_sync=full_sync,
            primary=primary, discard=discard, paused=paused, size_bytes=size_bytes, current=current,
            bitmap_id=bitmap_id, dirty_count=dirty_count, exposed=exposed, history=history,
        )  # fmt: skip


def _bad_size(disk: int, size_bytes: int) -> bool:
    return size_bytes % SECTOR != 0 or size_bytes > OFFSET_END or (disk == 0) != (size_bytes == 0)


class RoleAnswer(IntEnum):
    """Payload of ROLE_REPLY."""

    GRANTED = 0
    I_AM_PRIMARY = 1
    I_AM_ASKING = 2  #: and my node id is lower
    ROUND_GOING_ON = 3


class RelyAnswer(IntEnum):
    """Payload of RELY_REPLY."""

    GRANTED = 0
    NOT_GOOD = 1  #: my copy is not good, or I am letting go of it
    NOT_NOW = 2  #: something is going on that decides who has good data


def pack_goodbye(reason: int, text: str) -> bytes:
    """GOODBYE: a reason (one byte) and a sentence; made printable, and cut to fit."""
    clean = "".join(char if char.isprintable() else "?" for char in text)
    cut = clean.encode("utf-8")[: GOODBYE_MAX - 1].decode("utf-8", "ignore")
    return bytes([reason]) + cut.encode("utf-8")


def unpack_goodbye(payload: Buffer) -> tuple[int, str]:
    """The reason and the sentence of a GOODBYE."""
    reader = _Reader(payload, "GOODBYE")
    if len(payload) > GOODBYE_MAX:
        raise reader.fail(f"of {len(payload)} bytes, at most {GOODBYE_MAX} are allowed")
    reason = reader.number(1)
    return reason, reader.text(reader.rest())


def pack_role(primary: bool) -> bytes:
    """ROLE: Primary or Secondary."""
    return bytes([primary])


def unpack_role(payload: Buffer) -> bool:
    """Whether the peer says it is Primary."""
    return bool(_only_choice(payload, "ROLE", 1))


def pack_role_reply(answer: RoleAnswer) -> bytes:
    """ROLE_REPLY: granted, or why not."""
    return bytes([answer])


def unpack_role_reply(payload: Buffer) -> RoleAnswer:
    """The peer's answer to ROLE_REQUEST."""
    return RoleAnswer(_only_choice(payload, "ROLE_REPLY", max(RoleAnswer)))


def pack_rely_reply(answer: RelyAnswer) -> bytes:
    """RELY_REPLY: granted, or why not."""
    return bytes([answer])


def unpack_rely_reply(payload: Buffer) -> RelyAnswer:
    """The peer's answer to RELY_REQUEST."""
    return RelyAnswer(_only_choice(payload, "RELY_REPLY", max(RelyAnswer)))


def pack_sync_pause(paused: bool) -> bytes:
    """SYNC_PAUSE: whether the sender wants the resync paused."""
    return bytes([paused])


def unpack_sync_pause(payload: Buffer) -> bool:
    """Whether the peer wants the resync paused."""
    return bool(_only_choice(payload, "SYNC_PAUSE", 1))


def _only_choice(payload: Buffer, what: str, last: int) -> int:
    reader = _Reader(payload, what)
    value = reader.choice(last)
    reader.end()
    return value


def pack_generation(generation: int, *, clear_bitmap: bool) -> bytes:
    """NEW_GENERATION: the id, and whether the bitmap is cleared with it."""
    return _GENERATION.pack(generation, clear_bitmap)


def unpack_generation(payload: Buffer) -> tuple[int, bool]:
    """The generation id and whether the bitmap is to be cleared."""
    reader = _Reader(payload, "NEW_GENERATION")
    generation, clear_bitmap = reader.number(8), bool(reader.choice(1))
    reader.end()
    return generation, clear_bitmap


def pack_current_generation(generation: int) -> bytes:
    """CURRENT_GENERATION: the id."""
    return _ID.pack(generation)


def unpack_current_generation(payload: Buffer) -> int:
    """The generation of the copy that a diskless node lives on; never one that names no data."""
    reader = _Reader(payload, "CURRENT_GENERATION")
    generation = reader.number(8)
    reader.end()
    if generation < GENERATION_MIN:
        raise reader.fail(f"with the id {generation}")
    return generation


def pack_errno(errno: int) -> bytes:
    """READ_FAILED and RESYNC_FAILED: why; never 0."""
    assert errno > 0, errno
    return _ERRNO.pack(errno)


def unpack_errno(payload: Buffer) -> int:
    """The errno of READ_FAILED or RESYNC_FAILED; 0 is refused, it would read as success."""
    reader = _Reader(payload, "failure")
    errno = reader.number(4)
    reader.end()
    if not errno:
        raise reader.fail("with errno 0")
    return errno


def pack_sequences(sequences: Sequence[int]) -> bytes:
    """RECEIVED, WRITTEN, FAILED: 1 to `SEQUENCES_MAX` sequences; the caller cuts longer lists."""
    assert 0 < len(sequences) <= SEQUENCES_MAX, len(sequences)
    return struct.pack(f"!{len(sequences)}Q", *sequences)


def unpack_sequences(payload: Buffer) -> list[int]:
    """The sequences of RECEIVED, WRITTEN or FAILED, in the order sent."""
    count, odd = divmod(len(payload), SEQUENCE_SIZE)
    if odd or not 0 < count <= SEQUENCES_MAX:
        raise ProtocolError(f"the peer sent a list of sequences of {len(payload)} bytes")
    return list(struct.unpack(f"!{count}Q", payload))


def pack_ranges(ranges: Sequence[tuple[int, int]]) -> bytes:
    """RESYNC_CONFIRM: 1 to `RANGES_MAX` (offset, size); the caller cuts longer lists."""
    assert 0 < len(ranges) <= RANGES_MAX, len(ranges)
    return _pack_ranges(ranges, BLOCK)


def unpack_ranges(payload: Buffer) -> list[tuple[int, int]]:
    """The ranges of RESYNC_CONFIRM; each begins at a block and ends at a sector (the tail of the volume)."""
    count, odd = divmod(len(payload), RANGE_SIZE)
    if odd or not 0 < count <= RANGES_MAX:
        raise ProtocolError(f"the peer sent a RESYNC_CONFIRM of {len(payload)} bytes")
    return _unpack_ranges(bytes(payload), BLOCK, "RESYNC_CONFIRM")


def pack_disk_state(disk: int, ranges: Sequence[tuple[int, int]] = ()) -> bytes:
    """DISK_STATE: the new state, and at most `DISK_STATE_RANGES_MAX` ranges not to be trusted."""
    assert 0 <= disk <= DISK_STATE_LAST and len(ranges) <= DISK_STATE_RANGES_MAX, (disk, len(ranges))
    return _DISK_STATE.pack(disk, len(ranges)) + _pack_ranges(ranges, SECTOR)


def unpack_disk_state(payload: Buffer) -> tuple[int, list[tuple[int, int]]]:
    """The peer's disk state and the ranges of its disk that are not to be trusted."""
    reader = _Reader(payload, "DISK_STATE")
    disk, count = reader.choice(DISK_STATE_LAST), reader.number(4)
    if count > DISK_STATE_RANGES_MAX or len(payload) != DISK_STATE_MIN + count * RANGE_SIZE:
        raise reader.fail(f"of {len(payload)} bytes that announces {count} ranges")
    return disk, _unpack_ranges(reader.take(count * RANGE_SIZE), SECTOR, "DISK_STATE")


def _pack_ranges(ranges: Sequence[tuple[int, int]], offset_unit: int) -> bytes:
    for offset, size in ranges:
        assert not _bad_range(offset, size, offset_unit), (offset, size)
    return b"".join([_RANGE.pack(offset, size) for offset, size in ranges])


def _unpack_ranges(raw: bytes, offset_unit: int, what: str) -> list[tuple[int, int]]:
    ranges: list[tuple[int, int]] = list(_RANGE.iter_unpack(raw))
    for offset, size in ranges:
        if _bad_range(offset, size, offset_unit):
            raise ProtocolError(f"the peer sent a {what} with a range of {size} bytes at {offset}")
    return ranges


def _bad_range(offset: int, size: int, offset_unit: int) -> bool:
    return size <= 0 or bool(size % SECTOR or offset % offset_unit) or offset + size > OFFSET_END
