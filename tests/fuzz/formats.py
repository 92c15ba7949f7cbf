# SPDX-License-Identifier: Apache-2.0
"""What a peer sends and what lies on a disk: parsed, or refused with the one error, and never half of each.

Each function takes any bytes and holds its invariants by itself; `targets` has the table.  A round trip is checked
wherever there is one encoding of a value; one flipped bit may make bytes unreadable, but never readable as something
else where a checksum covers them.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from typing import Any, Final

from replicator.core import activity, sealed, superblock
from replicator.core import handshake_wire as hw
from replicator.core.bitmap import Bitmap
from replicator.core.geometry import (
    ACTIVITY_BLOCKS,
    PAGE,
    PAGE_BITS_BYTES,
    PAGE_BLOCKS,
    SECTOR,
)
from replicator.core.handshake_wire import Hello, VolumeState
from replicator.core.wire import FRAME_MAX, Frame, FrameDecoder, Kind, encode
from replicator.errors import FormatError, ProtocolError
from tests.fuzz import repair
from tests.fuzz.dice import Dice

# ----------------------------------------------------------------------------------------------------- frames


def joined(*frames: Frame) -> bytes:
    """What goes over the wire."""
    return b"".join(bytes(part) for frame in frames for part in encode(frame))


def flipped(data: bytes) -> bytes:
    """The same bytes with one bit changed; which one depends on the bytes."""
    bit = zlib.crc32(data) % (len(data) * 8)
    out = bytearray(data)
    out[bit // 8] ^= 1 << bit % 8
    return bytes(out)


def _fed(data: bytes, step: int, *, handshake_only: bool) -> tuple[list[Frame], str, FrameDecoder]:
    """Frames before the fault, the fault, the decoder; `open_all` is called as soon as an AGREE came."""
    decoder = FrameDecoder(handshake_only=handshake_only)
    frames: list[Frame] = []
    try:
        for at in range(0, len(data), step):
            frames += decoder.feed(data[at : at + step])
            assert decoder.buffered_bytes <= FRAME_MAX
            if decoder.handshake_only and frames and frames[-1].kind is Kind.AGREE:
                frames += decoder.open_all()
                assert not decoder.handshake_only
    except ProtocolError as error:
        for again in (b"", b"\0", data):
            try:
                decoder.feed(again)
            except ProtocolError as same:
                assert str(same) == str(error)
            else:
                raise AssertionError("a decoder that failed goes on") from None
        assert decoder.buffered_bytes == 0
        return frames, str(error), decoder
    return frames, "", decoder


def _stream(data: bytes, *, handshake_only: bool) -> None:
    # One call loses the frames before a fault, so the decoder that is fed single bytes is the one to believe.
    frames, fault, decoder = _fed(data, 1, handshake_only=handshake_only)
    for step in (max(1, len(data)), 44, 7):
        others, other_fault, other = _fed(data, step, handshake_only=handshake_only)
        assert other_fault == fault, (other_fault, fault)
        if not fault:
            assert others == frames
            assert other.buffered_bytes == decoder.buffered_bytes
    said = joined(*frames)
    assert data.startswith(said), "a frame that was let through encodes to other bytes"
    if not fault:
        assert len(said) + decoder.buffered_bytes == len(data)
    for frame in frames:
        _payload(frame.kind, bytes(frame.payload))
    if said and not handshake_only:
        kept, told, _ = _fed(flipped(said), len(said), handshake_only=False)
        assert told and not kept, "a flipped bit went through"


def frame_stream(data: bytes) -> None:
    """FrameDecoder: as it comes and with right checksums; opened, and from the handshake on."""
    for stream in dict.fromkeys((data, repair.frames(data))):
        _stream(stream, handshake_only=False)
        _stream(stream, handshake_only=True)


def _goodbye(payload: bytes) -> bytes:
    return hw.pack_goodbye(*hw.unpack_goodbye(payload))


def _generation(payload: bytes) -> bytes:
    generation, clear = hw.unpack_generation(payload)
    return hw.pack_generation(generation, clear_bitmap=clear)


#: kind -> payload through the parser and back; `ProtocolError` is the only other way out
ROUND_TRIPS: Final[dict[Kind, Callable[[bytes], bytes]]] = {
    Kind.HELLO: lambda payload: Hello.unpack(payload).pack(),
    Kind.VOLUME_STATE: lambda payload: VolumeState.unpack(payload).pack(),
    Kind.GOODBYE: _goodbye,
    Kind.ROLE: lambda payload: hw.pack_role(hw.unpack_role(payload)),
    Kind.ROLE_REPLY: lambda payload: hw.pack_role_reply(hw.unpack_role_reply(payload)),
    Kind.SYNC_PAUSE: lambda payload: hw.pack_sync_pause(hw.unpack_sync_pause(payload)),
    Kind.NEW_GENERATION: _generation,
    Kind.CURRENT_GENERATION: lambda payload: hw.pack_current_generation(hw.unpack_current_generation(payload)),
    Kind.RELY_REPLY: lambda payload: hw.pack_rely_reply(hw.unpack_rely_reply(payload)),
    Kind.READ_FAILED: lambda payload: hw.pack_errno(hw.unpack_errno(payload)),
    Kind.WRITTEN: lambda payload: hw.pack_sequences(hw.unpack_sequences(payload)),
    Kind.RESYNC_CONFIRM: lambda payload: hw.pack_ranges(hw.unpack_ranges(payload)),
    Kind.DISK_STATE: lambda payload: hw.pack_disk_state(*hw.unpack_disk_state(payload)),
}
PAYLOAD_KINDS: Final = tuple(ROUND_TRIPS)


def _payload(kind: Kind, payload: bytes) -> None:
    try:
        again = ROUND_TRIPS[kind](payload) if kind in ROUND_TRIPS else payload
    except ProtocolError:
        return
    assert again == payload, f"{kind.name} has two encodings of one value"


def payloads(data: bytes) -> None:
    """The payload parsers, without a frame around them: the first byte says which."""
    if data:
        _payload(PAYLOAD_KINDS[data[0] % len(PAYLOAD_KINDS)], data[1:])


# ------------------------------------------------------------------------------------------------- on the disk


def _sealed(magic: bytes, block: bytes) -> sealed.Verdict:
    verdict = sealed.unseal(magic, block)
    if isinstance(verdict, sealed.Sealed):
        again = sealed.seal(magic, verdict.sequence, verdict.body)
        for at in range(0, PAGE, SECTOR):  # the tags are not content
            assert again[at : at + sealed.PIECE] == block[at : at + sealed.PIECE]
        other = sealed.unseal(magic, flipped(block))
        assert not isinstance(other, sealed.Sealed) or other == verdict, "a flipped bit went through"
    return verdict


def sealed_blocks(data: bytes) -> None:
    """unseal and newest, over the blocks that the bytes make (the last one is filled up)."""
    magic = superblock.MAGIC
    raw = [data[at : at + PAGE].ljust(PAGE, b"\0") for at in range(0, max(1, len(data)), PAGE)][:ACTIVITY_BLOCKS]
    for blocks in (raw, [repair.sealed_block(magic, block) for block in raw]):
        for block in blocks:
            _sealed(magic, block)
        found = sealed.newest(magic, blocks)
        whole = [v.sequence for v in found.verdicts if isinstance(v, sealed.Sealed)]
        assert (found.sealed is None) == (found.index is None) == (not whole)
        if found.sealed is not None:
            assert found.sealed.sequence == max(whole)
            assert found.next_sequence > found.sealed.sequence
            assert found.next_sequence % len(blocks) != found.index or len(blocks) == 1


def _natural(magic: bytes, blocks: Sequence[bytes]) -> bool:
    """What is whole was written by `seal`, at its place, and not ages apart: one more fault can be told from a tear.

    Tags that disagree with a right checksum, or sequences 2^31 apart, are what no node leaves behind.
    """
    sequences = []
    for place, block in enumerate(blocks):
        verdict = sealed.unseal(magic, block)
        if isinstance(verdict, sealed.Sealed):
            if verdict.sequence % len(blocks) != place or sealed.seal(magic, verdict.sequence, verdict.body) != block:
                return False
            sequences.append(verdict.sequence)
    return bool(sequences) and max(sequences) - min(sequences) <= sealed.TEAR_WINDOW


def superblocks(data: bytes) -> None:
    """Two copies to the superblock that counts, or FormatError; then the values of a body."""
    copies = data[: 2 * PAGE].ljust(2 * PAGE, b"\0")
    raw = (copies[:PAGE], copies[PAGE:])
    repaired = tuple(repair.sealed_block(superblock.MAGIC, block) for block in raw)
    for pair in (raw, repaired, (raw[0], repaired[1])):
        _choose(pair[0], pair[1])
    try:
        found = superblock.unpack(data)
    except FormatError:
        return
    assert found.pack() == data


def _choose(copy0: bytes, copy1: bytes) -> None:
    try:
        chosen = superblock.choose(copy0, copy1)
    except FormatError:
        return
    found = chosen.superblock
    assert superblock.unpack(found.pack()) == found
    # Whoever attaches this disk writes the next copy over the other one.
    written = superblock.encode(found, chosen.next_sequence)
    place = superblock.copy_offset(chosen.next_sequence) // PAGE
    pair = [copy0, copy1]
    pair[place] = written
    if chosen.next_sequence <= sealed.SEQUENCE_BELIEVED_MAX:
        assert superblock.choose(*pair).superblock == found
    if not _natural(superblock.MAGIC, (copy0, copy1)):
        return
    damaged = flipped(copy0 + copy1)
    try:
        other = superblock.choose(damaged[:PAGE], damaged[PAGE:])
    except FormatError:
        return
    assert other.superblock == found, "a flipped bit made another superblock"


def activity_log(data: bytes) -> None:
    """The ring: raw bytes, and rings of transactions that the bytes describe (torn, rotten, misplaced)."""
    size = ACTIVITY_BLOCKS * PAGE
    _recover(data[:size].ljust(size, b"\0"))
    dice = Dice(data)
    ring = bytearray(activity.fresh_ring(dice.below(3) * dice.number(32))[0])
    while dice.left and dice.byte() % 16:
        sequence = max(1, dice.number(64)) if dice.chance(32) else 9 + dice.below(32)
        body = dice.take(dice.below(64)) if dice.chance(64) else _extents(dice)
        block = bytearray(sealed.seal(activity.MAGIC, sequence, body))
        if dice.chance(64):
            block[dice.below(PAGE)] ^= 1 << dice.below(8)
        place = dice.below(ACTIVITY_BLOCKS) if dice.chance(64) else sequence % ACTIVITY_BLOCKS
        sectors = 1 + dice.below(8) if dice.chance(64) else 8
        ring[place * PAGE : place * PAGE + sectors * SECTOR] = block[: sectors * SECTOR]
    _recover(bytes(ring))


def _extents(dice: Dice) -> bytes:
    numbers = sorted({dice.number(32) for _ in range(dice.below(24))})
    return b"".join(number.to_bytes(4, "big") for number in numbers)


def _recover(ring: bytes) -> None:
    found = activity.recover(ring)
    assert not (found.unknown and found.extents)
    assert list(found.extents) == sorted(set(found.extents))
    assert found.unknown == (not all("torn" in note for note in found.notes))
    _, last = activity.fresh_ring(found.sequence)  # what follows the attach
    assert last > found.sequence
    if not _natural(activity.MAGIC, [ring[at : at + PAGE] for at in range(0, len(ring), PAGE)]):
        return
    other = activity.recover(flipped(ring))
    # Nothing that was hot may be forgotten: that would be a difference nobody knows of (V1).
    assert other.unknown or (not found.unknown and other.extents == found.extents)


# ------------------------------------------------------------------------------------------------------- bitmap


def _dirty(bitmap: Bitmap) -> int:
    """The bits as one number, and the count that must go with it."""
    raw = bytes(bitmap._bits)
    bits = int.from_bytes(raw, "little")
    assert bits.bit_count() == bitmap.dirty_count
    assert not bits >> bitmap.block_count, "bits behind the last block"
    return bits


def bitmap_pages(data: bytes) -> None:
    """A slot on disk to a bitmap: damage makes blocks dirty, never clean."""
    dice = Dice(data)
    blocks = 1 + dice.below(3 * PAGE_BLOCKS)
    slot = dice.below(32)
    rest = dice.rest()
    for raw in dict.fromkeys((rest, repair.bitmap_sectors(rest, slot))):
        bitmap, damaged = Bitmap.decode(raw, blocks, slot)
        bits = _dirty(bitmap)
        needed = -(-blocks // ((SECTOR - 4) * 8))
        assert 0 <= damaged <= needed
        assert damaged >= needed - len(raw) // SECTOR
        pages = b"".join(bitmap.encode_page(page) for page in range(bitmap.page_count))
        again, wrong = Bitmap.decode(pages, blocks, slot)
        assert (_dirty(again), wrong) == (bits, 0)
        other, wrong = Bitmap.decode(flipped(pages), blocks, slot)
        assert not bits & ~_dirty(other), "a flipped bit made a dirty block clean"
        elsewhere, wrong = Bitmap.decode(pages, blocks, slot ^ 1)
        assert wrong == needed and elsewhere.dirty_count == blocks, "another peer's bitmap was believed"


def bitmap_chunks(data: bytes) -> None:
    """BITMAP payloads of a peer: only ever more bits, all or nothing, and never more memory than was announced."""
    dice = Dice(data)
    blocks = 1 + dice.below(2 * PAGE_BITS_BYTES * 8)
    bitmap = Bitmap(blocks)
    bitmap.mark(dice.below(blocks), 1)
    while dice.left:
        before = _dirty(bitmap)
        first, count = _chunk_range(dice, blocks)
        payload = _chunk(dice, count)
        try:
            fresh = bitmap.merge_chunk(first, count, payload)
        except ProtocolError:
            assert _dirty(bitmap) == before, "a refused chunk left traces"
            continue
        after = _dirty(bitmap)
        assert not before & ~after, "a chunk cleared a bit"
        assert fresh == (after & ~before).bit_count()
        assert not (after & ~before) & ~(((1 << count) - 1) << first), "a chunk set bits outside of its range"
    _export(bitmap)


def _chunk_range(dice: Dice, blocks: int) -> tuple[int, int]:
    first = dice.number(32) if dice.chance(48) else dice.below(blocks) & ~7
    count = dice.number(32) if dice.chance(48) else 1 + dice.below(max(1, blocks - min(first, blocks - 1)))
    return first, count


def _chunk(dice: Dice, count: int) -> bytes:
    how = dice.byte() % 8
    if how == 0:
        return b"\2"
    size = min(-(-count // 8), 32768)
    if how < 4:  # a bomb, or what a peer would send
        size = 32 << 20 if dice.chance(16) else size
        return b"\1" + zlib.compress(dice.take(min(size, 16)).ljust(min(size, 1 << 20), b"\0"), 1)
    if how < 6:
        return b"\0" + dice.take(size)
    return dice.take(dice.below(96))


def _export(bitmap: Bitmap) -> None:
    copy = Bitmap(bitmap.block_count)
    for first, count, payload in bitmap.export_chunks():
        assert len(payload) <= 65536
        copy.merge_chunk(first, count, payload)
    assert _dirty(copy) == _dirty(bitmap)


FORMATS: Final[dict[str, Any]] = {
    "frames": frame_stream,
    "payloads": payloads,
    "sealed": sealed_blocks,
    "superblock": superblocks,
    "activity": activity_log,
    "bitmap-pages": bitmap_pages,
    "bitmap-chunks": bitmap_chunks,
}
