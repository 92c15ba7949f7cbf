# SPDX-License-Identifier: Apache-2.0
"""The life of a resync: the target pulls, the source answers (decision 0001, "Resync", steps 3 to 5).

Target: runs of dirty blocks are requested in a window; an answer is written, flushed with its neighbours, and only then
the bits are cleared here and the range is confirmed to the source, which clears its own.  Nothing else clears bits.
Source: a range is read under a lock, so that the answer contains every write launched before it, and later
writes follow it on the link.

The rate: the window doubles per round trip while the application does not wait, and halves when it does (the side that
has the application's writes says so, flag BUSY).  `resync_max_rate` is a ceiling.  Checksums: the target may send a
digest of what it has; it pays when much is equal, and `auto` tries it on full syncs and watches.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Final, Protocol

from replicator.core.actions import FlushData, ReadData, WriteData, ZeroData
from replicator.core.context import Context
from replicator.core.events import DiskDone
from replicator.core.geometry import BLOCK, BLOCK_SHIFT
from replicator.core.handshake_wire import pack_ranges
from replicator.core.locks import Lock, LockKind, RangeLocks
from replicator.core.wire import RANGES_MAX, Flag, Frame, Kind

CHUNK: Final = 256 << 10  # bytes of one request; small enough to let application frames through between
DIGEST_CHUNK: Final = 64 << 10
DIGEST_SIZE: Final = 16
WINDOW_MIN: Final = CHUNK
WINDOW_START: Final = 2 << 20
WINDOW_MAX: Final = 16 << 20
FLUSH_BYTES: Final = 32 << 20  # unflushed copies before a flush is worth it
SOURCE_BYTES_MAX: Final = 64 << 20  # outstanding at the source: our targets ask for less
#: Ranges answered and not confirmed: a target confirms what it holds, 48 MiB at most, in blocks.
SOURCE_RANGES_MAX: Final = 1 << 16
BUSY_PAUSE_NS: Final = 20_000_000  # after a BUSY answer, before the next request
SHRINK_INTERVAL_NS: Final = 100_000_000
RETRY_NS: Final = 5_000_000_000  # before ranges the source could not read are asked for again
PROBE_REQUESTS: Final = 32  # digests tried before `auto` judges
ZEROES: Final = bytes(1 << 20)


class Home(Protocol):
    """What a resync asks of its volume."""

    number: int
    size: int

    def next_dirty(self, peer: int, start: int, blocks_max: int) -> tuple[int, int] | None:
        """(first block, count) of the next dirty run from `start`."""

    def dirty_count(self, peer: int) -> int:
        """Dirty blocks towards the peer."""

    def confirm(self, peer: int, offset: int, size: int) -> None:
        """The range is stable at the target (V2)."""

    def application_waits(self) -> bool:
        """Clients of this node wait longer than the latency target."""

    def disk_error(self, what: str, error: int) -> None:
        """A write or flush of the local disk failed."""

    @property
    def suspect(self) -> bool:
        """What the local disk shows may not be on it: an earlier flush or write of it failed."""

    @property
    def locks(self) -> RangeLocks:
        """Of this volume."""


SendFrame = Callable[[Frame], None]


class Copy:
    """One requested range."""

    __slots__ = ("asked", "data", "digest", "lock", "offset", "ready", "sequence", "size", "zero")

    def __init__(self, offset: int, size: int, ready: Callable[[Copy], None]) -> None:
        self.offset = offset
        self.size = size
        self.lock = Lock(LockKind.WANTED, offset, offset + size, self)
        self.ready = ready
        self.sequence = 0
        self.asked = False  # the request was sent
        self.digest = False
        self.zero = False
        self.data: bytes | bytearray | memoryview = b""

    def lock_granted(self) -> None:
        """Its turn has come (called by the lock table's owner)."""
        self.ready(self)


class SyncTarget:
    """This node copies from `peer`.  `finished()` is called when no bit is left and all is stable."""

    def __init__(
        self,
        home: Home,
        context: Context,
        peer: int,
        send: SendFrame,
        finished: Callable[[], None],
        *,
        full: bool,
    ) -> None:
        self._home = home
        self._context = context
        self._peer = peer
        self._send = send
        self._finished = finished
        # After a failed flush the page cache may show what the disk never got: "equal" would mean nothing (V8).
        self._mode = "never" if home.suspect else context.options.checksum_sync
        self._digests = self._mode == "always" or (self._mode == "auto" and full)
        self.full = full
        self.total = home.dirty_count(peer)  # blocks
        self.since = context.now
        self.same_blocks = 0
        self._digest_tries = 0
        self._digest_hits = 0
        self._cursor = 0
        self._sequence = 0
        self._requests: dict[int, Copy] = {}
        self._busy_bytes = 0  # requested or being written
        self._window = WINDOW_START
        self._shrunk_at = 0
        self._not_before = context.now
        self._allowance_at = context.now
        self._copied: list[tuple[int, int]] = []  # written, not flushed
        self._copied_bytes = 0
        self._flushing = False
        self._over = False
        self.paused = False
        self.failed_bytes = 0

    @property
    def deadline(self) -> int | None:
        """When `pull` may do more although nothing else happens."""
        if self._over or self.paused or self._not_before <= self._context.now:
            return None
        return self._not_before

    def cancel(self) -> None:
        """The link, the disk or the decision is gone.  What is being written ends by itself; bits stay."""
        self._over = True
        for copy in self._requests.values():
            self._home.locks.release(copy.lock)
        self._requests.clear()

    def pull(self) -> None:
        """Ask for more, flush, or finish; called once per turn."""
        if self._over:
            return
        now = self._context.now
        while not self.paused and self._busy_bytes < self._window and self._not_before <= now:
            if not self._request_next():
                break
        idle = not self._requests and not self._busy_bytes
        if self._copied and not self._flushing and (idle or self._copied_bytes >= FLUSH_BYTES):
            self._flush()
        if idle and not self._copied and not self._flushing and not self._home.dirty_count(self._peer):
            self._over = True
            self._finished()

    def _request_next(self) -> bool:
        home = self._home
        chunk = DIGEST_CHUNK if self._digests else CHUNK
        wrapped = False
        while True:
            run = home.next_dirty(self._peer, self._cursor, chunk >> BLOCK_SHIFT)
            if run is None:
                if wrapped or not self._cursor or self._requests or self._copied or self._flushing:
                    return False
                self._cursor, wrapped = 0, True
                continue
            first, count = run
            offset = first << BLOCK_SHIFT
            size = min(count << BLOCK_SHIFT, home.size - offset)
            self._cursor = first + count
            if home.locks.clear_of_clients(offset, offset + size):
                break
        copy = Copy(offset, size, self._write)
        home.locks.take(copy.lock)
        self._busy_bytes += size
        self._limit(size)
        if self._digests:
            copy.digest = True
            token = self._context.ask(self._digested, copy)
            self._sequence += 1
            copy.sequence = self._sequence
            self._requests[copy.sequence] = copy
            self._context.out.append(ReadData(home.number, token, offset, size))
        else:
            self._ask(copy, b"")
        return True

    def _limit(self, size: int) -> None:
        rate = self._context.options.resync_max_rate
        if rate:
            self._allowance_at = max(self._allowance_at, self._context.now) + size * 1_000_000_000 // rate
            self._not_before = max(self._not_before, self._allowance_at)

    def _ask(self, copy: Copy, digest: bytes) -> None:
        if not copy.sequence:
            self._sequence += 1
            copy.sequence = self._sequence
        self._requests[copy.sequence] = copy
        copy.asked = True
        self._send(
            Frame(
                Kind.RESYNC_REQUEST,
                volume=self._home.number,
                sequence=copy.sequence,
                offset=copy.offset,
                size=copy.size,
                payload=digest,
            )
        )

    def _digested(self, copy: Copy, event: DiskDone) -> None:
        if self._over:
            return
        # A block we cannot read is simply copied.
        digest = b"" if event.error else digest_of(event.data)
        copy.digest = bool(digest)
        self._ask(copy, digest)

    def on_answer(self, frame: Frame) -> str | None:
        """RESYNC_DATA, RESYNC_ZERO, RESYNC_EQUAL or RESYNC_FAILED.  Returns what is wrong with it, or None."""
        copy = self._requests.get(frame.sequence)
        if copy is None or not copy.asked or copy.offset != frame.offset or copy.size != frame.size:
            return f"answer {frame.sequence} to no resync request of ours"
        if frame.kind is Kind.RESYNC_EQUAL and not copy.digest:
            return f"answer {frame.sequence} says equal, but no digest was sent"
        del self._requests[frame.sequence]
        self._pace(bool(frame.flags & Flag.BUSY))
        self._judge(copy, equal=frame.kind is Kind.RESYNC_EQUAL)
        if frame.kind is Kind.RESYNC_FAILED:
            self.failed_bytes += copy.size
            self._not_before = max(self._not_before, self._context.now + RETRY_NS)
            self._context.notice("resync-read-failed", volume=self._home.number, offset=copy.offset, size=copy.size)
            self._end(copy)
            return None
        if frame.kind is Kind.RESYNC_EQUAL:
            self.same_blocks += (copy.size + BLOCK - 1) >> BLOCK_SHIFT
            self._copied.append((copy.offset, copy.size))  # still to be made stable before it counts
            self._copied_bytes += copy.size
            self._end(copy)
            return None
        copy.zero = frame.kind is Kind.RESYNC_ZERO
        copy.data = frame.payload
        if self._home.locks.become_copy(copy.lock):
            self._write(copy)
        return None

    def _pace(self, peer_busy: bool) -> None:
        now = self._context.now
        if peer_busy or self._home.application_waits():
            self._not_before = max(self._not_before, now + BUSY_PAUSE_NS)
            if now - self._shrunk_at >= SHRINK_INTERVAL_NS:
                self._shrunk_at = now
                self._window = max(WINDOW_MIN, self._window // 2)
        else:
            self._window = min(WINDOW_MAX, self._window + CHUNK)

    def _judge(self, copy: Copy, *, equal: bool) -> None:
        """`auto`: go on with digests while half of them hit; otherwise give them up for this resync."""
        if not copy.digest or self._mode != "auto":
            return
        self._digest_tries += 1
        self._digest_hits += equal
        if self._digest_tries >= PROBE_REQUESTS:
            self._digests = self._digest_hits * 2 >= self._digest_tries
            self._digest_tries = self._digest_hits = 0

    def _write(self, copy: Copy) -> None:
        if self._over:  # the disk or the link went while it waited for its turn
            self._end(copy)
            return
        token = self._context.ask(self._written, copy)
        if copy.zero:
            self._context.out.append(ZeroData(self._home.number, token, copy.offset, copy.size, True, False))
        else:
            self._context.out.append(WriteData(self._home.number, token, copy.offset, copy.data, False))

    def _written(self, copy: Copy, event: DiskDone) -> None:
        self._end(copy)
        if event.error:
            self._home.disk_error("resync write", event.error)
        elif not self._over:
            self._copied.append((copy.offset, copy.size))
            self._copied_bytes += copy.size

    def _end(self, copy: Copy) -> None:
        copy.data = b""
        self._busy_bytes -= copy.size
        self._home.locks.release(copy.lock)

    def _flush(self) -> None:
        ranges, self._copied, self._copied_bytes = self._copied, [], 0
        self._flushing = True
        token = self._context.ask(self._flushed, ranges)
        self._context.out.append(FlushData(self._home.number, token))

    def _flushed(self, ranges: list[tuple[int, int]], event: DiskDone) -> None:
        self._flushing = False
        if event.error:
            self._home.disk_error("resync flush", event.error)
            return
        if self._over:
            return
        for offset, size in ranges:
            self._home.confirm(self._peer, offset, size)
        for at in range(0, len(ranges), RANGES_MAX):
            payload = pack_ranges(ranges[at : at + RANGES_MAX])
            self._send(Frame(Kind.RESYNC_CONFIRM, volume=self._home.number, payload=payload))


class SyncSource:
    """The peer copies from this node."""

    def __init__(self, home: Home, context: Context, peer: int, send: SendFrame) -> None:
        self._home = home
        self._context = context
        self._peer = peer
        self._send = send
        self.total = home.dirty_count(peer)
        self.since = context.now
        self.paused = False
        self._bytes = 0
        self._over = False
        self._answered: set[tuple[int, int]] = set()

    def answered(self, offset: int, size: int) -> bool:
        """This very range was sent and not confirmed before; it counts once (requirement S-7)."""
        if (offset, size) not in self._answered:
            return False
        self._answered.remove((offset, size))
        return True

    @property
    def unfinishable(self) -> bool:
        """Some block was never sent, so without us the target stays what it durably is: a mixture."""
        answered = sum((size + BLOCK - 1) >> BLOCK_SHIFT for _, size in self._answered)
        return self._home.dirty_count(self._peer) > answered

    def cancel(self) -> None:
        """The link or the disk is gone; reads under way end by themselves."""
        self._over = True

    def on_request(self, frame: Frame) -> str | None:
        """RESYNC_REQUEST.  Returns what is wrong with it, or None."""
        if frame.offset + frame.size > self._home.size:
            return f"resync request beyond the end: {frame.offset}+{frame.size} of {self._home.size}"
        if len(self._answered) > SOURCE_RANGES_MAX:
            return f"more than {SOURCE_RANGES_MAX} ranges copied and not confirmed"
        if self._bytes + frame.size > SOURCE_BYTES_MAX:
            return f"more than {SOURCE_BYTES_MAX} bytes of resync requests at once"
        self._bytes += frame.size
        read = SourceRead(frame, self._read)
        if self._home.locks.take(read.lock):
            self._read(read)
        return None

    def _read(self, read: SourceRead) -> None:
        if self._over:
            self._bytes -= read.frame.size
            self._home.locks.release(read.lock)
            return
        token = self._context.ask(self._done, read)
        self._context.out.append(ReadData(self._home.number, token, read.frame.offset, read.frame.size))

    def _done(self, read: SourceRead, event: DiskDone) -> None:
        request = read.frame
        self._bytes -= request.size
        if not self._over:
            self._answer(request, event)
        self._home.locks.release(read.lock)

    def _answer(self, request: Frame, event: DiskDone) -> None:
        answer = Frame(
            Kind.RESYNC_DATA,
            volume=request.volume,
            flags=Flag.BUSY if self._home.application_waits() else 0,
            sequence=request.sequence,
            offset=request.offset,
            size=request.size,
        )
        data = event.data
        if event.error:
            answer.kind, answer.flags = Kind.RESYNC_FAILED, 0
            answer.payload = event.error.to_bytes(4, "big")
            self._context.notice("read-error", volume=request.volume, offset=request.offset, size=request.size)
        elif request.payload and digest_of(data) == bytes(request.payload):
            answer.kind = Kind.RESYNC_EQUAL
        elif data == ZEROES[: len(data)]:
            answer.kind = Kind.RESYNC_ZERO
        else:
            answer.payload = data
        if not event.error:
            self._answered.add((request.offset, request.size))
        self._send(answer)


class SourceRead:
    """A range being read for the peer."""

    __slots__ = ("frame", "lock", "ready")

    def __init__(self, frame: Frame, ready: Callable[[SourceRead], None]) -> None:
        self.frame = frame
        self.ready = ready
        self.lock = Lock(LockKind.SOURCE_READ, frame.offset, frame.offset + frame.size, self)

    def lock_granted(self) -> None:
        """Its turn has come."""
        self.ready(self)


def digest_of(data: bytes | bytearray | memoryview) -> bytes:
    """BLAKE2b-128: what RESYNC_REQUEST carries (docs/wire-format.md)."""
    return hashlib.blake2b(data, digest_size=DIGEST_SIZE).digest()
