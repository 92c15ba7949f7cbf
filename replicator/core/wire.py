# SPDX-License-Identifier: Apache-2.0
"""What peers say: frames, the table of what is legal in one, and the decoder that trusts nothing.

The specification is docs/wire-format.md.  A frame is a header of 44 bytes and at most 1 MiB of payload; both
carry a CRC-32.  Validation happens once, here: a `Frame` that leaves the decoder satisfies the row of
`RULES` of its kind, so the chapters behind it need no second look at flags, alignment or lengths.  What only
they can know (does the volume exist, is the range inside it, is this kind expected now) stays with them.
The same row is an assertion in `encode`.

Invariants of the decoder:
- a header is checked against its CRC and its row before a byte of its payload is waited for or stored;
- it stores at most one unfinished frame; what follows AGREE is held, bounded, until `open_all`;
- frames do not depend on how the stream was cut; after a fault every call raises `ProtocolError`.

What is inside the payloads is the next chapter, `handshake_wire`.
"""

from __future__ import annotations

import struct
import zlib
from dataclasses import dataclass
from enum import IntEnum
from typing import Final, TypeAlias

from replicator.errors import ProtocolError

Buffer: TypeAlias = bytes | bytearray | memoryview

MAGIC: Final = 0x52504C4B  # "RPLK"
VERSION: Final = 1
HEADER: Final = struct.Struct("!IBBHHHIQQIII")
HEADER_SIZE: Final = 44
PAYLOAD_MAX: Final = 1 << 20
FRAME_MAX: Final = HEADER_SIZE + PAYLOAD_MAX
RANGE_MAX: Final = 32 << 20  # bytes one TRIM or ZERO may concern
BITMAP_RANGE_MAX: Final = (1 << 32) - 512  # bytes one BITMAP may cover: what the size field can say
OFFSET_END: Final = 1 << 63  # no range reaches beyond what a file offset can express
SECTOR: Final = 512
BLOCK: Final = 4096
CONTROL_MAX: Final = 65536  # payload of the frames that carry lists
HANDSHAKE_MAX: Final = 4096  # payload of HELLO, AGREE, GOODBYE, VOLUME_STATE
GOODBYE_MAX: Final = 1024
HELLO_MIN: Final = 66  # the fixed part, two empty strings, no options, no volumes

_COVERED = struct.Struct("!IBBHHHIQQII")  # the header without its own checksum
_CRC_AT = _COVERED.size
_CRC = struct.Struct("!I")

SEQUENCE_SIZE: Final = 8  # bytes of one sequence in a list
RANGE_SIZE: Final = 12  # bytes of one (offset, size) in a list
DISK_STATE_MIN: Final = 5  # disk state and count
SEQUENCES_MAX: Final = CONTROL_MAX // SEQUENCE_SIZE  # in one RECEIVED, WRITTEN or FAILED
RANGES_MAX: Final = CONTROL_MAX // RANGE_SIZE  # in one RESYNC_CONFIRM
DISK_STATE_RANGES_MAX: Final = (CONTROL_MAX - DISK_STATE_MIN) // RANGE_SIZE


class Kind(IntEnum):
    """What a frame says; the numbers are the wire's."""

    HELLO = 1  #: who I am; the first frame of each side
    AGREE = 2  #: digest over both HELLOs: we saw the same ones
    GOODBYE = 3  #: why the link closes after this frame
    PING = 4  #: are you there?
    PONG = 5  #: I am; repeats the ping's sequence
    ROLE = 6  #: I am now Primary or Secondary
    ROLE_REQUEST = 7  #: may I become Primary?
    ROLE_REPLY = 8  #: granted, or why not
    VOLUME_STATE = 10  #: the state of my copy, in a round
    BITMAP = 11  #: which blocks of a range you have not got
    BITMAP_END = 12  #: my bitmap is complete; blocks not sent are clean
    SYNC_READY = 13  #: target: I am durably Inconsistent under your current id
    SYNC_START = 14  #: source: pull
    DISK_STATE = 15  #: my disk changed; these ranges of it are not to be trusted
    DISK_STATE_ACK = 16  #: marked and durable
    NEW_GENERATION = 17  #: take this current generation id
    NEW_GENERATION_ACK = 18  #: durable
    CURRENT_GENERATION = 19  #: the copy you live on is at this generation now
    WRITE = 20  #: write this
    TRIM = 21  #: the range is not needed any more
    ZERO = 22  #: the range becomes zeroes
    RECEIVED = 24  #: these writes arrived
    WRITTEN = 25  #: these writes are on the disk (with FUA: stable)
    FAILED = 26  #: these writes are not
    BARRIER = 27  #: make everything before this stable
    BARRIER_ACK = 28  #: it is
    READ = 30  #: send me this range, I am diskless
    READ_DATA = 31  #: the content of the range
    READ_FAILED = 32  #: the range could not be read
    RESYNC_REQUEST = 40  #: target: send this range, or say it equals this digest
    RESYNC_DATA = 41  #: the content of the range
    RESYNC_ZERO = 42  #: the range is all zeroes at the source
    RESYNC_EQUAL = 43  #: the digest matched
    RESYNC_FAILED = 44  #: the source could not read the range
    RESYNC_CONFIRM = 45  #: these ranges are stable at the target
    RESYNC_DONE = 46  #: the target's copy is UpToDate, durably
    SYNC_PAUSE = 47  #: I want the resync paused, or not any more
    RELY_REQUEST = 48  #: may I let go of my copy and rely on yours?
    RELY_REPLY = 49  #: granted, or why not


class Flag:
    """Bits of the header's flags; plain ints, because `IntFlag` arithmetic costs a microsecond a frame."""

    FUA: Final = 1  #: the write is stable before it is acknowledged
    KEEP: Final = 2  #: ZERO must not punch a hole
    BUSY: Final = 4  #: the sender's application waits longer than its latency target: pull slower
    ASK: Final = 8  #: the sender opens this round
    GRACEFUL: Final = 16  #: the sender leaves in good order


@dataclass(frozen=True, slots=True, kw_only=True)
class Rule:
    """What is legal in a frame of one kind.

    The payload has `length_min` + n * `unit` bytes, at most `length_max`; with `length_is_size` exactly as
    many as the range.  `size_max` 0 means the kind concerns no range: offset and size are 0.
    """

    length_min: int = 0
    length_max: int = 0
    unit: int = 1
    length_is_size: bool = False
    size_max: int = 0
    offset_unit: int = SECTOR
    flags: int = 0
    sequence: bool = False  #: the sequence has a meaning; without one it is 0
    link_wide: bool = False  #: concerns the link: volume is 0
    handshake: bool = False  #: legal before both sides agreed


def _sequences() -> Rule:
    return Rule(length_min=SEQUENCE_SIZE, length_max=CONTROL_MAX, unit=SEQUENCE_SIZE)


def _data(*, flags: int = 0, offset_unit: int = SECTOR) -> Rule:
    return Rule(length_min=SECTOR, length_max=PAYLOAD_MAX, length_is_size=True, size_max=PAYLOAD_MAX,
                offset_unit=offset_unit, flags=flags, sequence=True)  # fmt: skip


def _resync(*, length: int = 0, flags: int = 0) -> Rule:
    return Rule(length_min=length, length_max=length, size_max=PAYLOAD_MAX, offset_unit=BLOCK, flags=flags,
                sequence=True)  # fmt: skip


_BARE = Rule()
_ANSWER = Rule(sequence=True)
_LINK_ANSWER = Rule(sequence=True, link_wide=True)

RULES: Final[dict[Kind, Rule]] = {
    Kind.HELLO: Rule(length_min=HELLO_MIN, length_max=HANDSHAKE_MAX, link_wide=True, handshake=True),
    Kind.AGREE: Rule(length_min=32, length_max=32, link_wide=True, handshake=True),
    Kind.GOODBYE: Rule(length_min=1, length_max=GOODBYE_MAX, flags=Flag.GRACEFUL, link_wide=True, handshake=True),
    Kind.PING: _LINK_ANSWER,
    Kind.PONG: _LINK_ANSWER,
    Kind.ROLE: Rule(length_min=1, length_max=1, link_wide=True),
    Kind.ROLE_REQUEST: _LINK_ANSWER,
    Kind.ROLE_REPLY: Rule(length_min=1, length_max=1, sequence=True, link_wide=True),
    Kind.VOLUME_STATE: Rule(length_min=43, length_max=HANDSHAKE_MAX, unit=8, flags=Flag.ASK, sequence=True),
    Kind.BITMAP: Rule(length_min=1, length_max=CONTROL_MAX, size_max=BITMAP_RANGE_MAX, offset_unit=BLOCK),
    Kind.BITMAP_END: _BARE,
    Kind.SYNC_READY: _BARE,
    Kind.SYNC_START: _BARE,
    Kind.DISK_STATE: Rule(length_min=DISK_STATE_MIN, length_max=CONTROL_MAX, unit=RANGE_SIZE, sequence=True),
    Kind.DISK_STATE_ACK: _ANSWER,
    Kind.NEW_GENERATION: Rule(length_min=9, length_max=9, sequence=True),
    Kind.NEW_GENERATION_ACK: _ANSWER,
    Kind.CURRENT_GENERATION: Rule(length_min=8, length_max=8),
    Kind.WRITE: _data(flags=Flag.FUA),
    Kind.TRIM: Rule(size_max=RANGE_MAX, flags=Flag.FUA, sequence=True),
    Kind.ZERO: Rule(size_max=RANGE_MAX, flags=Flag.FUA | Flag.KEEP, sequence=True),
    Kind.RECEIVED: _sequences(),
    Kind.WRITTEN: _sequences(),
    Kind.FAILED: _sequences(),
    Kind.BARRIER: _ANSWER,
    Kind.BARRIER_ACK: _ANSWER,
    Kind.READ: Rule(size_max=PAYLOAD_MAX, sequence=True),
    Kind.READ_DATA: _data(),
    Kind.READ_FAILED: Rule(length_min=4, length_max=4, sequence=True),
    Kind.RESYNC_REQUEST: Rule(length_max=16, unit=16, size_max=PAYLOAD_MAX, offset_unit=BLOCK, sequence=True),
    Kind.RESYNC_DATA: _data(flags=Flag.BUSY, offset_unit=BLOCK),
    Kind.RESYNC_ZERO: _resync(flags=Flag.BUSY),
    Kind.RESYNC_EQUAL: _resync(flags=Flag.BUSY),
    Kind.RESYNC_FAILED: _resync(length=4),
    Kind.RESYNC_CONFIRM: Rule(length_min=RANGE_SIZE, length_max=CONTROL_MAX, unit=RANGE_SIZE),
    Kind.RESYNC_DONE: _BARE,
    Kind.SYNC_PAUSE: Rule(length_min=1, length_max=1),
    Kind.RELY_REQUEST: _ANSWER,
    Kind.RELY_REPLY: Rule(length_min=1, length_max=1, sequence=True),
}
_ROWS: Final[dict[int, tuple[Kind, Rule]]] = {int(kind): (kind, rule) for kind, rule in RULES.items()}


@dataclass(slots=True)
class Frame:
    """One message.  `offset` and `size` are bytes of the volume; `payload` is not copied by `encode`."""

    kind: Kind
    volume: int = 0
    flags: int = 0
    sequence: int = 0
    offset: int = 0
    size: int = 0
    payload: Buffer = b""


def encode(frame: Frame) -> list[Buffer]:
    """The buffers to send, in order: the header and, if there is one, the payload object itself.

    The payload must not change until it is sent.  A frame its rule forbids is an AssertionError.
    """
    payload = frame.payload
    length = len(payload)
    rule = RULES[frame.kind]
    fault = _fault(rule, frame.volume, frame.flags, frame.size, frame.sequence, frame.offset, length)
    assert not fault, f"{frame.kind.name} {fault}"
    covered = _COVERED.pack(
        MAGIC, VERSION, frame.kind, frame.flags, frame.volume, 0, frame.size, frame.sequence, frame.offset,
        length, zlib.crc32(payload),
    )  # fmt: skip
    header = covered + _CRC.pack(zlib.crc32(covered))
    return [header, payload] if length else [header]


def _fault(rule: Rule, volume: int, flags: int, size: int, sequence: int, offset: int, length: int) -> str:
    """What is wrong with these fields, as the rest of a sentence about the frame; "" if nothing is."""
    if not rule.length_min <= length <= rule.length_max or (length - rule.length_min) % rule.unit:
        return f"has a payload of {length} bytes, {_lengths(rule)} allowed"
    if flags & ~rule.flags:
        return f"has flags {flags:#x}, only {rule.flags:#x} allowed"
    if rule.size_max:
        if not 0 < size <= rule.size_max or size % SECTOR or offset % rule.offset_unit:
            return (
                f"concerns {size} bytes at {offset}, allowed are up to {rule.size_max} bytes in multiples of "
                f"{SECTOR} at multiples of {rule.offset_unit}"
            )
        if offset + size > OFFSET_END:
            return f"concerns {size} bytes at {offset}, which is beyond 2**63"
        if rule.length_is_size and length != size:
            return f"has a payload of {length} bytes for a range of {size}"
    elif size or offset:
        return f"concerns {size} bytes at {offset}, but this kind concerns no range"
    if sequence and not rule.sequence:
        return f"has sequence {sequence}, but this kind has none"
    if volume and rule.link_wide:
        return f"is for volume {volume}, but this kind concerns the link"
    return ""


def _lengths(rule: Rule) -> str:
    if rule.length_min == rule.length_max:
        return str(rule.length_min)
    steps = f" in steps of {rule.unit}" if rule.unit > 1 else ""
    return f"{rule.length_min} to {rule.length_max}{steps}"


class FrameDecoder:
    """Bytes of one link in, whole frames out.

    A new decoder lets only HELLO, AGREE and GOODBYE pass.  The peer may send ROLE right behind its AGREE, so
    what follows AGREE is held, unparsed, until `open_all` says that the core agreed too.
    """

    __slots__ = ("_failed", "_held", "_need", "_partial", "handshake_only")

    def __init__(self, *, handshake_only: bool = True) -> None:
        self.handshake_only: bool = handshake_only  #: nothing but the handshake is parsed
        self._partial = bytearray()  # one unfinished frame
        self._need = HEADER_SIZE  # bytes `_partial` must have before it is worth looking at
        self._held: bytearray | None = None  # what followed AGREE
        self._failed: ProtocolError | None = None

    def feed(self, data: Buffer) -> list[Frame]:
        """The frames that `data` completes, in order; payloads are copies, so `data` may be reused.

        Raises ProtocolError at the first fault, now and ever after; frames before it in the same call are
        lost with the link, as they would be if the link had broken a moment earlier.
        """
        if self._failed is not None:
            raise ProtocolError(self._failed.message)
        frames: list[Frame] = []
        try:
            with memoryview(data) as view:
                self._take(view, frames)
        except ProtocolError as error:
            self._failed = error
            self._partial = bytearray()
            self._held = None
            raise
        return frames

    def open_all(self) -> list[Frame]:
        """Both sides agreed: let every kind pass.  Returns what was held behind AGREE; raises as `feed`."""
        self.handshake_only = False
        held, self._held = self._held, None
        return self.feed(held or b"")

    @property
    def buffered_bytes(self) -> int:
        """Bytes stored: at most `FRAME_MAX`."""
        return len(self._partial) + len(self._held or b"")

    def _take(self, view: memoryview, frames: list[Frame]) -> None:
        at = 0
        partial = self._partial
        while partial and at < len(view):  # twice at most: the rest of the header, the rest of the payload
            end = at + self._need - len(partial)
            partial += view[at:end]
            at = min(end, len(view))
            if len(partial) >= self._need:
                with memoryview(partial) as whole:
                    done = self._parse(whole, 0, frames)
                if done:
                    partial.clear()
        if not partial and self._held is None:
            at = self._parse(view, at, frames)
            if self._held is None:
                partial += view[at:]
                return
        if self._held is not None:
            self._hold(view[at:])

    def _hold(self, rest: memoryview) -> None:
        held = self._held
        assert held is not None
        if len(held) + len(rest) > FRAME_MAX:
            raise ProtocolError(f"the peer sent more than {FRAME_MAX} bytes behind AGREE before ours")
        held += rest

    def _parse(self, view: memoryview, at: int, frames: list[Frame]) -> int:
        """Append the whole frames of `view` from `at` on; returns where the first unfinished one begins."""
        end = len(view)
        unpack, crc32, append = HEADER.unpack_from, zlib.crc32, frames.append
        while end - at >= HEADER_SIZE:
            (magic, version, number, flags, volume, reserved, size, sequence, offset, length, payload_crc,
             header_crc) = unpack(view, at)  # fmt: skip
            damaged = crc32(view[at : at + _CRC_AT]) != header_crc
            if magic != MAGIC or version != VERSION or damaged or reserved:
                raise ProtocolError(_bad_header(magic, version, reserved))
            row = _ROWS.get(number)
            if row is None:
                raise ProtocolError(f"the peer sent a frame of unknown kind {number}")
            kind, rule = row
            if self.handshake_only and not rule.handshake:
                raise ProtocolError(f"the peer sent {kind.name} before the handshake was complete")
            fault = _fault(rule, volume, flags, size, sequence, offset, length)
            if fault:
                raise ProtocolError(f"the peer sent a frame {kind.name} that {fault}")
            body = at + HEADER_SIZE
            if end - body < length:
                self._need = HEADER_SIZE + length
                return at
            at = body + length
            payload = bytes(view[body:at]) if length else b""
            if crc32(payload) != payload_crc:
                raise ProtocolError(f"a payload of {length} bytes of {kind.name} fails its checksum")
            append(Frame(kind, volume, flags, sequence, offset, size, payload))
            if kind is Kind.AGREE and self.handshake_only:
                self._held = bytearray()
                break
        self._need = HEADER_SIZE
        return at


def _bad_header(magic: int, version: int, reserved: int) -> str:
    if magic != MAGIC:
        return f"the peer does not speak this protocol: a frame begins with {magic:08x}, not {MAGIC:08x}"
    if version != VERSION:
        return f"the peer sent a frame of version {version}, this side speaks {VERSION}"
    if reserved:
        return f"a frame has {reserved:#x} in its reserved field, or its header is damaged"
    return "the header of a frame fails its checksum"
