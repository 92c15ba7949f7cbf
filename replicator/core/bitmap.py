# SPDX-License-Identifier: Apache-2.0
"""A bitmap: what one peer has not got.

One bit per 4 KiB block, set = the peer may not have this content.  Bits are set freely (`mark`,
`merge_chunk`, damaged sectors at `decode`): a bit too many costs a copy, a bit too few costs data.  They
are cleared by `confirm` alone (decision 0001, V2), and by the one exception that says its condition in its
name.

Invariants: `dirty_count` is the number of set bits at any time; bits past the last block are never set; a
page is *changed* when it may differ from what was last taken for writing.

What is on the disk is in docs/disk-format.md; what travels to the peer is BITMAP in docs/wire-format.md.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterable, Iterator

from replicator.core import kernels
from replicator.core.geometry import BLOCK, PAGE, PAGE_BITS_BYTES, PAGE_BLOCKS, SECTOR
from replicator.errors import ProtocolError

PIECE = SECTOR - 4  #: bytes of bits in one sector on disk
SECTORS_PER_PAGE = PAGE // SECTOR
_SEED = struct.Struct(">LL")
_NEVER_ZERO = 0xFFFFFFFF
_ONES_SECTOR = b"\xff" * PIECE

CHUNK_BYTES_MAX = 32768  #: raw bits in one wire chunk: 1 GiB of the volume
CHUNK_BLOCKS_MAX = CHUNK_BYTES_MAX * 8
_RAW, _ZLIB, _ONES = 0, 1, 2
#: Clean or all-dirty stretches shorter than this stay inside a chunk: a frame header costs 44 bytes, and zlib
#: makes little of them anyway.
_STRETCH = 1024
_CLEAN_STRETCH = bytes(_STRETCH)
_ONES_STRETCH = b"\xff" * _STRETCH


class Bitmap:
    """The dirty blocks of a volume of `block_count` blocks towards the peer of bitmap slot `slot`."""

    __slots__ = ("_bits", "_changed", "block_count", "dirty_count", "slot")

    def __init__(self, block_count: int, slot: int = 0) -> None:
        assert block_count > 0, f"bitmap for {block_count} blocks"
        self.block_count = block_count
        self.slot = slot
        self.dirty_count = 0
        self._bits = bytearray(-(-block_count // PAGE_BLOCKS) * PAGE_BITS_BYTES)
        self._changed: set[int] = set()

    @property
    def page_count(self) -> int:
        """How many pages of 4 KiB the slot has on disk."""
        return len(self._bits) // PAGE_BITS_BYTES

    def mark(self, first: int, count: int) -> int:
        """The peer does not have these blocks; return how many of them were clean."""
        self._check(first, count)
        fresh = kernels.set_range(self._bits, first, count)
        self._note(first, count, fresh)
        self.dirty_count += fresh
        return fresh

    def mark_all(self) -> int:
        """The peer has nothing (full sync); return how many blocks were clean."""
        return self.mark(0, self.block_count)

    def confirm(self, first: int, count: int) -> int:
        """The peer holds these blocks, stable, and no newer write is pending; return how many were dirty.

        The only way to clear a bit.
        """
        self._check(first, count)
        gone = kernels.clear_range(self._bits, first, count)
        self._note(first, count, gone)
        self.dirty_count -= gone
        return gone

    def clear_all_asserted_identical(self) -> int:
        """An operator asserts that both connected copies are equal (`new-current-uuid --clear-bitmap`)."""
        return self.confirm(0, self.block_count)

    def any_dirty(self, first: int, count: int) -> bool:
        """Return whether one of these blocks is dirty."""
        self._check(first, count)
        return self.dirty_count != 0 and kernels.any_in_range(self._bits, first, count)

    def count_dirty(self, first: int, count: int) -> int:
        """Return how many of these blocks are dirty."""
        self._check(first, count)
        return kernels.count_range(self._bits, first, count)

    def next_run(self, start: int, max_blocks: int) -> tuple[int, int] | None:
        """Return (first, count) of the first run of dirty blocks at or after `start`, cut to `max_blocks`."""
        assert start >= 0 and max_blocks > 0, f"run of {max_blocks} blocks from {start}"
        if not self.dirty_count:
            return None
        return kernels.next_run(self._bits, start, self.block_count, max_blocks)

    # -- pages on disk -------------------------------------------------------------------------------------

    def changed_pages_over(self, first: int, count: int) -> list[int]:
        """Return the pages over these blocks that changed since they were last taken."""
        self._check(first, count)
        if not count or not self._changed:
            return []
        pages = range(first // PAGE_BLOCKS, (first + count - 1) // PAGE_BLOCKS + 1)
        return [page for page in pages if page in self._changed]

    @property
    def changed_page_count(self) -> int:
        """How many pages changed since they were last taken."""
        return len(self._changed)

    def take_pages(self, pages: Iterable[int]) -> list[tuple[int, bytes]]:
        """Return (page, 4096 bytes) for each page; they count as unchanged from now on.

        The caller writes them: until that write is stable the disk holds the old page, and if it fails the
        disk is given up.  Page p belongs at byte p * 4096 of the slot.
        """
        taken = [(page, self.encode_page(page)) for page in pages]
        self._changed.difference_update(page for page, _ in taken)
        return taken

    def take_changed(self, limit: int) -> list[tuple[int, bytes]]:
        """As `take_pages`, for the first `limit` changed pages."""
        return self.take_pages(sorted(self._changed)[:limit])

    def encode_page(self, page: int) -> bytes:
        """Return the 4096 bytes of a page as it lies on the disk."""
        assert 0 <= page < self.page_count, f"page {page} of {self.page_count}"
        start = page * PAGE_BITS_BYTES
        sector = page * SECTORS_PER_PAGE
        parts: list[bytes] = []
        for at in range(start, start + PAGE_BITS_BYTES, PIECE):
            piece = bytes(self._bits[at : at + PIECE])
            parts.append(piece)
            parts.append(_sector_crc(piece, sector, self.slot))
            sector += 1
        return b"".join(parts)

    @classmethod
    def decode(cls, raw: bytes, block_count: int, slot: int) -> tuple[Bitmap, int]:
        """Return the bitmap of a slot, and how many of its sectors were damaged (all dirty now).

        `raw` may be longer than needed (the slot was made for a larger device); where it is too short it
        counts as damaged.  Pages with damaged sectors are changed pages.
        """
        bitmap = cls(block_count, slot)
        bits = bitmap._bits
        damaged = []
        needed = -(-block_count // (PIECE * 8))
        for sector in range(needed):
            piece = raw[sector * SECTOR : sector * SECTOR + PIECE]
            crc = raw[sector * SECTOR + PIECE : (sector + 1) * SECTOR]
            if len(piece) == PIECE and crc == _sector_crc(piece, sector, slot):
                bits[sector * PIECE : (sector + 1) * PIECE] = piece
            else:
                bits[sector * PIECE : (sector + 1) * PIECE] = _ONES_SECTOR
                damaged.append(sector)
        # A slot of a volume that was larger may have bits past the end.
        beyond = len(bits) * 8 - block_count
        kernels.clear_range(bits, block_count, beyond)
        bitmap.dirty_count = kernels.count_range(bits, 0, block_count)
        bitmap._changed.update(sector // SECTORS_PER_PAGE for sector in damaged)
        return bitmap, len(damaged)

    # -- chunks on the wire --------------------------------------------------------------------------------

    def export_chunks(self, max_payload: int = 65536) -> Iterator[tuple[int, int, bytes]]:
        """Iterate (first block, block count, payload) over everything dirty; first is a multiple of 8.

        The bitmap must not change while the iterator is in use.
        """
        window = min(CHUNK_BYTES_MAX, max_payload - 1)
        assert window >= 1, f"payload of {max_payload} bytes"
        end = -(-self.block_count // 8)
        at = 0
        while (at := kernels.zero_bytes_end(self._bits, at, end)) < end:
            ones_end = kernels.ones_bytes_end(self._bits, at, min(end, at + CHUNK_BYTES_MAX))
            blocks = (ones_end - at) * 8
            if ones_end == end - 1 and self._bits[ones_end] == self._last_byte_mask():
                # The tail of the volume: a part of a byte, and every bit of it that exists is set.
                ones_end, blocks = end, self.block_count - at * 8
            if blocks >= _STRETCH * 8 or (ones_end == end and blocks):
                yield at * 8, min(blocks, self.block_count - at * 8), bytes((_ONES,))
                at = ones_end
                continue
            chunk = self._mixed_chunk(at, min(end, at + window))
            yield at * 8, min(len(chunk) * 8, self.block_count - at * 8), _pack_chunk(chunk)
            at += len(chunk)

    def merge_chunk(self, first: int, count: int, payload: bytes) -> int:
        """Mark what a chunk of the peer's bitmap says; return how many of the blocks were clean.

        Raises ProtocolError when the chunk is malformed, out of range, or larger than announced; then nothing
        was changed.
        """
        if first < 0 or first % 8 or count < 1 or first + count > self.block_count:
            raise ProtocolError(f"bitmap chunk of {count} blocks from {first} on {self.block_count} blocks")
        raw = _unpack_chunk(count, payload)
        if raw is None:
            return self.mark(first, count)
        fresh = kernels.or_bytes(self._bits, first // 8, raw)
        self._note(first, count, fresh)
        self.dirty_count += fresh
        return fresh

    def _mixed_chunk(self, at: int, end: int) -> bytes:
        """Return the bits from byte `at` to the next long clean or all-dirty stretch, without clean tail."""
        chunk = bytes(self._bits[at:end])
        for stretch in (_CLEAN_STRETCH, _ONES_STRETCH):
            cut = chunk.find(stretch)
            if cut > 0:
                chunk = chunk[:cut]
        return chunk.rstrip(b"\0")

    def _last_byte_mask(self) -> int:
        return (1 << (self.block_count % 8 or 8)) - 1

    def _check(self, first: int, count: int) -> None:
        assert first >= 0 and count >= 0 and first + count <= self.block_count, (
            f"blocks {first}+{count} of {self.block_count} ({self.block_count * BLOCK} bytes)"
        )

    def _note(self, first: int, count: int, really: int) -> None:
        if really:
            self._changed.update(range(first // PAGE_BLOCKS, (first + count - 1) // PAGE_BLOCKS + 1))


def fresh_pages(slot: int, slot_bytes: int) -> Iterator[bytes]:
    """Iterate the pages of a slot where nothing is dirty; create-md writes them all, zeroes are not valid."""
    piece = bytes(PIECE)
    for page in range(slot_bytes // PAGE):
        sectors = range(page * SECTORS_PER_PAGE, (page + 1) * SECTORS_PER_PAGE)
        yield b"".join(piece + _sector_crc(piece, sector, slot) for sector in sectors)


def _sector_crc(piece: bytes, sector: int, slot: int) -> bytes:
    crc = zlib.crc32(piece, zlib.crc32(_SEED.pack(slot, sector)))
    return (crc or _NEVER_ZERO).to_bytes(4, "big")


def _pack_chunk(chunk: bytes) -> bytes:
    packed = zlib.compress(chunk, 1)
    return bytes((_ZLIB,)) + packed if len(packed) < len(chunk) else bytes((_RAW,)) + chunk


def _unpack_chunk(count: int, payload: bytes) -> bytes | None:
    """Return the raw bits of a chunk, or None for all ones.  Raises ProtocolError."""
    if not payload:
        raise ProtocolError("bitmap chunk without a payload")
    encoding, rest = payload[0], bytes(payload[1:])
    if encoding == _ONES:
        if rest:
            raise ProtocolError(f"bitmap chunk of ones carries {len(rest)} more bytes")
        return None
    size = -(-count // 8)
    if size > CHUNK_BYTES_MAX:
        raise ProtocolError(f"bitmap chunk of {count} blocks, at most {CHUNK_BLOCKS_MAX} are allowed")
    if encoding == _ZLIB:
        rest = _inflate(rest, size)
    elif encoding != _RAW:
        raise ProtocolError(f"bitmap chunk with unknown encoding {encoding}")
    if len(rest) != size:
        raise ProtocolError(f"bitmap chunk of {count} blocks carries {len(rest)} bytes of bits")
    if count % 8 and rest[-1] >> count % 8:
        raise ProtocolError(f"bitmap chunk of {count} blocks has bits beyond its end")
    return rest


def _inflate(packed: bytes, size: int) -> bytes:
    """Return `size` bytes; never makes more than one byte beyond, whatever the sender packed."""
    inflater = zlib.decompressobj()
    try:
        raw = inflater.decompress(packed, size + 1)
    except zlib.error as error:
        raise ProtocolError(f"bitmap chunk does not decompress: {error}") from None
    if len(raw) != size or not inflater.eof or inflater.unused_data:
        raise ProtocolError(f"bitmap chunk does not decompress to {size} bytes")
    return raw
