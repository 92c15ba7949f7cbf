# SPDX-License-Identifier: Apache-2.0
"""The tree keeps its own rules: sizes, licences, words, and who may clear a dirty bit."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "replicator"
LINES_MAX = 400
LINES_HARD_MAX = 600
FUNCTION_LINES_MAX = 60
PRAGMAS_MAX = 3  #: lines or branches that coverage leaves out by their own word

#: Modules above LINES_MAX, each with the reason why two would be worse.
LONG: dict[str, str] = {
    "replicator/core/connection.py": "losing a peer is one sequence, and everything it ends is here",
    "replicator/core/handshake_wire.py": "a few lines for each payload, in the order of the specification",
    "replicator/core/replica.py": "what a round asks, decides and begins is one story",
    "replicator/core/resource.py": "dispatch: one place where every event is seen",
    "replicator/core/resync.py": "target and source: each half explains the other",
    "replicator/core/roles.py": "promotion and demotion: each is one sequence of waits and durable steps",
    "replicator/core/volume.py": "the only place where bits are set, and all reasons for it",
}

#: Rule zero (decision 0001, V2): every place in the product that names what clears dirty bits, as it is spelled.
CLEARS_BITS = {"confirm", "clear_all_asserted_identical", "clear_range"}
MAY_CLEAR_BITS: dict[str, set[str]] = {
    # the bitmap itself; `clear_range` also at decode, for the bits behind the last block
    "replicator/core/bitmap.py": {"kernels.clear_range", "self.confirm"},
    # `Volume.confirm`, which a resync calls
    "replicator/core/volume.py": {"self.attached.bitmaps[peer].confirm"},
    "replicator/core/resync.py": {"self._home.confirm"},
    "replicator/core/resync_steps.py": {"self.volume.confirm"},
    # the operator's word instead of a copy
    "replicator/core/identity.py": {"volume.attached.bitmaps[connection.peer].clear_all_asserted_identical"},
    # another thing of that name: the peer confirms an epoch of the transfer log
    "replicator/core/connection.py": {"self._resource.log.confirm"},
}

#: Spelled in halves, so that this file does not contain them.
UNFINISHED = re.compile(r"\b(?:" + "|".join(["TO" + "DO", "FIX" + "ME", "X" + "XX"]) + r")\b")


def is_python_script(path: Path) -> bool:
    """An agent: no suffix, a Python first line."""
    if path.suffix or not path.is_file():
        return False
    with path.open("rb") as file:
        return b"python" in file.readline()


def name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


PRODUCT = sorted(PACKAGE.rglob("*.py")) + sorted(filter(is_python_script, (ROOT / "agents").rglob("*")))
TESTS = sorted((ROOT / "tests").rglob("*.py"))
PURE = [path for path in PRODUCT if path.is_relative_to(PACKAGE / "core") or path.is_relative_to(PACKAGE / "nbd")]
TREES = {path: ast.parse(path.read_text(), filename=str(path)) for path in PRODUCT + TESTS}

product = pytest.mark.parametrize("path", PRODUCT, ids=name)
everything = pytest.mark.parametrize("path", PRODUCT + TESTS, ids=name)


def line_count(path: Path) -> int:
    return len(path.read_text().splitlines())


def functions(path: Path) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    for node in ast.walk(TREES[path]):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node


def calls(path: Path) -> Iterator[tuple[str, int, bool]]:
    """(called name, line, is it a method) of every call in a file."""
    for node in ast.walk(TREES[path]):
        if isinstance(node, ast.Call):
            if isinstance(node.func, ast.Attribute):
                yield node.func.attr, node.lineno, True
            elif isinstance(node.func, ast.Name):
                yield node.func.id, node.lineno, False


@everything
def test_a_file_has_a_licence_a_docstring_and_a_bearable_length(path: Path) -> None:
    lines = path.read_text().splitlines()
    assert "# SPDX-License-Identifier: Apache-2.0" in lines[:2], "no SPDX line"
    assert (ast.get_docstring(TREES[path]) or "").strip(), "no module docstring"
    assert len(lines) <= LINES_HARD_MAX


@product
def test_a_module_is_a_chapter_and_not_a_book(path: Path) -> None:
    if line_count(path) > LINES_MAX:
        assert LONG.get(name(path)), f"{line_count(path)} lines; split it, or give a reason in LONG"


def test_the_list_of_long_modules_is_not_out_of_date() -> None:
    assert [path for path in LONG if line_count(ROOT / path) <= LINES_MAX] == []


@product
def test_a_function_fits_on_a_screen(path: Path) -> None:
    long = {
        f"{function.name} (line {function.lineno})": function.end_lineno - function.lineno + 1
        for function in functions(path)
        if function.end_lineno is not None and function.end_lineno - function.lineno >= FUNCTION_LINES_MAX
    }
    assert long == {}


@everything
def test_nothing_is_left_for_later(path: Path) -> None:
    found = [n for n, line in enumerate(path.read_text().splitlines(), 1) if UNFINISHED.search(line)]
    assert found == []


@pytest.mark.parametrize("path", PURE, ids=name)
def test_pure_code_neither_prints_nor_opens(path: Path) -> None:
    builtins = {"print", "open", "input", "exec", "eval", "__import__"}
    assert [(call, line) for call, line, method in calls(path) if call in builtins and not method] == []


@product
def test_only_those_who_may_clear_a_dirty_bit_do(path: Path) -> None:
    # Named is enough: a method may be kept and called later.
    found = {
        ast.unparse(node)
        for node in ast.walk(TREES[path])
        if isinstance(node, ast.Attribute) and node.attr in CLEARS_BITS
    }
    assert found == MAY_CLEAR_BITS.get(name(path), set())


def test_what_no_test_reaches_is_little_and_says_why() -> None:
    marks = [
        (f"{name(path)}:{number}", line.partition("pragma: no ")[2])
        for path in PRODUCT
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if "pragma: no " in line
    ]
    assert [place for place, mark in marks if not re.fullmatch(r"(?:cover|branch) - \S.{9,}", mark)] == []
    assert len(marks) <= PRAGMAS_MAX, [place for place, _ in marks]


def test_there_is_no_drawer_for_odds_and_ends() -> None:
    assert [name(path) for path in PRODUCT if path.stem in {"utils", "util", "helpers", "misc", "common"}] == []


def test_every_chapter_of_the_core_is_in_the_reading_order() -> None:
    page = (ROOT / "docs" / "architecture.md").read_text()
    chapters = {path.stem for path in (PACKAGE / "core").glob("*.py")} - {"__init__"}
    mentioned = set(re.findall(r"`(?:core[/.])?([a-z_]+)(?:\.py)?`", page))
    assert sorted(chapters - mentioned) == []


def test_nothing_unfinished_is_in_the_pages() -> None:
    pages = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")]
    assert [name(page) for page in pages if UNFINISHED.search(page.read_text())] == []


def test_shell_scripts_and_configuration_carry_their_licence() -> None:
    files = ["Makefile", "pyproject.toml", "tox.ini", ".ci/run", "tests/bootstrap"]
    texts = {file: (ROOT / file).read_text() for file in files}
    assert [file for file, text in texts.items() if "SPDX-License-Identifier: Apache-2.0" not in text] == []
