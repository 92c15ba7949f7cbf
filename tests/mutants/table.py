# SPDX-License-Identifier: Apache-2.0
"""Reads the table of breaks, and applies one of them to a copy of the tree."""

from __future__ import annotations

import tomllib
from dataclasses import dataclass
from pathlib import Path

TABLE = Path(__file__).with_name("table.toml")


class DoesNotApply(Exception):
    """The old text of a break is not, or not exactly once, in the source of today."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Mutant:
    """One break; see the head of table.toml."""

    id: str
    rules: tuple[str, ...]
    drbd: str
    file: str
    old: str
    new: str
    wrong: str

    def broken(self, root: Path) -> str:
        """The text of the file with the break in it; DoesNotApply if the source has moved."""
        text = (root / self.file).read_text()
        found = text.count(self.old)
        if found != 1:
            raise DoesNotApply(f"the old text is {found} times in {self.file}, not once")
        return text.replace(self.old, self.new)

    def apply(self, root: Path) -> None:
        """Break the tree under `root`."""
        broken = self.broken(root)
        (root / self.file).write_text(broken)


def read(path: Path = TABLE) -> list[Mutant]:
    """Every break, in the order of the table.  KeyError or TypeError if a field is missing or unknown."""
    rows = tomllib.loads(path.read_text())["mutant"]
    return [Mutant(**{"drbd": "", **row, "rules": tuple(row["rules"])}) for row in rows]
