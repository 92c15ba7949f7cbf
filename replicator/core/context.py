# SPDX-License-Identifier: Apache-2.0
"""What every chapter shares: the options, the time of this step, the actions asked for, and who waits for what.

A chapter that needs an answer from outside calls `ask(handler, subject)`: the token goes into the action, and when the
completion comes `handler(subject, event)` is called, exactly once.  A completion nobody asked for is a broken
invariant.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from replicator.core.actions import Action, Notice
from replicator.core.events import DiskDone
from replicator.core.options import Options

Handler = Callable[[Any, DiskDone], None]


class Context:
    """Shared by the chapters of one resource; holds no state of the mirror itself."""

    __slots__ = ("_new_id", "_pending", "_token", "now", "options", "out")

    def __init__(self, options: Options, new_id: Callable[[], int]) -> None:
        self.options = options
        self._new_id = new_id
        self.now = 0
        self.out: list[Action] = []
        self._token = 0
        self._pending: dict[int, tuple[Handler, Any]] = {}

    def new_id(self) -> int:
        """A fresh generation id; never one of the small numbers that have a meaning (0, 1, 4, 5)."""
        while (fresh := self._new_id()) < 8:
            pass
        return fresh

    def ask(self, handler: Handler, subject: object) -> int:
        """A fresh token; `handler(subject, event)` will be called with its completion."""
        self._token += 1
        self._pending[self._token] = (handler, subject)
        return self._token

    def complete(self, event: DiskDone) -> None:
        """Deliver one completion."""
        handler, subject = self._pending.pop(event.token)
        handler(subject, event)

    def notice(self, code: str, **fields: object) -> None:
        """Tell the operator (and the tests, and the trace) that something happened."""
        self.out.append(Notice(code, fields))
