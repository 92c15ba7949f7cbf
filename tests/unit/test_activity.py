# SPDX-License-Identifier: Apache-2.0
"""The activity log: what a crash finds, who gets extents, who is evicted."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from replicator.core import activity, sealed
from replicator.core.activity import ACTIVITY_MAX, ActivityLog, Transaction, recover
from replicator.core.geometry import ACTIVITY_OFFSET, PAGE, SECTOR

RING_BYTES = 8 * PAGE


class Ring:
    """The ring on a disk."""

    def __init__(self) -> None:
        fresh, self.sequence = activity.fresh_ring(0)
        self.raw = bytearray(fresh)

    def write(self, transaction: Transaction, subset: int = 255) -> None:
        base = transaction.offset - ACTIVITY_OFFSET
        assert base % PAGE == 0 and 0 <= base < RING_BYTES
        for n in range(8):
            if subset >> n & 1:
                at = n * SECTOR
                self.raw[base + at : base + at + SECTOR] = transaction.block[at : at + SECTOR]


def planned(log: ActivityLog, retired_epoch: int = 0) -> Transaction:
    transaction = log.plan(retired_epoch)
    assert transaction is not None
    return transaction


def filled(extents_max: int, count: int, epoch: int = 0) -> ActivityLog:
    """A log with extents 0 … count-1 hot, each written in `epoch` and released."""
    log = ActivityLog(extents_max, 8)
    log.want(range(min(count, extents_max)))
    planned(log)
    log.done()
    for extent in range(count):
        log.hold(extent, epoch)
        log.release(extent)
    return log


def test_an_extent_is_hot_only_when_its_transaction_is_stable() -> None:
    log = ActivityLog(9, 8)
    assert log.plan(0) is None and not log.starved
    log.want([5])
    assert log.pending
    transaction = planned(log)
    assert (transaction.sequence, transaction.add, transaction.evict) == (9, (5,), ())
    assert log.in_flight and not log.is_hot(5) and list(log.hot()) == []
    log.want([6])
    assert log.plan(0) is None  # one at a time
    assert log.done() == (5,)
    assert log.is_hot(5) and log.pending
    assert planned(log).add == (6,)


@pytest.mark.parametrize("count", [0, 1, 2, 9, 120, 121, 500, ACTIVITY_MAX])
def test_every_size_of_table_is_recovered(count: int) -> None:
    extents = tuple(range(0xFFFFFFFF - count, 0xFFFFFFFF))
    ring = Ring()
    ring.write(Transaction(9, (), (), activity.encode(reversed(extents), 9), activity.ring_offset(9)))
    assert recover(bytes(ring.raw)) == activity.Recovered(extents, 9, False, ())


def test_the_ring_wraps_and_the_newest_counts() -> None:
    ring, log = Ring(), ActivityLog(100, 8)
    for extent in range(30):
        log.want([extent])
        transaction = planned(log)
        assert transaction.offset == ACTIVITY_OFFSET + transaction.sequence % 8 * PAGE
        ring.write(transaction)
        log.done()
        assert recover(bytes(ring.raw)).extents == tuple(range(extent + 1))


def test_a_transaction_interrupted_anywhere_leaves_the_one_before_or_is_complete() -> None:
    base = filled(1008, 600)
    before = tuple(base.hot())
    base.want([5000])
    transaction = planned(base)
    for subset in range(256):
        ring = Ring()
        ring.write(Transaction(9, (), (), activity.encode(before, 9), activity.ring_offset(9)))
        ring.write(transaction, subset)
        found = recover(bytes(ring.raw))
        assert not found.unknown
        assert found.extents in (before, (*before, 5000))
        assert (subset != 255) or found.extents == (*before, 5000)


def test_after_an_interrupted_transaction_its_sequence_is_not_used_again() -> None:
    ring = Ring()
    many = range(900)
    for attempt in range(40):
        found = recover(bytes(ring.raw))
        assert (found.extents, found.unknown) == ((), False)
        log = ActivityLog(1008, found.sequence)
        log.want(extent + attempt for extent in many)
        ring.write(planned(log), 0x5A if attempt % 2 else 0xA4)


@given(st.integers(0, PAGE * 8 - 1))
def test_rot_in_the_newest_transaction_makes_the_hot_set_unknown(bit: int) -> None:
    ring = Ring()
    block = bytearray(activity.encode(range(100, 1100), 9))
    block[bit // 8] ^= 1 << bit % 8
    ring.write(Transaction(9, (), (), bytes(block), activity.ring_offset(9)))
    found = recover(bytes(ring.raw))
    if bit // 8 % SECTOR >= sealed.PIECE:  # a tag: the content is whole
        assert (found.unknown, found.extents) == (False, tuple(range(100, 1100)))
    else:
        assert (found.unknown, found.extents) == (True, ())


@pytest.mark.parametrize("raw", [bytes(RING_BYTES), b"\xff" * RING_BYTES, b"RPLACTIV" * (RING_BYTES // 8)])
def test_a_ring_without_a_valid_transaction_is_unknown(raw: bytes) -> None:
    assert recover(raw).unknown


@pytest.mark.parametrize("body", [b"abc", struct.pack(">2L", 2, 1), struct.pack(">2L", 1, 1), bytes(4036)])
def test_an_impossible_transaction_makes_the_hot_set_unknown(body: bytes) -> None:
    ring = Ring()
    ring.write(Transaction(9, (), (), sealed.seal(activity.MAGIC, 9, body), activity.ring_offset(9)))
    found = recover(bytes(ring.raw))
    assert found.unknown and "impossible" in found.notes[0]


@pytest.mark.parametrize("sequence", [0, 5, 8, 1000003])
def test_a_fresh_ring_is_empty_and_newer_than_what_was_there(sequence: int) -> None:
    raw, last = activity.fresh_ring(sequence)
    found = recover(raw)
    assert (found.extents, found.sequence, found.unknown, last) == ((), sequence + 8, False, sequence + 8)


def test_the_largest_request_gets_nine_extents_at_once_or_none() -> None:
    log = filled(9, 9)
    log.hold(4, 1)
    log.want(range(100, 109))
    assert log.plan(0) is None and log.starved
    log.release(4)
    assert log.plan(0) is None and log.starved  # epoch 1 has not retired
    transaction = planned(log, 1)
    assert set(transaction.evict) == set(range(9)) and set(transaction.add) == set(range(100, 109))
    assert log.hot_count == 0
    log.done()
    assert log.hot_count == 9


def test_two_requests_that_need_half_of_each_other_are_served_one_after_the_other() -> None:
    log = ActivityLog(10, 8)
    log.want(range(0, 8))
    log.want(range(4, 12))
    assert set(planned(log).add) == set(range(0, 8))  # the second does not fit beside it
    assert log.starved
    log.done()
    for extent in range(8):
        log.hold(extent, 1)
    assert log.plan(0) is None and log.starved
    for extent in range(8):
        log.release(extent)
    second = planned(log, 1)
    assert set(second.add) == set(range(8, 12))
    assert not set(second.evict) & set(range(4, 8))  # what it needs itself is kept
    log.done()
    assert all(log.is_hot(extent) for extent in range(4, 12))


def test_a_small_request_does_not_overtake_one_that_waits_for_room() -> None:
    log = filled(9, 8)
    log.hold(0, 1)
    log.want(range(100, 109))
    log.want([50])
    assert log.plan(0) is None and log.starved and log.pending


def test_the_least_recently_used_are_evicted_first_with_a_few_to_spare() -> None:
    log = filled(64, 64)
    for extent in (0, 1, 2):
        log.hold(extent, 1)
        log.release(extent)
    log.want([1000])
    assert planned(log, 1).evict == tuple(range(3, 12))  # one needed, 64 // 8 to spare
    assert not log.is_hot(3)


def test_nothing_is_evicted_while_there_is_room() -> None:
    log = filled(64, 63)
    log.want([1000])
    assert planned(log, 9).evict == ()


def test_an_extent_whose_epoch_has_not_retired_or_that_is_held_is_never_evicted() -> None:
    log = filled(16, 16, epoch=3)
    log.hold(0, 2)  # an older epoch does not lower it
    log.release(0)
    log.hold(1, 1)
    log.want([100])
    assert log.plan(2) is None and log.starved
    assert 1 not in planned(log, 3).evict


def test_emptying_waits_for_holds_epochs_and_requests_and_works_on_an_empty_log() -> None:
    log = filled(16, 3, epoch=5)
    assert log.plan_empty(4) is None and log.starved
    log.hold(2, 5)
    assert log.plan_empty(5) is None and log.starved
    log.release(2)
    transaction = log.plan_empty(5)
    assert transaction is not None and transaction.evict == (0, 1, 2)
    assert log.plan_empty(5) is None
    assert sealed.unseal(activity.MAGIC, transaction.block) == sealed.Sealed(transaction.sequence, b"")
    assert log.done() == () and log.hot_count == 0
    assert log.plan_empty(0) is not None
    log.done()
    log.want([1])
    assert log.plan_empty(0) is None


def test_misuse_is_a_broken_invariant() -> None:
    log = filled(9, 1)
    with pytest.raises(AssertionError):
        log.release(0)
    with pytest.raises(AssertionError):
        log.want(range(10))
    with pytest.raises(AssertionError):
        log.want([])
    with pytest.raises(AssertionError):
        log.want([1 << 32])
    with pytest.raises(AssertionError):
        log.done()
    with pytest.raises(KeyError):
        log.hold(1, 1)
    for size in (8, 1009):
        with pytest.raises(AssertionError):
            ActivityLog(size, 0)


def test_a_transaction_that_completed_and_rotted_makes_the_hot_set_unknown_and_says_so() -> None:
    ring, log = Ring(), ActivityLog(1008, 8)
    log.want(range(100, 1100))
    transaction = planned(log)
    ring.write(transaction)
    ring.raw[transaction.offset - ACTIVITY_OFFSET + 2 * SECTOR] ^= 1
    found = recover(bytes(ring.raw))
    assert found.unknown and found.notes == ("a transaction of the activity log newer than 8 may be lost",)


class Writer:
    """Launches a request when all its extents are hot; checks what a crash after each step would find."""

    def __init__(self, extents_max: int) -> None:
        self.ring, self.log = Ring(), ActivityLog(extents_max, 8)
        self.waiting: list[range] = []
        self.flying: list[range] = []
        self.last_epoch: dict[int, int] = {}
        self.epoch, self.retired = 1, 0

    def ask(self, request: range) -> None:
        self.waiting.append(request)
        self.launch()
        if self.waiting:
            self.log.want(request)

    def launch(self) -> None:
        for request in list(self.waiting):
            if all(self.log.is_hot(extent) for extent in request):
                self.waiting.remove(request)
                self.flying.append(request)
                for extent in request:
                    self.log.hold(extent, self.epoch)
                    self.last_epoch[extent] = self.epoch

    def turn(self, torn: int) -> None:
        transaction = self.log.plan(self.retired)
        if transaction is not None:
            assert all(self.last_epoch.get(extent, 0) <= self.retired for extent in transaction.evict)
            self.ring.write(transaction, torn)
            self.check()
            self.ring.write(transaction)
            self.log.done()
            self.launch()
            self.check()

    def check(self) -> None:
        found = recover(bytes(self.ring.raw))
        risky = {extent for extent, last in self.last_epoch.items() if last > self.retired}
        assert not found.unknown and risky <= set(found.extents)
        assert len(found.extents) <= self.log.extents_max

    def retire(self) -> None:
        for request in self.flying:
            for extent in request:
                self.log.release(extent)
        self.flying.clear()
        self.retired, self.epoch = self.epoch, self.epoch + 1


@settings(max_examples=60, deadline=None)
@given(
    st.integers(9, 40),
    st.lists(st.tuples(st.integers(0, 60), st.integers(1, 9), st.integers(0, 3), st.booleans()), max_size=50),
)
def test_every_request_is_served_and_every_crash_finds_every_write_in_flight(
    extents_max: int, requests: list[tuple[int, int, int, bool]]
) -> None:
    writer = Writer(extents_max)
    for first, count, torn, ends in requests:
        writer.ask(range(first, first + count))
        writer.turn((0x0F, 0xF0, 0x01, 0xFE)[torn])
        if ends:
            writer.retire()
    for _ in range(2 * len(requests) + 2):
        writer.retire()
        writer.turn(0x3C)
    assert not writer.waiting
