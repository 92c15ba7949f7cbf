# SPDX-License-Identifier: Apache-2.0
"""Tries one break: a copy of the tree with the break in it, the scenarios there, then seeds of the simulator.

Everything runs in processes of their own, with a bound: a break may also be noticed because nothing goes on any more.
A whole table ends in bounded time, too: seeds are tried in chunks until one fails, the seeds are over, or the time is.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from tests.mutants.table import DoesNotApply, Mutant

ROOT = Path(__file__).resolve().parents[2]
COPIED = ("replicator", "tests", "pyproject.toml")
SCENARIOS = "tests/scenarios"
SCENARIO_TEST = "test_the_trace_is_what_the_file_says"
#: Seeds of one process, the first small: most breaks are noticed at once.
CHUNKS = (10, 40, 150)
#: A chunk that takes this much longer than one without a break hangs, whatever the machine does besides.
HANG_FACTOR = 20
HANG_SECONDS_MIN = 60.0
MESSAGE_MAX = 160
NO_TESTS = 5  # pytest's exit status


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """How hard to try.  `seed_seconds` is what one seed takes without a break; times are seconds."""

    seeds: int = 2000
    start: int = 0
    seconds: float = 600.0
    seed_seconds: float = 1.0
    first_only: bool = False
    scenarios: bool = True


@dataclass(slots=True)
class Finding:
    """What noticed a break, if anything did."""

    mutant: str
    rules: tuple[str, ...]
    scenario: str = ""  # which, and what it said
    scenario_seconds: float = 0.0
    simulator: str = ""  # what the first failing seed said
    seed: int | None = None
    seeds: int = 0  # tried, the failing one included
    seconds: float = 0.0  # of the simulator
    error: str = ""  # the break could not be tried, or not be blamed

    @property
    def caught(self) -> bool:
        """Somebody noticed, and would not have without the break."""
        return bool(self.scenario or self.simulator) and not self.error


@dataclass(slots=True)
class Answer:
    """What a process said; `status` None if it was ended because it took too long."""

    status: int | None
    lines: list[str] = field(default_factory=list)
    seconds: float = 0.0


def ask(root: Path, timeout: float, *args: str) -> Answer:
    """Run Python in a tree, importing from that tree."""
    environment: Mapping[str, str] = os.environ | {
        "PYTHONPATH": str(root),
        "PYTHONDONTWRITEBYTECODE": "1",
        "COLUMNS": "400",  # pytest cuts its summary to the width of the terminal
    }
    since = time.monotonic()
    with subprocess.Popen(
        [sys.executable, *args], cwd=root, env=environment, text=True, errors="replace",
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    ) as process:  # fmt: skip
        status: int | None
        try:
            output, _ = process.communicate(timeout=timeout)
            status = process.returncode
        except subprocess.TimeoutExpired:
            process.kill()
            output, _ = process.communicate()
            status = None
    return Answer(status, output.splitlines(), time.monotonic() - since)


def copy_tree(target: Path) -> None:
    """The package and its tests, without what earlier runs left."""
    ignored = shutil.ignore_patterns("__pycache__", "*.pyc", ".hypothesis")
    for name in COPIED:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, target / name, ignore=ignored)
        else:
            shutil.copy(source, target / name)


def try_mutant(mutant: Mutant | None, plan: Plan) -> Finding:
    """Break a copy and look who notices; None is the tree as it is, which nobody may object to."""
    finding = Finding(mutant.id, mutant.rules) if mutant is not None else Finding("(none)", ())
    with tempfile.TemporaryDirectory(prefix="mutant-") as directory:
        root = Path(directory)
        copy_tree(root)
        if mutant is not None:
            try:
                mutant.apply(root)
            except (DoesNotApply, OSError) as error:
                finding.error = str(error)
                return finding
        if plan.scenarios:
            try_scenarios(root, plan, finding)
        if not (plan.first_only and finding.caught):
            try_seeds(root, plan, finding)
        if mutant is not None:
            blame(root, ROOT, mutant, finding)
    return finding


def try_scenarios(root: Path, plan: Plan, finding: Finding) -> None:
    """Play the scenarios until one fails."""
    if not (root / SCENARIOS).is_dir():
        return
    timeout = HANG_SECONDS_MIN + plan.seed_seconds * 200
    answer = ask(root, timeout, "-m", "pytest", SCENARIOS, "-x", "-q", "-p", "no:cacheprovider", "-k", SCENARIO_TEST)
    finding.scenario_seconds = answer.seconds
    if answer.status not in (0, NO_TESTS):
        finding.scenario = scenario_message(answer)


def scenario_message(answer: Answer) -> str:
    """Which scenario, and why: what must hold in it did not, or its trace is another one."""
    if answer.status is None:
        return "hangs"
    for line in answer.lines:
        found = re.match(r"(?:FAILED|ERROR) \S+?(?:\[(?P<name>[^\]]+)\])?(?: - (?P<why>.*))?$", line)
        if found:
            name, why = found["name"] or "collection", found["why"] or ""
            return short(f"{name}: {'another trace' if 'the trace differs' in why else why}")
    return short(f"status {answer.status}: {answer.lines[-1] if answer.lines else ''}")


def try_seeds(root: Path, plan: Plan, finding: Finding) -> None:
    """Run seeds until one fails, they are over, or the time is."""
    chunk = 0
    while finding.seeds < plan.seeds and finding.seconds < plan.seconds:
        count = min(CHUNKS[min(chunk, len(CHUNKS) - 1)], plan.seeds - finding.seeds)
        chunk += 1
        start = plan.start + finding.seeds
        timeout = HANG_SECONDS_MIN + count * plan.seed_seconds * HANG_FACTOR
        answer = ask(
            root, timeout,
            "-m", "tests.sim", "--seeds", str(count), "--from", str(start), "--jobs", "1", "--fail-fast",
        )  # fmt: skip
        finding.seconds += answer.seconds
        if answer.status == 0:
            finding.seeds += count
            continue
        finding.seed, finding.simulator = simulator_message(answer)
        finding.seeds = count + finding.seeds if finding.seed is None else finding.seed - plan.start + 1
        return


def blame(root: Path, original: Path, mutant: Mutant, finding: Finding) -> None:
    """A seed counts as a catch only if it passes without the break."""
    if finding.seed is None:
        return
    shutil.copy(original / mutant.file, root / mutant.file)
    answer = ask(root, HANG_SECONDS_MIN, "-m", "tests.sim", "--seed", str(finding.seed))
    if answer.status != 0:
        finding.error = f"seed {finding.seed} fails without the break, too: {simulator_message(answer)[1]}"


def simulator_message(answer: Answer) -> tuple[int | None, str]:
    """The first seed that failed, and what it said: a checker's sentence, or the broken invariant of the core."""
    for index, line in enumerate(answer.lines):
        found = re.match(r"seed (\d+): (.*)$", line)
        if found:
            said = found[2]
            if said.startswith("Traceback"):
                said = traceback_message(answer.lines[index + 1 :])
            return int(found[1]), short(said)
    if answer.status is None:
        return None, "hangs"
    return None, short(f"status {answer.status}: {answer.lines[-1] if answer.lines else ''}")


def traceback_message(lines: list[str]) -> str:
    """What went wrong and where, out of a traceback."""
    where = what = ""
    for line in lines:
        found = re.match(r'  File "[^"]*?([\w-]+\.py)", line \d+, in (\w+)', line)
        if found:
            where = f"{found[1]} {found[2]}"
        elif line and not line.startswith(" "):
            what = line
            break
    return f"{what} in {where}"


def short(text: str) -> str:
    """One line of a table."""
    text = " ".join(text.split())
    return text if len(text) <= MESSAGE_MAX else text[: MESSAGE_MAX - 1] + "…"
