# SPDX-License-Identifier: Apache-2.0
"""Every disk that a power cut at one moment may leave.

The unit is the sector: each sector of each write that was not stable is kept or lost on its own (a kept one lies over
the older ones).  Up to `EXACT` such sectors all subsets are made; with more: none, all, each alone, all but each, and
a sample that is the same every time.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass

from replicator.core.geometry import BLOCK, SECTOR
from tests.crash.image import Image, Place, Reading, read
from tests.crash.record import Moment

EXACT = 12
SAMPLE = 64
SINGLES = 96  #: the fixed part has no more sectors in use; of a large copy every n-th sector is enough

Unit = tuple[Place, bytes]
#: What the core will see, and which data it will find: images that agree in it are recovered alike.
Class = tuple[Reading, int, tuple[tuple[int, str], ...]]


@dataclass(frozen=True, slots=True)
class Left:
    """One possible disk after a crash.  `number` counts the subsets of this moment."""

    moment: Moment
    node: int
    number: int
    image: Image
    reading: Reading
    kind: Class


def units(moment: Moment, node: int) -> list[Unit]:
    """Sectors that may be there or not, oldest first; those that change nothing are left out."""
    stable = moment.stable[node]
    return [pair for write in moment.volatile[node] for pair in write.sectors if stable.get(pair[0]) != pair[1]]


def subsets(count: int, *, exact: int = EXACT, sample: int = SAMPLE) -> Iterator[int]:
    """Bit masks over `count` units."""
    if count <= exact:
        yield from range(1 << count)
        return
    everything = (1 << count) - 1
    chosen = {0: None, everything: None}
    step = -(-count // SINGLES)
    chosen |= dict.fromkeys(1 << n for n in range(0, count, step))
    chosen |= dict.fromkeys(everything ^ 1 << n for n in range(0, count, step))
    rng = random.Random(count)
    for _ in range(sample):
        chosen[rng.getrandbits(count)] = None
    yield from chosen


def after_power_cut(moment: Moment, node: int) -> Iterator[Left]:
    """Every disk that this node may be left with."""
    stable, pairs = moment.stable[node], units(moment, node)
    for number, mask in enumerate(subsets(len(pairs))):
        image = stable.changed(pair for n, pair in enumerate(pairs) if mask >> n & 1)
        reading = read(image)
        yield Left(moment, node, number, image, reading, (reading, *_data_class(stable, image, pairs)))


def _data_class(stable: Image, image: Image, pairs: list[Unit]) -> tuple[int, tuple[tuple[int, str], ...]]:
    """The content, or, where blocks are torn, which ones are."""
    newest = {place: data for place, data in pairs if place[0] == "data"}
    torn: dict[int, set[bool]] = {}
    for place, data in newest.items():
        torn.setdefault(place[1] * SECTOR // BLOCK, set()).add(image.get(place) == data)
    if all(len(found) == 1 for found in torn.values()):
        return image.data_key, ()
    words = tuple((block, "torn" if len(found) > 1 else str(found.pop())) for block, found in sorted(torn.items()))
    return stable.data_key, words
