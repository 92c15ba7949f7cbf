# SPDX-License-Identifier: Apache-2.0
"""Progress is honest: no 100 % before the end, no invented time, no negative figures."""

from __future__ import annotations

import re

from hypothesis import given
from hypothesis import strategies as st

from replicator.control.progress import (
    Pace,
    Progress,
    ProgressPrinter,
    eta_text,
    format_progress,
    percent_text,
)

GIB = 2**30


def test_at_first_the_time_to_the_end_is_unknown() -> None:
    line = format_progress("sync", Pace().observe(0.0, 0, GIB))
    assert line == "sync   0.0%  0 B of 1.0 GiB  --/s  ETA --:--"


def test_a_steady_pace_gives_rate_and_time() -> None:
    pace = Pace()
    for second in range(5):
        progress = pace.observe(float(second), second * 2**20, 64 * 2**20)
    assert format_progress("r0/0", progress) == "r0/0   6.2%  4.0 MiB of 64.0 MiB  1.0 MiB/s  ETA 01:00"


def test_standing_still_or_growing_work_has_no_end() -> None:
    pace = Pace()
    pace.observe(0.0, 100, 1000)
    progress = pace.observe(1.0, 100, 2000)
    assert (progress.rate_bytes_s, progress.eta_s) == (0.0, None)


def test_a_change_of_pace_shows_gradually() -> None:
    pace = Pace()
    pace.observe(0.0, 0, 10_000)
    pace.observe(1.0, 1000, 10_000)
    rate = pace.observe(2.0, 1000, 10_000).rate_bytes_s
    assert rate is not None
    assert 800 < rate < 1000


def test_the_bar_fits_the_width_and_is_full_only_at_the_end() -> None:
    almost = format_progress("sync", Progress(GIB - 1, GIB, 1.0, 1.0), 80)
    assert ">" in almost
    assert "99.9%" in almost
    done = format_progress("sync", Progress(GIB, GIB, 1.0, 0.0), 80)
    assert ">" not in done
    assert "100.0%" in done
    assert "ETA 00:00" in done


def test_times_are_written_like_a_clock() -> None:
    assert [eta_text(value) for value in (0, 0.2, 125, 3725, 10**9, -1, None)] == [
        "00:00",
        "00:01",
        "02:05",
        "1:02:05",
        "--:--",
        "--:--",
        "--:--",
    ]


@given(st.integers(0, 2**60), st.integers(0, 2**60), st.integers(1, 200))
def test_a_line_is_never_longer_than_the_terminal(done: int, total: int, width: int) -> None:
    assert len(format_progress("sync", Progress(done, total, -1.0, -1.0), width)) <= width
    assert (percent_text(done, total) == "100.0%") == (done >= total)


@given(st.lists(st.tuples(st.floats(0, 1e6), st.integers(0, 2**50), st.integers(0, 2**50)), max_size=20))
def test_no_figure_is_ever_negative(observations: list[tuple[float, int, int]]) -> None:
    pace = Pace()
    for now_s, done, total in observations:
        progress = pace.observe(now_s, done, total)
        assert progress.eta_s is None or progress.eta_s >= 0
        assert progress.rate_bytes_s is None or progress.rate_bytes_s >= 0
        assert not re.search(r"-\d", format_progress("sync", progress))


def test_a_terminal_line_is_redrawn_and_ended_once() -> None:
    written: list[str] = []
    clock = iter([0.0, 0.05, 1.0])
    printer = ProgressPrinter("sync", written.append, lambda: next(clock), columns=60)
    for done in (0, 1, 2):
        printer.update(done, 2)
    assert len(written) == 2  # the second came too soon
    assert all(text.startswith("\r") and "\n" not in text for text in written)
    printer.finish()
    printer.finish()
    assert written[-1] == "\n"
    assert written.count("\n") == 1


def test_elsewhere_plain_lines_come_now_and_then() -> None:
    written: list[str] = []
    seconds = iter(range(100))
    printer = ProgressPrinter("sync", written.append, lambda: float(next(seconds)))
    for done in range(12):
        printer.update(done, 12)
    assert len(written) == 3  # at 0, 5 and 10 s
    assert all(text.endswith("\n") and "\r" not in text and "\x1b" not in text for text in written)


def test_nothing_was_waited_for_nothing_is_printed() -> None:
    written: list[str] = []
    ProgressPrinter("sync", written.append, lambda: 0.0, columns=80).finish()
    assert written == []


def test_the_last_state_is_printed_wherever_it_goes() -> None:
    written: list[str] = []
    seconds = iter((0.0, 1.0))
    printer = ProgressPrinter("sync", written.append, lambda: next(seconds))
    printer.update(0, 2)
    printer.update(2, 2)  # too soon for a line of its own
    printer.finish()
    assert len(written) == 2 and "100.0%" in written[-1] and written[-1].endswith("\n")


def test_two_observations_at_one_moment_say_nothing_about_the_pace() -> None:
    pace = Pace()
    pace.observe(1.0, 0, 1000)
    assert pace.observe(1.0, 500, 1000) == Progress(500, 1000, None, None)
    assert pace.observe(2.0, 500, 1000).rate_bytes_s == 500.0
