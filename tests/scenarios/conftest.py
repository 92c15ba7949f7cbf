# SPDX-License-Identifier: Apache-2.0
"""`pytest tests/scenarios --rewrite` writes the traces that came out into the files; review them as a diff."""

from __future__ import annotations

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    """The option that makes expected traces out of real ones; `expect` lines fail all the same."""
    parser.addoption("--rewrite", action="store_true", help="write the traces that came out into tests/scenarios/*.txt")
