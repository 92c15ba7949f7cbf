# SPDX-License-Identifier: Apache-2.0
"""One thread owns the core: read all that is ready, step the core, then act once.

A *turn*: wait for I/O, the core's deadline or a timer; run the callbacks of everything that is ready (they
`post` core events); hand all events to the core at once; run what asked to run at the end of the turn (disks
hand over their batch, links send their frames).  So a system call, a lock or a wake-up is paid for per batch.

Invariants:
- Everything but `wake` and `call_from_thread` is called in the loop's own thread.
- A `Tick` follows the I/O that was ready with it: a process that was stopped for a minute reads what its peer
  said meanwhile before it judges whether the peer is silent.
- An exception in a callback leaves `run` and ends the process; it is a broken invariant and never swallowed.
"""

from __future__ import annotations

import heapq
import os
import selectors
import signal
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

from replicator.core.events import Event, Tick

READ = selectors.EVENT_READ
WRITE = selectors.EVENT_WRITE

#: Turns in a row without looking at I/O (completions that arise inline); then other sockets get their share.
INLINE_TURNS_MAX = 16
#: Cancelled timers are swept out of the heap when there are more of them than this and than live ones.
CANCELLED_MAX = 64

Callback = Callable[[int], None]
Turn = Callable[[list[Event], int], None]
Deadline = Callable[[], int | None]


class HasFileno(Protocol):
    """A socket, a pipe end, anything with a descriptor."""

    def fileno(self) -> int: ...


def now_ns() -> int:
    """The clock the core is stepped with: CLOCK_MONOTONIC, nanoseconds."""
    return time.monotonic_ns()


@dataclass(slots=True)
class _Watch:
    mask: int
    callback: Callback
    live: bool = True


@dataclass(slots=True, order=True)
class Timer:
    """A handle of `Loop.call_at`."""

    when_ns: int
    number: int
    fn: Callable[[], None] | None = field(compare=False)


class Loop:
    """A selectors loop for one process; `now_ns` may be replaced by a test."""

    def __init__(self, clock: Callable[[], int] = now_ns) -> None:
        self.now_ns = clock
        self._selector = selectors.DefaultSelector()
        self._watches: dict[int, _Watch] = {}
        self._events: list[Event] = []
        self._turn_end: dict[Callable[[], None], None] = {}
        self._timers: list[Timer] = []
        self._timer_number = 0
        self._cancelled = 0
        self._from_threads: deque[Callable[[], None]] = deque()
        self._stopped = False
        self._signals: dict[int, Callable[[], None]] = {}
        self._signal_pipe: tuple[int, int] | None = None
        self._eventfd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self.register(self._eventfd, READ, self._on_wake)

    # -- descriptors --------------------------------

    def register(self, fileobj: int | HasFileno, mask: int, callback: Callback) -> None:
        """Call `callback(ready_mask)` while `fileobj` is ready for `mask` (READ, WRITE or both)."""
        watch = _Watch(mask, callback)
        key = self._selector.register(fileobj, mask, watch)
        self._watches[key.fd] = watch

    def modify(self, fileobj: int | HasFileno, mask: int, callback: Callback) -> None:
        """Replace mask and callback of a registered descriptor."""
        fd = fileobj if isinstance(fileobj, int) else fileobj.fileno()
        watch = self._watches[fd]
        watch.callback = callback
        if mask != watch.mask:
            watch.mask = mask
            self._selector.modify(fileobj, mask, watch)

    def unregister(self, fileobj: int | HasFileno) -> None:
        """Forget a descriptor; its callback is not called again, not even later in this turn."""
        key = self._selector.unregister(fileobj)
        self._watches.pop(key.fd).live = False

    # -- events, turn ends, timers --------------------------------

    def post(self, event: Event) -> None:
        """Hand an event to the core in this turn or, if that was stepped already, in the next, at once."""
        self._events.append(event)

    def at_turn_end(self, fn: Callable[[], None]) -> None:
        """Run `fn` once when the core's actions of this turn are dispatched; asking twice is asking once."""
        self._turn_end[fn] = None

    def call_at(self, when_ns: int, fn: Callable[[], None]) -> Timer:
        """Run `fn` once, at `when_ns` on this loop's clock or as soon as possible after it."""
        self._timer_number += 1
        timer = Timer(when_ns, self._timer_number, fn)
        heapq.heappush(self._timers, timer)
        return timer

    def cancel(self, timer: Timer) -> None:
        """Make sure that a timer does not run; one that ran or was cancelled is left alone."""
        if timer.fn is None:
            return
        timer.fn = None
        self._cancelled += 1
        if self._cancelled > CANCELLED_MAX and self._cancelled * 2 > len(self._timers):
            self._timers = [timer for timer in self._timers if timer.fn is not None]
            heapq.heapify(self._timers)
            self._cancelled = 0

    # -- other threads, signals --------------------------------

    def wake(self) -> None:
        """End the loop's sleep.  Any thread."""
        os.eventfd_write(self._eventfd, 1)

    def call_from_thread(self, fn: Callable[[], None]) -> None:
        """Run `fn` in the loop's thread, with the I/O callbacks of the next turn.  Any thread."""
        self._from_threads.append(fn)
        self.wake()

    def on_signal(self, signum: int, fn: Callable[[], None]) -> None:
        """Run `fn` in the loop when the process receives `signum`.  Main thread only (Python's rule)."""
        if self._signal_pipe is None:
            self._signal_pipe = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
            signal.set_wakeup_fd(self._signal_pipe[1], warn_on_full_buffer=False)
            self.register(self._signal_pipe[0], READ, self._on_signals)
        self._signals[signum] = fn
        signal.signal(signum, _interrupt_nothing)

    def stop(self) -> None:
        """Make `run` return when the current turn has ended."""
        self._stopped = True

    def close(self) -> None:
        """Release the loop's own descriptors and restore the signals it took."""
        if self._signal_pipe is not None:
            signal.set_wakeup_fd(-1)
            for signum in self._signals:
                signal.signal(signum, signal.SIG_DFL)
            for fd in self._signal_pipe:
                os.close(fd)
        self._selector.close()
        os.close(self._eventfd)

    # -- the turn --------------------------------

    def run(self, turn: Turn, deadline: Deadline) -> None:
        """Turn until `stop`.

        `turn(events, now_ns)` steps the core and dispatches its actions, which may `post` again; `events` may
        be empty.  `deadline()` says when the core wants a `Tick` (None: never).  Raises what callbacks raise.
        """
        self._stopped = False
        while not self._stopped:
            ready = self._selector.select(self._timeout_s(deadline()))
            for key, mask in ready:
                watch: _Watch = key.data
                if watch.live and mask & watch.mask:  # an earlier callback may have changed either
                    watch.callback(mask & watch.mask)
            self._run_timers()
            due = deadline()
            if due is not None and due <= self.now_ns():
                self._events.append(Tick())
            for _ in range(INLINE_TURNS_MAX):
                events, self._events = self._events, []
                turn(events, self.now_ns())
                ends, self._turn_end = self._turn_end, {}
                for fn in ends:
                    fn()
                if not self._pending():
                    break

    def _pending(self) -> bool:
        return bool(self._events or self._turn_end)

    def _timeout_s(self, due: int | None) -> float | None:
        """How long the loop may sleep."""
        if self._pending():
            return 0.0
        while self._timers and self._timers[0].fn is None:
            heapq.heappop(self._timers)
            self._cancelled -= 1
        if self._timers and (due is None or self._timers[0].when_ns < due):
            due = self._timers[0].when_ns
        return None if due is None else max(0, due - self.now_ns()) / 1e9

    def _run_timers(self) -> None:
        now = self.now_ns()
        ripe: list[Timer] = []  # collected first: a timer that sets another one for now must not starve I/O
        while self._timers and self._timers[0].when_ns <= now:
            timer = heapq.heappop(self._timers)
            if timer.fn is None:
                self._cancelled -= 1
            else:
                ripe.append(timer)
        for timer in ripe:
            fn, timer.fn = timer.fn, None
            if fn is not None:  # a timer of the same moment may have cancelled it
                fn()
            else:
                self._cancelled -= 1

    def _on_wake(self, _mask: int) -> None:
        os.eventfd_read(self._eventfd)
        for _ in range(len(self._from_threads)):
            self._from_threads.popleft()()

    def _on_signals(self, _mask: int) -> None:
        assert self._signal_pipe is not None
        for signum in dict.fromkeys(os.read(self._signal_pipe[0], 4096)):
            if signum in self._signals:
                self._signals[signum]()


def _interrupt_nothing(_signum: int, _frame: object) -> None:
    """A Python-level handler must exist for the wake-up descriptor to be written."""
