# SPDX-License-Identifier: Apache-2.0
"""Writes that are not yet known to be stable everywhere, in epochs (decision 0001, V10).

Every launched write is in the open epoch.  Closing an epoch sends a BARRIER to the peers that got writes of it
and, once its writes are complete here, flushes the local disks.  An epoch retires when both are done; only then may its
extents leave the activity log.  When a peer is lost, every range it has not confirmed is marked dirty: that is what
makes a resync find them, under all three protocols.

Epochs retire in order.  `retired` is the number of the newest retired one.  The log is bounded: `full` tells the write
path to wait.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Final

#: Closed epochs that may wait for confirmation before new writes wait too.  64 epochs of 2048 writes are 8 MiB of
#: records.
EPOCHS_MAX: Final = 64


class Epoch:
    """A set of writes between two barriers."""

    __slots__ = (
        "closed",
        "flushing",
        "number",
        "peers",
        "ranges",
        "since",
        "stable",
        "unfinished",
        "volumes",
        "waiters",
    )

    def __init__(self, number: int) -> None:
        self.number = number
        self.since = 0  # when its first write was launched, ns
        self.ranges: list[tuple[int, int, int]] = []  # volume, offset, size
        self.volumes: set[int] = set()
        self.peers = 0  # bit per node id that has to confirm
        self.unfinished = 0  # writes not complete on the local disk
        self.flushing = 0  # local flushes under way
        self.closed = False
        self.stable = False  # here
        self.waiters: list[tuple[int, int]] = []  # (volume, client token) of FLUSH requests


class TransferLog:
    """The epochs of one resource.

    `barrier(peers, number)` sends BARRIER; `flush(epoch)` asks for local flushes, sets `epoch.flushing`, and later
    calls `flushed(epoch)` once per flush; `mark(peer, volume, offset, size)` sets bits; `flush_done(volume, token)`
    answers a FLUSH.
    """

    def __init__(
        self,
        *,
        writes_max: int,
        wait_for_peers: Callable[[], bool],
        barrier: Callable[[int, int], None],
        flush: Callable[[Epoch], None],
        mark: Callable[[int, int, int, int], None],
        flush_done: Callable[[int, int], None],
    ) -> None:
        self._writes_max = writes_max
        self._wait_for_peers = wait_for_peers
        self._barrier = barrier
        self._flush = flush
        self._mark = mark
        self._flush_done = flush_done
        self.open = Epoch(1)
        self._closed: deque[Epoch] = deque()
        self.retired = 0

    @property
    def full(self) -> bool:
        """Too many epochs wait for confirmation: launch nothing more."""
        return len(self._closed) >= EPOCHS_MAX

    @property
    def idle(self) -> bool:
        """Every write ever launched is stable, and confirmed or marked."""
        return not self._closed and not self.open.ranges

    def idle_for(self, volumes: set[int]) -> bool:
        """As `idle`, for these volumes only."""
        return not any(number in volumes for epoch in (*self._closed, self.open) for number, _, _ in epoch.ranges)

    def close_for(self, volumes: set[int]) -> None:
        """Close the open epoch if it holds a write to one of these volumes."""
        if any(number in volumes for number, _, _ in self.open.ranges):
            self.close()

    def add(self, volume: int, offset: int, size: int, peers: int, now: int, *, local: bool) -> Epoch:
        """A write is launched; `peers` got it; `local` if the local disk did.  Returns its epoch."""
        epoch = self.open
        if not epoch.ranges:
            epoch.since = now
        epoch.ranges.append((volume, offset, size))
        epoch.peers |= peers
        if local:
            epoch.volumes.add(volume)
            epoch.unfinished += 1
        if len(epoch.ranges) >= self._writes_max:
            self.close()
        return epoch

    def written(self, epoch: Epoch) -> None:
        """A write of the epoch is complete on the local disk (or the disk is gone)."""
        epoch.unfinished -= 1
        assert epoch.unfinished >= 0
        if epoch.closed and not epoch.unfinished:
            self.pump()

    def close(self) -> None:
        """Begin to make the open epoch stable (nothing to do if it is empty)."""
        epoch = self.open
        if not epoch.ranges:
            return
        epoch.closed = True
        self._closed.append(epoch)
        self.open = Epoch(epoch.number + 1)
        if epoch.peers:
            self._barrier(epoch.peers, epoch.number)
        self.pump()

    def flush(self, volume: int, token: int) -> None:
        """A client asked for FLUSH: answered when everything launched so far is stable."""
        self.close()
        if self._closed:
            self._closed[-1].waiters.append((volume, token))
            self.pump()
        else:
            self._flush_done(volume, token)

    def flushed(self, epoch: Epoch) -> None:
        """One local flush of the epoch is done (or its disk is gone)."""
        epoch.flushing -= 1
        assert epoch.flushing >= 0
        if not epoch.flushing:
            epoch.stable = True
            self.pump()

    def confirm(self, peer: int, number: int) -> bool:
        """The peer says that every write up to this epoch is stable there; False if no such barrier is out."""
        if number > self.retired + len(self._closed):
            return False
        bit = 1 << peer
        for epoch in self._closed:
            if epoch.number <= number:
                epoch.peers &= ~bit
        self.pump()
        return True

    def lose(self, peer: int, volume: int | None = None) -> set[int]:
        """The peer is lost (for one volume, or whole): mark what it has not confirmed.  Returns the volumes marked."""
        bit = 1 << peer
        marked: set[int] = set()
        for epoch in (*self._closed, self.open):
            if not epoch.peers & bit:
                continue
            for number, offset, size in epoch.ranges:
                if volume is None or number == volume:
                    self._mark(peer, number, offset, size)
                    marked.add(number)
            if volume is None:
                epoch.peers &= ~bit
        if volume is None:
            self.pump()
        return marked

    def pump(self) -> None:
        """Flush and retire what can be.  Flushes start in order, so one flush covers all that went before."""
        for epoch in self._closed:
            if epoch.unfinished:
                break
            if not epoch.stable and not epoch.flushing:
                self._flush(epoch)
                if not epoch.flushing:
                    epoch.stable = True
        self._answer()
        while self._closed and self._closed[0].stable and not self._closed[0].peers and not self._closed[0].waiters:
            self.retired = self._closed.popleft().number

    def _answer(self) -> None:
        """Answer FLUSH requests whose epoch, and all before it, are stable (and confirmed, if peers count)."""
        for epoch in tuple(self._closed):
            if not epoch.stable or (epoch.peers and self._wait_for_peers()):
                return
            if epoch.waiters:
                waiters, epoch.waiters = epoch.waiters, []
                for volume, token in waiters:
                    self._flush_done(volume, token)
