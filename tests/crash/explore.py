# SPDX-License-Identifier: Apache-2.0
"""All crashes of one operation: record it once, look at every image, recover from every kind of image.

Every image is read by the core's own functions and checked.  Images that the core reads alike, with alike data, are one
class, and a recovery is run for each class: from both disks (the other node's as complete as can be, and as lossy as
can be) and beside the other node's living process.  `limit` bounds the recoveries of each sort, spread evenly.
"""

from __future__ import annotations

import traceback
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

from tests.crash.enumerate import Class, Left, after_power_cut
from tests.crash.operations import Operation, Scene
from tests.crash.record import Moment, after_crash
from tests.crash.recover import Case, beside_the_living, check_reading, together

BOTH = frozenset({0, 1})


@dataclass
class Findings:
    """One row of the table."""

    name: str
    moments: int = 0
    steps: int = 0  #: durable steps of both nodes
    images: int = 0
    distinct: int = 0
    classes: int = 0
    recoveries: int = 0
    nested: int = 0
    reached: Counter[str] = field(default_factory=Counter)
    faults: list[str] = field(default_factory=list)

    def row(self) -> str:
        """For people."""
        reached = "; ".join(f"{what} {count}" for what, count in sorted(self.reached.items()))
        return (
            f"{self.name:36} {self.moments:5} {self.steps:5} {self.images:7} {self.distinct:7} {self.classes:6} "
            f"{self.recoveries:6} {self.nested:6}  {reached}"
        )


HEADER = (
    f"{'operation':36} {'event':>5} {'steps':>5} {'images':>7} {'distin.':>7} {'class':>6} {'recov.':>6} {'nested':>6}"
)


def record(operation: Operation) -> tuple[list[Moment], int]:
    """Run it once, undisturbed; its moments, and how many durable steps it took."""
    scene = operation.scene()
    operation.setup(scene)
    before = scene.rec.steps
    scene.rec.start()
    operation.act(scene)
    scene.m.pause()
    scene.rec.check_model()
    return scene.rec.moments, scene.rec.steps - before


Item = TypeVar("Item")


def spread(items: Sequence[Item], limit: int | None) -> list[Item]:
    """At most `limit` of them, evenly."""
    if limit is None or len(items) <= limit:
        return list(items)
    return [items[n * len(items) // limit] for n in range(limit)]


def cases(operation: Operation, moments: list[Moment], findings: Findings) -> tuple[list[Case], list[Case]]:
    """Look at every image; one case per class, for `together` and for `beside_the_living`."""
    from_disks: dict[object, Case] = {}
    living: dict[object, Case] = {}
    distinct: set[tuple[int, int]] = set()
    classes: set[tuple[int, Class]] = set()
    looked_at: set[object] = set()
    for moment in moments:
        for victim in (0, 1):
            other_kept = moment.kept(1 - victim)
            others = {other_kept.key: other_kept, moment.stable[1 - victim].key: moment.stable[1 - victim]}
            state = (victim, moment.stable[victim].key, moment.volatile[victim], moment.promises)
            fresh = (*state, moment.up, *others) not in looked_at
            looked_at.add((*state, moment.up, *others))
            if not fresh:
                continue
            for left in after_power_cut(moment, victim):
                findings.images += 1
                if (victim, left.image.key) not in distinct:
                    distinct.add((victim, left.image.key))
                    _checked(findings, operation, left)
                classes.add((victim, left.kind))
                for key, other in others.items():
                    lost = frozenset({victim}) if other is other_kept else BOTH
                    case = Case(operation, moment, victim, left.image, other, lost)
                    from_disks.setdefault((victim, left.kind, key, lost, moment.promises), case)
                alone = Case(operation, moment, victim, left.image, other_kept, frozenset({victim}))
                if moment.up[victim]:
                    living.setdefault((victim, left.kind, tuple(others), moment.promises), alone)
    findings.moments, findings.distinct, findings.classes = len(moments), len(distinct), len(classes)
    return list(from_disks.values()), list(living.values())


def _checked(findings: Findings, operation: Operation, left: Left) -> None:
    try:
        check_reading(left)
    except AssertionError as error:
        findings.faults.append(f"{operation.name}: event {left.moment.index}, subset {left.number}: {error}")


def attempt(findings: Findings, case: Case, recover: Callable[[Case], str]) -> None:
    """Run one recovery and note what it reached."""
    findings.recoveries += 1
    try:
        findings.reached[recover(case)] += 1
    except Exception as error:
        where = "" if str(error) else traceback.format_exc()
        findings.faults.append(f"{case} [{recover.__name__}]: {type(error).__name__}: {error}{where}")


def explore(
    operation: Operation, *, limit: int | None = None, nested: int = 0, moments_max: int | None = None
) -> Findings:
    """Everything about one operation; `nested`: how many recoveries are themselves crashed."""
    findings = Findings(operation.name)
    try:
        moments, findings.steps = record(operation)
    except AssertionError as error:
        findings.faults.append(f"{operation.name}: {str(error) or traceback.format_exc()}")
        return findings
    from_disks, living = cases(operation, spread(moments, moments_max), findings)
    for case in spread(from_disks, limit):
        attempt(findings, case, together)
    for number, case in enumerate(spread(living, limit)):
        if limit is None or number % 2 == 0:
            attempt(findings, case, lambda case: beside_the_living(case, take_over=True))
        if limit is None or number % 2 == 1:
            attempt(findings, case, lambda case: beside_the_living(case, take_over=False))
    for case in afterwards(operation, moments[-1]):
        attempt(findings, case, together)
        if moments[-1].up[case.victim]:
            attempt(findings, case, lambda case: beside_the_living(case, take_over=False))
    lives = [second_life(case) for case in spread(from_disks, nested)]
    # (A survivor that is killed before its flag is durable has forgotten it: two failures at once.)
    lives += [killed_life(operation, moment) for moment in spread([m for m in moments if all(m.up)], nested)]
    for life in lives:
        again = explore(life, limit=limit and 3, moments_max=limit and 10)
        findings.nested += again.recoveries
        findings.faults += again.faults
    return findings


def afterwards(operation: Operation, last: Moment) -> list[Case]:
    """When all is done and said, one node loses all that is not stable: what was forgotten to be made so shows here."""
    return [Case(operation, last, node, last.stable[node], last.kept(1 - node), frozenset({node})) for node in (0, 1)]


def _both_boot(scene: Scene) -> None:
    scene.m.restart(scene.m.alpha, scene.m.beta)
    scene.join()


def second_life(case: Case) -> Operation:
    """The recovery from a power cut as an operation of its own: both attach and come together."""
    promises = after_crash(case.moment.promises, case.promised_without)
    name = f"[{case}], again"
    seed = case.operation.seed + 1
    return Operation(
        name, _nothing, _both_boot, case.operation.settings, images=case.images, promises=promises, seed=seed
    )


def killed_life(operation: Operation, moment: Moment) -> Operation:
    """Both processes were killed: what was complete lies in the caches, what was in flight did not happen."""
    cached = [
        tuple(pair for write in moment.volatile[node] if write.completed for pair in write.sectors) for node in (0, 1)
    ]
    return Operation(
        f"[{operation.name}: both killed after event {moment.index}], again",
        _nothing,
        _both_boot,
        operation.settings,
        images=moment.stable,
        promises=moment.promises,
        cached=(cached[0], cached[1]),
        seed=operation.seed + 1,
    )


def _nothing(_: Scene) -> None:
    pass
