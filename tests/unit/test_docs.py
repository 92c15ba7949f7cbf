# SPDX-License-Identifier: Apache-2.0
"""The pages say what the program does: generated ones are in step, tables are complete, links lead there."""

from __future__ import annotations

import ast
import re
from enum import Enum
from pathlib import Path
from typing import get_args

import pytest

from replicator.core import sealed
from replicator.core.activity import MAGIC as ACTIVITY_MAGIC
from replicator.core.states import MACHINES, Disk, word
from replicator.core.superblock import MAGIC as SUPERBLOCK_MAGIC
from replicator.core.wire import Flag, Kind
from tests import generate_states

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
PAGES = sorted([*ROOT.glob("*.md"), *DOCS.rglob("*.md")])
DECISIONS = sorted((DOCS / "decisions").glob("[0-9]*.md"))


def page(name: str) -> str:
    return (DOCS / name).read_text()


def shown(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def reading_order() -> list[str]:
    """The chapters in the table of architecture.md."""
    section = page("architecture.md").partition("## Reading order of the core")[2].partition("\n## ")[0]
    return re.findall(r"^\| `([a-z_]+)` \|", section, re.MULTILINE)


def chapters() -> dict[str, set[str]]:
    """Each module of the core and the chapters it imports at run time."""
    found = {}
    for path in (ROOT / "replicator" / "core").glob("*.py"):
        if path.stem != "__init__":
            found[path.stem] = set(_imports(ast.parse(path.read_text()).body))
    return found


def _imports(body: list[ast.stmt]) -> list[str]:
    names: list[str] = []
    for statement in body:  # only the top level: what stands under `if TYPE_CHECKING` is not imported
        if not isinstance(statement, ast.ImportFrom) or statement.module is None:
            continue
        if statement.module == "replicator.core":
            names += [alias.name for alias in statement.names]
        elif statement.module.startswith("replicator.core."):
            names.append(statement.module.split(".")[2])
    return names


# -- states.md --------------------------------


def test_the_page_of_states_is_what_the_tables_say() -> None:
    said = page("states.md")
    assert said == generate_states.page(), "run: python -m tests.generate_states > docs/states.md"


@pytest.mark.parametrize("machine", MACHINES, ids=lambda machine: str(machine[0]))
def test_every_state_has_a_meaning_and_an_answer(machine: tuple[str, type[Enum], object]) -> None:
    name, kind, _ = machine
    assert set(generate_states.ADVICE[name]) == {word(member) for member in kind}
    assert set(generate_states.meanings(kind)) == {member.name for member in kind}


def test_a_state_without_a_meaning_cannot_be_published() -> None:
    class Bare(Enum):
        SILENT = "Silent"

    with pytest.raises((ValueError, IndentationError)):
        generate_states.meanings(Bare)


# -- architecture.md --------------------------------


def test_the_reading_order_has_every_chapter_once() -> None:
    order = reading_order()
    assert sorted(order) == sorted(chapters())


def test_a_chapter_imports_only_what_was_read_before_it() -> None:
    order = reading_order()
    place = {name: number for number, name in enumerate(order)}
    backwards = [
        f"{name} imports {used}, which comes later"
        for name, imports in chapters().items()
        for used in imports
        if place[used] >= place[name]
    ]
    assert backwards == []


# -- formats --------------------------------


@pytest.mark.parametrize("kind", Kind, ids=lambda kind: str(kind.name))
def test_the_wire_format_names_every_kind_with_its_number(kind: Kind) -> None:
    assert re.search(rf"^\| {kind.value} \| {kind.name} \|", page("wire-format.md"), re.MULTILINE)


def test_the_wire_format_has_no_kind_that_the_program_lacks() -> None:
    section = page("wire-format.md").partition("## Kinds")[2].partition("\n## ")[0]
    rows = re.findall(r"^\| (\d+) \| ([A-Z_]+) \|", section, re.MULTILINE)
    assert {int(number): name for number, name in rows} == {kind.value: kind.name for kind in Kind}


def test_the_wire_format_names_every_flag_with_its_number() -> None:
    text = page("wire-format.md")
    flags = {name: value for name, value in vars(Flag).items() if isinstance(value, int)}
    assert flags
    assert [name for name, value in flags.items() if f"{value} {name}" not in text] == []


def test_the_wire_format_names_every_disk_state_with_its_number() -> None:
    text = page("wire-format.md")
    assert [disk.word for disk in Disk if f"{disk.value} {disk.word}" not in text] == []


@pytest.mark.parametrize("magic", [SUPERBLOCK_MAGIC, ACTIVITY_MAGIC], ids=lambda magic: magic.decode())
def test_the_disk_format_names_every_magic_with_its_bytes(magic: bytes) -> None:
    text = page("disk-format.md")
    assert f"`{magic.decode()}`" in text
    assert magic.hex(" ") in text


def test_the_disk_format_explains_every_verdict() -> None:
    rows = re.findall(r"^\| ([a-z]+) \|", page("disk-format.md"), re.MULTILINE)
    verdicts = {kind.__name__.lower().replace("sealed", "valid") for kind in get_args(sealed.Verdict)}
    assert verdicts - set(rows) == set()


# -- all pages --------------------------------


@pytest.mark.parametrize("path", PAGES, ids=shown)
def test_links_lead_somewhere(path: Path) -> None:
    targets = re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", path.read_text())
    local = [target for target in targets if "://" not in target]
    assert [target for target in local if not (path.parent / target).exists()] == []


@pytest.mark.parametrize("path", DECISIONS, ids=shown)
def test_a_decision_says_when_why_and_what_follows(path: Path) -> None:
    text = path.read_text()
    assert re.match(rf"# {path.name[:4]} \S", text)
    status = r"^Created: \d{4}-\d\d-\d\d\. Status: (accepted|superseded by \d{4})"
    assert re.search(status, text, re.MULTILINE)
    sections = re.findall(r"^## (.+)$", text, re.MULTILINE)
    if path.name.startswith("0001"):
        return  # it is a specification
    assert sections == ["Context", "Decision", "Alternatives", "Consequences"]


def test_decisions_are_numbered_without_holes() -> None:
    assert [int(path.name[:4]) for path in DECISIONS] == list(range(1, len(DECISIONS) + 1))
