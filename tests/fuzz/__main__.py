# SPDX-License-Identifier: Apache-2.0
"""Coverage-guided fuzzing with atheris: ``tox run -e fuzz -- TARGET|all [--runs N] [--seconds S]``.

Each target runs in a process of its own, because libFuzzer ends the process that it ran in.  It starts from the
committed corpus, keeps what it learns in tests/fuzz/learnt (not committed), and writes what broke something to
tests/fuzz/crashers/TARGET, from where it belongs, under a telling name, into the corpus once the bug is fixed.
"""

from __future__ import annotations

import argparse
import importlib
import re
import subprocess
import sys
from typing import Any

from tests.fuzz.targets import CORPUS, CRASHERS, HERE, TARGETS

LEARNT = HERE / "learnt"
MEMORY_MB = 2048  # libFuzzer's own limit for the process
_STAT = re.compile(r"stat::number_of_executed_units:\s+(\d+)[\s\S]*?stat::average_exec_per_sec:\s+(\d+)")


def fuzz(name: str, arguments: list[str]) -> None:
    """In a process of its own: never returns."""
    atheris: Any = importlib.import_module("atheris")  # no types, and not there in the test environment
    with atheris.instrument_imports(include=["replicator"]):
        # Imported for the table already, without instruments: once more, packages included.
        for module in [module for module in sys.modules if module.partition(".")[0] in ("replicator", "tests")]:
            del sys.modules[module]
        fresh = importlib.import_module("tests.fuzz.targets")
    target = fresh.TARGETS[name]
    atheris.Setup([sys.argv[0], *arguments], target.run)
    atheris.Fuzz()


def one(name: str, runs: int, seconds: int) -> bool:
    """Fuzz one target in a child; True if nothing broke."""
    crashers, learnt = CRASHERS / name, LEARNT / name
    crashers.mkdir(parents=True, exist_ok=True)
    learnt.mkdir(parents=True, exist_ok=True)
    options = [
        f"-max_len={TARGETS[name].size_max}", f"-artifact_prefix={crashers}/", f"-rss_limit_mb={MEMORY_MB}",
        "-timeout=60", "-print_final_stats=1", "-verbosity=0",
    ]  # fmt: skip
    if runs:
        options.append(f"-runs={runs}")
    if seconds:
        options.append(f"-max_total_time={seconds}")
    command = [sys.executable, "-m", "tests.fuzz", "--inside", name, *options, str(learnt), str(CORPUS / name)]
    done = subprocess.run(command, cwd=HERE.parent.parent, capture_output=True, text=True, check=False)
    said = done.stdout + done.stderr
    found = _STAT.search(said)
    speed = f"{found[1]} executions, {found[2]} a second" if found else "no statistics"
    print(f"{name}: {'ok' if done.returncode == 0 else 'BROKEN'}, {speed}", flush=True)
    if done.returncode:
        print(said[-6000:], flush=True)
    return done.returncode == 0


def main(arguments: list[str]) -> int:
    """Exit code 1 if any target broke."""
    if arguments[:1] == ["--inside"]:
        fuzz(arguments[1], arguments[2:])
    parser = argparse.ArgumentParser(prog="tests.fuzz", description="fuzz with atheris")
    parser.add_argument("target", choices=["all", *TARGETS], help="what to fuzz")
    parser.add_argument("--runs", type=int, default=0, help="executions per target")
    parser.add_argument("--seconds", type=int, default=0, help="seconds per target (20 if --runs is not given)")
    chosen = parser.parse_args(arguments)
    names = list(TARGETS) if chosen.target == "all" else [chosen.target]
    seconds = chosen.seconds or (0 if chosen.runs else 20)
    broken = [name for name in names if not one(name, chosen.runs, seconds)]  # all of them get their turn
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
