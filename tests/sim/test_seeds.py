# SPDX-License-Identifier: Apache-2.0
"""A few seeds of the simulator with every change; `python -m tests.sim --seeds COUNT` runs as many as one likes.

What a failing seed did is shown by `python -m tests.sim --seed N --trace`.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.sim.run import Run

ROOT = Path(__file__).resolve().parents[2]
REGRESSIONS = Path(__file__).with_name("regressions.txt")
SEEDS = 40


def regressions() -> list[tuple[int, str]]:
    """The seeds that once found something, each with its sentence."""
    lines = [line for line in REGRESSIONS.read_text().splitlines() if line and not line.startswith("#")]
    return [(int(seed), why) for seed, _, why in (line.partition(" ") for line in lines)]


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


@pytest.mark.parametrize("seed", range(SEEDS))
def test_nothing_acknowledged_is_lost_and_both_copies_end_equal(seed: int) -> None:
    Run(seed).execute()


@pytest.mark.parametrize("seed", [pytest.param(seed, id=f"{seed}: {why}") for seed, why in regressions()])
def test_a_seed_that_once_found_something_passes(seed: int) -> None:
    Run(seed).execute()


def test_every_regression_says_what_it_was() -> None:
    assert [seed for seed, why in regressions() if not why] == []


def test_a_seed_means_the_same_in_every_process() -> None:
    first, second = trace_in_another_process(15, "1"), trace_in_another_process(15, "2")
    assert first.count("\n") > 50
    assert first == second
