# SPDX-License-Identifier: Apache-2.0
"""`python -m tests.sim`: run seeds or tapes, in parallel; shrink what fails."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from tests.sim.batch import Report, run_batch, run_tape
from tests.sim.shrink import shrink
from tests.sim.situations import SITUATIONS
from tests.sim.tape import Tape


def main() -> int:
    """Exit status 1 when a run fails, or when a large batch never reached some situation."""
    parser = argparse.ArgumentParser(prog="python -m tests.sim", description=__doc__)
    parser.add_argument("--seed", type=int, help="one seed")
    parser.add_argument("--tape", type=Path, help="one tape (a file of regressions/, or one that --shrink made)")
    parser.add_argument("--seeds", type=int, default=100, metavar="COUNT")
    parser.add_argument("--from", type=int, default=0, dest="start", metavar="SEED")
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--fail-fast", action="store_true", help="end at the first failure")
    parser.add_argument("--trace", action="store_true", help="print what happened (one seed or tape)")
    parser.add_argument("--shrink", type=Path, metavar="FILE", help="make the failing tape small, and keep it")
    parser.add_argument("--reach", action="store_true", help="fail when a situation was never reached")
    args = parser.parse_args()
    if args.tape is not None or args.seed is not None:
        tape = Tape.load(args.tape.read_text()) if args.tape is not None else Tape.draw(args.seed)
        return _one(tape, args.trace, args.shrink)
    report = run_batch(range(args.start, args.start + args.seeds), args.jobs, fail_fast=args.fail_fast)
    return _tell(report, reach=args.reach)


def _one(tape: Tape, trace: bool, keep: Path | None) -> int:
    outcome = run_tape(tape)
    if trace:
        sys.stdout.write("\n".join(outcome.lines) + "\n")
    sys.stdout.write(f"{tape.swarm}\n")
    for what in sorted(outcome.seen):
        sys.stdout.write(f"  sometimes {what}: {outcome.seen[what]}\n")
    if not outcome.failure:
        sys.stdout.write(f"seed {tape.seed}: passed\n")
        return 0
    sys.stdout.write(f"seed {tape.seed}: {outcome.failure}\n{outcome.traceback}")
    if keep is not None:
        small = shrink(tape, outcome.failure, sys.stdout.write)
        keep.write_text(small.dump())
        sys.stdout.write(f"{tape.size} entries became {small.size}: {keep}\n")
    return 1


def _tell(report: Report, *, reach: bool) -> int:
    for seed, failure in report.failures:
        sys.stdout.write(f"seed {seed}: {failure}\n")
    for what in sorted(report.seen):
        sys.stdout.write(f"  sometimes {what}: {report.seen[what]}\n")
    never = [what for what in SITUATIONS if what not in report.seen]
    if never:
        sys.stdout.write(f"never reached: {', '.join(never)}\n")
    failed = [seed for seed, _ in report.failures]
    sys.stdout.write(f"{report.count} seeds, {len(failed)} failed: {failed[:20]}\n")
    return 1 if failed or (reach and never) else 0


if __name__ == "__main__":
    sys.exit(main())
