# SPDX-License-Identifier: Apache-2.0
"""A disk with a volatile cache, and its metadata area.

Data and metadata writes are applied when their completion is drawn.  What was applied but not flushed is in the cache:
a power cut loses, keeps or tears each such write, sector by sector, each on its own.  A killed process loses nothing
that was applied; what was handed over but not completed may or may not have happened (that is `node.py`'s part).

What a run may break: every operation (`broken`), only FLUSH, only metadata, reads of single sectors, the next writes,
or everything hangs (`frozen`).  `rot` and `misdirect` damage metadata at rest.
"""

from __future__ import annotations

import errno
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from replicator.core import superblock
from replicator.core.bitmap import fresh_pages
from replicator.core.geometry import BLOCK, FIXED_BYTES, SECTOR, slot_bytes_for, slot_offset
from replicator.core.superblock import PeerSlot, Superblock


@dataclass(slots=True)
class Cut:
    """What a power cut did to the sectors that were only in a cache."""

    lost: int = 0
    kept: int = 0
    torn: int = 0  # writes of which a part was kept


CHUNK = 1 << 16
LARGE = 4 << 20


class Sparse:
    """As much of a bytearray as an `Area` needs, without touching what is never written."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._chunks: dict[int, bytearray] = {}

    def __len__(self) -> int:
        return self._size

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sparse) and self._size == other._size and self._written() == other._written()

    __hash__ = None  # type: ignore[assignment]

    def _written(self) -> dict[int, bytes]:
        return {number: bytes(chunk) for number, chunk in self._chunks.items() if any(chunk)}

    def __getitem__(self, part: slice) -> bytes:
        start, stop, _ = part.indices(self._size)
        pieces = []
        while start < stop:
            number, at = divmod(start, CHUNK)
            end = min(CHUNK, at + stop - start)
            chunk = self._chunks.get(number)
            pieces.append(bytes(end - at) if chunk is None else bytes(chunk[at:end]))
            start += end - at
        return b"".join(pieces)

    def __setitem__(self, part: slice, data: bytes) -> None:
        start, stop, _ = part.indices(self._size)
        assert stop - start == len(data)
        done = 0
        while start < stop:
            number, at = divmod(start, CHUNK)
            end = min(CHUNK, at + stop - start)
            chunk = self._chunks.setdefault(number, bytearray(CHUNK))
            chunk[at:end] = data[done : done + end - at]
            done += end - at
            start += end - at


class Area:
    """Bytes with a volatile cache in front."""

    def __init__(self, size: int) -> None:
        make: Callable[[int], Any] = Sparse if size > LARGE else bytearray
        self.stable = make(size)
        self.seen = make(size)  # what a read returns: stable plus cache
        self.version = 0  # of `stable`
        self.doomed: list[tuple[int, int]] = []  # clean in the page cache, and never written: a failed FLUSH
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
        self.version += 1
        for offset, data in self.cache:
            self.stable[offset : offset + len(data)] = data
        self.cache.clear()

    def _touch(self, offset: int, size: int) -> None:
        first, last = offset // BLOCK, (offset + size - 1) // BLOCK
        if first == last:
            self.touched.add(first)
        else:
            self.touched.update(range(first, last + 1))

    def flush_these(self, covered: list[tuple[int, bytes]]) -> None:
        """These writes are stable; newer ones stay in the cache (and over them)."""
        self.version += 1
        known = {id(entry) for entry in covered}
        left = []
        for entry in self.cache:
            if id(entry) in known:
                self.stable[entry[0] : entry[0] + len(entry[1])] = entry[1]
            else:
                left.append(entry)
        self.cache = left

    def fail_flush(self, covered: list[tuple[int, bytes]], drops: Callable[[], bool]) -> int:
        """A FLUSH that fails may drop what it was to write: reads go on showing it until the power is cut."""
        known = {id(entry) for entry in covered}
        for entry in [entry for entry in self.cache if id(entry) in known and drops()]:
            self.doomed.append((entry[0], len(entry[1])))
            self.cache.remove(entry)
        return errno.EIO

    def flush_last(self) -> None:
        """The newest write is stable (FUA), and with it older ones in its place: they can not come out over it."""
        chosen = [self.cache[-1]]
        for entry in reversed(self.cache[:-1]):
            if any(entry[0] < at + len(data) and at < entry[0] + len(entry[1]) for at, data in chosen):
                chosen.append(entry)
        self.flush_these(chosen)

    def power_cut(self, rng: random.Random) -> Cut:
        """Each cached sector is lost or kept, on its own."""
        self.version += 1
        cut = Cut()
        for offset, data in self.cache:
            self._touch(offset, len(data))
            fate = rng.random()
            kept = 0
            for at in range(0, len(data), SECTOR):
                if fate < 0.4 or (fate < 0.7 and rng.random() < 0.5):
                    self.stable[offset + at : offset + at + SECTOR] = data[at : at + SECTOR]
                    kept += 1
            cut.kept += kept
            cut.lost += len(data) // SECTOR - kept
            cut.torn += 0 < kept < len(data) // SECTOR
        for offset, data in self.cache:
            self.seen[offset : offset + len(data)] = self.stable[offset : offset + len(data)]
        for offset, size in self.doomed:
            self._touch(offset, size)
            self.seen[offset : offset + size] = self.stable[offset : offset + size]
        self.cache.clear()
        self.doomed.clear()
        return cut

    def damage(self, offset: int, data: bytes) -> None:
        """Change what is stored, behind everybody's back."""
        self.version += 1
        self.stable[offset : offset + len(data)] = data
        self.seen[offset : offset + len(data)] = data


class Disk:
    """One node's disk for one volume, with an external metadata area, freshly created."""

    def __init__(self, size: int, *, node_id: int, volume: int, peers: list[int], resource_id: bytes) -> None:
        self.size = size
        self.data = Area(size)
        self._node_id, self._volume, self._peers = node_id, volume, peers
        self.slot_bytes = slot_bytes_for(size)
        self.fixed_base = self.slot_bytes * len(peers)
        self.slots = len(peers)
        self.meta = Area(self.fixed_base + FIXED_BYTES)
        self.create_md(resource_id)
        self.broken = False  # every operation fails
        self.fail_flush = False
        self.fail_meta = False  # writes of metadata fail
        self.fail_writes = 0  # so many data writes fail
        self.bad: set[int] = set()  # sectors that cannot be read (until they are written)
        self.frozen = False  # nothing completes
        self.thaw_calls: list[Callable[[], object]] = []

    def create_md(self, resource_id: bytes) -> None:
        """Fresh metadata, stable; the data stays."""
        found = Superblock(
            resource_id=resource_id,
            volume=self._volume,
            node_id=self._node_id,
            size_bytes=self.size,
            device_bytes=self.size,
            slot_bytes=self.slot_bytes,
            current=4,
            peers=tuple(PeerSlot(node_id=peer) for peer in self._peers),
        )
        for slot in range(self.slots):
            pages = b"".join(fresh_pages(slot, self.slot_bytes))
            self.meta.write(self.fixed_base + slot_offset(slot, self.slot_bytes), pages)
        self.meta.write(self.fixed_base, superblock.fresh_fixed_part(found))
        self.meta.flush()

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

    def power_cut(self, rng: random.Random) -> Cut:
        """Lose what was not flushed."""
        data, meta = self.data.power_cut(rng), self.meta.power_cut(rng)
        return Cut(data.lost + meta.lost, data.kept + meta.kept, data.torn + meta.torn)

    # --- what breaks

    @property
    def error(self) -> int:
        """errno of the next operation."""
        return errno.EIO if self.broken else 0

    def read_error(self, offset: int, size: int) -> int:
        """errno of a read of this range."""
        if self.bad and not self.bad.isdisjoint(range(offset // SECTOR, (offset + size) // SECTOR)):
            return errno.EIO
        return self.error

    def write_error(self) -> int:
        """errno of the next data write."""
        if self.fail_writes:
            self.fail_writes -= 1
            return errno.EIO
        return self.error

    def thaw(self) -> None:
        """What hung completes."""
        self.frozen = False
        calls, self.thaw_calls = self.thaw_calls, []
        for call in calls:
            call()

    def mend(self) -> None:
        """Nothing is broken any more (a new cable; the data that is there stays)."""
        self.broken = self.fail_flush = self.fail_meta = False
        self.fail_writes = 0
        self.bad.clear()
        self.thaw()
