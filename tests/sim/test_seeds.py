# SPDX-License-Identifier: Apache-2.0
"""2,000 seeds of the simulator with every change, and everything that ever failed.

`python -m tests.sim --seeds COUNT` runs as many as one likes; docs/simulation.md says how to read a failure.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.sim.batch import run_batch, run_tape
from tests.sim.shrink import shrink
from tests.sim.situations import SITUATIONS
from tests.sim.tape import Tape

ROOT = Path(__file__).resolve().parents[2]
REGRESSIONS = sorted((Path(__file__).parent / "regressions").glob("*.json"))
SEEDS = int(os.environ.get("SEEDS", "2000"))
JOBS = os.cpu_count() or 1


def trace_in_another_process(seed: int, hash_seed: str) -> str:
    """What `--trace` prints."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.sim", "--seed", str(seed), "--trace"],
        cwd=ROOT,
        env=os.environ | {"PYTHONHASHSEED": hash_seed},
        capture_output=True,
        text=True,
        timeout=100,
        check=True,
    )
    return done.stdout


def test_every_promise_holds_and_every_situation_is_reached() -> None:
    report = run_batch(range(SEEDS), JOBS)
    assert not report.failures, f"python -m tests.sim --seed N --trace shows them: {report.failures}"
    assert SEEDS < 2000 or not [what for what in SITUATIONS if what not in report.seen]


@pytest.mark.parametrize("path", REGRESSIONS, ids=lambda path: path.stem)
def test_what_once_failed_passes(path: Path) -> None:
    tape = Tape.load(path.read_text())
    assert tape.why
    assert not run_tape(tape).failure


def test_a_seed_means_the_same_in_every_process() -> None:
    for seed in (3, 15):
        first, second = trace_in_another_process(seed, "1"), trace_in_another_process(seed, "2")
        assert first.count("\n") > 50
        assert first == second


def test_a_tape_survives_its_file() -> None:
    tape = Tape.draw(11)
    assert Tape.load(tape.dump()) == tape
    assert run_tape(Tape.load(tape.dump())).lines == run_tape(tape).lines


def test_a_failing_tape_shrinks_to_what_matters(monkeypatch: pytest.MonkeyPatch) -> None:
    tape = next(tape for tape in map(Tape.draw, range(1000)) if [f.kind for f in tape.faults].count("kill") == 1)
    number = next(number for number, fault in enumerate(tape.faults) if fault.kind == "kill")

    def forbid_kills(run: object, fault: object) -> None:
        raise AssertionError("NoKill: a process was killed")

    monkeypatch.setitem(__import__("tests.sim.faults", fromlist=["FAULTS"]).FAULTS, "kill", forbid_kills)
    failure = run_tape(tape).failure
    assert failure.startswith("NoKill")
    small = shrink(tape, failure)
    assert small.faults == (tape.faults[number],) and small.size == 1
