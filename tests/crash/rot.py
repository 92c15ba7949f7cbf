# SPDX-License-Identifier: Apache-2.0
"""Bit rot: each sector of the metadata, replaced by what a disk may show instead.

Zeroes (a lost mapping), garbage, the sector's own older content (a lost write), a neighbour's content (a misdirected
write).  Whatever it is, attach refuses with a hint, or takes what was there before, or counts as dirty: it never takes
a copy back in time and never believes less dirty than there was.  One thing is not defended against and said so in
docs/disk-format.md: a lost write in the newest block, which is just what an interrupted write looks like.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass

from replicator.core.geometry import (
    ACTIVITY_BLOCKS,
    ACTIVITY_OFFSET,
    EXTENT_BLOCKS,
    PAGE,
    SECTOR,
    block_count,
    slot_bytes_for,
)
from tests.crash.image import Image, Place, Reading, read

GARBAGE = random.Random(7).randbytes(SECTOR)
SUPERBLOCK_SECTORS = 2 * PAGE // SECTOR
LOG_END = (ACTIVITY_OFFSET + ACTIVITY_BLOCKS * PAGE) // SECTOR


@dataclass(frozen=True, slots=True)
class Rotten:
    """One sector of `image` is not what it was."""

    image: Image
    place: Place
    how: str

    @property
    def part(self) -> str:
        """Which structure it lies in."""
        number = self.place[1]
        return "bitmap" if number < 0 else "superblock" if number < SUPERBLOCK_SECTORS else "activity log"


def rotten(image: Image, older: Image) -> Iterator[Rotten]:
    """Every sector of the metadata in use, each way; `older`: the same disk some time before."""
    for number in range(-slot_bytes_for(image.size) // SECTOR, LOG_END):
        place = ("meta", number)
        for how, content in (
            ("zeroes", bytes(SECTOR)),
            ("garbage", GARBAGE),
            ("stale", older.get(place)),
            ("from behind", image.get(("meta", number + 1))),
            ("from before", image.get(("meta", number - 1))),
        ):
            if content != image.get(place):
                yield Rotten(image.changed([(place, content)]), place, how)


def hot_or_dirty(reading: Reading, size: int) -> set[int]:
    """The blocks that count as dirty after attach."""
    blocks = block_count(size)
    if reading.unknown or (reading.superblock is not None and reading.superblock.peers[0].full_sync):
        return set(range(blocks))
    found = set(reading.dirty)
    for extent in reading.extents:
        found.update(range(extent * EXTENT_BLOCKS, min(blocks, (extent + 1) * EXTENT_BLOCKS)))
    return found


def verdict(true: Image, sick: Rotten) -> str:
    """What attach makes of it; a sentence that begins with "WRONG" when it must not."""
    expected, found = read(true), read(sick.image)
    if found.superblock is None:
        return "refused"
    lost_write = sick.how == "stale"
    if found.superblock != expected.superblock:
        return "older superblock (lost write)" if lost_write else "WRONG: an older superblock counts"
    missing = hot_or_dirty(expected, true.size) - hot_or_dirty(found, true.size)
    if missing:
        return "less dirty (lost write)" if lost_write else f"WRONG: {len(missing)} dirty blocks are forgotten"
    return "all dirty" if found.unknown else "sector dirty" if found.damaged else "unharmed"
