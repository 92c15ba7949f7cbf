# SPDX-License-Identifier: Apache-2.0
"""A peer that says the same thing again and again while our disk hangs: it is told off, or it costs nothing (S-7)."""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable
from typing import Final

import pytest

from replicator.core import receiver, resync
from replicator.core.geometry import BLOCK
from replicator.core.handshake_wire import pack_disk_state
from replicator.core.wire import Frame, Kind
from tests.fuzz import hostile
from tests.fuzz.victim import SIZE, Victim

TIMES: Final = 1000
KEPT_PER_FRAME: Final = 2048  # bytes that a frame may cost as long as it waits

#: (state, the n-th frame): what the core takes without an answer from the disk.
FLOODS: Final[dict[str, tuple[Callable[[str], Victim], Callable[[int], Frame]]]] = {
    "trim": (hostile.replica, lambda n: Frame(Kind.TRIM, sequence=n, offset=0, size=512)),
    "barrier": (hostile.replica, lambda n: Frame(Kind.BARRIER, sequence=n) if n > 1 else _trim()),
    "request": (hostile.source, lambda n: Frame(Kind.RESYNC_REQUEST, sequence=n, size=512)),
    "read": (hostile.secondary, lambda n: Frame(Kind.READ, sequence=n, size=512)),
    "ping": (hostile.secondary, lambda n: Frame(Kind.PING, sequence=n)),
    "role-request": (hostile.secondary, lambda n: Frame(Kind.ROLE_REQUEST, sequence=n)),
    "disk-state": (hostile.secondary, lambda n: Frame(Kind.DISK_STATE, sequence=n, payload=pack_disk_state(0))),
}


def _trim() -> Frame:
    return Frame(Kind.TRIM, sequence=1, offset=0, size=512)


def _flood(victim: Victim, make: Callable[[int], Frame], first: int, times: int) -> None:
    """Frames in turns of a hundred; what is said to the peer is not kept."""
    for at in range(first, first + times, 100):
        victim.say([make(n) for n in range(at, at + 100)])
        if victim.wire is not None:
            victim.wire.heard.clear()


@pytest.mark.parametrize("name", FLOODS)
def test_a_frame_that_waits_costs_little(name: str) -> None:
    start, make = FLOODS[name]
    victim = start("C")
    _flood(victim, make, 1, 100)
    tracemalloc.start()
    try:
        _flood(victim, make, 101, TIMES)
        kept = tracemalloc.get_traced_memory()[0]
    finally:
        tracemalloc.stop()
    assert kept < TIMES * KEPT_PER_FRAME
    victim.finish()


@pytest.mark.parametrize(("name", "reason"), [("trim", "unacknowledged writes"), ("barrier", "writes and barriers")])
def test_writes_without_payload_and_barriers_are_counted(
    name: str, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(receiver, "UNFINISHED_COUNT_MAX", 150)
    start, make = FLOODS[name]
    victim = start("C")
    _flood(victim, make, 1, 200)
    assert victim.wire is None and reason in victim.connection.reason
    victim.finish()


def test_writes_that_are_over_do_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(receiver, "UNFINISHED_COUNT_MAX", 150)
    for name in ("trim", "barrier"):
        start, make = FLOODS[name]
        for protocol in "ABC":
            victim = start(protocol)
            for turn in range(5):
                _flood(victim, make, 1 + turn * 100, 100)
                victim.complete_all()
            assert victim.wire is not None, victim.connection.reason
            victim.finish()


def test_a_target_that_asks_and_never_confirms_is_told_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resync, "SOURCE_RANGES_MAX", 100)
    victim = hostile.source("C")
    for n in range(1, 103):
        offset = n * BLOCK % SIZE // BLOCK * BLOCK
        victim.say([Frame(Kind.RESYNC_REQUEST, sequence=n, offset=offset, size=BLOCK)])
        victim.complete_all()
    assert victim.wire is None and "not confirmed" in victim.connection.reason
    victim.finish()
