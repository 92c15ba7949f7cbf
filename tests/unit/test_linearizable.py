# SPDX-License-Identifier: Apache-2.0
"""The checker of histories (tests/faults/linearizable.py) against trying every order, and against known lies."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from tests.faults.linearizable import (
    INITIAL,
    Kind,
    Operation,
    by_search,
    epoch_prefixes,
    prefixes,
    unflushed,
    violations,
)


def write(value: int, invoked: int, returned: int | None, *, block: int = 0) -> Operation:
    return Operation(0, Kind.WRITE, block, value, invoked, returned)


def read(value: int, invoked: int, returned: int | None, *, block: int = 0) -> Operation:
    return Operation(1, Kind.READ, block, value, invoked, returned)


def linearizable(*history: Operation) -> bool:
    found = violations(history)
    assert bool(found) != by_search(history), (found, history)
    return not found


# --- known histories


def test_one_thing_after_the_other_is_possible() -> None:
    assert linearizable(read(INITIAL, 0, 1), write(1, 2, 3), read(1, 4, 5), write(2, 6, 7), read(2, 8, 9))


def test_a_lost_acknowledged_write_is_found() -> None:
    assert not linearizable(write(1, 0, 1), write(2, 2, 3), read(1, 4, 5))


def test_a_lost_first_write_is_found() -> None:
    assert not linearizable(write(1, 0, 1), read(INITIAL, 2, 3))


def test_a_stale_read_behind_a_fresh_one_is_found() -> None:
    assert not linearizable(write(1, 0, 1), write(2, 2, 9), read(2, 3, 4), read(1, 5, 6))


def test_a_value_from_nowhere_is_found() -> None:
    assert not linearizable(write(1, 0, 1), read(7, 2, 3))


def test_a_value_from_the_future_is_found() -> None:
    assert not linearizable(read(1, 0, 1), write(1, 2, 3))


def test_a_read_beside_a_write_may_see_either() -> None:
    assert linearizable(write(1, 0, 1), write(2, 2, 9), read(1, 3, 4))
    assert linearizable(write(1, 0, 1), write(2, 2, 9), read(2, 3, 4))


def test_a_write_without_an_answer_may_have_happened_or_not() -> None:
    assert linearizable(write(1, 0, 1), write(2, 2, None), read(1, 3, 4), read(1, 5, 6))
    assert linearizable(write(1, 0, 1), write(2, 2, None), read(1, 3, 4), read(2, 50, 60))


def test_a_write_without_an_answer_must_not_be_taken_back_once_it_was_seen() -> None:
    assert not linearizable(write(1, 0, 1), write(2, 2, None), read(2, 3, 4), read(1, 5, 6))


def test_a_value_that_came_and_went_while_another_was_there_is_found() -> None:
    history = (write(1, 0, 1), write(2, 2, 7), read(1, 8, 9))
    assert not linearizable(*history)
    assert "came and went" in violations(history)[0].why


def test_a_read_without_an_answer_says_nothing() -> None:
    assert linearizable(write(1, 0, 1), read(7, 2, None))


def test_blocks_are_judged_apart() -> None:
    good = (write(1, 0, 1), read(1, 2, 3))
    bad = (write(2, 0, 1, block=5), read(INITIAL, 2, 3, block=5))
    (found,) = violations(good + bad)
    assert found.block == 5 and "client 1 read 0" in str(found)


def test_two_writes_of_one_value_are_a_mistake_of_the_test() -> None:
    with pytest.raises(AssertionError, match="not a value of its own"):
        violations([write(1, 0, 1), write(1, 2, 3)])


# --- any history


@st.composite
def histories(draw: st.DrawFn) -> list[Operation]:
    """Any operations at all: most of them impossible."""
    writes = draw(st.integers(0, 4))
    times = st.integers(0, 12)
    history = []
    for value in range(1, writes + 1):
        begin = draw(times)
        history.append(write(value, begin, draw(st.one_of(st.none(), st.integers(begin, 14)))))
    for _ in range(draw(st.integers(0, 5))):
        begin = draw(times)
        end = draw(st.one_of(st.integers(begin, 14), st.none()))
        history.append(read(draw(st.integers(0, writes)), begin, end))
    return history


@st.composite
def possible_histories(draw: st.DrawFn) -> list[Operation]:
    """What one disk does, with each effect somewhere between begin and end, or (a write) without an end."""
    value, history = INITIAL, []
    for number in range(1, draw(st.integers(1, 9)) + 1):
        at = 10 * number
        begin = at - draw(st.integers(0, 40))
        end = None if draw(st.integers(0, 5)) == 0 else at + draw(st.integers(0, 40))
        if draw(st.booleans()):
            value = number
            history.append(write(number, begin, end))
        else:
            history.append(read(value, begin, end))
    if draw(st.booleans()):
        history.append(write(99, draw(st.integers(0, 90)), None))  # never happened
    return history


@given(histories())
def test_zones_and_search_agree(history: list[Operation]) -> None:
    assert bool(violations(history)) != by_search(history)


@given(possible_histories())
def test_what_one_disk_does_is_accepted(history: list[Operation]) -> None:
    assert not violations(history)


@given(possible_histories(), st.data())
def test_a_read_turned_into_an_overwritten_value_is_rejected(history: list[Operation], data: st.DataObject) -> None:
    """The mutation that a lost write looks like: somebody reads, long after everything, what was overwritten."""
    written = [o for o in history if o.kind is Kind.WRITE and o.returned_ns is not None]
    assume(written)
    over_ns = 1000
    lost = data.draw(st.sampled_from([INITIAL] + [o.value for o in written]))
    history = [*history, write(1000, over_ns, over_ns + 1), read(lost, over_ns + 2, over_ns + 3)]
    assert violations(history)
    history[-1] = replace(history[-1], value=1000)
    assert not violations(history)


@given(possible_histories(), st.data())
def test_a_changed_read_is_judged_as_the_search_does(history: list[Operation], data: st.DataObject) -> None:
    reads = [index for index, o in enumerate(history) if o.kind is Kind.READ]
    values = [INITIAL] + [o.value for o in history if o.kind is Kind.WRITE]
    assume(reads)
    place = data.draw(st.sampled_from(reads))
    history[place] = replace(history[place], value=data.draw(st.sampled_from(values)))
    assert bool(violations(history)) != by_search(history)


# --- after a power cut of both


def test_a_flushed_write_is_there_after_a_power_cut() -> None:
    history = [write(1, 0, 1), write(2, 2, 3), write(3, 6, 7), write(4, 6, None)]
    assert unflushed(history, [(4, 5)]) == {0: {2, 3, 4}}


def test_without_a_flush_anything_may_be_left() -> None:
    assert unflushed([write(1, 0, 1), write(2, 2, 3)], []) == {0: {INITIAL, 1, 2}}


def test_a_flush_says_nothing_of_a_write_that_was_not_answered_before_it_was_asked_for() -> None:
    assert unflushed([write(1, 0, 1), write(2, 2, 5)], [(4, 9)]) == {0: {1, 2}}


def test_of_two_writes_beside_each_other_a_flush_may_keep_either() -> None:
    assert unflushed([write(1, 0, 3), write(2, 1, 2)], [(5, 6)]) == {0: {1, 2}}


def test_a_write_with_fua_is_there_after_a_power_cut_and_says_nothing_of_others() -> None:
    history = [write(1, 0, 1), write(2, 2, 3), write(3, 0, 1, block=1)]
    assert unflushed(history, [], {2}) == {0: {2}, 1: {INITIAL, 3}}


# --- what an asynchronous mirror may lose


def test_a_suffix_may_be_missing_but_no_hole() -> None:
    order = [(0, 1), (1, 2), (0, 3), (1, 4)]
    assert prefixes(order, {0: 3, 1: 4}) == [4]
    assert prefixes(order, {0: 1, 1: 2}) == [2]
    assert prefixes(order, {0: INITIAL, 1: INITIAL}) == [0]
    assert prefixes(order, {0: 1, 1: 4}) == []  # 3 is missing and 4 is there


def test_a_suffix_must_not_reach_into_what_was_flushed() -> None:
    assert prefixes([(0, 1), (0, 2)], {0: 1}, stable=1) == [1]
    assert prefixes([(0, 1), (0, 2)], {0: 1}, stable=2) == []


@given(st.lists(st.integers(0, 2), max_size=8), st.data())
def test_every_prefix_is_recognised(blocks: list[int], data: st.DataObject) -> None:
    order = [(block, number) for number, block in enumerate(blocks, 1)]
    length = data.draw(st.integers(0, len(order)))
    held = dict.fromkeys(range(3), INITIAL) | dict(order[:length])
    assert length in prefixes(order, held)


def test_after_a_power_cut_part_of_one_epoch_may_be_missing_and_nothing_of_an_earlier_one() -> None:
    epochs = [[(0, 1), (1, 2)], [(0, 3), (1, 4)], [(0, 5)]]
    assert epoch_prefixes(epochs, {0: 1, 1: 4}) == [1]
    assert epoch_prefixes(epochs, {0: 3, 1: 4}) == [1, 2]
    assert epoch_prefixes(epochs, {0: 5, 1: 4}) == [2, 3]
    assert epoch_prefixes(epochs, {0: INITIAL, 1: INITIAL}) == [0]
    assert epoch_prefixes(epochs, {0: INITIAL, 1: 4}) == []  # 4 is of a later epoch than the missing 1
    assert epoch_prefixes(epochs, {0: 5, 1: 2}) == []
