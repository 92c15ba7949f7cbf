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
from replicator.core.superblock import Chosen, Superblock, choose
from replicator.errors import FormatError
from tests.sim.disk import Disk


class Stored:
    """What the metadata of one disk says, read again only when it was written."""

    def __init__(self, disk: Disk, peer: int) -> None:
        self._disk, self._peer = disk, peer
        self._version = -1
        self._chosen: Chosen | None = None
        self._fault = ""
        self._marked_version = -1
        self._marked: int | None = None

    def _fixed(self) -> bytes:
        disk = self._disk
        return bytes(disk.meta.stable[disk.fixed_base : disk.fixed_base + FIXED_BYTES])

    def _read(self) -> None:
        if self._version == self._disk.meta.version:
            return
        self._version = self._disk.meta.version
        fixed = self._fixed()
        try:
            self._chosen, self._fault = choose(fixed[:PAGE], fixed[PAGE : 2 * PAGE]), ""
        except FormatError as error:
            self._chosen, self._fault = None, str(error)

    def _marks(self) -> int | None:
        found = self.superblock
        if found is None:
            return None
        fixed = self._fixed()
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
        return self._chosen.superblock if self._chosen is not None else None

    @property
    def sequence(self) -> int:
        """Of that superblock; 0 if there is none."""
        self._read()
        return self._chosen.sequence if self._chosen is not None else 0

    @property
    def fault(self) -> str:
        """Why it would refuse; empty if it would not."""
        self._read()
        return self._fault

    @property
    def marked(self) -> int | None:
        """Dirty blocks and hot extents that a restart would find, a bit per block; None: all."""
        if self._marked_version != self._disk.meta.version:
            self._marked_version = self._disk.meta.version
            self._marked = self._marks()
        return self._marked


_EXTENT_MASK = (1 << EXTENT_BLOCKS) - 1


def as_mask(bitmap: Bitmap) -> int:
    """A bit per dirty block."""
    return int.from_bytes(bitmap._bits, "little") if bitmap.dirty_count else 0


def lowest(mask: int) -> int:
    """The first block of a mask."""
    return (mask & -mask).bit_length() - 1
