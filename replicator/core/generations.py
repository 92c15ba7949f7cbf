# SPDX-License-Identifier: Apache-2.0
"""Which history a copy of the data belongs to, and who copies from whom when two copies meet.

A *generation id* names a moment up to which copies were equal.  `current` is the generation a copy is in;
`bitmap_id` (one per peer) is the fork point: the generation the peer was in when we went on without it, so the
dirty bits towards that peer say what changed since; `history` holds older ids.

`decide` is a pure function of the two states exchanged in one round (decision 0001, V7): both nodes compute it with
swapped arguments and must come to mirrored results.  The rules are a table, first match wins; each has a name
that is logged with both lineages.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from typing import Final

from replicator.core.states import Disk

UNSET: Final = 0
#: The current id of a copy that never held data of ours (DRBD's value, so that operators recognise it).
JUST_CREATED: Final = 4
#: Lowest bit: the generation was made by a Primary.  It carries no identity and is masked in comparisons.
PRIMARY_BIT: Final = 1
#: The decision is refused because clients have seen a generation that the good copy does not contain.
EXPOSED_RULE: Final = "exposed-data"
#: History ids kept; beyond it the oldest is forgotten, and the peer that needs it gets "unrelated data".
HISTORY_MAX: Final = 32


def same(left: int, right: int) -> bool:
    """Two ids name the same generation."""
    return left | PRIMARY_BIT == right | PRIMARY_BIT


def remember(history: tuple[int, ...], generation: int) -> tuple[int, ...]:
    """History with one more id in front; ids that carry no meaning and repetitions are left out."""
    if generation in (UNSET, JUST_CREATED) or any(same(generation, known) for known in history):
        return history
    return (generation, *history)[:HISTORY_MAX]


@dataclass(frozen=True, slots=True, kw_only=True)
class Side:
    """What one node says about its copy in a round."""

    node_id: int
    disk: Disk
    current: int
    bitmap_id: int  # towards the other side
    history: tuple[int, ...]
    dirty: bool  # has bits towards the other side
    full_sync: bool  # the bits towards the other side count as all set
    crashed_primary: bool
    survived: bool  # durably: it held all that the other side had acknowledged when that was lost, or led without it
    primary: bool
    exposed: int = UNSET  # what its clients have seen, if that is not this copy

    @property
    def inconsistent(self) -> bool:
        """A mixture of two moments."""
        return self.disk is Disk.INCONSISTENT

    @property
    def just_created(self) -> bool:
        """Never held our data."""
        return same(self.current, JUST_CREATED)

    def remembers(self, generation: int) -> bool:
        """The id is in this side's history."""
        return any(same(generation, known) for known in self.history)

    def lineage(self) -> set[int]:
        """Every id this copy descends from, without the primary bit."""
        ids = {self.current, self.bitmap_id, *self.history}
        return {generation | PRIMARY_BIT for generation in ids if generation not in (UNSET, JUST_CREATED)}


class Outcome(Enum):
    """What a round leads to."""

    NONE = "no sync"  #: the copies are equal, or nothing can be done about it
    SOURCE = "source"  #: the other side copies from us
    TARGET = "target"  #: we copy from the other side
    SPLIT_BRAIN = "split brain"  #: both went on alone
    UNRELATED = "unrelated data"  #: nothing in common
    CONFLICT = "conflict"  #: the would-be target is Primary on data it believes good
    NO_GOOD_COPY = "no good copy"  #: both are Inconsistent

    @property
    def mirrored(self) -> Outcome:
        """What the other side must have come to."""
        return {Outcome.SOURCE: Outcome.TARGET, Outcome.TARGET: Outcome.SOURCE}.get(self, self)


@dataclass(frozen=True, slots=True)
class Decision:
    """The outcome for the side called `ours`; `rule` names why; `full`: every block is copied."""

    outcome: Outcome
    rule: str
    full: bool = False


@dataclass(frozen=True, slots=True)
class Rule:
    """One row: if `holds(a, b)` then `outcome` for a; also tried with the sides swapped (outcome mirrored)."""

    name: str
    holds: Callable[[Side, Side], bool]
    outcome: Outcome
    full: bool = False


def _equal(a: Side, b: Side) -> bool:
    return same(a.current, b.current)


def _trouble(a: Side, b: Side) -> bool:
    return a.dirty or b.dirty or a.crashed_primary or b.crashed_primary


def _crashed(a: Side, b: Side) -> bool:
    return _equal(a, b) and a.crashed_primary and not b.crashed_primary


def _crashed_both(a: Side, b: Side) -> bool:
    return _equal(a, b) and a.crashed_primary and b.crashed_primary


def _fork_point(a: Side, b: Side) -> bool:
    return not same(a.bitmap_id, UNSET) and same(a.bitmap_id, b.bitmap_id)


#: The rule table of decision 0001.
#:
#: Sources: DRBD's rules 1-3, 4, 6, 8-11, 13, 15-19 (its diskless and quorum rules have no place with two nodes),
#: and its reconcile rules for equal ids with dirty bits.
RULES: Final[tuple[Rule, ...]] = (
    Rule("just-created-both", lambda a, b: a.just_created and b.just_created, Outcome.NONE),
    Rule("just-created", lambda a, _: a.just_created, Outcome.TARGET, full=True),
    Rule(
        "inconsistent-both",
        lambda a, b: _equal(a, b) and a.inconsistent and b.inconsistent,
        Outcome.NO_GOOD_COPY,
    ),
    Rule("inconsistent", lambda a, b: _equal(a, b) and a.inconsistent, Outcome.TARGET),
    Rule(
        # A copy that is known to be old, or whose disk failed, gives way (DRBD: disk states override).
        "outdated",
        lambda a, b: _equal(a, b) and a.disk is Disk.OUTDATED and b.disk > Disk.OUTDATED and _trouble(a, b),
        Outcome.TARGET,
    ),
    Rule(
        "primary-now",
        lambda a, b: _equal(a, b) and a.primary and not b.primary and _trouble(a, b),
        Outcome.SOURCE,
    ),
    Rule(
        # The crashed Primary may be ahead, unless the other durably survived it (decision 0007).
        "crashed-primary",
        lambda a, b: _crashed(a, b) and not b.survived,
        Outcome.SOURCE,
    ),
    Rule("survivor", lambda a, b: _crashed(b, a), Outcome.SOURCE),
    Rule(
        # Both crashed, and one had led without the other: what its clients saw counts, also under A.
        "crashed-last",
        lambda a, b: _crashed_both(a, b) and a.survived and not b.survived,
        Outcome.SOURCE,
    ),
    Rule(
        "crashed-both",
        lambda a, b: _crashed_both(a, b) and a.node_id < b.node_id,
        Outcome.SOURCE,
    ),
    Rule("bits", lambda a, b: _equal(a, b) and a.dirty and not b.dirty, Outcome.SOURCE),
    Rule(
        "bits-both",
        lambda a, b: _equal(a, b) and a.dirty and b.dirty and a.node_id < b.node_id,
        Outcome.SOURCE,
    ),
    Rule("equal", _equal, Outcome.NONE),
    Rule("bitmap", lambda a, b: not same(a.bitmap_id, UNSET) and same(a.bitmap_id, b.current), Outcome.SOURCE),
    Rule(
        "history",
        lambda a, b: a.remembers(b.current) and not b.remembers(a.current),
        Outcome.SOURCE,
        full=True,
    ),
    Rule("bitmap-both", _fork_point, Outcome.SPLIT_BRAIN),
    Rule("history-both", lambda a, b: bool(a.lineage() & b.lineage()), Outcome.SPLIT_BRAIN),
    Rule("unrelated", lambda a, b: True, Outcome.UNRELATED),
)


def decide(ours: Side, theirs: Side) -> Decision:
    """Who copies from whom, seen from `ours`; `decide(b, a)` is the mirror of `decide(a, b)` (V7)."""
    for rule in RULES:
        forward, backward = rule.holds(ours, theirs), rule.holds(theirs, ours)
        if forward and backward:
            # Each would be the other's source: they went on alone, whatever the ids look like.
            contradiction = rule.outcome is not rule.outcome.mirrored
            return Decision(Outcome.SPLIT_BRAIN if contradiction else rule.outcome, rule.name)
        if forward:
            return _checked(ours, theirs, Decision(rule.outcome, f"{rule.name}-self", rule.full))
        if backward:
            return _checked(ours, theirs, Decision(rule.outcome.mirrored, f"{rule.name}-peer", rule.full))
    raise AssertionError("the last rule always holds")  # pragma: no cover - for mypy, which cannot see that


def hold_to_exposed(ours: Side, theirs: Side, decision: Decision) -> Decision:
    """Clients go on only with data that contains what they have seen (V11; decision 0009).

    `decision` stays, or becomes a conflict: the copy that would be good in it has neither the exposed generation nor
    descends from it.  A mixture is not looked at: nobody reads it.  Nor is a copy of their own that meets a peer
    without one: it stays in doubt, and is not read either.
    """
    candidates = {Outcome.SOURCE: (ours,), Outcome.TARGET: (theirs,), Outcome.NONE: (ours, theirs)}
    good = [side for side in candidates.get(decision.outcome, ()) if side.disk > Disk.INCONSISTENT]
    for side, other in ((ours, theirs), (theirs, ours)):
        if same(side.exposed, UNSET) or other.disk is Disk.DISKLESS or not good:
            continue
        if not any(side.exposed | PRIMARY_BIT in copy.lineage() for copy in good):
            return Decision(Outcome.CONFLICT, EXPOSED_RULE)
    return decision


def _checked(ours: Side, theirs: Side, decision: Decision) -> Decision:
    """A source must be good data; a Primary is not overwritten under its clients (rr-conflict disconnect)."""
    assert decision.outcome in (Outcome.SOURCE, Outcome.TARGET), f"{decision.rule} holds one way round only"
    source, target = (ours, theirs) if decision.outcome is Outcome.SOURCE else (theirs, ours)
    if source.inconsistent:
        if target.inconsistent or target.just_created:
            return Decision(Outcome.NO_GOOD_COPY, decision.rule)
        # The lineage says one thing, but that copy is a mixture now (invalidated): the other one is good and related.
        decision = Decision(decision.outcome.mirrored, f"{decision.rule}-inconsistent", True)
        source, target = target, source
    if target.primary and not target.inconsistent:
        return Decision(Outcome.CONFLICT, decision.rule)
    return decision
