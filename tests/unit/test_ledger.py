# SPDX-License-Identifier: Apache-2.0
"""The ledger: a change is visible after it is durable, one write at a time, in order."""

from __future__ import annotations

import errno
import random
from collections.abc import Callable
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from replicator.core.actions import WriteMeta
from replicator.core.context import Context
from replicator.core.events import DiskDone
from replicator.core.geometry import PAGE, SUPERBLOCK_OFFSETS, slot_bytes_for
from replicator.core.ledger import Ledger, slot_index, with_slot
from replicator.core.options import Options
from replicator.core.superblock import PeerSlot, Superblock, choose, copy_offset, encode

SIZE = 1 << 30
START = Superblock(
    resource_id=bytes(range(16)),
    volume=3,
    node_id=0,
    size_bytes=SIZE,
    device_bytes=SIZE,
    slot_bytes=slot_bytes_for(SIZE),
    current=100,
    peers=(PeerSlot(node_id=4), PeerSlot(node_id=1), PeerSlot()),
)


class Fake:
    """A ledger on a disk that holds two superblock copies and ends writes when told."""

    def __init__(self, sequence: int = 2) -> None:
        options = Options(resource="r0", node_id=0, node_name="alpha", peers={1: "bravo"}, volumes=(3,))
        self.context = Context(options, lambda: 1 << 40)
        self.copies = {SUPERBLOCK_OFFSETS[s % 2]: encode(START, s) for s in (sequence - 1, sequence)}
        self.failures: list[int] = []
        self.ledger = Ledger(self.context, START, sequence, self.failures.append)
        self.called: list[int] = []

    def writes(self) -> list[WriteMeta]:
        return [action for action in self.context.out if isinstance(action, WriteMeta)]

    def set(self, current: int, then: Callable[[], None] | None = None) -> None:
        """Change the current id; `called` gets it when it is durable."""
        self.ledger.save(lambda found: replace(found, current=current), then or (lambda: self.called.append(current)))

    def end(self, error: int = 0) -> None:
        """The write in flight ends."""
        (write,) = self.writes()
        self.context.out.remove(write)
        if not error:
            ((offset, block),) = write.pieces
            self.copies[offset] = block
        self.context.complete(DiskDone(write.token, error))

    def on_disk(self) -> Superblock:
        """What a crash would leave."""
        return choose(*(self.copies[offset] for offset in SUPERBLOCK_OFFSETS)).superblock


def test_a_change_is_wanted_at_once_and_durable_when_it_is_on_the_disk() -> None:
    fake = Fake()
    fake.set(101)
    assert fake.ledger.wanted.current == 101 and fake.ledger.durable.current == 100
    assert fake.ledger.busy and fake.called == []
    fake.end()
    assert fake.ledger.durable.current == 101 and fake.on_disk() == fake.ledger.durable
    assert fake.called == [101] and not fake.ledger.busy


def test_changes_during_a_write_go_together_in_the_next_one() -> None:
    fake = Fake()
    for current in (101, 102, 103):
        fake.set(current)
    assert len(fake.writes()) == 1
    fake.end()
    assert fake.called == [101] and fake.on_disk().current == 101 and fake.ledger.busy
    fake.end()
    assert fake.called == [101, 102, 103] and fake.on_disk().current == 103
    assert fake.writes() == [] and not fake.ledger.busy


def test_each_write_goes_to_the_copy_that_does_not_hold_the_newest() -> None:
    fake = Fake(sequence=7)
    for current in (101, 102, 103):
        fake.set(current)
        ((offset, block),) = fake.writes()[0].pieces
        assert len(block) == PAGE and fake.writes()[0].volume == 3
        older = 1 - SUPERBLOCK_OFFSETS.index(copy_offset(fake.ledger.sequence - 1))
        assert offset == SUPERBLOCK_OFFSETS[older]
        fake.end()
        assert choose(fake.copies[0], fake.copies[4096]).sequence == fake.ledger.sequence
    assert fake.ledger.sequence == 10


def test_settled_calls_at_once_or_after_everything_asked_before() -> None:
    fake = Fake()
    fake.ledger.settled(lambda: fake.called.append(1))
    assert fake.called == [1] and fake.writes() == []
    fake.set(101)
    fake.set(102)
    fake.ledger.settled(lambda: fake.called.append(2))
    fake.end()
    assert fake.called == [1, 101]
    fake.end()
    assert fake.called == [1, 101, 102, 2]


def test_who_is_called_may_change_something_again() -> None:
    fake = Fake()
    fake.set(101, lambda: fake.set(102))
    fake.set(110)
    fake.end()
    assert len(fake.writes()) == 1
    fake.end()
    assert fake.on_disk().current == 102 and sorted(fake.called) == [102, 110]


def test_a_failed_write_is_told_once_and_nobody_who_waits_is_called() -> None:
    fake = Fake()
    fake.set(101)
    fake.set(102)
    fake.end(errno.EIO)
    assert fake.failures == [errno.EIO] and fake.called == []
    fake.set(103)
    assert fake.writes() == [], "a failed disk is not written again"
    assert fake.ledger.durable.current == 100 == fake.on_disk().current


def test_after_abandon_nobody_is_called_and_nothing_is_written() -> None:
    fake = Fake()
    fake.set(101)
    fake.set(102)
    fake.ledger.abandon()
    fake.end()
    fake.set(103)
    assert fake.called == [] and fake.failures == [] and fake.writes() == []


def test_a_failure_after_abandon_is_nobody_s_business() -> None:
    fake = Fake()
    fake.set(101)
    fake.ledger.abandon()
    fake.end(errno.EIO)
    assert fake.failures == []


def test_abandon_by_one_who_is_called_silences_those_behind_it() -> None:
    fake = Fake()
    fake.set(101)
    fake.set(102, fake.ledger.abandon)
    fake.set(103)
    fake.end()
    fake.end()
    assert fake.called == [101]


def test_a_slot_is_found_by_node_id_and_changed_alone() -> None:
    assert (slot_index(START, 4), slot_index(START, 1)) == (0, 1)
    with pytest.raises(KeyError):
        slot_index(START, 9)
    changed = with_slot(START, 1, bitmap_id=55)
    assert changed.peers == (START.peers[0], PeerSlot(node_id=1, bitmap_id=55), START.peers[2])
    fake = Fake()
    fake.ledger.save(lambda found: with_slot(found, 4, bitmap_id=77), lambda: None)
    assert fake.ledger.slot(4).bitmap_id == 0, "what is not durable is not known"
    fake.end()
    assert fake.ledger.slot(4).bitmap_id == 77


@given(st.integers(0, 1 << 32))
def test_whatever_happens_a_crash_finds_every_change_that_somebody_was_told_of(seed: int) -> None:
    draw = random.Random(seed)
    fake = Fake()
    asked = 0

    def told(number: int) -> Callable[[], None]:
        def then() -> None:
            assert fake.on_disk().current >= 100 + number and fake.ledger.durable == fake.on_disk()
            assert fake.called == [] or fake.called[-1] < number, "out of order"
            fake.called.append(number)

        return then

    for _ in range(40):
        if draw.random() < 0.6:
            asked += 1
            fake.set(100 + asked, told(asked))
        elif fake.ledger.busy:
            fake.end()
        assert len(fake.writes()) == bool(fake.ledger.busy)
    while fake.ledger.busy:
        fake.end()
    assert fake.called == list(range(1, asked + 1)) and fake.on_disk() == fake.ledger.wanted
