# SPDX-License-Identifier: Apache-2.0
"""Connections that have not proved who they are: one deadline, one outcome.

Invariants: before the outcome nothing is sent or parsed but the TLS handshake; the outcome is reported
exactly once; who the peer is follows from the certificate whose key it proved to hold, and from nothing else
it says.
"""

from __future__ import annotations

import socket
from collections.abc import Callable
from functools import partial
from typing import Final, TypeAlias

from replicator.drivers import tcp
from replicator.drivers.keys import Trust
from replicator.drivers.link import Link
from replicator.drivers.loop import READ, WRITE, Loop, Timer
from replicator.drivers.transport import ClearStream, Stream
from replicator.errors import ProtocolError

HANDSHAKE_NS: Final = 10_000_000_000  #: from the first packet to the proof of identity

Secure: TypeAlias = Callable[[socket.socket], Stream]
"""Makes a connected socket a stream; raises ProtocolError."""


class Attempt:
    """A connection that has not proved who it is: connect (if dialed), handshake, the certificate; one
    deadline.
    """

    def __init__(
        self,
        loop: Loop,
        sock: socket.socket,
        secure: Secure,
        trust: Trust | None,
        on_end: Callable[[Attempt, int | None, str], None],
        *,
        peer: int | None,
    ) -> None:
        """`peer` is who was dialed, None for an accepted connection."""
        self.peer = peer
        self._loop = loop
        self._secure = secure
        self._trust = trust
        self._on_end = on_end
        self._socket: socket.socket | Stream = sock
        self._stream: Stream | None = None
        self._over = False
        self._watched = True
        self._timer = loop.call_at(loop.now_ns() + HANDSHAKE_NS, self._on_deadline)
        loop.register(sock, WRITE, self._on_ready)  # connected; an accepted one is at once

    @property
    def dialed(self) -> bool:
        """Whether this side opened the connection."""
        return self.peer is not None

    def stream(self) -> Stream:
        """What the handshake made; the receiver owns it."""
        assert self._stream is not None and self._over
        return self._stream

    def release(self) -> None:
        """Close the connection."""
        self._socket.close()

    def abandon(self, reason: str) -> None:
        """Give up; `on_end` is told."""
        self._end(None, reason)

    def _on_deadline(self) -> None:
        doing = "authenticated" if self._stream is not None or not self.dialed else "answered"
        self._end(None, f"the peer has not {doing} within {HANDSHAKE_NS // 10**9} s")

    def _on_ready(self, _mask: int) -> None:
        try:
            if self._stream is None:
                self._begin()
            assert self._stream is not None
            wanted = self._stream.handshake()
            if wanted:
                self._loop.modify(self._stream, wanted, self._on_ready)
                return
            proved = self._proved(self._stream)
        except ProtocolError as error:
            self._end(None, str(error))
            return
        self._end(proved, "")

    def _begin(self) -> None:
        sock = self._socket
        assert isinstance(sock, socket.socket)
        fault = tcp.connect_fault(sock)
        if fault:
            raise ProtocolError(f"cannot connect: {fault}")
        self._loop.unregister(sock)  # TLS takes the descriptor over in an object of its own
        self._watched = False
        self._socket = self._stream = self._secure(sock)
        self._loop.register(self._stream, READ, self._on_ready)
        self._watched = True

    def _proved(self, stream: Stream) -> int | None:
        """Whose certificate was proved; the trust anchors let no other pass, and this does not rely on it."""
        if isinstance(stream, ClearStream):
            return None
        assert self._trust is not None
        shown = stream.fingerprint()
        owner = self._trust.owners.get(shown)
        if owner is None or (self.peer is not None and owner != self.peer):
            whom = "any peer" if self.peer is None else "the node that was dialed"
            raise ProtocolError(
                f"the certificate the peer shows is not pinned for {whom}: sha256 {shown}",
                hint="copy its node.crt to the peers/ directory here if it is the right one",
            )
        return owner

    def _end(self, proved: int | None, fault: str) -> None:
        assert not self._over
        self._over = True
        self._loop.cancel(self._timer)
        if self._watched:
            self._loop.unregister(self._socket)
        self._on_end(self, proved, fault)


class Probation:
    """An accepted clear link until its first frame: it holds a place in `Admission` and has a deadline."""

    def __init__(self, loop: Loop, leave: Callable[..., None]) -> None:
        self._loop = loop
        self._leave = leave
        self._timer: Timer | None = None

    def begin(self, link: Link) -> None:
        """The clock starts."""
        reason = f"no frame within {HANDSHAKE_NS // 10**9} s"
        self._timer = self._loop.call_at(self._loop.now_ns() + HANDSHAKE_NS, partial(link.cut, reason))

    def passed(self) -> None:
        """The first frame came."""
        self._finish(failed=False)

    def failed(self) -> None:
        """The link ended; nothing to do when it had passed."""
        self._finish(failed=True)

    def _finish(self, *, failed: bool) -> None:
        if self._timer is not None:
            self._loop.cancel(self._timer)
            self._timer = None
            self._leave(self._loop.now_ns(), failed=failed)
