# SPDX-License-Identifier: Apache-2.0
"""Who copies from whom (decision 0001, V7 and the decision table), over colliding ids and by example."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from replicator.core.context import Context
from replicator.core.generations import (
    HISTORY_MAX,
    JUST_CREATED,
    PRIMARY_BIT,
    RULES,
    UNSET,
    Decision,
    Outcome,
    Side,
    decide,
    remember,
    same,
)
from replicator.core.options import Options
from replicator.core.states import Disk

G1, G2, G3, G4, G5 = (number << 8 for number in range(1, 6))
GENERATIONS = [G1, G2, G3, G4, G5, G1 | PRIMARY_BIT, G2 | PRIMARY_BIT]
DISKS = [Disk.INCONSISTENT, Disk.OUTDATED, Disk.CONSISTENT, Disk.UP_TO_DATE]

A = Side(
    node_id=0,
    disk=Disk.UP_TO_DATE,
    current=G1,
    bitmap_id=UNSET,
    history=(),
    dirty=False,
    full_sync=False,
    crashed_primary=False,
    survived=False,
    primary=False,
)
B = replace(A, node_id=1)
FULL = True


def sides(node_id: int) -> st.SearchStrategy[Side]:
    return st.builds(
        Side,
        node_id=st.just(node_id),
        disk=st.sampled_from(DISKS),
        current=st.sampled_from([*GENERATIONS, JUST_CREATED, JUST_CREATED | PRIMARY_BIT]),
        bitmap_id=st.sampled_from([UNSET, UNSET, *GENERATIONS]),
        history=st.lists(st.sampled_from(GENERATIONS), max_size=3).map(tuple),
        dirty=st.booleans(),
        full_sync=st.booleans(),
        crashed_primary=st.booleans(),
        survived=st.booleans(),
        primary=st.booleans(),
    )


PAIRS = st.tuples(sides(0), sides(1)) | st.tuples(sides(1), sides(0))


def mirrored(decision: Decision) -> Decision:
    """What the other side must have come to."""
    swap = {"self": "peer", "peer": "self"}
    rule = "-".join(swap.get(word, word) for word in decision.rule.split("-"))
    return Decision(decision.outcome.mirrored, rule, decision.full)


# --- V7 over everything


@settings(max_examples=400)
@given(PAIRS)
def test_both_nodes_come_to_mirrored_decisions(pair: tuple[Side, Side]) -> None:
    ours, theirs = pair
    there = decide(theirs, ours)
    assert decide(ours, theirs) == mirrored(there)


@settings(max_examples=400)
@given(PAIRS)
def test_a_source_is_never_a_mixture_and_a_primary_on_good_data_is_never_a_target(pair: tuple[Side, Side]) -> None:
    decision = decide(*pair)
    if decision.outcome not in (Outcome.SOURCE, Outcome.TARGET):
        return
    source, target = pair if decision.outcome is Outcome.SOURCE else pair[::-1]
    assert source.disk is not Disk.INCONSISTENT
    assert not same(source.current, JUST_CREATED)
    assert not target.primary or target.disk is Disk.INCONSISTENT


@settings(max_examples=400)
@given(PAIRS)
def test_no_sync_means_equal_ids_no_bits_and_nobody_in_doubt(pair: tuple[Side, Side]) -> None:
    ours, theirs = pair
    if decide(ours, theirs).outcome is not Outcome.NONE:
        return
    assert same(ours.current, theirs.current)
    if not same(ours.current, JUST_CREATED):
        assert not (ours.dirty or theirs.dirty or ours.crashed_primary or theirs.crashed_primary)
        assert Disk.INCONSISTENT not in (ours.disk, theirs.disk)


@settings(max_examples=400)
@given(PAIRS)
def test_equal_generations_with_bits_are_never_left_alone_while_one_copy_is_good(pair: tuple[Side, Side]) -> None:
    ours, theirs = pair
    theirs = replace(theirs, current=ours.current ^ PRIMARY_BIT)
    decision = decide(ours, replace(theirs, dirty=True))
    nobody_good = same(ours.current, JUST_CREATED) or ours.disk is theirs.disk is Disk.INCONSISTENT
    assert nobody_good or decision.outcome in (Outcome.SOURCE, Outcome.TARGET, Outcome.CONFLICT)


@settings(max_examples=400)
@given(PAIRS)
def test_a_bitmap_sync_needs_equal_ids_or_a_fork_point_that_the_source_recorded(pair: tuple[Side, Side]) -> None:
    decision = decide(*pair)
    if decision.outcome not in (Outcome.SOURCE, Outcome.TARGET) or decision.full:
        return
    source, target = pair if decision.outcome is Outcome.SOURCE else pair[::-1]
    assert same(source.current, target.current) or same(source.bitmap_id, target.current)


@settings(max_examples=400)
@given(PAIRS)
def test_the_primary_bit_is_no_identity(pair: tuple[Side, Side]) -> None:
    ours, theirs = pair
    plain = decide(ours, theirs)
    flipped = replace(
        ours,
        current=ours.current ^ PRIMARY_BIT,
        bitmap_id=ours.bitmap_id ^ PRIMARY_BIT if ours.bitmap_id else UNSET,
        history=tuple(generation ^ PRIMARY_BIT for generation in ours.history),
    )
    assert decide(flipped, theirs) == plain


def test_every_rule_of_the_table_is_reached() -> None:
    """A rule that nothing reaches is shadowed by one before it."""
    draw = random.Random(1)

    def some(node_id: int) -> Side:
        return Side(
            node_id=node_id,
            disk=draw.choice(DISKS),
            current=draw.choice([*GENERATIONS, JUST_CREATED]),
            bitmap_id=draw.choice([UNSET, *GENERATIONS]),
            history=tuple(draw.sample(GENERATIONS, draw.randrange(3))),
            dirty=draw.random() < 0.3,
            full_sync=False,
            crashed_primary=draw.random() < 0.3,
            survived=draw.random() < 0.5,
            primary=draw.random() < 0.2,
        )

    names = {rule.name for rule in RULES}
    reached = set()
    for _ in range(8000):
        rule = decide(some(0), some(1)).rule.removesuffix("-inconsistent")
        reached.add(rule.removesuffix("-self").removesuffix("-peer"))
    assert reached - {"inconsistent-both"} == names - {"inconsistent-both"}
    both = [replace(side, disk=Disk.INCONSISTENT) for side in (A, B)]
    assert decide(*both).rule == "inconsistent-both"


# --- the decision table, row by row

EXAMPLES: dict[str, tuple[Side, Side, Outcome, str, bool]] = {
    "1 both just created": (
        replace(A, current=JUST_CREATED, disk=Disk.INCONSISTENT),
        replace(B, current=JUST_CREATED, disk=Disk.INCONSISTENT),
        Outcome.NONE,
        "just-created-both",
        False,
    ),
    "2 a new disk gets everything": (
        replace(A, current=JUST_CREATED, disk=Disk.INCONSISTENT),
        B,
        Outcome.TARGET,
        "just-created-self",
        FULL,
    ),
    "3 two mixtures": (
        replace(A, disk=Disk.INCONSISTENT),
        replace(B, disk=Disk.INCONSISTENT),
        Outcome.NO_GOOD_COPY,
        "inconsistent-both",
        False,
    ),
    "4 a resync goes on": (
        replace(A, disk=Disk.INCONSISTENT, dirty=True),
        B,
        Outcome.TARGET,
        "inconsistent-self",
        False,
    ),
    "4 a resync goes on although only the source knows what is missing": (
        replace(A, disk=Disk.INCONSISTENT),
        replace(B, dirty=True),
        Outcome.TARGET,
        "inconsistent-self",
        False,
    ),
    "5 a running Primary is the source": (
        replace(A, primary=True),
        replace(B, dirty=True),
        Outcome.SOURCE,
        "primary-now-self",
        False,
    ),
    "5 even when the other one crashed as Primary": (
        replace(A, primary=True),
        replace(B, crashed_primary=True),
        Outcome.SOURCE,
        "primary-now-self",
        False,
    ),
    "6 the crashed Primary is the source": (
        replace(A, crashed_primary=True),
        B,
        Outcome.SOURCE,
        "crashed-primary-self",
        False,
    ),
    "7 but not of one who survived it": (
        replace(A, crashed_primary=True, dirty=True),
        replace(B, survived=True),
        Outcome.TARGET,
        "survivor-peer",
        False,
    ),
    "8 both crashed": (
        replace(A, crashed_primary=True),
        replace(B, crashed_primary=True, dirty=True),
        Outcome.SOURCE,
        "crashed-both-self",
        False,
    ),
    "9 bits": (A, replace(B, dirty=True), Outcome.TARGET, "bits-peer", False),
    "10 bits on both": (
        replace(A, dirty=True),
        replace(B, dirty=True),
        Outcome.SOURCE,
        "bits-both-self",
        False,
    ),
    "11 equal": (A, B, Outcome.NONE, "equal", False),
    "12 went on alone": (
        replace(A, current=G2, bitmap_id=G1, history=(G4,)),
        replace(B, history=(G4,)),
        Outcome.SOURCE,
        "bitmap-self",
        False,
    ),
    "13 so long ago that no bitmap tells": (
        A,
        replace(B, current=G3, bitmap_id=G2, history=(G1,)),
        Outcome.TARGET,
        "history-peer",
        FULL,
    ),
    "14 both went on from one point": (
        replace(A, current=G2, bitmap_id=G1),
        replace(B, current=G3, bitmap_id=G1),
        Outcome.SPLIT_BRAIN,
        "bitmap-both",
        False,
    ),
    "15 related long ago": (
        replace(A, current=G2, history=(G1,)),
        replace(B, current=G3, history=(G1,)),
        Outcome.SPLIT_BRAIN,
        "history-both",
        False,
    ),
    "16 strangers": (A, replace(B, current=G2), Outcome.UNRELATED, "unrelated", False),
    "a good mixture cannot be made of a mixture": (
        replace(A, current=JUST_CREATED, disk=Disk.INCONSISTENT),
        replace(B, disk=Disk.INCONSISTENT),
        Outcome.NO_GOOD_COPY,
        "just-created-self",
        False,
    ),
    "a Primary is not overwritten under its clients": (
        replace(A, primary=True),
        replace(B, current=G2, bitmap_id=G1),
        Outcome.CONFLICT,
        "bitmap-peer",
        False,
    ),
    "unless its own copy is a mixture anyway": (
        replace(A, primary=True, disk=Disk.INCONSISTENT),
        replace(B, current=G2, bitmap_id=G1),
        Outcome.TARGET,
        "bitmap-peer",
        False,
    ),
    "known to be old beats having crashed as Primary": (
        replace(A, disk=Disk.OUTDATED, crashed_primary=True, dirty=True),
        B,
        Outcome.TARGET,
        "outdated-self",
        False,
    ),
    "known to be old beats being Primary, but not under its clients": (
        replace(A, disk=Disk.OUTDATED, primary=True),
        replace(B, dirty=True),
        Outcome.CONFLICT,
        "outdated-self",
        False,
    ),
    "an invalidated newer copy is filled from the older good one": (
        replace(A, current=G2, bitmap_id=G1, disk=Disk.INCONSISTENT, dirty=True),
        B,
        Outcome.TARGET,
        "bitmap-self-inconsistent",
        FULL,
    ),
    "each says the other is its past": (
        replace(A, current=G1, bitmap_id=G2),
        replace(B, current=G2, bitmap_id=G1),
        Outcome.SPLIT_BRAIN,
        "bitmap",
        False,
    ),
    "each is in the other's history": (
        replace(A, current=G1, history=(G2,)),
        replace(B, current=G2, history=(G1,)),
        Outcome.SPLIT_BRAIN,
        "history-both",
        False,
    ),
}


@pytest.mark.parametrize("example", EXAMPLES)
def test_the_decision_table_by_example(example: str) -> None:
    ours, theirs, outcome, rule, full = EXAMPLES[example]
    decision = decide(ours, theirs)
    assert decision == Decision(outcome, rule, full)
    assert decide(theirs, ours) == mirrored(decision)


def test_of_two_crashed_primaries_the_one_that_led_without_the_other_counts() -> None:
    first, last = replace(A, crashed_primary=True), replace(B, crashed_primary=True, survived=True)
    assert decide(first, last) == Decision(Outcome.TARGET, "crashed-last-peer")
    assert decide(first, replace(last, survived=False)).outcome is Outcome.SOURCE  # else the lower node id
    both = replace(first, survived=True)
    assert decide(both, last).rule == "crashed-both-self"


def test_no_fork_point_is_not_a_fork_point_even_if_the_peer_sends_nonsense() -> None:
    for there in (replace(B, current=UNSET), replace(B, current=G3, bitmap_id=UNSET | PRIMARY_BIT)):
        for ours, theirs in ((A, there), (there, A)):
            assert decide(ours, theirs).outcome is Outcome.UNRELATED


# --- ids and history


def test_the_history_is_newest_first_bounded_and_without_repetitions_or_empty_ids() -> None:
    history: tuple[int, ...] = ()
    for number in range(1, HISTORY_MAX + 4):
        history = remember(history, number << 8)
    assert len(history) == HISTORY_MAX and history[0] == (HISTORY_MAX + 3) << 8
    for nothing in (UNSET, JUST_CREATED, history[0], history[5] | PRIMARY_BIT):
        assert remember(history, nothing) == history


def test_a_lineage_holds_no_id_without_meaning() -> None:
    fresh = replace(A, current=JUST_CREATED, bitmap_id=UNSET, history=())
    assert fresh.lineage() == set()
    assert replace(A, bitmap_id=G2, history=(G3,)).lineage() == {G | PRIMARY_BIT for G in (G1, G2, G3)}


def test_a_fresh_id_is_never_one_that_has_a_meaning() -> None:
    drawn = iter((UNSET, PRIMARY_BIT, JUST_CREATED, JUST_CREATED | PRIMARY_BIT, 7, 8))
    options = Options(resource="r0", node_id=0, node_name="alpha", peers={1: "beta"}, volumes=(0,))
    assert Context(options, lambda: next(drawn)).new_id() == 8
