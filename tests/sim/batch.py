# SPDX-License-Identifier: Apache-2.0
"""Many seeds, over several processes."""

from __future__ import annotations

import gc
import multiprocessing
import sys
import traceback
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from tests.sim.run import Run
from tests.sim.tape import Tape

TELL_EVERY = 5000


@dataclass
class Outcome:
    """Of one run."""

    failure: str  # "" when it passed; begins with the name of the checker or of the exception
    lines: list[str]
    seen: dict[str, int]
    traceback: str = ""


@dataclass
class Report:
    """Of a batch."""

    count: int = 0
    failures: list[tuple[int, str]] = field(default_factory=list)
    seen: dict[str, int] = field(default_factory=dict)

    def add(self, seed: int, outcome: Outcome) -> None:
        """One more run."""
        self.count += 1
        if outcome.failure:
            self.failures.append((seed, outcome.failure))
        for what, times in outcome.seen.items():
            self.seen[what] = self.seen.get(what, 0) + times


def run_tape(tape: Tape) -> Outcome:
    """One run; whatever it raises is its failure."""
    run = None
    try:
        run = Run(tape)
        run.execute()
    except Exception as error:
        failure = f"{type(error).__name__}: {error}" if not isinstance(error, AssertionError) else str(error)
        told = failure.partition("\n")[0] or _place(error)
        return Outcome(told, run.world.lines if run else [], run.seen if run else {}, traceback.format_exc())
    return Outcome("", run.world.lines, run.seen)


def _place(error: BaseException) -> str:
    """Where a bare assertion of the core stands."""
    frames = traceback.extract_tb(error.__traceback__)
    return f"AssertionError in {frames[-1].name}: {frames[-1].line}"


def run_seed(seed: int) -> tuple[int, Outcome]:
    """One seed; the trace is not kept."""
    outcome = run_tape(Tape.draw(seed))
    outcome.lines = []
    return seed, outcome


def run_batch(seeds: Sequence[int], jobs: int, *, fail_fast: bool = False) -> Report:
    """All of them, in no particular order when `jobs` is more than one."""
    if jobs == 1:
        return _collect(map(run_seed, seeds), fail_fast)
    with multiprocessing.get_context("fork").Pool(jobs, initializer=gc.freeze) as pool:
        return _collect(pool.imap_unordered(run_seed, seeds, chunksize=4 if fail_fast else 16), fail_fast)


def _collect(outcomes: Iterable[tuple[int, Outcome]], fail_fast: bool) -> Report:
    report = Report()
    for seed, outcome in outcomes:
        report.add(seed, outcome)
        if report.count % TELL_EVERY == 0:
            sys.stderr.write(f"{report.count} seeds, {len(report.failures)} failed\n")
        if fail_fast and outcome.failure:
            break
    report.failures.sort()
    return report
