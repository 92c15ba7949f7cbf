# SPDX-License-Identifier: Apache-2.0
"""How a long wait looks: one line redrawn on a terminal, a plain line now and then elsewhere.

The figures are honest.  100 % appears only when nothing is left; the time to the end is `--:--` until there
is a rate to reckon with, and again when the work stands still or grows; a rate is what was measured,
smoothed over seconds.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

SMOOTHING_S = 10.0  # a change of pace shows after about this long
ETA_MAX_S = 100 * 3600  # beyond that a figure would be a joke
PLAIN_INTERVAL_S = 5.0
DRAW_INTERVAL_S = 0.1
_BAR_MIN = 10
_BAR_MAX = 40
_UNITS = ("B", "KiB", "MiB", "GiB", "TiB", "PiB")


class Progress(NamedTuple):
    """A moment of a long piece of work; None where nothing is known yet."""

    done_bytes: int
    total_bytes: int
    rate_bytes_s: float | None = None
    eta_s: float | None = None


def percent_text(done: int, total: int) -> str:
    """Like "28.1%", rounded down: what is unfinished never reads 100.0%."""
    done, total = max(0, done), max(0, total)
    if done >= total:
        return "100.0%"
    return f"{done * 1000 // total / 10:.1f}%"


def size_text(size_bytes: float) -> str:
    """Like "1.2 GiB"."""
    power = 0
    while size_bytes >= 1024 and power < len(_UNITS) - 1:
        size_bytes /= 1024
        power += 1
    return f"{size_bytes:.0f} {_UNITS[power]}" if power == 0 else f"{size_bytes:.1f} {_UNITS[power]}"


def eta_text(eta_s: float | None) -> str:
    """Like "02:05" or "1:02:05"; "--:--" when it is not known."""
    if eta_s is None or not 0 <= eta_s < ETA_MAX_S:
        return "--:--"
    seconds = math.ceil(eta_s)
    hours, minutes = seconds // 3600, seconds // 60 % 60
    return f"{hours}:{minutes:02}:{seconds % 60:02}" if hours else f"{minutes:02}:{seconds % 60:02}"


def format_progress(label: str, progress: Progress, width: int = 0) -> str:
    """One line; with `width` columns it has a bar, if there is room for one, and is never longer."""
    done, total = min(max(0, progress.done_bytes), progress.total_bytes), progress.total_bytes
    rate = "--" if progress.rate_bytes_s is None else size_text(max(0.0, progress.rate_bytes_s))
    figures = f"{percent_text(done, total):>6}  {size_text(done)} of {size_text(total)}"
    figures += f"  {rate}/s  ETA {eta_text(progress.eta_s)}"
    room = min(width - len(label) - len(figures) - 5, _BAR_MAX)
    if room < _BAR_MIN:
        line = f"{label} {figures}"
        return line[:width] if width else line
    filled = room if done >= total else done * room // total
    bar = "=" * filled + (">" if filled < room else "")
    return f"{label} [{bar:.<{room}}] {figures}"


class Pace:
    """Rate and time to the end from successive observations."""

    __slots__ = ("_last", "_rate")

    def __init__(self) -> None:
        self._last: tuple[float, int] | None = None  # when, bytes left
        self._rate: float | None = None

    def observe(self, now_s: float, done_bytes: int, total_bytes: int) -> Progress:
        """Take one observation; `now_s` is monotonic."""
        left = max(0, total_bytes - done_bytes)
        if self._last is None:
            self._last = (now_s, left)
        elif now_s > self._last[0]:
            span_s = now_s - self._last[0]
            # What counts is how fast the rest shrinks: writes that make more work are part of the truth.
            rate = (self._last[1] - left) / span_s
            weight = 1.0 if self._rate is None else 1.0 - math.exp(-span_s / SMOOTHING_S)
            self._rate = rate * weight + (self._rate or 0.0) * (1.0 - weight)
            self._last = (now_s, left)
        eta_s: float | None = None
        if left == 0:
            eta_s = 0.0
        elif self._rate is not None and self._rate > 0:
            eta_s = left / self._rate
        shown_rate = None if self._rate is None else max(0.0, self._rate)
        return Progress(done_bytes, total_bytes, shown_rate, eta_s)


class ProgressPrinter:
    """Prints a wait through `write`; `now` is a monotonic clock in seconds.

    On a terminal (`columns` > 0) the line is redrawn in place, at most ten times a second; elsewhere (0) a
    line is printed every few seconds.  `finish` prints the last state and ends the line.
    """

    def __init__(self, label: str, write: Callable[[str], object], now: Callable[[], float], columns: int = 0) -> None:
        self._label = label
        self._write = write
        self._now = now
        self._columns = columns
        self._pace = Pace()
        self._drawn_s: float | None = None
        self._latest: Progress | None = None

    def update(self, done_bytes: int, total_bytes: int) -> None:
        """Take the present state, and print it when it is time."""
        now_s = self._now()
        interval_s = DRAW_INTERVAL_S if self._columns else PLAIN_INTERVAL_S
        self._latest = self._pace.observe(now_s, done_bytes, total_bytes)
        if self._drawn_s is None or now_s - self._drawn_s >= interval_s:
            self._drawn_s = now_s
            self._draw(self._latest)

    def finish(self) -> None:
        """The wait is over, well or not: leave the last state on the screen."""
        if self._latest is None:
            return
        self._draw(self._latest)
        if self._columns:
            self._write("\n")
        self._latest = None

    def _draw(self, progress: Progress) -> None:
        if self._columns:
            # One column is left free: a full line would wrap on some terminals.
            self._write("\r" + format_progress(self._label, progress, self._columns - 1) + "\x1b[K")
        else:
            self._write(format_progress(self._label, progress) + "\n")
