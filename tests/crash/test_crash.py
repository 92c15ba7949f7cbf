# SPDX-License-Identifier: Apache-2.0
"""After a crash at any moment, with any part of what was not stable, the mirror is whole again.

With every change: every image of every operation is read and checked, some of every operation are recovered from, some
of those recoveries are crashed again.  `python -m tests.crash` recovers from all.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from replicator.core import activity, superblock
from replicator.core.generations import JUST_CREATED, same
from replicator.core.geometry import ACTIVITY_BLOCKS, ACTIVITY_OFFSET, PAGE
from replicator.drivers.metadata import Place
from tests.crash import createmd
from tests.crash.enumerate import EXACT, subsets
from tests.crash.explore import explore, record
from tests.crash.image import Image, read, shown
from tests.crash.operations import OPERATIONS, WIDE, Operation
from tests.crash.record import Moment
from tests.crash.rot import rotten, verdict
from tests.unit.mirror import MIB

LIMIT, NESTED = 6, 1
BY_NAME = {operation.name: operation for operation in OPERATIONS}
ROTTING = ("peer lost, new generation", "resync under a write", "activity log and bitmap, alone")


def moments_of(name: str) -> list[Moment]:
    return record(BY_NAME[name])[0]


# --- the cores


@pytest.mark.parametrize("operation", OPERATIONS, ids=lambda operation: operation.name)
def test_every_crash_is_recovered_from(operation: Operation) -> None:
    wide = operation.options is WIDE  # large disks cost
    findings = explore(operation, limit=LIMIT // 2 if wide else LIMIT, nested=0 if wide else NESTED)
    assert not findings.faults, "\n".join(findings.faults[:5])
    # A recorder that sees nothing, or an enumerator that makes nothing, would find nothing.
    assert findings.steps >= 2 and findings.images >= 700 and findings.distinct >= 500 and findings.classes >= 5
    assert findings.recoveries >= LIMIT and (wide or findings.nested >= 4)
    assert sum(findings.reached.values()) == findings.recoveries


def test_up_to_twelve_sectors_every_subset_is_made_and_no_image_twice() -> None:
    assert sorted(subsets(EXACT)) == list(range(1 << EXACT))
    many = list(subsets(EXACT + 8))
    assert len(many) == len(set(many)) and {0, (1 << EXACT + 8) - 1} <= set(many)
    assert many == list(subsets(EXACT + 8)), "the sample is the same every time"


@pytest.mark.parametrize("name, node", [("down, Primary", 0), ("down, Secondary", 1), ("demotion", 0)])
def test_after_a_clean_end_nothing_is_volatile_hot_or_in_doubt(name: str, node: int) -> None:
    last = moments_of(name)[-1]
    reading = read(last.stable[node])
    found = reading.superblock
    assert found is not None and found.consistent and found.was_up_to_date
    assert not found.primary_indicator and not found.crashed_primary
    assert reading.extents == () and not reading.unknown and reading.dirty == frozenset()
    if node == 0:  # (what a Secondary's cache holds is marked at the Primary)
        assert not last.volatile[node]


# --- rot


@pytest.mark.parametrize("name", ROTTING)
def test_rot_of_any_metadata_sector_is_noticed_or_harmless(name: str) -> None:
    moments = moments_of(name)
    seen: Counter[str] = Counter()
    for moment in (moments[len(moments) // 2], moments[-1]):
        for node in (0, 1):
            image = moment.kept(node)
            for sick in rotten(image, moments[0].stable[node]):
                found = verdict(image, sick)
                assert not found.startswith("WRONG"), (moment.index, node, sick.place, sick.how, found)
                if "lost write" in found:
                    assert sick.how == "stale", "only what looks like an interrupted write goes unnoticed"
                seen[found] += 1
    assert seen["refused"] > 20 and seen["all dirty"] > 20 and seen["sector dirty"] > 10 and seen["unharmed"] > 100


def test_both_superblocks_gone_is_refused() -> None:
    image = moments_of("demotion")[-1].stable[0]
    for content in (bytes(512), b"\xa5" * 512):
        wiped = image.changed((("meta", number), content) for number in range(16))
        assert read(wiped).superblock is None


# --- create-md


def old_area() -> bytes:
    """Of a Primary with a hot extent."""
    image = moments_of("write, write, flush")[-1].kept(0)
    assert read(image).extents
    return image.bitmap() + image.fixed()


def check_interrupted(place: Place, before: bytes) -> Counter[str]:
    """Every image opens as fresh, or as what was there before with all that was hot, or is refused."""
    seen: Counter[str] = Counter()
    known: set[bytes] = set()
    for left in createmd.power_cuts(before, createmd.asked_by_create(place, before)):
        if left.content in known:
            continue
        known.add(left.content)
        opened, refusal = createmd.what_is_left(place, left.content)
        if opened is None:
            seen["refused"] += 1
            assert refusal
        else:
            seen[_opened_as(opened.fixed, opened.bitmaps[0], before)] += 1
        if len(known) % 40 == 0:
            assert createmd.created_again(place)
    return seen


def _opened_as(fixed: bytes, bits: bytes, before: bytes) -> str:
    found = superblock.choose(fixed[:PAGE], fixed[PAGE : 2 * PAGE]).superblock
    if same(found.current, JUST_CREATED):
        assert not found.consistent, "a fresh copy that claims to hold data"
        return "fresh"
    was = createmd.fixed_of(before)
    assert found == superblock.choose(was[:PAGE], was[PAGE : 2 * PAGE]).superblock, "a superblock from before"
    assert bits in before, "an old superblock over new bitmaps"
    log, hot = (
        activity.recover(part[ACTIVITY_OFFSET : ACTIVITY_OFFSET + ACTIVITY_BLOCKS * PAGE]) for part in (fixed, was)
    )
    assert log.unknown or set(hot.extents) <= set(log.extents), "what was hot is forgotten"
    return "as before"


def test_create_md_interrupted_on_a_blank_file_can_be_done_again(tmp_path: Path) -> None:
    (tmp_path / "disk").write_bytes(bytes(MIB))
    seen = check_interrupted(createmd.place_of(tmp_path, internal=False), bytes(len(old_area())))
    assert seen["refused"] > 100 and seen["fresh"] > 10 and not seen["as before"], seen


def test_create_md_interrupted_over_metadata_leaves_no_mixture_of_old_and_new(tmp_path: Path) -> None:
    (tmp_path / "disk").write_bytes(bytes(MIB))
    seen = check_interrupted(createmd.place_of(tmp_path, internal=False), old_area())
    assert seen["refused"] > 100 and seen["fresh"] > 10 and seen["as before"] > 10, seen


def test_create_md_interrupted_on_a_disk_with_its_metadata_at_the_end_can_be_done_again(tmp_path: Path) -> None:
    seen = check_interrupted(createmd.place_of(tmp_path, internal=True), b"\xa5" * MIB)
    assert seen["refused"] > 100 and seen["fresh"] > 10 and not seen["as before"], seen


def test_an_image_becomes_the_disk_it_was_made_from() -> None:
    scene = BY_NAME["demotion"].scene()
    disk = scene.m.alpha.disks[0]
    image = Image.of(disk).changed([(("data", 9), b"\x07" * 512)])
    blank = BY_NAME["down, Primary"].scene().m.beta.disks[0]
    image.load(blank, over=Image.of(blank))
    assert blank.fixed() == disk.fixed() and blank.bitmaps() == disk.bitmaps() and shown(blank, 9) == 7
    assert Image.of(blank).key == Image.of(disk).key != image.key
