# SPDX-License-Identifier: Apache-2.0
"""Attaching, from bytes: what was hot is dirty, and no crash in the middle forgets it (decision 0001)."""

from __future__ import annotations

import errno
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from replicator.core import activity, sealed, superblock
from replicator.core.actions import FlushData, Notice, WriteMeta
from replicator.core.attach import PAGES_MAX, Attached, Attaching, bitmap_pieces
from replicator.core.bitmap import fresh_pages
from replicator.core.context import Context
from replicator.core.events import DiskDone, DiskOpened
from replicator.core.geometry import (
    ACTIVITY_BLOCKS,
    ACTIVITY_OFFSET,
    EXTENT_BLOCKS,
    PAGE,
    PAGE_BLOCKS,
    SECTOR,
    block_count,
    slot_bytes_for,
    slot_offset,
)
from replicator.core.options import Options
from replicator.core.superblock import PeerSlot, Superblock

SIZE = 300 << 20  # three bitmap pages
BLOCKS = block_count(SIZE)
PEERS = {1: "bravo"}
START = Superblock(
    resource_id=bytes(range(16)),
    volume=0,
    node_id=0,
    size_bytes=SIZE,
    device_bytes=SIZE,
    slot_bytes=slot_bytes_for(SIZE),
    current=100,
    # Slot 1 belongs to a node that is configured no more: when it comes back it must not lack anything.
    peers=(PeerSlot(node_id=1), PeerSlot(node_id=2), PeerSlot()),
    consistent=True,
    was_up_to_date=True,
)


class Image:
    """A metadata area: what is stable on it."""

    def __init__(self, found: Superblock = START) -> None:
        self.slot_bytes = found.slot_bytes
        self.base = found.slot_count * found.slot_bytes
        slots = [b"".join(fresh_pages(slot, found.slot_bytes)) for slot in range(found.slot_count)]
        self.area = bytearray(b"".join(reversed(slots)) + superblock.fresh_fixed_part(found))

    def put(self, offset: int, data: bytes) -> None:
        self.area[self.base + offset : self.base + offset + len(data)] = data

    def put_log(self, extents: tuple[int, ...], sequence: int = 9) -> None:
        self.put(activity.ring_offset(sequence), activity.encode(extents, sequence))

    def opened(self, size: int = SIZE) -> DiskOpened:
        bitmaps = {}
        for slot in range(self.base // self.slot_bytes):
            at = self.base + slot_offset(slot, self.slot_bytes)
            bitmaps[slot] = bytes(self.area[at : at + self.slot_bytes])
        return DiskOpened(0, size, bytes(self.area[self.base :]), bitmaps)

    def superblock(self) -> Superblock:
        return superblock.choose(*(bytes(self.area[self.base + at :][:PAGE]) for at in (0, PAGE))).superblock

    def hot(self) -> activity.Recovered:
        at = self.base + ACTIVITY_OFFSET
        return activity.recover(bytes(self.area[at : at + ACTIVITY_BLOCKS * PAGE]))


class Attempt:
    """One attempt to attach an image, up to a crash."""

    def __init__(self, image: Image, *, node_id: int = 0, volume: int = 0, size: int = SIZE) -> None:
        options = Options(resource="r0", node_id=node_id, node_name="alpha", peers=PEERS, volumes=(volume,))
        self.context = Context(options, lambda: 1 << 40)
        self.image = image
        self.attached: Attached | None = None
        self.refused: list[str] = []
        self.errors: list[int] = []
        self.steps: list[WriteMeta] = []
        self.flushed_after: list[list[str]] = []  # what had been written when the data was flushed
        self.flush_error = 0
        attaching = Attaching(self.context, volume, PEERS, self._done, self.refused.append, self.errors.append)
        attaching.begin(image.opened(size))

    def _done(self, attached: Attached) -> None:
        assert self.attached is None
        self.attached = attached

    def pending(self) -> WriteMeta | None:
        """The write in flight: never more than one.  A flush of the data is answered on the way."""
        for action in [action for action in self.context.out if isinstance(action, FlushData)]:
            self.context.out.remove(action)
            self.flushed_after.append([kind_of(step) for step in self.steps])
            self.context.complete(DiskDone(action.token, self.flush_error))
        writes = [action for action in self.context.out if isinstance(action, WriteMeta)]
        assert len(writes) <= 1
        return writes[0] if writes else None

    def step(self, error: int = 0) -> bool:
        """One durable step; False if nothing is to be written."""
        write = self.pending()
        if write is None:
            return False
        self.context.out.remove(write)
        if not error:
            self.steps.append(write)
            for offset, data in write.pieces:
                self.image.put(offset, data)
        self.context.complete(DiskDone(write.token, error))
        return True

    def tear(self, sectors: int) -> None:
        """The crash hits the write in flight: only so many of its sectors arrive."""
        write = self.pending()
        for offset, data in write.pieces if write else ():
            arrived = data[: sectors * SECTOR]
            sectors -= len(arrived) // SECTOR
            self.image.put(offset, arrived)

    def run(self) -> Attached:
        """To the end."""
        while self.step():
            pass
        assert self.attached is not None and not self.refused and not self.errors
        return self.attached

    def notices(self) -> list[str]:
        return [action.code for action in self.context.out if isinstance(action, Notice)]


def kind_of(write: WriteMeta) -> str:
    offset = write.pieces[0][0]
    return "bitmap" if offset < 0 else "log" if offset >= ACTIVITY_OFFSET else "superblock"


def marked(attached: Attached, peer: int) -> set[int]:
    """The extents that have a dirty block."""
    bitmap = attached.bitmaps[peer]
    extents = set()
    for extent in range(-(-BLOCKS // EXTENT_BLOCKS)):
        first = extent * EXTENT_BLOCKS
        count = min(EXTENT_BLOCKS, BLOCKS - first)
        assert bitmap.count_dirty(first, count) in (0, count), "an extent is marked whole"
        if bitmap.any_dirty(first, count):
            extents.add(extent)
    return extents


def test_a_disk_left_in_good_order_has_nothing_dirty() -> None:
    attempt = Attempt(Image())
    attached = attempt.run()
    assert attached.size == SIZE and attached.ledger.durable == START
    assert {peer: bitmap.dirty_count for peer, bitmap in attached.bitmaps.items()} == {1: 0, 2: 0}
    assert [kind_of(write) for write in attempt.steps] == ["superblock", "log"]
    assert attempt.notices() == []


def test_what_was_hot_is_dirty_towards_every_peer_slot_and_is_written_before_the_log_is_emptied() -> None:
    image = Image(replace(START, primary_indicator=True))
    image.put_log((0, 40, 74))
    attempt = Attempt(image)
    attached = attempt.run()
    assert marked(attached, 1) == marked(attached, 2) == {0, 40, 74}
    assert [kind_of(write) for write in attempt.steps] == ["bitmap", "superblock", "log"]
    assert image.hot().extents == () and not image.hot().unknown
    assert attempt.notices() == ["activity-log-applied"] * 2
    assert attached.log.hot_count == 0 and attached.log.sequence >= 9


def test_the_data_is_flushed_while_the_log_still_names_what_was_hot() -> None:
    """A killed process leaves writes in a volatile cache; kill, resync from here, power cut lost them (simulator)."""
    image = Image()
    image.put_log((1,))
    attempt = Attempt(image)
    attempt.run()
    assert attempt.flushed_after == [["bitmap"]]


def test_a_node_that_was_primary_when_it_stopped_is_a_crashed_primary_until_a_peer_says_otherwise() -> None:
    image = Image(replace(START, primary_indicator=True))
    assert Attempt(image).run().ledger.durable == replace(START, crashed_primary=True)
    assert Attempt(image).run().ledger.durable.crashed_primary, "another restart does not forget it"
    assert image.superblock().crashed_primary and not image.superblock().primary_indicator


def test_an_extent_beyond_the_end_is_from_before_a_shrink_and_marks_nothing() -> None:
    image = Image()
    image.put_log((75, 1 << 20))
    assert marked(Attempt(image).run(), 1) == set()


def test_a_full_sync_that_was_interrupted_counts_every_bit_until_all_are_on_disk() -> None:
    peers = (PeerSlot(node_id=1, full_sync=True), *START.peers[1:])
    image = Image(replace(START, peers=peers, consistent=False, was_up_to_date=False))
    attempt = Attempt(image)
    attempt.step()  # the pages
    assert image.superblock().peers[0].full_sync, "the flag goes after the bits are stable"
    attached = attempt.run()
    assert attached.bitmaps[1].dirty_count == BLOCKS and attached.bitmaps[2].dirty_count == 0
    assert not image.superblock().peers[0].full_sync
    assert Attempt(image).run().bitmaps[1].dirty_count == BLOCKS


def test_damaged_bitmap_sectors_are_dirty_and_repaired() -> None:
    image = Image()
    image.put(slot_offset(0, START.slot_bytes) + PAGE + SECTOR + 7, b"\xff")
    attempt = Attempt(image)
    attached = attempt.run()
    first = PAGE_BLOCKS + 508 * 8
    assert attached.bitmaps[1].dirty_count == 508 * 8 == attached.bitmaps[1].count_dirty(first, 508 * 8)
    assert attached.bitmaps[2].dirty_count == 0 and attempt.notices() == ["bitmap-damaged"]
    again = Attempt(image)
    assert again.run().bitmaps[1].dirty_count == 508 * 8 and again.notices() == []


def test_an_unreadable_activity_log_makes_everything_dirty_towards_everybody() -> None:
    image = Image()
    image.put(ACTIVITY_OFFSET, b"\xa5" * (ACTIVITY_BLOCKS * PAGE))
    attempt = Attempt(image)
    attached = attempt.run()
    assert [bitmap.dirty_count for bitmap in attached.bitmaps.values()] == [BLOCKS, BLOCKS]
    assert not image.hot().unknown and "activity-log-applied" in attempt.notices()


@given(
    hot=st.sets(st.integers(0, 74), max_size=4).map(lambda extents: tuple(sorted(extents))),
    full=st.booleans(),
    crashes=st.lists(st.tuples(st.integers(0, 3), st.integers(0, 100)), max_size=4),
)
def test_crashes_between_and_inside_the_durable_steps_forget_nothing(
    hot: tuple[int, ...], full: bool, crashes: list[tuple[int, int]]
) -> None:
    peers = (PeerSlot(node_id=1, full_sync=full), *START.peers[1:])
    image = Image(replace(START, peers=peers, primary_indicator=True))
    image.put_log(hot)
    for steps, sectors in crashes:
        attempt = Attempt(image)
        assert attempt.refused == []
        for _ in range(steps):
            attempt.step()
        attempt.tear(sectors)
        found = image.superblock()
        assert found.crashed_primary or found.primary_indicator
    attached = Attempt(image).run()
    assert attached.ledger.durable == replace(START, crashed_primary=True) == image.superblock()
    for peer in (1, 2):
        assert set(hot) <= marked(attached, peer)
    assert not full or attached.bitmaps[1].dirty_count == BLOCKS
    assert image.hot().extents == () and not image.hot().unknown


REFUSED: dict[str, tuple[Image, dict[str, int], str]] = {
    "another node's": (Image(), {"node_id": 5}, "belongs to volume 0 of node 0, not to volume 0 of node 5"),
    "another volume's": (Image(), {"volume": 3}, "belongs to volume 0 of node 0, not to volume 3"),
    "a device that shrank": (
        Image(),
        {"size": SIZE - SECTOR},
        f"has {SIZE - SECTOR} bytes for data, the volume {SIZE}",
    ),
    "no slot for a peer": (
        Image(replace(START, peers=(PeerSlot(node_id=2), PeerSlot()))),
        {},
        "no slot for bravo",
    ),
    "a device that grew before its size was agreed": (
        Image(replace(START, size_bytes=0)),
        {"size": SIZE * 2},
        f"bitmap slots of {START.slot_bytes} bytes are too small for {SIZE * 2} bytes",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_metadata_that_does_not_fit_is_refused_and_left_alone(case: str) -> None:
    image, wrong, text = REFUSED[case]
    before = bytes(image.area)
    attempt = Attempt(image, **wrong)
    (sentence,) = attempt.refused
    assert text in sentence and "hint:" in sentence
    assert not attempt.step() and attempt.attached is None and image.area == before


def test_no_metadata_is_refused() -> None:
    image = Image()
    image.area[image.base :] = bytes(len(image.area) - image.base)
    attempt = Attempt(image)
    assert "there is no metadata" in attempt.refused[0] and not attempt.step()


def test_a_volume_without_an_agreed_size_is_as_large_as_its_device() -> None:
    assert Attempt(Image(replace(START, size_bytes=0)), size=SIZE).run().size == SIZE
    assert Attempt(Image(), size=SIZE + (1 << 20)).run().size == SIZE


@pytest.mark.parametrize("good_steps", [0, 1, 2])
def test_a_metadata_write_that_fails_ends_the_attempt_and_is_told_once(good_steps: int) -> None:
    image = Image()
    image.put_log((1,))
    attempt = Attempt(image)
    for _ in range(good_steps):
        attempt.step()
    attempt.step(errno.EIO)
    assert attempt.errors == [errno.EIO] and attempt.attached is None and not attempt.step()


def test_data_that_cannot_be_flushed_ends_the_attempt_and_the_log_still_names_it() -> None:
    image = Image()
    image.put_log((1,))
    attempt = Attempt(image)
    attempt.flush_error = errno.EIO
    while attempt.step():
        pass
    assert attempt.errors == [errno.EIO] and attempt.attached is None
    assert image.hot().extents == (1,)


def test_a_later_write_goes_to_the_superblock_copy_that_is_not_the_newest() -> None:
    image = Image()
    attempt = Attempt(image)
    attached = attempt.run()
    attached.ledger.save(lambda found: replace(found, current=101), lambda: None)
    write = attempt.pending()
    assert write is not None
    image.put(write.pieces[0][0], b"\x5a" * SECTOR)  # the worst crash while it is written
    survivor = [image.area[image.base + at :][:PAGE] for at in (0, PAGE) if at != write.pieces[0][0]]
    found = sealed.unseal(superblock.MAGIC, bytes(survivor[0]))
    assert isinstance(found, sealed.Sealed) and superblock.unpack(found.body).current == 100
    assert found.sequence == attached.ledger.sequence - 1


def test_many_changed_pages_are_written_in_bounded_pieces_and_those_asked_for_exactly() -> None:
    size = (PAGES_MAX + 10) * PAGE_BLOCKS * 4096
    start = replace(START, size_bytes=size, device_bytes=size, slot_bytes=slot_bytes_for(size))
    image = Image(start)
    attached = Attempt(image, size=size).run()
    attached.bitmaps[1].mark_all()
    attached.bitmaps[2].mark(0, 1)
    exact = bitmap_pieces(attached, PAGES_MAX, {1: {3, 1}})
    base = slot_offset(0, start.slot_bytes)
    assert [offset for offset, _ in exact] == [base + PAGE, base + 3 * PAGE]
    sizes = []
    while pieces := bitmap_pieces(attached, PAGES_MAX):
        sizes.append(len(pieces))
        assert all(offset < 0 for offset, _ in pieces)
    assert sizes == [PAGES_MAX, 10 - 2 + 1]
