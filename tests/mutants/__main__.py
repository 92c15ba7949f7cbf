# SPDX-License-Identifier: Apache-2.0
"""`python -m tests.mutants [--only ID] [--seeds 2000] [--jobs 2]`: does anybody notice the breaks of table.toml?

The tree without a break goes first: it must pass.  Exit status 1 when a break survives, when one does not apply any
more, or when the tree itself does not pass.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

from tests.mutants.runner import Finding, Plan, short, try_mutant
from tests.mutants.table import Mutant, read

HEAD = ("break", "rules", "scenario", "simulator", "seeds", "s")
BASELINE_SEEDS = 60


def arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m tests.mutants", description=__doc__)
    parser.add_argument("--only", action="append", metavar="ID", help="this break; may be repeated")
    parser.add_argument("--seeds", type=int, default=2000, help="seeds of the simulator for each break")
    parser.add_argument("--from", type=int, default=0, dest="start", metavar="SEED")
    parser.add_argument("--seconds", type=float, default=600.0, help="bound for the seeds of one break")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--first-only", action="store_true", help="no seeds for what a scenario noticed")
    parser.add_argument("--no-scenarios", action="store_false", dest="scenarios")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="write the table there, too")
    parser.add_argument("--list", action="store_true", help="show the breaks, run nothing")
    return parser.parse_args(argv)


Attempt = Callable[[Mutant | None, Plan], Finding]


def main(argv: Sequence[str] | None = None, attempt: Attempt = try_mutant) -> int:
    """Try what was asked for; 1 when something is wrong."""
    args = arguments(argv)
    mutants = read()
    if args.only:
        unknown = set(args.only) - {mutant.id for mutant in mutants}
        if unknown:
            sys.stderr.write(f"there is no break {', '.join(sorted(unknown))}; see --list\n")
            return 2
        mutants = [mutant for mutant in mutants if mutant.id in args.only]
    if args.list:
        sys.stdout.write("".join(f"{mutant.id}  {' '.join(mutant.rules)}\n    {mutant.wrong}\n" for mutant in mutants))
        return 0
    plan = Plan(
        seeds=args.seeds, start=args.start, seconds=args.seconds, first_only=args.first_only, scenarios=args.scenarios
    )
    baseline = attempt(None, replace(plan, seeds=min(plan.seeds, BASELINE_SEEDS), seconds=1e9, first_only=False))
    if baseline.caught or baseline.error:
        sys.stdout.write(f"the tree itself does not pass: {baseline.scenario or baseline.simulator}\n")
        return 1
    plan = replace(plan, seed_seconds=baseline.seconds / max(1, baseline.seeds))
    findings = try_all(mutants, plan, args.jobs, attempt)
    if args.markdown:
        args.markdown.write_text(markdown(findings, plan))
    return 0 if all(finding.caught for finding in findings) else 1


def try_all(mutants: list[Mutant], plan: Plan, jobs: int, attempt: Attempt) -> list[Finding]:
    """Try them side by side (each in processes of its own), telling as they end."""
    findings = []
    with ThreadPoolExecutor(jobs) as pool:
        for finding in pool.map(lambda mutant: attempt(mutant, plan), mutants):
            findings.append(finding)
            sys.stdout.write(f"{len(findings):4}/{len(mutants)} {told(finding)}\n")
            sys.stdout.flush()
    sys.stdout.write(f"\n{aligned([HEAD, *map(row, findings)])}\n{summary(findings)}\n")
    return findings


def told(finding: Finding) -> str:
    """One line while the others still run."""
    if finding.error:
        return f"{finding.mutant}: {finding.error}"
    scenario = finding.scenario or "-"
    simulator = f"seed {finding.seed}: {finding.simulator}" if finding.simulator else f"- in {finding.seeds} seeds"
    return f"{'' if finding.caught else 'SURVIVED '}{finding.mutant}: scenario {scenario}; simulator {simulator}"


def row(finding: Finding) -> tuple[str, ...]:
    """One row of the table."""
    scenario, simulator = finding.scenario, finding.simulator
    if finding.error:
        scenario = simulator = short(finding.error)
    elif not finding.caught:
        scenario = simulator = "SURVIVED"
    seeds = "" if not finding.seeds else f"{finding.seeds}" if finding.simulator else f"> {finding.seeds}"
    return (
        finding.mutant,
        " ".join(finding.rules),
        scenario or "-",
        simulator or "-",
        seeds,
        f"{finding.seconds + finding.scenario_seconds:.0f}",
    )


def summary(findings: list[Finding]) -> str:
    """How many of how many, and which not."""
    caught = sum(finding.caught for finding in findings)
    by_scenario = sum(bool(finding.scenario) for finding in findings)
    by_simulator = sum(bool(finding.simulator) for finding in findings)
    lines = [f"{caught} of {len(findings)} noticed: {by_simulator} by the simulator, {by_scenario} by a scenario"]
    lines += [f"survived: {finding.mutant}" for finding in findings if not finding.caught and not finding.error]
    lines += [f"{finding.mutant}: {finding.error}" for finding in findings if finding.error]
    return "\n".join(lines)


def aligned(rows: Sequence[tuple[str, ...]]) -> str:
    """Columns of equal width; the last two are numbers."""
    widths = [max(len(cells[column]) for cells in rows) for column in range(len(HEAD))]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if column >= len(HEAD) - 2 else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(cells, widths, strict=True))
        ).rstrip()
        for cells in rows
    )


def markdown(findings: list[Finding], plan: Plan) -> str:
    """The table as a page."""
    rows = [HEAD, tuple("---" for _ in HEAD), *map(row, findings)]
    table = "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |" for cells in rows)
    return (
        f"# The mutation check\n\n{summary(findings)}\n\nAt most {plan.seeds} seeds from {plan.start} for each; "
        f"the column *seeds* says how many it took.\n\n{table}\n"
    )


if __name__ == "__main__":
    sys.exit(main())
