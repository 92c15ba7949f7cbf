# SPDX-License-Identifier: Apache-2.0
"""docs/simulation.md is in step with what it is about: invariants, checkers, faults, situations, commands."""

from __future__ import annotations

import ast
import configparser
import re
from itertools import pairwise
from pathlib import Path
from typing import Final

import pytest

from tests.mutants.table import read
from tests.sim.checker import Checker
from tests.sim.checkers import CHECKERS
from tests.sim.faults import FAULTS
from tests.sim.situations import SITUATIONS
from tests.sim.tape import KINDS, MIB, Swarm, Tape

ROOT = Path(__file__).resolve().parents[2]
TEXT = (ROOT / "docs/simulation.md").read_text()
DECISION = (ROOT / "docs/decisions/0001-invariants-and-durable-steps.md").read_text()
NUMBERS = [f"I-{number}" for number in range(1, 33)]
NAMED = {kind.__name__: kind for kind in CHECKERS}
#: Features that an invariant is about and that do not exist: the page must say so.
NOT_YET: Final = {
    "I-6": "Two Primaries",
    "I-9": "automatic policies",
    "I-26": "Resize",
    "I-27": "`suspend-io`",
    "I-29": "",
}


def section(title: str) -> str:
    """What stands under a heading, up to the next one."""
    found = re.search(rf"^##+ {re.escape(title)}\n(.*?)(?=^##+ |\Z)", TEXT, re.MULTILINE | re.DOTALL)
    assert found, f"no section {title!r}"
    return found[1]


def rows(text: str) -> list[list[str]]:
    """The cells of each line of its tables, heads and rules left out."""
    lines = [re.split(r"(?<!\\)\|", line)[1:-1] for line in text.splitlines() if line.startswith("|")]
    cells = [[cell.strip() for cell in line] for line in lines]
    rules = {number for number, line in enumerate(cells) if set("".join(line)) == {"-"}}
    return [line for number, line in enumerate(cells) if number not in rules and number + 1 not in rules]


def spans(text: str) -> list[str]:
    """What is in backticks."""
    return re.findall(r"`([^`\n]+)`", text)


COMMANDS = sorted({span for span in spans(TEXT) if re.match(r"(tox|python|pytest|make) ", span)})
INVARIANTS = {cells[0]: cells for cells in rows(section("The invariants")) if cells[0].startswith("I-")}


def watchers(number: str) -> set[str]:
    """The checkers that the table claims for an invariant: the bold names."""
    return set(re.findall(r"\*\*([A-Z]\w+)\*\*", INVARIANTS[number][3]))


# -- invariants and checkers --------------------------------


def test_every_invariant_has_one_row_in_order() -> None:
    found = [cells[0] for cells in rows(section("The invariants")) if cells[0].startswith("I-")]
    assert found == NUMBERS


@pytest.mark.parametrize("number", NUMBERS)
def test_an_invariant_is_watched_by_exactly_the_checkers_that_claim_it(number: str) -> None:
    assert watchers(number) == {name for name, kind in NAMED.items() if number in kind.invariants}


def test_a_checker_claims_only_what_is_in_the_table() -> None:
    claimed = {claim for kind in CHECKERS for claim in kind.invariants if claim.startswith("I-")}
    assert claimed - set(INVARIANTS) == set()
    assert [kind.__name__ for kind in CHECKERS if not kind.invariants] == []


def test_every_class_of_checkers_is_used() -> None:
    assert set(CHECKERS) == set(Checker.__subclasses__())


@pytest.mark.parametrize("number", NUMBERS)
def test_an_invariant_is_watched_by_something_or_not_yet(number: str) -> None:
    meaning, watched = INVARIANTS[number][1], INVARIANTS[number][3]
    assert meaning
    assert watched == "**not yet**" or spans(watched)


@pytest.mark.parametrize("number", NOT_YET)
def test_a_feature_that_does_not_exist_is_said_not_to(number: str) -> None:
    row = " ".join(INVARIANTS[number])
    assert "**not yet**" in row and NOT_YET[number] in row
    assert number in section("What is not modelled")


def test_the_rules_of_the_decision_that_are_named_exist() -> None:
    rules = {rule for cells in INVARIANTS.values() for rule in re.findall(r"V\d+", cells[2])}
    assert {rule for rule in rules if f"- {rule} **" not in DECISION} == set()
    assert set(re.findall(r"^- (V\d+) \*\*", DECISION, re.MULTILINE)) - rules == set()


def test_a_mutant_breaks_only_what_is_in_the_table() -> None:
    broken = {rule for mutant in read() for rule in mutant.rules if rule.startswith("I-")}
    assert broken and broken - set(INVARIANTS) == set()


def test_the_requirements_of_the_link_are_those_of_the_page_on_security() -> None:
    found = {cells[0] for cells in rows(section("The invariants")) if cells[0].startswith("S-")}
    assert found == {f"S-{number}" for number in range(1, 8)}
    security = (ROOT / "docs/security.md").read_text()
    assert [number for number in sorted(found) if f"| {number} |" not in security] == []


# -- failures --------------------------------


def failures() -> set[str]:
    """The names that `Run.fail` is called with: words, or the checker itself."""
    names = set(NAMED)
    for path in (ROOT / "tests/sim").glob("*.py"):
        for call in ast.walk(ast.parse(path.read_text())):
            if isinstance(call, ast.Call) and isinstance(call.func, ast.Attribute) and call.func.attr == "fail":
                first = call.args[0] if call.args else None
                if isinstance(first, ast.Constant):
                    names.add(str(first.value))
    return names


def test_every_name_of_a_failure_is_explained_and_no_other() -> None:
    told = {cells[0] for cells in rows(section("Names of failures"))}
    assert {name for name in told if re.fullmatch(r"[A-Z]\w+", name)} == failures()


def test_what_the_world_says_about_an_endless_loop_is_explained() -> None:
    assert 'AssertionError("livelock: too many events")' in (ROOT / "tests/sim/world.py").read_text()
    assert "`livelock: too many events`" in section("Names of failures")


# -- faults and situations --------------------------------


def test_every_kind_of_fault_has_its_place_in_the_fault_model() -> None:
    told = [kind for cells in rows(section("The fault model")) for kind in spans(cells[2])]
    assert sorted(told) == sorted(KINDS) == sorted(FAULTS)


def test_a_situation_that_is_named_exists() -> None:
    named = {span.strip('"') for span in spans(TEXT) if span.startswith('"') and span.endswith('"')}
    assert named and named - set(SITUATIONS) == set()


def test_the_number_of_seeds_that_must_reach_every_situation_is_that_of_the_test() -> None:
    source = (ROOT / "tests/sim/test_seeds.py").read_text()
    count = re.search(r'"SEEDS", "(\d+)"', source)
    assert count
    assert f"SEEDS < {count[1]} or" in source
    assert f"a batch of {int(count[1]):,} seeds must reach every one of them" in " ".join(section("Situations").split())


def test_the_bound_of_convergence_is_that_of_the_runs() -> None:
    assert "CONVERGE_NS = 60 * SECOND" in (ROOT / "tests/sim/run.py").read_text()
    assert "60 simulated seconds" in section("Names of failures")


def test_what_is_said_to_be_outside_of_the_runs_is_outside() -> None:
    outside = " ".join(section("What is not modelled").split())
    tapes = [Tape.draw(seed) for seed in range(300)]
    sizes = {tape.swarm.size_bytes // MIB for tape in tapes}
    assert f"simulated ones have {min(sizes)} to {max(sizes)} MiB" in outside
    longest = max(op.count for tape in tapes for client in tape.clients for op in client)
    assert f"requests at most {longest} sectors" in outside
    assert "`fencing` other than dont-care" in outside and "fencing" not in Swarm().options
    assert "`down`" in outside and not {"down", "new-current-uuid"} & set(KINDS)


# -- commands and files --------------------------------


def test_nothing_in_backticks_is_broken_over_lines() -> None:
    assert [line for line in TEXT.splitlines() if line.count("`") % 2] == []  # or the tests here would not see it


def known_options(module: str) -> set[str]:
    """The options of a module's command line, read from its source."""
    return set(re.findall(r'"(--[a-z-]+)"', (ROOT / module.replace(".", "/") / "__main__.py").read_text()))


def environments() -> configparser.ConfigParser:
    """tox.ini."""
    found = configparser.ConfigParser(interpolation=None)
    found.read(ROOT / "tox.ini")
    return found


def module_of(command: str) -> str | None:
    """The module that a command runs, itself or through tox."""
    found = re.match(r"tox run -e (\w+)", command)
    text = environments()[f"testenv:{found[1]}"]["commands"] if found else command
    module = re.search(r"python\}? -m ([\w.]+)", text)
    return module[1] if module else None


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_that_is_named_exists(command: str) -> None:
    program, *words = command.split()
    if program == "make":
        assert re.search(rf"^{words[0]}:", (ROOT / "Makefile").read_text(), re.MULTILINE)
    elif program == "pytest":
        assert (ROOT / words[0]).exists()
        assert all(word == "-k" or previous == "-k" for previous, word in pairwise(words))
    elif program == "tox":
        assert words[:2] == ["run", "-e"]
        assert f"testenv:{words[2]}" in environments()
        assert len(words) == 3 or words[3] == "--"
    else:
        assert words[0] == "-m"
    options = {word for word in words if re.match(r"--\w", word)}
    module = module_of(command)
    if module is not None:
        assert options - known_options(module) == set()
    else:
        assert options == set()


def test_the_page_names_a_command_for_each_way_of_testing() -> None:
    assert all(re.match(r"`(tox|python|pytest) ", cells[2]) for cells in rows(section("What is proved how")))
    for name in ("sim", "seeds", "mutants", "fuzz", "faults", "integration", "coverage"):
        assert any(re.match(rf"tox run -e {name}\b", command) for command in COMMANDS), name


def test_a_part_of_a_test_suite_that_is_named_selects_something() -> None:
    for command in COMMANDS:
        found = re.match(r"pytest (\S+) -k (\w+)", command)
        if found:
            sources = [path.read_text() for path in (ROOT / found[1]).rglob("test_*.py")]
            assert any(re.search(rf"^def test_\w*{found[2]}", source, re.MULTILINE) for source in sources), command


def test_a_file_that_is_named_exists() -> None:
    there = {path.name for path in (ROOT / "tests").rglob("*") if path.is_file()}
    written = {"docs/mutants.md"}  # by the command beside it
    lost = [
        span
        for span in spans(TEXT)
        if re.fullmatch(r"[\w/.-]+\.(py|txt|toml|md|json)", span)
        and "NAME" not in span
        and span not in written
        and not ((ROOT / span).exists() if "/" in span else span in there)
    ]
    assert lost == []


def test_a_directory_that_is_named_exists() -> None:
    found = [span for span in spans(TEXT) if re.fullmatch(r"(tests|replicator|docs)(/\w+)+", span)]
    assert found and [span for span in found if not (ROOT / span).is_dir()] == []
