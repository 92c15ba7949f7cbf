# SPDX-License-Identifier: Apache-2.0
"""What a restart would find in the metadata of a disk, read with the core's own decoders; for checkers only."""

from __future__ import annotations

from replicator.core import activity
from replicator.core.bitmap import Bitmap
from replicator.core.generations import JUST_CREATED
from replicator.core.geometry import (
    ACTIVITY_BLOCKS,
    ACTIVITY_OFFSET,
    EXTENT_BLOCKS,
    FIXED_BYTES,
    PAGE,
    block_count,
    slot_offset,
)
from replicator.core.superblock import Superblock, choose
from replicator.errors import FormatError
from tests.sim.disk import Disk


class Stored:
    """What the metadata of one disk says, read again only when it was written."""

    def __init__(self, disk: Disk, peer: int) -> None:
        self._disk, self._peer = disk, peer
        self._version = -1
        self._superblock: Superblock | None = None
        self._marked: int | None = None

    def _read(self) -> None:
        if self._version == self._disk.meta.version:
            return
        self._version = self._disk.meta.version
        disk = self._disk
        fixed = bytes(disk.meta.stable[disk.fixed_base : disk.fixed_base + FIXED_BYTES])
        try:
            self._superblock = choose(fixed[:PAGE], fixed[PAGE : 2 * PAGE]).superblock
        except FormatError:
            self._superblock = None
        self._marked = None if self._superblock is None else self._marks(self._superblock, fixed)

    def _marks(self, found: Superblock, fixed: bytes) -> int | None:
        slot = found.slot_of(self._peer)
        if slot is None or found.current == JUST_CREATED or found.peers[slot].full_sync:
            return None
        hot = activity.recover(fixed[ACTIVITY_OFFSET : ACTIVITY_OFFSET + ACTIVITY_BLOCKS * PAGE])
        if hot.unknown:
            return None
        disk = self._disk
        base = disk.fixed_base + slot_offset(slot, disk.slot_bytes)
        raw = bytes(disk.meta.stable[base : base + disk.slot_bytes])
        mask = as_mask(Bitmap.decode(raw, block_count(disk.size), slot)[0])
        for extent in hot.extents:
            mask |= _EXTENT_MASK << extent * EXTENT_BLOCKS
        return mask

    @property
    def superblock(self) -> Superblock | None:
        """What a node that starts now would use; None: it would refuse."""
        self._read()
        return self._superblock

    @property
    def marked(self) -> int | None:
        """Dirty blocks and hot extents that a restart would find, a bit per block; None: all."""
        self._read()
        return self._marked


_EXTENT_MASK = (1 << EXTENT_BLOCKS) - 1


def as_mask(bitmap: Bitmap) -> int:
    """A bit per dirty block."""
    return int.from_bytes(bitmap._bits, "little") if bitmap.dirty_count else 0


def lowest(mask: int) -> int:
    """The first block of a mask."""
    return (mask & -mask).bit_length() - 1
