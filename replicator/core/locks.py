# SPDX-License-Identifier: Apache-2.0
"""Who may touch a range of a volume now, in order of arrival.

Every operation that must not cross another on the same bytes holds a `Lock` from before it is launched until it is
over.  A lock waits for every overlapping lock that came before it, waiting ones included, so overlapping operations
happen in the order in which they came (decision 0001, V9).  Which kinds wait for which is a table:

- LOCAL, a write of our own clients, waits for everything before it;
- PEER, a replicated write, waits for everything but WANTED: it is older than the answer that will come, and waiting
  for that answer would deadlock protocol C (the source's read waits for this very write to be acknowledged);
- SOURCE_READ, the read that answers a resync request, waits for writes;
- WANTED, a range requested from the source, never waits: it is taken only where nothing of our own clients is
  under way; when the answer arrives it *becomes* a COPY in its place and then waits for replicated writes only.

LOCAL and PEER never meet on one volume: there is one writer (V6; `WritePath.submit` asserts it).  If they could,
WANTED, then LOCAL, then PEER on one range would wait for each other.

The table is bucketed by region, so that a lookup among scattered writes touches one short list.
"""

from __future__ import annotations

from collections.abc import Callable
from enum import IntEnum
from typing import Final

REGION_SHIFT: Final = 20


class LockKind(IntEnum):
    """What the holder does."""

    LOCAL = 0
    PEER = 1
    COPY = 2
    WANTED = 3
    SOURCE_READ = 4


#: WAITS[new][existing]
WAITS: Final = (
    (True, True, True, True, True),
    (True, True, True, False, True),
    (False, True, True, False, False),
    (False, False, False, False, False),
    (True, True, True, True, False),
)
#: The same for copies only.
COPIES: Final = tuple((False, False, row[LockKind.COPY], row[LockKind.WANTED], False) for row in WAITS)


class Lock:
    """One range [start, end) in bytes.  `holder` is told through the table's `granted` when its turn comes."""

    __slots__ = ("blockers", "end", "held", "holder", "kind", "start", "waiters")

    def __init__(self, kind: LockKind, start: int, end: int, holder: object) -> None:
        self.kind = kind
        self.start = start
        self.end = end
        self.holder = holder
        self.blockers = 0
        self.held = False  # it is in the table (waiting or granted)
        self.waiters: list[Lock] = []

    @property
    def granted(self) -> bool:
        """It is this lock's turn."""
        return self.held and not self.blockers


class RangeLocks:
    """All locks of one volume."""

    def __init__(self, granted: Callable[[Lock], None]) -> None:
        self._granted = granted
        self._regions: dict[int, list[Lock]] = {}
        self.count = 0

    def take(self, lock: Lock) -> bool:
        """Put the lock in line; True if it is granted at once, else `granted(lock)` will be called."""
        assert not lock.held and lock.start < lock.end
        lock.held = True
        self.count += 1
        regions = self._regions
        for region in range(lock.start >> REGION_SHIFT, ((lock.end - 1) >> REGION_SHIFT) + 1):
            others = regions.get(region)
            if others is None:
                regions[region] = [lock]
                continue
            waits = WAITS[lock.kind]
            for other in reversed(others):
                if other.start < lock.end and lock.start < other.end and waits[other.kind]:
                    self._wait(lock, other)
                    if other.kind <= LockKind.PEER and other.start <= lock.start and lock.end <= other.end:
                        # It covers the range, so it waits for every older write and read that we would wait for: to
                        # wait for it is enough, and a long queue on one block stays a chain.  Not so for copies: they
                        # may have become copies behind it.
                        waits = COPIES[lock.kind]
            others.append(lock)
        return not lock.blockers

    def clear_of_clients(self, start: int, end: int) -> bool:
        """No write of our own clients, and nothing requested or being copied, overlaps the range."""
        for region in range(start >> REGION_SHIFT, ((end - 1) >> REGION_SHIFT) + 1):
            for other in self._regions.get(region, ()):
                if other.start < end and start < other.end and other.kind != LockKind.PEER:
                    return False
        return True

    def become_copy(self, lock: Lock) -> bool:
        """The answer for a WANTED range is here; True if it may be written at once."""
        assert lock.kind is LockKind.WANTED and lock.granted
        lock.kind = LockKind.COPY
        for region in range(lock.start >> REGION_SHIFT, ((lock.end - 1) >> REGION_SHIFT) + 1):
            for other in self._regions[region]:
                overlaps = other.start < lock.end and lock.start < other.end
                if overlaps and other.kind is LockKind.PEER and lock not in other.waiters:
                    self._wait(lock, other)
        return not lock.blockers

    def release(self, lock: Lock) -> None:
        """The operation is over; whoever waited only for it gets its turn."""
        assert lock.granted
        self.count -= 1
        lock.held = False
        for region in range(lock.start >> REGION_SHIFT, ((lock.end - 1) >> REGION_SHIFT) + 1):
            others = self._regions[region]
            if len(others) == 1:
                del self._regions[region]
            else:
                others.remove(lock)
        if lock.waiters:
            waiters, lock.waiters = lock.waiters, []
            for waiter in waiters:
                waiter.blockers -= 1
                if not waiter.blockers:
                    self._granted(waiter)

    @staticmethod
    def _wait(lock: Lock, other: Lock) -> None:
        # Met again in its next region, it is the last one that came; to look at all would be cubic in a queue.
        if not other.waiters or other.waiters[-1] is not lock:
            other.waiters.append(lock)
            lock.blockers += 1
