# SPDX-License-Identifier: Apache-2.0
"""How fast a resync gives way to the application and comes back, and what a target may leave unconfirmed."""

from __future__ import annotations

import pytest

from replicator.core import resync
from replicator.core.geometry import BLOCK
from replicator.core.resync import BUSY_PAUSE_NS, CHUNK, SHRINK_INTERVAL_NS, WINDOW_MIN, WINDOW_START
from replicator.core.wire import Frame, Kind
from tests.unit.test_resync import MIB, Mirror, noise

SIZE = 24 * MIB


def refill(mirror: Mirror) -> int:
    """What is under way after the pause is over: the window, if it is full."""
    mirror.target.context.now += BUSY_PAUSE_NS
    mirror.source.context.now = mirror.target.context.now
    mirror.here.pull()
    return sum(frame.size for frame in mirror.target.sent)


def answer_all(mirror: Mirror) -> None:
    """Every request that is under way is answered and written."""
    requests, mirror.target.sent = mirror.target.sent, []
    for frame in requests:
        mirror.to_source(frame)
    mirror.source.run_all()
    answers, mirror.source.sent = mirror.source.sent, []
    for frame in answers:
        mirror.to_target(frame)
    mirror.target.run_all()
    mirror.target.sent.clear()


def test_many_busy_answers_of_one_moment_halve_the_window_once() -> None:
    mirror = Mirror(noise(1, SIZE), noise(2, SIZE)).dirty().begin()
    mirror.source.busy = True
    assert refill(mirror) == WINDOW_START
    answer_all(mirror)
    assert refill(mirror) == WINDOW_START // 2
    answer_all(mirror)
    assert refill(mirror) == WINDOW_START // 2, "not yet again"
    mirror.target.context.now += SHRINK_INTERVAL_NS
    answer_all(mirror)
    assert refill(mirror) == WINDOW_START // 4
    for _ in range(10):
        mirror.target.context.now += SHRINK_INTERVAL_NS
        answer_all(mirror)
    assert refill(mirror) == WINDOW_MIN, "it never stands still"
    mirror.source.busy = False
    answer_all(mirror)
    assert refill(mirror) == WINDOW_MIN + CHUNK


def test_a_target_that_confirms_nothing_is_refused_at_a_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resync, "SOURCE_RANGES_MAX", 20)
    mirror = Mirror(noise(1), noise(2)).begin()

    def ask(number: int) -> str | None:
        return mirror.there.on_request(Frame(Kind.RESYNC_REQUEST, sequence=1, offset=number * BLOCK, size=BLOCK))

    for number in range(21):
        assert ask(number) is None
        mirror.source.run_all()
    assert ask(21) == "more than 20 ranges copied and not confirmed"
    assert mirror.there.answered(0, BLOCK), "one is confirmed"
    assert ask(21) is None
