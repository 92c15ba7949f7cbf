# SPDX-License-Identifier: Apache-2.0
"""The table of breaks fits the source of today, and the runner tells a break that is noticed from one that is not."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

from tests.mutants import __main__ as command
from tests.mutants import runner
from tests.mutants.runner import Answer, Finding, Plan, try_mutant
from tests.mutants.table import DoesNotApply, Mutant, read

ROOT = Path(__file__).resolve().parents[2]
MUTANTS = read()
MANY = 25
#: Every invariant of decision 0001, and those of the list in docs/simulation.md that the core keeps by itself.
COVERED = {f"V{number}" for number in range(1, 11)} | {
    *(f"I-{number}" for number in (*range(1, 18), 19, 20, 21, 22, 23, 25, 27, 28, 31, 32)),
}
NOTICED_AT_ONCE = "replicated-writes-land-beside-their-place"

each = pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.id)


def named(name: str) -> Mutant:
    return next(mutant for mutant in MUTANTS if mutant.id == name)


def indentation(text: str) -> int:
    return len(text) - len(text.lstrip(" "))


@each
def test_a_break_applies_once_changes_something_and_compiles(mutant: Mutant) -> None:
    broken = mutant.broken(ROOT)
    assert broken != (ROOT / mutant.file).read_text()
    compile(broken, mutant.file, "exec")
    if mutant.new:  # or the new lines become a part of something else
        assert indentation(mutant.new) == indentation(mutant.old)


@each
def test_a_break_says_what_it_is(mutant: Mutant) -> None:
    assert re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)+", mutant.id)
    assert mutant.file.startswith("replicator/core/")
    assert mutant.wrong and not mutant.wrong.endswith(".")
    assert mutant.rules and all(re.fullmatch(r"V\d+|I-\d+", rule) for rule in mutant.rules)


def test_every_break_is_another_one() -> None:
    ids = Counter(mutant.id for mutant in MUTANTS)
    changes = Counter((mutant.file, mutant.old, mutant.new) for mutant in MUTANTS)
    assert [name for name, count in (*ids.items(), *changes.items()) if count > 1] == []
    assert len(MUTANTS) >= MANY


def test_no_invariant_is_left_unbroken() -> None:
    assert COVERED - {rule for mutant in MUTANTS for rule in mutant.rules} == set()


def test_an_invariant_that_is_named_exists() -> None:
    decision = (ROOT / "docs/decisions/0001-invariants-and-durable-steps.md").read_text()
    rules = {rule for mutant in MUTANTS for rule in mutant.rules if rule.startswith("V")}
    assert {rule for rule in rules if f"- {rule} **" not in decision} == set()


def test_a_break_whose_text_has_moved_is_an_error_and_not_a_catch() -> None:
    moved = replace(MUTANTS[0], old="this is nowhere")
    with pytest.raises(DoesNotApply, match="0 times"):
        moved.broken(ROOT)
    finding = try_mutant(moved, Plan(seeds=1, scenarios=False))
    assert finding.error and not finding.caught


def test_the_command_catches_a_break(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    page = tmp_path / "table.md"
    status = command.main(
        ["--only", NOTICED_AT_ONCE, "--seeds", "10", "--jobs", "1", "--no-scenarios", "--markdown", str(page)]
    )
    said = capsys.readouterr().out
    assert status == 0, said
    assert "1 of 1 noticed: 1 by the simulator" in said
    assert re.search(rf"\| {NOTICED_AT_ONCE} \| I-23 \| - \| \w+: .*sector \d+", page.read_text()), page.read_text()


def test_a_break_that_changes_nothing_survives() -> None:
    harmless = replace(
        named(NOTICED_AT_ONCE), old="The connection to one peer: its state", new="The connection to a peer: its state"
    )
    finding = try_mutant(harmless, Plan(seeds=2, scenarios=False))
    assert (finding.caught, finding.error, finding.seeds) == (False, "", 2)
    assert "survived" in command.summary([finding])
    assert command.row(finding)[2:5] == ("SURVIVED", "SURVIVED", "> 2")


def test_a_tree_that_does_not_pass_proves_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    def failing(mutant: Mutant | None, plan: Plan) -> Finding:
        assert mutant is None
        return Finding("(none)", (), simulator="two Primaries", seed=3, seeds=4)

    assert command.main(["--only", NOTICED_AT_ONCE], failing) == 1
    assert "the tree itself does not pass: two Primaries" in capsys.readouterr().out


def test_a_break_that_nobody_knows_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["--only", "no-such-break"]) == 2
    assert "no-such-break" in capsys.readouterr().err


def test_a_hang_is_noticed(tmp_path: Path) -> None:
    answer = runner.ask(tmp_path, 0.2, "-c", "while True: pass")
    assert answer.status is None
    assert runner.simulator_message(answer) == (None, "hangs")
    assert runner.scenario_message(answer) == "hangs"


@pytest.mark.parametrize(
    ("lines", "seed", "said"),
    [
        (["seed 7: two Primaries", "1 seeds, 1 failed: [7]"], 7, "two Primaries"),
        (
            [
                "seed 9: Traceback (most recent call last):",
                '  File "/tmp/x/replicator/core/locks.py", line 3, in take',
                "    assert not lock.held",
                "AssertionError",
            ],
            9,
            "AssertionError in locks.py take",
        ),
        (["usage: tests.sim", "error: no such flag"], None, "status 2: error: no such flag"),
    ],
)
def test_what_the_simulator_says_is_understood(lines: list[str], seed: int | None, said: str) -> None:
    assert runner.simulator_message(Answer(2, lines)) == (seed, said)


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("FAILED tests/scenarios/test_s.py::test_t[peer-lost] - AssertionError: 3: block 3 is 0", "peer-lost: Assert"),
        ("FAILED tests/scenarios/test_s.py::test_t[a-b] - AssertionError: the trace differs; if", "a-b: another trace"),
        ("ERROR tests/scenarios/test_s.py - ImportError: no", "collection: ImportError"),
    ],
)
def test_what_a_scenario_says_is_understood(line: str, said: str) -> None:
    assert runner.scenario_message(Answer(1, ["....", line])).startswith(said)
