# SPDX-License-Identifier: Apache-2.0
"""The event loop: turns, timers, wake-ups, signals."""

from __future__ import annotations

import os
import signal
import socket
import threading
from collections.abc import Callable, Iterator

import pytest

from replicator.core.events import DialFailed, Event, Tick
from replicator.drivers.loop import INLINE_TURNS_MAX, READ, WRITE, Loop


class Clock:
    """Jumps to the moment that is waited for: a timer never costs a test real time."""

    def __init__(self) -> None:
        self.now = 1_000

    def __call__(self) -> int:
        self.now += 1
        return self.now


@pytest.fixture
def loop() -> Iterator[Loop]:
    loop = Loop()
    yield loop
    loop.close()


def never() -> None:
    return None


def event(number: int) -> Event:
    return DialFailed(number, "test")


class Core:
    """Notes the turns; stops the loop when `enough` says so."""

    def __init__(self, loop: Loop, enough: Callable[[list[list[Event]]], bool]) -> None:
        self.loop = loop
        self.enough = enough
        self.turns: list[list[Event]] = []

    def turn(self, events: list[Event], now_ns: int) -> None:
        self.turns.append(events)
        if self.enough(self.turns):
            self.loop.stop()


def test_everything_ready_is_read_before_the_core_is_stepped_once(loop: Loop) -> None:
    pairs = [socket.socketpair() for _ in range(3)]
    for number, (ours, theirs) in enumerate(pairs):
        theirs.send(b"x")

        def on_ready(mask: int, number: int = number, ours: socket.socket = ours) -> None:
            assert mask == READ
            ours.recv(1)
            loop.post(event(number))

        loop.register(ours, READ, on_ready)
    core = Core(loop, lambda turns: True)
    loop.run(core.turn, never)
    assert sorted(str(e) for e in core.turns[0]) == [str(event(n)) for n in range(3)]
    for ours, theirs in pairs:
        loop.unregister(ours)
        ours.close()
        theirs.close()


def test_a_callback_is_not_called_after_another_one_unregistered_it(loop: Loop) -> None:
    pairs = [socket.socketpair() for _ in range(2)]
    called: list[int] = []
    for number, (ours, theirs) in enumerate(pairs):
        theirs.send(b"x")

        def on_ready(mask: int, number: int = number) -> None:
            called.append(number)
            loop.unregister(pairs[0][0])
            loop.unregister(pairs[1][0])

        loop.register(ours, READ, on_ready)
    loop.run(Core(loop, lambda turns: True).turn, never)
    assert len(called) == 1
    for pair in pairs:
        for end in pair:
            end.close()


def test_modify_changes_mask_and_callback(loop: Loop) -> None:
    ours, theirs = socket.socketpair()
    seen: list[int] = []

    def writable(mask: int) -> None:
        seen.append(mask)
        theirs.send(b"x")
        loop.modify(ours, READ, readable)

    def readable(mask: int) -> None:
        seen.append(mask)
        loop.unregister(ours)
        loop.stop()

    loop.register(ours, READ | WRITE, writable)
    loop.run(lambda events, now: None, never)
    assert seen == [WRITE, READ]
    ours.close()
    theirs.close()


def test_an_event_posted_by_an_action_is_a_turn_of_its_own_without_sleep(loop: Loop) -> None:
    turns: list[list[Event]] = []

    def turn(events: list[Event], now_ns: int) -> None:
        turns.append(events)
        if len(turns) < 5:
            loop.post(event(len(turns)))
        else:
            loop.stop()

    loop.post(event(0))
    loop.run(turn, never)
    assert turns == [[event(n)] for n in range(5)]


def test_endless_inline_completions_do_not_starve_input(loop: Loop) -> None:
    ours, theirs = socket.socketpair()
    theirs.send(b"x")
    turns = 0
    turns_at_input: list[int] = []

    def on_ready(mask: int) -> None:
        turns_at_input.append(turns)
        ours.recv(1)
        if len(turns_at_input) == 2:
            loop.stop()
        else:
            theirs.send(b"x")

    def turn(events: list[Event], now_ns: int) -> None:
        nonlocal turns
        turns += 1
        loop.post(event(turns))

    loop.register(ours, READ, on_ready)
    loop.run(turn, never)
    assert turns_at_input == [0, INLINE_TURNS_MAX]
    loop.unregister(ours)
    ours.close()
    theirs.close()


def test_turn_ends_run_once_in_order_and_after_the_turn(loop: Loop) -> None:
    seen: list[str] = []

    def first() -> None:
        seen.append("first")

    def second() -> None:
        seen.append("second")
        loop.at_turn_end(third)

    def third() -> None:
        seen.append("third")
        loop.stop()

    def turn(events: list[Event], now_ns: int) -> None:
        seen.append("turn")
        if len(seen) == 1:
            loop.at_turn_end(first)
            loop.at_turn_end(second)
            loop.at_turn_end(first)

    loop.post(event(0))
    loop.run(turn, never)
    assert seen == ["turn", "first", "second", "turn", "third"]


def test_timers_run_in_order_of_time_and_not_when_cancelled() -> None:
    loop = Loop(Clock())
    seen: list[str] = []
    loop.call_at(1_030, lambda: seen.append("late"))
    loop.call_at(1_031, loop.stop)
    loop.call_at(1_010, lambda: seen.append("early"))
    loop.cancel(loop.call_at(1_020, lambda: seen.append("cancelled")))
    loop.run(lambda events, now: None, never)
    assert seen == ["early", "late"]
    loop.close()


def test_a_timer_may_cancel_another_one_that_is_due_with_it() -> None:
    loop = Loop(Clock())
    seen: list[str] = []
    loop.call_at(0, lambda: loop.cancel(victim))
    victim = loop.call_at(1, lambda: seen.append("victim"))
    loop.call_at(2, loop.stop)
    loop.run(lambda events, now: None, never)
    assert seen == []
    loop.cancel(victim)  # harmless
    loop.close()


def test_cancelled_timers_do_not_pile_up(loop: Loop) -> None:
    far = loop.now_ns() + 10**15
    keep = loop.call_at(far, lambda: None)
    for _ in range(10_000):
        loop.cancel(loop.call_at(far, lambda: None))
    assert len(loop._timers) < 200
    assert keep in loop._timers


def test_tick_is_posted_when_the_deadline_is_due_and_behind_the_input() -> None:
    loop = Loop(Clock())
    ours, theirs = socket.socketpair()
    theirs.send(b"x")

    def on_ready(mask: int) -> None:
        ours.recv(1)
        loop.post(event(1))

    loop.register(ours, READ, on_ready)
    core = Core(loop, lambda turns: True)
    loop.run(core.turn, lambda: 1_000)
    assert core.turns == [[event(1), Tick()]]
    loop.unregister(ours)
    ours.close()
    theirs.close()
    loop.close()


def test_a_thread_wakes_the_loop_and_its_call_runs_in_the_loops_thread(loop: Loop) -> None:
    where: list[threading.Thread] = []

    def call() -> None:
        where.append(threading.current_thread())
        loop.stop()

    thread = threading.Thread(target=lambda: loop.call_from_thread(call))
    thread.start()
    loop.run(lambda events, now: None, never)
    thread.join()
    assert where == [threading.main_thread()]


def test_wake_ends_the_sleep(loop: Loop) -> None:
    core = Core(loop, lambda turns: True)
    thread = threading.Thread(target=loop.wake)
    thread.start()
    loop.run(core.turn, never)
    thread.join()
    assert core.turns == [[]]


def test_a_signal_runs_its_function_once_in_the_loop(loop: Loop) -> None:
    seen: list[str] = []
    loop.on_signal(signal.SIGUSR1, lambda: seen.append("usr1"))
    loop.on_signal(signal.SIGUSR2, loop.stop)
    for signum in (signal.SIGUSR1, signal.SIGUSR1, signal.SIGUSR2):
        os.kill(os.getpid(), signum)
    loop.run(lambda events, now: None, never)
    assert seen == ["usr1"]


def test_an_exception_in_a_callback_leaves_run(loop: Loop) -> None:
    def broken() -> None:
        raise AssertionError("invariant")

    loop.call_at(0, broken)
    with pytest.raises(AssertionError, match="invariant"):
        loop.run(lambda events, now: None, never)
