# SPDX-License-Identifier: Apache-2.0
"""Blocks, extents, and where the metadata lies: all alignment arithmetic of the core.

A *block* (4 KiB) is what one bit of a bitmap stands for, an *extent* (4 MiB) is what the activity log names.
Ranges come in as bytes and leave as (first, count).  Two roundings exist and they are not interchangeable:

- `blocks_of` covers the range.  It is for *marking*: a block touched in one byte differs.
- `whole_blocks_of` takes only blocks that lie in the range completely.  It is for *confirming*: a block of
  which a part was copied is not equal.

The metadata area is described in docs/disk-format.md.  Its offsets are relative to `Layout.fixed_base`, so
they are the same numbers for an area of its own (external) and for the tail of the data device (internal).
"""

from __future__ import annotations

from dataclasses import dataclass

from replicator.errors import DiskError

SECTOR = 512
BLOCK_SHIFT = 12
BLOCK = 1 << BLOCK_SHIFT
EXTENT_SHIFT = 22
EXTENT = 1 << EXTENT_SHIFT
EXTENT_BLOCKS = EXTENT // BLOCK

FIXED_BYTES = 65536  #: size of the fixed part: superblocks, activity log, reserve
SUPERBLOCK_OFFSETS = (0, 4096)  #: of the two copies, relative to the fixed part
ACTIVITY_OFFSET = 8192  #: of the activity log's ring, relative to the fixed part
ACTIVITY_BLOCKS = 8  #: blocks of 4 KiB in the ring

PAGE = 4096  #: metadata is written in pages
PAGE_BITS_BYTES = 4064  #: bytes of bits in a bitmap page: 8 sectors of 508, each followed by its CRC
PAGE_BLOCKS = PAGE_BITS_BYTES * 8  #: blocks of data that one bitmap page describes
SLOTS_MAX = 32  #: peers that a volume can remember


def align_down(value: int, unit: int) -> int:
    """Return the largest multiple of `unit` that is not above `value`."""
    return value - value % unit


def align_up(value: int, unit: int) -> int:
    """Return the smallest multiple of `unit` that is not below `value`."""
    return -(-value // unit) * unit


def block_count(size_bytes: int) -> int:
    """Return how many blocks a volume of that size has; the last one may be a part of a block."""
    return -(-size_bytes // BLOCK)


def extent_count(size_bytes: int) -> int:
    """Return how many extents a volume of that size has."""
    return -(-size_bytes // EXTENT)


def blocks_of(offset: int, size: int) -> tuple[int, int]:
    """Return (first, count) of the blocks that the range of bytes touches; count is 0 for an empty range."""
    first = offset >> BLOCK_SHIFT
    if size <= 0:
        return first, 0
    return first, ((offset + size - 1) >> BLOCK_SHIFT) - first + 1


def whole_blocks_of(offset: int, size: int, device_size: int) -> tuple[int, int]:
    """Return (first, count) of the blocks that lie completely in the range of bytes.

    The last block of a device whose size is no multiple of `BLOCK` is complete when the range reaches
    the end of the device.
    """
    first = -(-offset // BLOCK)
    end_bytes = offset + size
    end = block_count(device_size) if end_bytes >= device_size else end_bytes >> BLOCK_SHIFT
    return first, max(0, end - first)


def extents_of(offset: int, size: int) -> range:
    """Return the numbers of the extents that the range of bytes touches; empty for an empty range."""
    if size <= 0:
        return range(0)
    return range(offset >> EXTENT_SHIFT, ((offset + size - 1) >> EXTENT_SHIFT) + 1)


def blocks_of_extent(extent: int, blocks: int) -> tuple[int, int]:
    """Return (first, count) of the blocks of an extent on a volume of `blocks` blocks.

    The count is 0 for an extent past the end (the log may remember one from before a shrink).
    """
    first = extent * EXTENT_BLOCKS
    return first, max(0, min(EXTENT_BLOCKS, blocks - first))


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """Where things lie.  `fixed_base` is a byte offset in the area (external) or on the device (internal).

    `data_size` is what is left for data (internal) or was given (external).
    """

    data_size: int
    fixed_base: int
    slot_bytes: int
    slots: int

    def slot_base(self, slot: int) -> int:
        """Return the absolute byte offset of a bitmap slot."""
        return self.fixed_base + slot_offset(slot, self.slot_bytes)


def slot_bytes_for(size_bytes: int) -> int:
    """Return the size of one bitmap slot on disk for a volume of `size_bytes`."""
    return -(-block_count(size_bytes) // PAGE_BLOCKS) * PAGE


def slot_offset(slot: int, slot_bytes: int) -> int:
    """Return the offset of a bitmap slot relative to the fixed part: negative, slots lie below it."""
    return -(slot + 1) * slot_bytes


def area_bytes(data_size: int, slots: int) -> int:
    """Return the smallest size of a metadata area for a volume of `data_size` and that many peers."""
    return slots * slot_bytes_for(data_size) + FIXED_BYTES


def external_layout(area_size: int, data_size: int, slots: int) -> Layout:
    """Return the layout of a metadata area of its own.

    Raises DiskError when the area is too small.
    """
    _check_slots(slots)
    if data_size <= 0:
        raise DiskError(f"the data device has {data_size} bytes, there is nothing to replicate")
    fixed_base = align_down(area_size, PAGE) - FIXED_BYTES
    slot_bytes = slot_bytes_for(data_size)
    if slots * slot_bytes > fixed_base:
        raise DiskError(
            f"{area_size} bytes of metadata area are too few for {data_size} bytes of data and {slots} peers",
            hint=f"it needs {area_bytes(data_size, slots)} bytes",
        )
    return Layout(data_size=data_size, fixed_base=fixed_base, slot_bytes=slot_bytes, slots=slots)


def internal_layout(device_size: int, slots: int) -> Layout:
    """Return the layout of a device that carries its metadata at its tail, with the largest data area.

    Raises DiskError when not one block is left for data.
    """
    _check_slots(slots)
    fixed_base = align_down(device_size, PAGE) - FIXED_BYTES
    pages = fixed_base // PAGE
    # d blocks of data need slots * ceil(d / PAGE_BLOCKS) pages.  Without the ceil this bounds d from above;
    # the best d needs either as many bitmap pages as the bound does, or one less (and fills them completely).
    bound = pages * PAGE_BLOCKS // (PAGE_BLOCKS + slots)
    most = -(-bound // PAGE_BLOCKS)
    blocks = max((min(n * PAGE_BLOCKS, pages - slots * n) for n in (most, most - 1) if n > 0), default=0)
    if blocks <= 0:
        raise DiskError(
            f"a device of {device_size} bytes is too small for data and internal metadata for {slots} peers",
            hint=f"it needs at least {area_bytes(BLOCK, slots) + BLOCK} bytes",
        )
    data_size = blocks * BLOCK
    return Layout(data_size=data_size, fixed_base=fixed_base, slot_bytes=slot_bytes_for(data_size), slots=slots)


def _check_slots(slots: int) -> None:
    if not 1 <= slots <= SLOTS_MAX:
        raise DiskError(f"metadata for {slots} peers was asked for, possible are 1 to {SLOTS_MAX}")
