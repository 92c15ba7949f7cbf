# SPDX-License-Identifier: Apache-2.0
"""Carries out every scenario file and compares the trace; the files keep their own rules."""

from __future__ import annotations

import difflib
import re
from pathlib import Path

import pytest

from tests.scenarios.expect import EXPECTATIONS
from tests.scenarios.language import COMMANDS, carry_out
from tests.scenarios.scenario import Scenario, ScenarioError

HERE = Path(__file__).parent
FILES = sorted(HERE.glob("*.txt"))
COUNT_MIN = 60
LINES_MAX = 100


def played(text: str, name: str = "scenario") -> str:
    """The same file with the traces that came out."""
    scenario = Scenario()
    out: list[str] = []
    in_trace = False
    printed: list[str] = []
    for number, line in enumerate([*text.splitlines(), ""], 1):
        if not line.strip():
            in_trace = False
            out.append(line)
        elif line.startswith("#"):
            assert not in_trace, f"{name}:{number}: a comment inside a trace"
            out.append(line)
        elif line == "----":
            assert not in_trace, f"{name}:{number}: a second trace without a command"
            out += [line, *printed]
            printed = []
            in_trace = True
        elif not in_trace:
            out.append(line)
            try:
                printed += carry_out(scenario, line)
            except (ScenarioError, AssertionError) as error:
                came = "\n".join([*printed, *scenario.lines()])
                raise AssertionError(f"{name}:{number}: {line}: {error}\n{came}") from error
        if not line.strip() and printed:
            raise AssertionError(f"{name}:{number}: commands without ----")
    try:
        scenario.end()
    except ScenarioError as error:
        raise AssertionError(f"{name}: at the end: {error}") from error
    return "\n".join(out)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_the_trace_is_what_the_file_says(path: Path, request: pytest.FixtureRequest) -> None:
    expected = path.read_text()
    came = played(expected, path.name)
    if request.config.getoption("--rewrite", default=False):
        path.write_text(came)
        return
    diff = difflib.unified_diff(
        expected.splitlines(), came.splitlines(), f"{path.name} (expected)", f"{path.name} (came)", lineterm=""
    )
    assert expected == came, "\n".join(["the trace differs; if that is right: pytest tests/scenarios --rewrite", *diff])


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_file_says_what_it_is_and_expects_something(path: Path) -> None:
    text = path.read_text()
    comment = text.split("\n\n")[0]
    assert all(line.startswith("# ") for line in comment.splitlines()), "the first paragraph is a comment"
    assert "# From: " in comment, "which test or bug it comes from"
    assert "# Look at: " in comment, "what to look at"
    assert re.search(r"^expect ", text, re.MULTILINE), "nothing is expected: a rewrite could bless anything"
    assert len(text.splitlines()) <= LINES_MAX, "a scenario is read at one go"
    assert re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", path.stem), path.stem


def test_there_are_as_many_as_promised() -> None:
    assert len(FILES) >= COUNT_MIN


def test_the_page_names_every_command_and_every_expectation() -> None:
    page = (HERE / "README.md").read_text().split("## ")[1]
    named = set(re.findall(r"^\| `(?:begin )?([a-z-]+)", page, re.MULTILINE))
    expected = set(re.findall(r"^\| `expect ([a-z-]+)", page, re.MULTILINE))
    assert named == set(COMMANDS)
    assert expected == set(EXPECTATIONS)


def test_every_command_and_every_expectation_is_used() -> None:
    text = "\n".join(path.read_text() for path in FILES)
    assert [one for one in COMMANDS if not re.search(rf"^(?:begin )?{one}\b", text, re.MULTILINE)] == []
    assert [one for one in EXPECTATIONS if not re.search(rf"^expect {one}\b", text, re.MULTILINE)] == []


@pytest.mark.parametrize(
    ("lines", "fault"),
    [
        (["mirror primary=alpha", "write alpha block=3 value=7", "expect value 8 on alpha blocks=3"], "is 7"),
        (["mirror primary=alpha", "disconnect alpha", "write alpha block=3 value=7", "expect equal"], "blocks 3"),
        (["mirror", "before RESYNC_DONE cut"], "never happened: before RESYNC_DONE cut"),
        (["mirror primary=alpha", "stall beta", "begin write alpha block=3 value=7"], "never answered: write 3"),
        (["mirror", "expect state alpha disk=Outdated"], "disk of alpha is UpToDate"),
        (["mirror", "primary alpha", "expect refused peer-is-primary -1"], "the last answer"),
        (["mirror", "writ alpha block=3 value=7"], "there is no command writ"),
        (["mirror", "primary alpha forced"], "not understood: forced"),
        (["mirror", "expect nothing"], "nothing is known"),
    ],
)
def test_what_must_hold_fails_by_itself(lines: list[str], fault: str) -> None:
    with pytest.raises(AssertionError, match=re.escape(fault)):
        played("\n".join([*lines, "----", ""]))


def test_a_copy_that_lost_an_acknowledged_write_is_not_kept() -> None:
    lines = ["mirror primary=alpha", "write alpha block=3 value=7", "fill beta value=0", "expect kept on beta"]
    with pytest.raises(AssertionError, match=r"block 3 of beta is 0, acknowledged or later: \[7\]"):
        played("\n".join([*lines, "----", ""]))


def test_a_trace_that_is_played_again_is_the_same() -> None:
    text = "mirror primary=alpha\nwrite alpha each=0-9 value=7\ncut\nestablish\n----\n"
    once = played(text)
    assert "WRITE 0-9 x10" in once and played(once) == once
