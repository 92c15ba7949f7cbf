# SPDX-License-Identifier: Apache-2.0
"""Execute the core's disk actions: one hand-over to a few threads per turn, one wake-up back.

`submit` collects; at the end of the turn the batch goes to the threads at once and each answer becomes one
`DiskDone`.  Reads, writes and flushes of one volume are independent of each other here: the core never has
two overlapping ones in flight unless it does not care, and asks for a flush when the writes are complete.

Invariants:
- Every token submitted is answered once, also after an error; an error is never retried (V8).
- The answer to a flush comes from an fdatasync that began after the flush was submitted.
- Memory is bounded: each thread owns one aligned buffer, O_DIRECT transfers are copied through it.
- A write that is not a whole number of the store's blocks reads, changes and writes the blocks around it
  under one lock, so that two neighbours in one block cannot undo each other.
"""

from __future__ import annotations

import errno
import os
import threading
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum
from queue import Empty, SimpleQueue
from typing import Protocol

from replicator.core.actions import FlushData, ReadData, WriteData, WriteMeta, ZeroData
from replicator.core.events import Buffer, DiskClosed, DiskDone
from replicator.drivers.backing import BUFFER_SIZE, Backing, aligned_buffer, put, round_down, round_up
from replicator.drivers.loop import Loop

#: Neighbouring writes are joined up to this size: larger ones keep several threads busy and gain nothing.
MERGE_MAX = 256 << 10
#: Buffers in one system call (the kernel's limit is 1024).
MERGE_COUNT_MAX = 256
#: Operations one thread takes at once, and what is worth a thread's wake-up when it only touches memory.
SHARE_MAX = 16
CACHED_SHARE = 8
#: A thread that works through its share tells what is done at least this often.
PUBLISH_NS = 200_000
#: A batch of at most this many bytes for an idle buffered store is copied to the page cache in the loop:
#: handing over costs three times as much (measured at 32 writes of 4 KiB).
INLINE_MAX = 128 << 10
#: Unit of pages and file system blocks: zeroing other ranges would dirty the page cache beside O_DIRECT.
ZERO_UNIT = 4096

DiskAction = ReadData | WriteData | ZeroData | FlushData | WriteMeta


class MetadataPlace(Protocol):
    """What this driver must know of the layout: where `WriteMeta` offsets count from."""

    @property
    def fixed_base(self) -> int: ...


class _Kind(Enum):
    READ = 0
    WRITE = 1
    ZERO = 2
    FLUSH = 3
    META = 4


@dataclass(slots=True)
class _Op:
    """What one thread does in one go; several requests when they were joined."""

    kind: _Kind
    tokens: list[int]
    offset: int = 0
    size: int = 0
    buffers: list[memoryview] = field(default_factory=list)
    fua: bool = False
    punch: bool = False
    pieces: Sequence[tuple[int, bytes]] = ()

    @property
    def slow(self) -> bool:
        """Waits for a device cache: nothing else should wait behind it."""
        return self.fua or self.kind is _Kind.FLUSH or self.kind is _Kind.META


class Disk:
    """The open disk of one volume: data at the start of `backing`, metadata in `metadata` (or the same)."""

    def __init__(
        self,
        loop: Loop,
        volume: int,
        backing: Backing,
        metadata: Backing,
        layout: MetadataPlace,
        threads: int = 4,
    ) -> None:
        assert threads >= 1
        self._loop = loop
        self.volume = volume
        self.backing = backing
        self.metadata = metadata
        self._meta_base = layout.fixed_base
        self._batch: list[_Op] = []
        self._in_flight = 0  # operations handed to threads and not collected
        self._closing = self._closed = False
        self._inline_buffer = memoryview(b"")
        # Shared with the threads, under the lock:
        self._lock = threading.Lock()
        self._queue: deque[_Op] = deque()
        self._queued_flush: _Op | None = None
        self._idle = 0
        self._waking = 0
        # Shared with the threads, safe by themselves:
        self._wakeups: SimpleQueue[bool] = SimpleQueue()  # True: there is work; False: end
        self._done: SimpleQueue[tuple[int, list[DiskDone]]] = SimpleQueue()
        self._signalled = False
        self._edge_lock = threading.Lock()
        self._threads = [
            threading.Thread(target=self._work, name=f"disk-{volume}-{number}", daemon=True)
            for number in range(threads)
        ]
        for thread in self._threads:
            thread.start()

    # -- the loop's side --------------------------------

    def submit(self, action: DiskAction) -> None:
        """Take an action; its `DiskDone` is posted to the loop.  Payloads must not change until then."""
        assert not self._closing, f"action for the closed disk of volume {self.volume}"
        assert action.volume == self.volume
        self._batch.append(_operation(action))
        self._loop.at_turn_end(self._hand_over)

    def close(self) -> None:
        """Finish what was submitted, release both stores, then post `DiskClosed`."""
        assert not self._closing
        self._closing = True
        self._loop.at_turn_end(self._hand_over)

    def drain(self) -> None:
        """Block until everything submitted is done and posted (the end of the process, tools)."""
        self._hand_over()
        while self._in_flight:
            self._accept(*self._done.get())
        self._finish()

    def _hand_over(self) -> None:
        batch, self._batch = self._batch, []
        operations = _joined(batch) if len(batch) > 1 else batch
        if not self.backing.direct and not self._in_flight and sum(o.size for o in operations) <= INLINE_MAX:
            operations = [operation for operation in operations if not self._inline(operation)]
        if operations:
            slow = sum(operation.slow for operation in operations)
            wanted = len(operations)
            if not self.backing.direct:
                wanted = slow + -(-(wanted - slow) // CACHED_SHARE)
            with self._lock:
                for operation in operations:
                    self._enqueue(operation)
                wake = min(self._idle, wanted)
                self._idle -= wake
                self._waking += wake
            for _ in range(wake):
                self._wakeups.put(True)
        self._finish()

    def _enqueue(self, operation: _Op) -> None:
        """Under the lock."""
        if operation.kind is _Kind.FLUSH:
            if self._queued_flush is not None:  # not begun yet, so it covers what this one means, too
                self._queued_flush.tokens += operation.tokens
                return
            self._queued_flush = operation
        self._queue.append(operation)
        self._in_flight += 1

    def _inline(self, operation: _Op) -> bool:
        """Do it here when it only touches the page cache.  False: let a thread do it."""
        if operation.fua:
            return False
        if operation.kind is _Kind.READ:
            data = bytearray(operation.size)
            try:
                if os.preadv(self.backing.fd, [data], operation.offset, os.RWF_NOWAIT) != operation.size:
                    return False
            except OSError:
                return False  # not in the cache, or this store cannot say; a thread finds out and answers
            self._loop.post(DiskDone(operation.tokens[0], 0, data))
            return True
        if operation.kind is _Kind.WRITE and not (operation.offset | operation.size) % ZERO_UNIT:
            for done in self._execute(operation, self._inline_buffer):
                self._loop.post(done)
            return True
        return False

    def _collect(self) -> None:
        self._signalled = False  # before looking: what arrives from now on signals again
        try:
            while True:
                self._accept(*self._done.get_nowait())
        except Empty:
            pass
        self._finish()

    def _accept(self, operations: int, done: list[DiskDone]) -> None:
        self._in_flight -= operations
        assert self._in_flight >= 0
        for event in done:
            self._loop.post(event)

    def _finish(self) -> None:
        if not self._closing or self._closed or self._in_flight or self._batch:
            return
        self._closed = True
        for _ in self._threads:
            self._wakeups.put(False)
        self.backing.close()
        self.metadata.close()
        self._loop.post(DiskClosed(self.volume))

    # -- the threads' side --------------------------------

    def _work(self) -> None:
        buffer = aligned_buffer()
        woken = False
        try:
            while True:
                with self._lock:
                    self._waking -= woken
                    woken = False
                    share = self._take()
                    self._idle += not share
                if share:
                    self._work_through(share, buffer)
                elif self._wakeups.get():
                    woken = True
                else:
                    return
        except BaseException as error:  # a broken invariant must end the process, not just this thread
            self._loop.call_from_thread(_Raise(error))

    def _take(self) -> list[_Op]:
        """A fair share of the queue, a slow operation alone.  Under the lock."""
        queue = self._queue
        goal = min(SHARE_MAX, -(-len(queue) // (self._waking + 1)))
        share: list[_Op] = []
        while len(share) < goal and not (share and queue[0].slow):
            operation = queue.popleft()
            share.append(operation)
            if operation.slow:
                if operation is self._queued_flush:
                    self._queued_flush = None
                break
        return share

    def _work_through(self, share: list[_Op], buffer: memoryview) -> None:
        done: list[DiskDone] = []
        count = 0
        published_ns = time.monotonic_ns()
        for operation in share:
            done += self._execute(operation, buffer)
            count += 1
            if count < len(share) and time.monotonic_ns() - published_ns > PUBLISH_NS:
                self._publish(count, done)
                share, count, done, published_ns = share[count:], 0, [], time.monotonic_ns()
        if count:
            self._publish(count, done)

    def _publish(self, operations: int, done: list[DiskDone]) -> None:
        self._done.put((operations, done))
        if not self._signalled:
            self._signalled = True
            self._loop.call_from_thread(self._collect)

    def _execute(self, operation: _Op, buffer: memoryview) -> list[DiskDone]:
        data: Buffer = b""
        number = 0
        edges = self._edge_lock
        try:
            match operation.kind:
                case _Kind.READ:
                    data = self._read(operation, buffer)
                case _Kind.WRITE:
                    put(self.backing, operation.offset, operation.buffers, buffer, edges, operation.fua)
                case _Kind.ZERO:
                    self._zero(operation, buffer)
                case _Kind.FLUSH:
                    self.backing.sync()
                case _Kind.META:
                    self._write_meta(operation, buffer)
        except OSError as error:
            number = error.errno or errno.EIO
            data = b""
        return [DiskDone(token, number, data) for token in operation.tokens]

    def _read(self, operation: _Op, buffer: memoryview) -> Buffer:
        offset, size = operation.offset, operation.size
        if not self.backing.direct:
            cached = os.pread(self.backing.fd, size, offset)
            if len(cached) == size:
                return cached
            whole = bytearray(size)
            self.backing.read_into(memoryview(whole), offset)
            return whole
        start = round_down(offset, self.backing.block_size)
        end = round_up(offset + size, self.backing.block_size)
        if end - start <= len(buffer):
            self.backing.read_into(buffer[: end - start], start)
            return bytes(buffer[offset - start : offset - start + size])
        parts = bytearray()
        for at in range(start, end, len(buffer)):
            part = buffer[: min(len(buffer), end - at)]
            self.backing.read_into(part, at)
            parts += part
        return memoryview(parts)[offset - start : offset - start + size]

    def _zero(self, operation: _Op, buffer: memoryview) -> None:
        start, end = operation.offset, operation.offset + operation.size
        first, last = round_up(start, ZERO_UNIT), round_down(end, ZERO_UNIT)
        if first < last:
            self.backing.zero(first, last - first, punch=operation.punch)
            edges = [(start, first), (last, end)]
        else:
            edges = [(start, end)]
        for edge_start, edge_end in edges:
            if edge_start < edge_end:
                zeroes = [memoryview(bytes(edge_end - edge_start))]
                put(self.backing, edge_start, zeroes, buffer, self._edge_lock, False)
        if operation.fua:
            self.backing.sync()

    def _write_meta(self, operation: _Op, buffer: memoryview) -> None:
        alone = len(operation.pieces) == 1
        for offset, piece in operation.pieces:
            at = self._meta_base + offset
            assert at >= 0 and not (at | len(piece)) % 4096, (at, len(piece))
            put(self.metadata, at, [memoryview(piece)], buffer, self._edge_lock, alone)
        if not alone:
            self.metadata.sync()


@dataclass(slots=True)
class _Raise:
    error: BaseException

    def __call__(self) -> None:
        raise self.error


def _operation(action: DiskAction) -> _Op:
    match action:
        case WriteData():
            data = memoryview(action.data).cast("B")
            return _Op(_Kind.WRITE, [action.token], action.offset, len(data), [data], action.fua)
        case ReadData():
            return _Op(_Kind.READ, [action.token], action.offset, action.size)
        case ZeroData():
            kind = _Kind.ZERO
            return _Op(kind, [action.token], action.offset, action.size, fua=action.fua, punch=action.punch)
        case FlushData():
            return _Op(_Kind.FLUSH, [action.token])
        case WriteMeta():
            return _Op(_Kind.META, [action.token], pieces=action.pieces)


def _joined(batch: list[_Op]) -> list[_Op]:
    """Join neighbouring writes, and all flushes, of one batch."""
    writes = [operation for operation in batch if operation.kind is _Kind.WRITE]
    result = [operation for operation in batch if operation.kind is not _Kind.WRITE]
    flushes = [operation for operation in result if operation.kind is _Kind.FLUSH]
    if len(flushes) > 1:
        flushes[0].tokens = [operation.tokens[0] for operation in flushes]
        result = [op for op in result if op.kind is not _Kind.FLUSH or op is flushes[0]]
    writes.sort(key=lambda operation: operation.offset)
    last: _Op | None = None
    for write in writes:
        if (
            last is not None
            and last.offset + last.size == write.offset
            and last.fua == write.fua
            and last.size + write.size <= MERGE_MAX
            and len(last.buffers) < MERGE_COUNT_MAX
        ):
            last.tokens += write.tokens
            last.buffers += write.buffers
            last.size += write.size
        else:
            last = write
            result.append(write)
    return result


assert MERGE_MAX <= BUFFER_SIZE
