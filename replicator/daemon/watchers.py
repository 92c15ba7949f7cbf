# SPDX-License-Identifier: Apache-2.0
"""Who follows the events of a resource: the present state first, then changes, each at most every 100 ms.

Nobody watches most of the time, and then this costs nothing: the status is made and compared only while there
is a subscriber.  A subscriber that asked for `status` also gets the status object itself with each change.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from replicator.control.messages import Reply
from replicator.control.render import event_lines, initial_events
from replicator.drivers.loop import Loop, Timer

INTERVAL_NS = 100_000_000

Status = Mapping[str, object]


@dataclass(frozen=True, slots=True)
class Wish:
    """What a subscriber asked for."""

    statistics: bool = False
    diff: bool = False
    status: bool = False


class Watchers:
    """Everything is called in the loop's thread.  `reply` is the controller's."""

    def __init__(self, loop: Loop, status: Callable[[], Status], reply: Callable[[int, Reply], bool]) -> None:
        self._loop = loop
        self._status = status
        self._reply = reply
        self._wishes: dict[int, Wish] = {}
        self._shown: Status = {}
        self._timer: Timer | None = None
        self._looked_ns = 0

    def add(self, token: int, wish: Wish) -> None:
        """Answer a subscription with the present state; changes follow until `remove`."""
        self._look()  # so that everybody compares with the same state
        self._wishes[token] = wish
        self._send(token, wish, initial_events([self._shown], statistics=wish.statistics))

    def remove(self, token: int) -> None:
        """The subscriber went away; a token that does not subscribe is left alone."""
        self._wishes.pop(token, None)

    def turned(self) -> None:
        """The core was stepped: something may have changed."""
        if self._wishes and self._timer is None:
            when_ns = max(self._loop.now_ns(), self._looked_ns + INTERVAL_NS)
            self._timer = self._loop.call_at(when_ns, self._on_timer)

    def finish(self) -> None:
        """The resource ends: tell what changed last, and that it is gone."""
        self._look()
        wishes, self._wishes = self._wishes, {}
        for token, wish in wishes.items():
            lines = event_lines(self._shown, None, statistics=wish.statistics)
            self._reply(token, Reply(ok=True, data={"lines": lines}))

    def _on_timer(self) -> None:
        self._timer = None
        self._look()

    def _look(self) -> None:
        """Compare with what was shown last; tell everybody what they wanted to know."""
        self._looked_ns = self._loop.now_ns()
        before, self._shown = self._shown, self._status()
        for token, wish in list(self._wishes.items()):
            lines = event_lines(before, self._shown, statistics=wish.statistics, diff=wish.diff)
            if lines or (wish.status and before != self._shown):
                self._send(token, wish, lines)

    def _send(self, token: int, wish: Wish, lines: list[str]) -> None:
        data: dict[str, object] = {"lines": lines}
        if wish.status:
            data["status"] = self._shown
        self._reply(token, Reply(ok=True, data=data, final=False))
