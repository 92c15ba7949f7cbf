# SPDX-License-Identifier: Apache-2.0
"""One established connection: frames in, frames out, one end.

Invariants: frames go out in the order they were handed over; `LinkDown` is posted exactly once and no frame
after it; nothing but HELLO, AGREE and GOODBYE reaches the core before an AGREE was both sent and received
here. Input is taken in turns of at most `TURN_BYTES`, so that one busy link does not starve disks and
clients.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from replicator.core.events import LinkDown, LinkFrames
from replicator.core.wire import Frame, FrameDecoder, Kind, encode
from replicator.drivers.loop import READ, WRITE, Loop, Timer
from replicator.drivers.transport import SendQueue, Stream
from replicator.errors import ProtocolError

BUFFER_BYTES: Final = 256 * 1024
TURN_BYTES: Final = 4 * 1024 * 1024
#: queued for a peer before its frames wait; reads and resync answers stay below 128 MiB
QUEUE_BYTES_MAX: Final = 192 << 20
CLOSE_NS: Final = 1_000_000_000  #: what is queued has this long to leave after `close`


class Link:
    """A connection the core knows by `number`."""

    def __init__(
        self,
        loop: Loop,
        number: int,
        stream: Stream,
        buffer: memoryview,
        *,
        peer: int | None,
        dialed: bool,
        on_first: Callable[[], None],
        on_end: Callable[[Link], None],
    ) -> None:
        """`buffer` is shared by all links of the thread.  `on_first` runs at the first frame, `on_end` at the
        end.
        """
        self.number = number
        self.peer = peer
        self.dialed = dialed
        self._loop = loop
        self._stream = stream
        self._buffer = buffer
        self._on_first: Callable[[], None] | None = on_first
        self._on_end = on_end
        self._decoder = FrameDecoder(handshake_only=True)
        self._queue = SendQueue()
        self._agree_sent = False
        self._agree_received = False
        self._closing = ""  # the reason, once `close` was called
        self._output_ended = False
        self._ended = False
        self._mask = READ
        self._resume: Timer | None = None
        self._give_up: Timer | None = None
        loop.register(stream, READ, self._on_ready)

    @property
    def queued_bytes(self) -> int:
        """Bytes handed over that the kernel has not taken."""
        return self._queue.size_bytes

    def send(self, frame: Frame) -> None:
        """Queue a frame; it leaves at the end of the turn.  After `close` it goes nowhere."""
        if self._ended or self._closing:
            return
        self._queue.push(encode(frame))
        if frame.kind is Kind.AGREE and not self._agree_sent:
            self._agree_sent = True
            if self._agree_received:
                self._open_all()
        self._loop.at_turn_end(self._flush)

    def close(self, reason: str) -> None:
        """Send what is queued, wait for the peer to end too, for `CLOSE_NS` at most; then `LinkDown`."""
        if self._ended or self._closing:
            return
        self._closing = reason or "closed"
        self._give_up = self._loop.call_at(self._loop.now_ns() + CLOSE_NS, self._on_give_up)
        self._loop.at_turn_end(self._flush)

    def cut(self, reason: str) -> None:
        """End now; what is queued is lost."""
        if self._ended:
            return
        self._ended = True
        for timer in (self._resume, self._give_up):
            if timer is not None:
                self._loop.cancel(timer)
        self._loop.unregister(self._stream)
        self._stream.close()
        self._on_end(self)
        self._loop.post(LinkDown(self.number, self._closing or reason))

    def _on_give_up(self) -> None:
        self.cut(self._closing)

    def _on_resume(self) -> None:
        self._resume = None
        self._on_ready(READ)

    def _on_ready(self, mask: int) -> None:
        if mask & READ:
            if self._closing:
                self._discard()
            else:
                self._receive()
        if not self._ended and (mask & WRITE or self._queue.size_bytes):
            self._flush()

    # -- out -----------------------------------------------------------------------------------------------

    def _flush(self) -> None:
        if self._ended or self._output_ended:
            return
        wanted = self._stream.send(self._queue)
        if self._stream.output_failed:
            if not self._closing:
                self._receive()  # the peer may have said why before it went away
            self.cut(self._stream.output_failed)
            return
        if self._closing and not self._queue.size_bytes:
            self._output_ended = True
            self._stream.end_output()
            wanted = 0
        # A peer that asks for more than it takes is not listened to until it has taken some.  Both sides cannot be in
        # that state at once: what the core sends to a peer that writes is bounded well below it.
        self._watch(wanted | (READ if self._queue.size_bytes <= QUEUE_BYTES_MAX or self._closing else 0))

    def _watch(self, mask: int) -> None:
        if mask != self._mask:
            self._mask = mask
            self._loop.modify(self._stream, mask, self._on_ready)

    # -- in ------------------------------------------------------------------------------------------------

    def _receive(self) -> None:
        """Take in what is there, up to `TURN_BYTES`, and post it as one event."""
        frames: list[Frame] = []
        fault = ""
        budget = TURN_BYTES
        size = len(self._buffer)
        while budget > 0:
            count = self._stream.receive(self._buffer)
            try:
                if count:
                    self._decode(count, frames)
            except ProtocolError as error:
                fault = str(error)
                break
            if count < size:
                break
            budget -= count
        if frames:
            self._post(frames)
        if fault:
            self.cut(fault)
        elif self._stream.input_ended:
            part = self._decoder.buffered_bytes
            self.cut(
                self._stream.input_ended + (f" in the middle of a frame, {part} bytes of it had come" if part else "")
            )
        elif self._stream.undelivered() and self._resume is None:
            self._resume = self._loop.call_at(self._loop.now_ns(), self._on_resume)

    def _decode(self, count: int, frames: list[Frame]) -> None:
        got = self._decoder.feed(self._buffer[:count])
        frames += got
        if not self._agree_received and any(frame.kind is Kind.AGREE for frame in got):
            self._agree_received = True
            if self._agree_sent:
                frames += self._decoder.open_all()

    def _open_all(self) -> None:
        """The core agreed after the peer did: what the peer sent behind its AGREE is let through."""
        try:
            held = self._decoder.open_all()
        except ProtocolError as error:
            self.cut(str(error))
            return
        if held:
            self._loop.post(LinkFrames(self.number, held))

    def _post(self, frames: list[Frame]) -> None:
        if self._on_first is not None:
            first, self._on_first = self._on_first, None
            first()
        self._loop.post(LinkFrames(self.number, frames))

    def _discard(self) -> None:
        """The core has closed: read on, so that the peer is not reset before it has read our last frames."""
        for _ in range(TURN_BYTES // len(self._buffer)):
            if self._output_ended:
                if self._stream.discard(self._buffer):
                    self.cut(self._closing)
                return
            if self._stream.receive(self._buffer) < len(self._buffer):
                break
        if self._stream.input_ended:
            self.cut(self._closing)
