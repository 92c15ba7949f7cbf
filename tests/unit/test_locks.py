# SPDX-License-Identifier: Apache-2.0
"""The range locks against a model that looks at every pair (decision 0001, V9)."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from replicator.core.locks import REGION_SHIFT, Lock, LockKind, RangeLocks

REGION = 1 << REGION_SHIFT
LOCAL, PEER, COPY, WANTED, SOURCE_READ = LockKind

#: What the module's first paragraph says, in words a second time: (newcomer, who it waits for).
WAITS_FOR = {
    LOCAL: {LOCAL, PEER, COPY, WANTED, SOURCE_READ},
    PEER: {LOCAL, PEER, COPY, SOURCE_READ},
    WANTED: set(),
    SOURCE_READ: {LOCAL, PEER, COPY, WANTED},
}
#: Never under way at once on one range: a write and anything, but a replicated write in a requested range.
CONFLICTS = {frozenset((a, b)) for a in (LOCAL, PEER, COPY) for b in LockKind} - {frozenset((PEER, WANTED))}


class Table:
    """The table under test, with what it granted."""

    def __init__(self) -> None:
        self.told: list[Lock] = []
        self.locks = RangeLocks(self.told.append)

    def take(self, kind: LockKind, start: int, end: int) -> tuple[Lock, bool]:
        lock = Lock(kind, start, end, self)
        return lock, self.locks.take(lock)


class Model:
    """All locks in one list; who waits for whom is looked up pair by pair."""

    def __init__(self) -> None:
        self.order: list[Lock] = []
        self.waits: dict[Lock, set[Lock]] = {}

    @staticmethod
    def overlap(a: Lock, b: Lock) -> bool:
        return max(a.start, b.start) < min(a.end, b.end)

    def take(self, lock: Lock) -> None:
        self.waits[lock] = {
            other for other in self.order if self.overlap(lock, other) and other.kind in WAITS_FOR[lock.kind]
        }
        self.order.append(lock)

    def become_copy(self, lock: Lock) -> None:
        self.waits[lock] = {o for o in self.order if self.overlap(lock, o) and o.kind is PEER}

    def release(self, lock: Lock) -> None:
        self.order.remove(lock)
        del self.waits[lock]
        for others in self.waits.values():
            others.discard(lock)

    @property
    def granted(self) -> set[Lock]:
        return {lock for lock in self.order if not self.waits[lock]}


POINTS = st.integers(0, 5) | st.sampled_from([REGION - 1, REGION, REGION + 1, 2 * REGION, 7 * REGION + 3])
RANGES = st.tuples(POINTS, POINTS).filter(lambda pair: pair[0] != pair[1]).map(sorted)
#: One node is Primary: the writes of a volume are our clients' or the peer's, never both.
WORKLOADS = st.sampled_from([(LOCAL, SOURCE_READ), (LOCAL, WANTED), (PEER, WANTED), (PEER, SOURCE_READ)])


@settings(max_examples=200)
@given(WORKLOADS, st.lists(st.tuples(st.integers(0, 2), RANGES, st.integers(0, 99)), max_size=40))
def test_the_table_grants_what_a_model_grants_and_every_workload_finishes(
    kinds: tuple[LockKind, LockKind], steps: list[tuple[int, list[int], int]]
) -> None:
    table, model = Table(), Model()

    def agree() -> None:
        assert {lock for lock in model.order if lock.granted} == model.granted
        assert table.locks.count == len(model.order)
        for a in model.granted:
            for b in model.granted - {a}:
                assert not Model.overlap(a, b) or frozenset((a.kind, b.kind)) not in CONFLICTS

    def finish(choice: int) -> None:
        """One that may goes on: an answer arrives, or an operation is over."""
        ready = [lock for lock in model.order if lock.granted]
        lock = ready[choice % len(ready)]
        if lock.kind is WANTED:
            model.become_copy(lock)
            assert table.locks.become_copy(lock) == (lock in model.granted)
            return
        before = model.granted
        model.release(lock)
        table.told.clear()
        table.locks.release(lock)
        assert set(table.told) == model.granted - before
        assert len(table.told) == len(set(table.told)), "told twice"

    for what, (start, end), choice in steps:
        if what == 2 and model.granted:
            finish(choice)
        else:
            kind = kinds[what % 2]
            if kind is WANTED and not table.locks.clear_of_clients(start, end):
                continue
            lock = Lock(kind, start, end, None)
            model.take(lock)
            assert table.locks.take(lock) == (lock in model.granted)
        agree()
    draw = random.Random(len(steps))
    while model.order:
        assert model.granted, "deadlock"
        finish(draw.randrange(99))
        agree()
    assert table.locks.count == 0 and not table.locks._regions, "nothing may be left behind"


def test_overlapping_writes_get_their_turn_in_order_of_arrival() -> None:
    table = Table()
    first, now = table.take(LOCAL, 0, 10)
    second, at_once = table.take(LOCAL, 5, 15)
    third, too = table.take(LOCAL, 12, 20)  # overlaps only the one that waits
    assert (now, at_once, too) == (True, False, False)
    table.locks.release(first)
    assert table.told == [second]
    table.locks.release(second)
    assert table.told == [second, third]


def test_touching_ranges_do_not_overlap() -> None:
    table = Table()
    assert table.take(LOCAL, 0, 10)[1] and table.take(LOCAL, 10, 20)[1]


def test_a_replicated_write_passes_a_requested_range_and_the_answer_waits_for_it() -> None:
    """Waiting the other way round would deadlock protocol C (decision 0001, Resync, 3)."""
    table = Table()
    wanted, _ = table.take(WANTED, 0, 100)
    write, at_once = table.take(PEER, 50, 60)
    assert at_once
    assert not table.locks.become_copy(wanted) and not wanted.granted
    table.locks.release(write)
    assert table.told == [wanted] and wanted.granted


def test_a_replicated_write_behind_a_copy_waits_and_is_not_overwritten_by_it() -> None:
    table = Table()
    wanted, _ = table.take(WANTED, 0, 100)
    assert table.locks.become_copy(wanted)
    write, at_once = table.take(PEER, 50, 60)
    assert not at_once
    table.locks.release(wanted)
    assert table.told == [write]


def test_a_copy_waits_for_replicated_writes_and_not_for_our_clients_that_wait_for_it() -> None:
    table = Table()
    wanted, _ = table.take(WANTED, 0, 100)
    write, at_once = table.take(LOCAL, 0, 10)
    assert not at_once
    assert table.locks.become_copy(wanted)
    table.locks.release(wanted)
    assert table.told == [write]


def test_the_source_reads_after_the_writes_that_came_before_and_before_those_that_come_later() -> None:
    table = Table()
    before, _ = table.take(LOCAL, 0, 10)
    read, at_once = table.take(SOURCE_READ, 0, 100)
    after, _ = table.take(LOCAL, 90, 95)
    assert not at_once
    table.locks.release(before)
    assert table.told == [read]
    table.locks.release(read)
    assert table.told == [read, after]
    assert table.take(SOURCE_READ, 0, 50)[1]
    assert table.take(SOURCE_READ, 0, 50)[1], "two reads do not disturb each other"


@pytest.mark.parametrize(("kind", "clear"), [(LOCAL, False), (PEER, True), (SOURCE_READ, False)])
def test_a_range_is_requested_only_where_our_clients_and_other_copies_are_not(kind: LockKind, clear: bool) -> None:
    table = Table()
    table.take(kind, 3 * REGION, 3 * REGION + 8)
    assert table.locks.clear_of_clients(0, 10 * REGION) == clear
    assert table.locks.clear_of_clients(3 * REGION + 8, 10 * REGION)
    wanted, _ = table.take(WANTED, 0, 8)
    assert not table.locks.clear_of_clients(7, 9)
    table.locks.become_copy(wanted)
    assert not table.locks.clear_of_clients(7, 9)


def test_a_range_over_many_regions_waits_once_and_leaves_nothing_behind() -> None:
    table = Table()
    large, _ = table.take(LOCAL, 0, 33 * REGION)
    small, at_once = table.take(LOCAL, 32 * REGION, 33 * REGION)
    also_large, _ = table.take(LOCAL, REGION // 2, 32 * REGION + 1)
    assert not at_once and also_large.blockers == 2
    for lock in (large, small, also_large):
        table.locks.release(lock)
    assert table.told == [small, also_large] and table.locks.count == 0 and not table.locks._regions


def test_misuse_is_a_broken_invariant() -> None:
    table = Table()
    lock, _ = table.take(LOCAL, 0, 10)
    waiting, _ = table.take(LOCAL, 0, 10)
    for misuse in (
        lambda: table.locks.take(lock),
        lambda: table.locks.release(waiting),
        lambda: table.locks.become_copy(lock),
        lambda: table.take(LOCAL, 5, 5),
    ):
        with pytest.raises(AssertionError):
            misuse()
