# SPDX-License-Identifier: Apache-2.0
"""The life of a write (decision 0001): gates, launch, completion, reply.

A write passes four gates in order, and waits at the first that is closed:

1. *hold*: a round is being negotiated, too much is under way (transfer log, unacknowledged bytes), or (replicated
   writes) this copy is not yet durably Inconsistent;
2. *lock*: an overlapping operation came first (V9);
3. *fork point*: a peer will not get this write and no fork point towards it is durable yet (V3);
4. *activity log*: its extents are not hot on disk (V4).

Whoever opens a gate wakes the writes behind it, and each starts again at gate 1, so a gate that closed meanwhile is
seen.  *Launch* happens in one turn: mark, log, send, submit.  The reply leaves when the local disk and the peers that
count under the protocol have answered, and neither a missing fork point nor a failing disk stands in the way.
"""

from __future__ import annotations

import errno
from collections import deque
from collections.abc import Callable
from typing import Final, Protocol

from replicator.core.actions import Reply, WriteData, ZeroData
from replicator.core.context import Context
from replicator.core.events import DiskDone, Io
from replicator.core.geometry import extents_of
from replicator.core.locks import Lock, RangeLocks
from replicator.core.transferlog import TransferLog
from replicator.core.write import Write

#: Weight of a new sample in the smoothed write latency: 1/8, as TCP smooths round-trip times.
LATENCY_SHIFT: Final = 3


class Home(Protocol):
    """What the write path asks of its volume."""

    number: int

    def absent(self, origin: int) -> int:
        """Bit per peer slot that will not have a write of this origin."""

    def forked(self, peers: int) -> bool:
        """A fork point towards each of these peers is durable."""

    def crowded(self) -> bool:
        """Too much is under way already: launch nothing more for now."""

    def missed(self) -> bool:
        """Some peer that is away lacks something."""

    def rotate(self) -> None:
        """Make one; `WritePath.wake_unforked` follows."""

    def hot(self, extents: range) -> bool:
        """The extents are in the activity log on disk; otherwise they will be (`wake_cold` follows)."""

    def touch(self, extents: range, epoch: int) -> None:
        """A write of this epoch was launched into hot extents."""

    def mark(self, peer: int, offset: int, size: int) -> None:
        """Set dirty bits."""

    def has_disk(self) -> bool:
        """Writes go to the local disk."""

    def trusts_itself(self) -> bool:
        """The local copy alone is good data."""

    def writable(self) -> bool:
        """Up-to-date data is within reach, here or at the peer."""

    def send(self, write: Write) -> int:
        """Send to every peer that should have it; sets its sequence; returns the peers."""

    def replicated_done(self, write: Write, error: int) -> None:
        """A replicated write ended: acknowledge it."""

    def disk_error(self, what: str, error: int) -> None:
        """A write or flush of the local disk failed."""


class WritePath:
    """The writes of one volume."""

    def __init__(self, home: Home, context: Context, log: TransferLog) -> None:
        self._home = home
        self._context = context
        self._log = log
        self._me = context.options.node_id
        self.locks = RangeLocks(self._lock_granted)
        self.held = False  # gate 1 for our own clients
        self.draining = False  # gate 1 for a detach that waits for what is in flight
        self.doomed = False  # the local disk was lost, and no good copy vouches for what it lacks
        self.held_peer = False  # gate 1 for replicated writes
        self.frozen = False  # the local disk failed and the peer has not confirmed that it knows
        self._parked: deque[Write] = deque()
        self._unforked: deque[Write] = deque()
        self._cold: deque[Write] = deque()
        self._ripe: deque[Write] = deque()  # complete, but the reply must wait (fork point, frozen)
        self._ripe_flushes: deque[int] = deque()
        self.in_flight = 0  # launched or waiting, clients' and replicated
        self._peer_in_flight = 0  # replicated ones
        self._when_quiet: deque[Callable[[], None]] = deque()
        self.latency_ns = 0  # smoothed, of clients' writes
        self.last_reply = 0

    # --- coming in

    def submit(self, write: Write) -> None:
        """A write begins its way."""
        write.since = self._context.now
        self.in_flight += 1
        if write.origin != self._me:
            self._peer_in_flight += 1
        # One writer (V6): LOCAL and PEER locks never meet on a volume, or the lock table could deadlock.
        assert self._peer_in_flight in (0, self.in_flight), "two writers"
        self._advance(write)

    def when_peers_quiet(self, then: Callable[[], None]) -> None:
        """Call `then` when every replicated write that arrived is over (at once if none is under way)."""
        self._when_quiet.append(then)
        self._peers_quiet()

    def _peers_quiet(self) -> None:
        while self._when_quiet and not self._peer_in_flight:
            self._when_quiet.popleft()()

    def _advance(self, write: Write) -> None:
        home = self._home
        own = write.origin == self._me
        lock = write.lock
        # A detach waits for what holds a lock, and for what waits behind it: that must not stop here.
        draining = self.draining and not lock.granted
        if (self.held or draining or home.crowded()) if own else self.held_peer:
            self._parked.append(write)
            return
        if not lock.granted and (lock.held or not self.locks.take(lock)):
            return
        if own and not home.writable():
            self._finish_unlaunched(write, errno.EIO)
            return
        absent = home.absent(write.origin) if own else write.lone
        if absent and not home.forked(absent):
            self._unforked.append(write)
            home.rotate()
            return
        disk = home.has_disk()
        logged = disk and (own or absent != 0)
        if logged and not home.hot(extents_of(write.offset, write.size)):
            self._cold.append(write)
            return
        self._launch(write, absent, disk=disk, logged=logged)

    def _launch(self, write: Write, absent: int, *, disk: bool, logged: bool) -> None:
        home, context = self._home, self._context
        own = write.origin == self._me
        if not disk and not own:
            self._finish_unlaunched(write, errno.EIO)
            return
        peer = 0
        while absent >> peer:
            if absent >> peer & 1:
                home.mark(peer, write.offset, write.size)
            peer += 1
        if own:
            write.sent = home.send(write)
        if own or logged:
            write.epoch = self._log.add(home.number, write.offset, write.size, write.sent, context.now, local=disk)
            if logged:
                home.touch(extents_of(write.offset, write.size), write.epoch.number)
        write.local = disk
        if disk:
            token = context.ask(self._local_done, write)
            if write.io is Io.WRITE:
                context.out.append(WriteData(home.number, token, write.offset, write.data, write.fua))
            else:
                punch = write.io is Io.TRIM or not write.keep
                context.out.append(ZeroData(home.number, token, write.offset, write.size, punch, write.fua))
        else:
            write.disk_failed = True
            self._check(write)

    # --- completions

    def _local_done(self, write: Write, event: DiskDone) -> None:
        write.local = False
        if event.error:
            self._home.disk_error("write", event.error)
        if event.error or not self._home.has_disk():
            write.disk_failed = True
            if write.origin == self._me:
                write.waiting |= write.unwritten  # A and B: now the peer's disk has to have it
        epoch = write.epoch
        if epoch is not None:
            self._log.written(epoch)
        self._check(write)

    def acknowledged(self, write: Write, peer: int) -> None:
        """The peer that the reply waited for has the write."""
        write.waiting &= ~(1 << peer)
        if not write.local:
            self._check(write)

    def lost(self, write: Write, peer: int) -> None:
        """The peer will not acknowledge: it was lost (and the range marked), or refused the write."""
        bit = 1 << peer
        write.sent &= ~bit
        write.waiting &= ~bit
        write.unwritten &= ~bit
        write.missed = True
        if not self._home.trusts_itself():
            write.disk_failed = True  # what is left of it lies on a copy that is no good data (I-10)
        self._check(write)

    def drop_unlaunched(self, peer: int) -> None:
        """The link is gone: replicated writes that no gate let through were never acknowledged in any way."""
        for _ in range(len(self._parked)):
            write = self._parked.popleft()
            if write.origin == peer:
                assert not write.lock.held, "gate 1 closes for a peer only when none of its writes is behind it"
                self.in_flight -= 1
                self._peer_in_flight -= 1
            else:
                self._parked.append(write)
        self._peers_quiet()

    def _check(self, write: Write) -> None:
        if write.local or write.waiting or write.replied:
            return
        if write.origin != self._me:
            self._end(write)
            self._home.replicated_done(write, errno.EIO if write.disk_failed else 0)
            self._peers_quiet()
            return
        if self.frozen or (write.missed and not self._home.forked(self._home.absent(self._me))):
            if write.missed and not write.disk_failed:
                self._home.rotate()
            if not write.disk_failed or write.sent:
                self._ripe.append(write)
                write.replied = True  # parked: `_reply_ripe` answers
                return
        self._reply(write)

    def _reply(self, write: Write) -> None:
        failed = write.disk_failed and (self.doomed or not write.sent)
        now = self._context.now
        self.latency_ns += (now - write.since - self.latency_ns) >> LATENCY_SHIFT
        self.last_reply = now
        self._context.out.append(Reply(write.token, errno.EIO if failed else 0))
        self._end(write)

    def _end(self, write: Write) -> None:
        write.replied = True
        self.in_flight -= 1
        if write.origin != self._me:
            self._peer_in_flight -= 1
        write.data = b""
        self.locks.release(write.lock)

    def _finish_unlaunched(self, write: Write, error: int) -> None:
        self._end(write)
        if write.origin == self._me:
            self._context.out.append(Reply(write.token, error))
        else:
            self._home.replicated_done(write, error)
            self._peers_quiet()

    def thaw(self, *, good: bool) -> None:
        """The peer knows of our lost disk (`good`), or there is no good data left: answer what waited.

        Without a good copy nothing may be acknowledged, not even what a lost peer once had (V8).
        """
        self.frozen = False
        self.doomed = not good  # also for those whose local completion is still to come
        if not good:
            for write in self._ripe:
                write.disk_failed, write.sent = True, 0
        self.wake_all()

    def flush_done(self, token: int) -> None:
        """A FLUSH is answered, unless the reply must wait for a fork point, a failing disk or a round."""
        unforked = self._home.missed() and not self._home.forked(self._home.absent(self._me))
        if unforked:
            self._home.rotate()
        writable = self._home.writable()
        if self.frozen or unforked or (self.held and not writable):  # a round decides soon who has good data
            self._ripe_flushes.append(token)
        else:
            self._context.out.append(Reply(token, 0 if writable else errno.EIO))

    # --- gates open

    def _lock_granted(self, lock: Lock) -> None:
        holder = lock.holder
        if isinstance(holder, Write):
            self._advance(holder)
        else:
            holder.lock_granted()  # type: ignore[attr-defined]

    def wake(self) -> None:
        """Gate 1 may be open, or the data may be gone: try all that wait there."""
        self._again(self._parked)

    def wake_unforked(self) -> None:
        """A fork point is durable (or no longer needed): gate 3, and replies that waited for it."""
        self._again(self._unforked)
        self.reply_ripe()

    def wake_cold(self) -> None:
        """Extents became hot (or the disk is gone): gate 4."""
        self._again(self._cold)

    def wake_all(self) -> None:
        """Something fundamental changed (disk or peer lost): every gate is tried again."""
        for queue in (self._parked, self._unforked, self._cold):
            self._again(queue)
        self.reply_ripe()

    def reply_ripe(self) -> None:
        """Answer what was complete and waited for a fork point or for the peer to know of our failed disk."""
        if self.frozen:
            return
        if self._home.forked(self._home.absent(self._me)):
            while self._ripe:
                self._reply(self._ripe.popleft())
        for _ in range(len(self._ripe_flushes)):
            self.flush_done(self._ripe_flushes.popleft())

    def _again(self, queue: deque[Write]) -> None:
        for _ in range(len(queue)):
            self._advance(queue.popleft())

    @property
    def parked(self) -> bool:
        """Writes wait at gate 1."""
        return bool(self._parked)

    @property
    def launched(self) -> bool:
        """Something is beyond gate 1."""
        return self.in_flight > len(self._parked) or bool(self._ripe_flushes)

    @property
    def quiet(self) -> bool:
        """Nothing in flight, waiting or unanswered."""
        return not self.in_flight and not self._ripe_flushes
