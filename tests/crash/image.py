# SPDX-License-Identifier: Apache-2.0
"""What a disk holds, sector by sector, apart from the simulator's own fake.

A place is ("data", n) or ("meta", n): sector n of the data, or of the metadata area counted from its fixed part
(negative in the bitmap slots).  An image names the sectors that are not zero.  It knows how to become a fresh `Disk`
of the simulator, and what the core will make of its metadata (`Reading`).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache

from replicator.core import activity, superblock
from replicator.core.bitmap import Bitmap
from replicator.core.geometry import (
    ACTIVITY_BLOCKS,
    ACTIVITY_OFFSET,
    FIXED_BYTES,
    PAGE,
    SECTOR,
    block_count,
    slot_bytes_for,
    slot_offset,
)
from replicator.core.superblock import Superblock
from replicator.errors import FormatError
from tests.sim.disk import Disk

Place = tuple[str, int]
Sectors = tuple[tuple[Place, bytes], ...]

ZERO = bytes(SECTOR)


def sectors_of(where: str, offset: int, data: bytes) -> Sectors:
    """A write, cut into what a disk keeps or loses."""
    assert offset % SECTOR == len(data) % SECTOR == 0, (offset, len(data))
    first = offset // SECTOR
    return tuple(((where, first + at // SECTOR), data[at : at + SECTOR]) for at in range(0, len(data), SECTOR))


def _mark(place: Place, data: bytes) -> int:
    return 0 if data == ZERO else hash((place, data))


class Image:
    """The content of one node's disk and its metadata area.  Immutable.

    `key` is equal for equal content (the exclusive or of what every sector contributes, so that a change is cheap);
    `data_key` the same of the data alone.
    """

    __slots__ = ("data_key", "key", "sectors", "size")

    def __init__(self, size: int, sectors: dict[Place, bytes], key: int, data_key: int) -> None:
        self.size = size
        self.sectors = sectors
        self.key = key
        self.data_key = data_key

    @classmethod
    def of(cls, disk: Disk) -> Image:
        """A disk with nothing in its data, as the simulator makes it."""
        blank = cls(disk.size, {}, 0, 0)
        pieces = [sectors_of("meta", 0, disk.fixed())]
        pieces += [sectors_of("meta", slot_offset(slot, disk.slot_bytes), raw) for slot, raw in disk.bitmaps().items()]
        return blank.changed(pair for piece in pieces for pair in piece)

    def changed(self, changes: Iterable[tuple[Place, bytes]]) -> Image:
        """With these sectors written, in order."""
        sectors = dict(self.sectors)
        key, data_key = self.key, self.data_key
        for place, data in changes:
            change = _mark(place, sectors.get(place, ZERO)) ^ _mark(place, data)
            key ^= change
            if place[0] == "data":
                data_key ^= change
            if data == ZERO:
                sectors.pop(place, None)
            else:
                sectors[place] = data
        return Image(self.size, sectors, key, data_key)

    def get(self, place: Place) -> bytes:
        """One sector."""
        return self.sectors.get(place, ZERO)

    def span(self, where: str, offset: int, size: int) -> bytes:
        """Bytes."""
        first = offset // SECTOR
        return b"".join([self.sectors.get((where, first + n), ZERO) for n in range(size // SECTOR)])

    def fixed(self) -> bytes:
        """The fixed part."""
        return self.span("meta", 0, FIXED_BYTES)

    def bitmap(self) -> bytes:
        """Slot 0."""
        size = slot_bytes_for(self.size)
        return self.span("meta", slot_offset(0, size), size)

    def load(self, disk: Disk, *, over: Image, cached: Sectors = ()) -> None:
        """Make this the content of a disk that holds `over`; `cached` lies in its volatile cache on top."""
        places = sorted({place for place, _ in self.sectors.items() ^ over.sectors.items()})
        for pairs, stable in (([(place, self.get(place)) for place in places], True), (cached, False)):
            for (where, number), data in pairs:
                if where == "data":
                    disk.data.write(number * SECTOR, data)
                else:
                    disk.meta.write(disk.fixed_base + number * SECTOR, data)
            if stable:
                disk.data.flush()
                disk.meta.flush()


def shown(disk: Disk, sector: int) -> int:
    """The value that a sector of the data is filled with (-1: not one value)."""
    raw = bytes(disk.data.seen[sector * SECTOR : (sector + 1) * SECTOR])
    return raw[0] if raw == raw[:1] * SECTOR else -1


@dataclass(frozen=True, slots=True)
class Reading:
    """What the core will see in a metadata area: the same functions as in `core/attach`."""

    superblock: Superblock | None
    refusal: str
    next_sequence: int
    extents: tuple[int, ...]
    unknown: bool
    log_sequence: int
    dirty: frozenset[int]
    damaged: int


@cache
def _chosen(copies: bytes) -> tuple[Superblock | None, str, int]:
    try:
        chosen = superblock.choose(copies[:PAGE], copies[PAGE:])
    except FormatError as error:
        assert error.hint and error.message and error.message[0].islower() and not error.message.endswith("."), error
        return None, str(error), 0
    return chosen.superblock, "", chosen.next_sequence


_recovered = cache(activity.recover)


@cache
def _dirty(raw: bytes, blocks: int) -> tuple[frozenset[int], int]:
    bitmap, damaged = Bitmap.decode(raw, blocks, 0)
    found: list[int] = []
    at = 0
    while at < blocks and (run := bitmap.next_run(at, blocks)) is not None:
        found += range(run[0], run[0] + run[1])
        at = run[0] + run[1]
    return frozenset(found), damaged


_READINGS: dict[tuple[int, int], Reading] = {}


def read(image: Image) -> Reading:
    """Interpret the metadata."""
    key = (image.key ^ image.data_key, image.size)
    if key not in _READINGS:
        _READINGS[key] = _read(image)
    return _READINGS[key]


def _read(image: Image) -> Reading:
    fixed = image.fixed()
    found, refusal, following = _chosen(fixed[: 2 * PAGE])
    log = _recovered(fixed[ACTIVITY_OFFSET : ACTIVITY_OFFSET + ACTIVITY_BLOCKS * PAGE])
    dirty, damaged = _dirty(image.bitmap(), block_count(image.size))
    return Reading(found, refusal, following, log.extents, log.unknown, log.sequence, dirty, damaged)
