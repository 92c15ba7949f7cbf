# SPDX-License-Identifier: Apache-2.0
"""The peer's writes over one link: applied, acknowledged in batches, and made stable at its barriers; and its reads.

Writes between two BARRIERs are one *batch*.  A barrier is answered when all writes of its batch and of the batches
before are over and the disks they touched are flushed.  Under protocol A what follows a barrier waits until it is
answered, so that a power cut here loses a suffix of the peer's writes and never a hole.

A receiver outlives its link: writes that were let through are applied (or fail with their disk) before anything is
decided.
"""

from __future__ import annotations

import errno
from collections import deque
from collections.abc import Callable
from typing import Final

from replicator.core.actions import FlushData, ReadData
from replicator.core.context import Context
from replicator.core.events import DiskDone, Io
from replicator.core.handshake_wire import pack_errno, pack_sequences
from replicator.core.locks import LockKind
from replicator.core.states import Disk
from replicator.core.volume import Volume
from replicator.core.wire import SEQUENCES_MAX, Flag, Frame, Kind
from replicator.core.write import Write

_IO: Final = {Kind.WRITE: Io.WRITE, Kind.TRIM: Io.TRIM, Kind.ZERO: Io.ZERO}
#: Bytes of payload received and not over yet; our senders are bounded below it, so more is a broken peer.
UNFINISHED_BYTES_MAX: Final = 256 << 20
#: Writes and barriers not over yet: TRIM and ZERO carry no payload, but cost memory as long as the disk hangs.  Our
#: senders stay below 2^18 (`unwritten_bytes_max` in sectors).
UNFINISHED_COUNT_MAX: Final = 300_000
#: Bytes of READ answers under way for the peer; our own clients ask for less, so more is a broken peer.
READ_BYTES_MAX: Final = 64 << 20


class Batch:
    """Writes between two barriers."""

    __slots__ = ("barrier", "count", "flushing", "volumes")

    def __init__(self) -> None:
        self.count = 0
        self.barrier: int | None = None
        self.volumes: set[int] = set()
        self.flushing = 0


class Receiver:
    """One link's incoming writes.  `send` is dropped by `link_down`."""

    def __init__(self, context: Context, peer: int, volumes: dict[int, Volume], send: Callable[[Frame], None]) -> None:
        self._context = context
        self._peer = peer
        self._volumes = volumes
        self._send: Callable[[Frame], None] | None = send
        self._ordered = context.options.protocol == "A"
        self._early = context.options.protocol == "B"
        self._batches: deque[Batch] = deque([Batch()])
        self._behind: deque[tuple[Frame, int]] = deque()  # protocol A: what follows an unanswered barrier
        self._bytes = 0
        self._count = 0
        self._read_bytes = 0
        self._pumping = False
        self._last_sequence = 0
        self._acks: dict[Kind, list[int]] = {Kind.RECEIVED: [], Kind.WRITTEN: [], Kind.FAILED: []}

    def link_down(self) -> None:
        """Nothing can be sent any more; what arrived goes on, but for what waits behind a barrier (protocol A).

        That is dropped as a whole: a suffix, which is what protocol A may lose.
        """
        self._send = None
        self._behind.clear()

    def on_write(self, frame: Frame) -> str | None:
        """WRITE, TRIM or ZERO.  Returns what is wrong with it, or None."""
        volume = self._volumes[frame.volume]
        if volume.size and frame.offset + frame.size > volume.size:
            return f"{frame.kind.name} beyond the end: {frame.offset}+{frame.size} of {volume.size}"
        if frame.sequence <= self._last_sequence:
            return f"{frame.kind.name} with sequence {frame.sequence} after {self._last_sequence}"
        self._last_sequence = frame.sequence
        self._bytes += len(frame.payload)
        self._count += 1
        if self._bytes > UNFINISHED_BYTES_MAX:
            return f"more than {UNFINISHED_BYTES_MAX} bytes of unacknowledged writes"
        if self._count > UNFINISHED_COUNT_MAX:
            return f"more than {UNFINISHED_COUNT_MAX} unacknowledged writes"
        # Decided on arrival: a link lost later takes nothing from what the origin has (its own log covers it).
        diskless = volume.replicas[self._peer].disk < Disk.INCONSISTENT
        lone = 1 << self._peer if diskless and volume.has_disk() else 0
        if self._behind or (self._ordered and len(self._batches) > 1):
            self._behind.append((frame, lone))
        else:
            self._apply(volume, frame, lone)
        return None

    def _apply(self, volume: Volume, frame: Frame, lone: int) -> None:
        write = Write(
            _IO[frame.kind],
            frame.offset,
            frame.size,
            frame.payload,
            fua=bool(frame.flags & Flag.FUA),
            keep=bool(frame.flags & Flag.KEEP),
            origin=self._peer,
            kind=LockKind.PEER,
        )
        write.sequence = frame.sequence
        write.lone = lone
        batch = self._batches[-1]
        batch.count += 1
        batch.volumes.add(volume.number)
        write.arrival = (self, batch)
        if self._early and not volume.path.held_peer:
            self._acks[Kind.RECEIVED].append(frame.sequence)
        volume.path.submit(write)

    def done(self, write: Write, error: int) -> None:
        """A write of ours is over."""
        _, batch = write.arrival
        batch.count -= 1
        self._count -= 1
        if write.io is Io.WRITE:
            self._bytes -= write.size
        self._acks[Kind.FAILED if error else Kind.WRITTEN].append(write.sequence)
        self._pump()

    def on_barrier(self, frame: Frame) -> str | None:
        """Make stable what came before.  Returns what is wrong with it, or None."""
        self._count += 1
        if self._count > UNFINISHED_COUNT_MAX:
            return f"more than {UNFINISHED_COUNT_MAX} unanswered writes and barriers"
        if self._behind:
            self._behind.append((frame, 0))
            return None
        self._batches[-1].barrier = frame.sequence
        self._batches.append(Batch())
        self._pump()
        return None

    def _pump(self) -> None:
        """Answer every barrier whose turn has come: in a loop, because a peer may send more than a stack holds."""
        if self._pumping:
            return
        self._pumping = True
        while self._answered_next():
            pass
        self._pumping = False

    def _answered_next(self) -> bool:
        batch = self._batches[0]
        if batch.count or batch.barrier is None or batch.flushing:
            return False
        for number in sorted(batch.volumes):
            if self._volumes[number].has_disk():
                batch.flushing += 1
                token = self._context.ask(self._flushed, (batch, self._volumes[number]))
                self._context.out.append(FlushData(number, token))
        batch.volumes.clear()
        if batch.flushing:
            return False
        self._answer(batch)
        return True

    def _flushed(self, subject: tuple[Batch, Volume], event: DiskDone) -> None:
        batch, volume = subject
        batch.flushing -= 1
        if event.error:
            volume.disk_error("flush", event.error)  # the peer hears DISK_STATE before the answer
        self._pump()

    def _answer(self, batch: Batch) -> None:
        assert batch is self._batches[0] and batch.barrier is not None
        self.settle()  # acknowledgements of the batch go before its barrier's
        if self._send is not None:
            self._send(Frame(Kind.BARRIER_ACK, sequence=batch.barrier))
        self._batches.popleft()
        self._count -= 1
        while self._behind and len(self._batches) == 1:
            frame, lone = self._behind.popleft()
            if frame.kind is Kind.BARRIER:
                self._batches[-1].barrier = frame.sequence
                self._batches.append(Batch())
            else:
                self._apply(self._volumes[frame.volume], frame, lone)

    def on_read(self, volume: Volume, frame: Frame) -> str | None:
        """READ.  Returns what is wrong with it, or None."""
        if frame.offset + frame.size > volume.size and volume.attached is not None:
            return f"READ beyond the end: {frame.offset}+{frame.size} of {volume.size}"
        assert self._send is not None
        if volume.disk is not Disk.UP_TO_DATE:
            self._send(Frame(Kind.READ_FAILED, volume.number, sequence=frame.sequence, payload=pack_errno(errno.EIO)))
            return None
        if self._read_bytes + frame.size > READ_BYTES_MAX:
            return f"more than {READ_BYTES_MAX} bytes of reads at once"
        self._read_bytes += frame.size
        token = self._context.ask(self._read_done, frame)
        self._context.out.append(ReadData(volume.number, token, frame.offset, frame.size))
        return None

    def _read_done(self, request: Frame, event: DiskDone) -> None:
        if self._send is None:
            return
        self._read_bytes -= request.size
        if event.error:
            answer = Frame(Kind.READ_FAILED, request.volume, sequence=request.sequence, payload=pack_errno(event.error))
        else:
            answer = Frame(
                Kind.READ_DATA, request.volume, 0, request.sequence, request.offset, request.size, event.data
            )
        self._send(answer)

    def settle(self) -> None:
        """Once per turn: acknowledgements, together."""
        for kind, sequences in self._acks.items():
            if not sequences:
                continue
            self._acks[kind] = []
            if self._send is None:
                continue
            for at in range(0, len(sequences), SEQUENCES_MAX):
                self._send(Frame(kind, payload=pack_sequences(sequences[at : at + SEQUENCES_MAX])))
