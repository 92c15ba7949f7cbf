# SPDX-License-Identifier: Apache-2.0
"""What crash enumeration and rot found, small: sectors wiped or misdirected in the newest block of the metadata."""

from __future__ import annotations

import pytest

from replicator.core import activity, sealed
from replicator.core.geometry import PAGE, SECTOR
from replicator.core.sealed import newest, seal

MAGIC = b"RPLTESTS"


def mixture(old: bytes, new: bytes, subset: int) -> bytes:
    """The sectors of `new` whose bit is set in `subset`, else those of `old`."""
    return b"".join((new if subset >> n & 1 else old)[n * SECTOR : (n + 1) * SECTOR] for n in range(PAGE // SECTOR))


@pytest.mark.parametrize("subset", [0xFE, 0xFC, 0x80, 0x7E])
def test_a_wiped_sector_of_the_newest_block_is_no_interrupted_write(subset: int) -> None:
    wiped = mixture(bytes(PAGE), seal(MAGIC, 6, b"six"), subset)
    assert newest(MAGIC, [wiped, seal(MAGIC, 5, b"five")]).damaged_newer


def test_a_create_md_interrupted_over_a_young_area_is_no_way_back_in_time() -> None:
    for subset in range(1, 255):
        result = newest(MAGIC, [mixture(bytes(PAGE), seal(MAGIC, 6, b"six"), subset), seal(MAGIC, 5, b"five")])
        assert result.damaged_newer or result.sealed == sealed.Sealed(6, b"six")


@pytest.mark.parametrize("neighbour", [5, 7])
def test_a_sector_of_the_other_copy_in_the_newest_is_no_interrupted_write(neighbour: int) -> None:
    mixed = mixture(seal(MAGIC, neighbour, b"other"), seal(MAGIC, 8, b"newest" * 400), 0x7F)
    mixed = mixture(mixed, seal(MAGIC, neighbour, b"other" * 400), 0x02)
    assert newest(MAGIC, [mixed, seal(MAGIC, 7, b"seven")]).damaged_newer


@pytest.mark.parametrize("wiped", range(2, 10))
def test_create_md_interrupted_and_interrupted_again_is_still_an_interrupted_write(wiped: int) -> None:
    blocks = [mixture(bytes(PAGE), seal(MAGIC, 2, b"two" * 900), 0x0F), seal(MAGIC, 1, b"one" * 900)]
    for _ in range(wiped):
        result = newest(MAGIC, blocks)
        assert not result.damaged_newer and result.sealed == sealed.Sealed(1, b"one" * 900)
        assert result.next_sequence % 2 == 0
        blocks[0] = mixture(blocks[0], seal(MAGIC, result.next_sequence, b"new" * 900), 0x15)


def test_interrupted_writes_are_known_when_the_tags_come_round() -> None:
    last = (1 << 32) - 1
    torn = mixture(seal(MAGIC, last - 1, b"old" * 900), seal(MAGIC, last + 1, b"new" * 900), 0x33)
    result = newest(MAGIC, [torn, seal(MAGIC, last, b"kept")])
    assert result.sealed == sealed.Sealed(last, b"kept") and not result.damaged_newer


def test_a_wiped_sector_of_the_newest_transaction_makes_every_extent_suspect() -> None:
    ring, sequence = activity.fresh_ring(8)
    at = (sequence + 1) % 8 * PAGE
    block = mixture(bytes(PAGE), activity.encode((1, 2), sequence + 1), 0xFE)
    assert activity.recover(ring[:at] + block + ring[at + PAGE :]).unknown
