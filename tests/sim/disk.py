# SPDX-License-Identifier: Apache-2.0
"""A disk with a volatile cache, and its metadata area.

Data and metadata writes are applied when their completion is drawn.  What was applied but not flushed is in the cache:
a power cut loses, keeps or tears each such write, sector by sector.  A killed process loses nothing that was applied;
what was handed over but not completed may or may not have happened.
"""

from __future__ import annotations

import errno
import random

from replicator.core import superblock
from replicator.core.bitmap import fresh_pages
from replicator.core.geometry import BLOCK, FIXED_BYTES, SECTOR, slot_bytes_for, slot_offset
from replicator.core.superblock import PeerSlot, Superblock


class Area:
    """Bytes with a volatile cache in front."""

    def __init__(self, size: int) -> None:
        self.stable = bytearray(size)
        self.seen = bytearray(size)  # what a read returns: stable plus cache
        self.cache: list[tuple[int, bytes]] = []
        self.touched: set[int] = set()  # blocks of `seen` that changed; whoever compares them empties it

    def write(self, offset: int, data: bytes) -> None:
        """Into the cache."""
        assert offset >= 0 and offset + len(data) <= len(self.seen), (offset, len(data), len(self.seen))
        self.seen[offset : offset + len(data)] = data
        self.cache.append((offset, data))
        self._touch(offset, len(data))

    def flush(self) -> None:
        """The cache is stable."""
        for offset, data in self.cache:
            self.stable[offset : offset + len(data)] = data
        self.cache.clear()

    def _touch(self, offset: int, size: int) -> None:
        self.touched.update(range(offset // BLOCK, -(-(offset + size) // BLOCK)))

    def flush_these(self, covered: list[tuple[int, bytes]]) -> None:
        """These writes are stable; newer ones stay in the cache (and over them)."""
        known = {id(entry) for entry in covered}
        for entry in covered:
            if any(entry is other for other in self.cache):
                self.stable[entry[0] : entry[0] + len(entry[1])] = entry[1]
        self.cache = [entry for entry in self.cache if id(entry) not in known]

    def power_cut(self, rng: random.Random) -> None:
        """Each cached sector is lost or kept, on its own."""
        for offset, data in self.cache:
            self._touch(offset, len(data))
            fate = rng.random()
            for at in range(0, len(data), SECTOR):
                if fate < 0.4 or (fate < 0.7 and rng.random() < 0.5):
                    self.stable[offset + at : offset + at + SECTOR] = data[at : at + SECTOR]
        self.cache.clear()
        self.seen[:] = self.stable


class Disk:
    """One node's disk for one volume, with an external metadata area, freshly created."""

    def __init__(self, size: int, *, node_id: int, volume: int, peers: list[int], resource_id: bytes) -> None:
        self.size = size
        self.data = Area(size)
        slot_bytes = slot_bytes_for(size)
        self.fixed_base = slot_bytes * len(peers)
        self.slot_bytes = slot_bytes
        self.slots = len(peers)
        self.meta = Area(self.fixed_base + FIXED_BYTES)
        found = Superblock(
            resource_id=resource_id,
            volume=volume,
            node_id=node_id,
            size_bytes=size,
            device_bytes=size,
            slot_bytes=slot_bytes,
            current=4,
            peers=tuple(PeerSlot(node_id=peer) for peer in peers),
        )
        for slot in range(self.slots):
            pages = b"".join(fresh_pages(slot, slot_bytes))
            self.meta.write(self.fixed_base + slot_offset(slot, slot_bytes), pages)
        self.meta.write(self.fixed_base, superblock.fresh_fixed_part(found))
        self.meta.flush()
        self.broken = False  # every operation fails
        self.fail_flush = False

    def fixed(self) -> bytes:
        """The fixed part as it would be read now."""
        return bytes(self.meta.seen[self.fixed_base :])

    def bitmaps(self) -> dict[int, bytes]:
        """Raw bitmap slots."""
        return {
            slot: bytes(self.meta.seen[base : base + self.slot_bytes])
            for slot in range(self.slots)
            for base in (self.fixed_base + slot_offset(slot, self.slot_bytes),)
        }

    def power_cut(self, rng: random.Random) -> None:
        """Lose what was not flushed."""
        self.data.power_cut(rng)
        self.meta.power_cut(rng)

    @property
    def error(self) -> int:
        """errno of the next operation."""
        return errno.EIO if self.broken else 0
