# SPDX-License-Identifier: Apache-2.0
"""A TCP proxy between two nodes that ends a connection behind an exact byte.

It counts bytes and understands nothing, so it serves TLS as well.  `arm` says what happens to the next connection:
behind `after_bytes` bytes in one direction not one byte more passes, and the connection is reset, ended, or goes on
as if nothing had happened while everything is swallowed (a peer that is silently gone).  A connection that ends
before it got so far leaves the cut to the next one.
"""

from __future__ import annotations

import selectors
import socket
import struct
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum
from types import TracebackType
from typing import Final, Self

from tests.integration.cluster import GIVE_UP_S

_CHUNK: Final = 64 * 1024
_ABORT: Final = struct.pack("ii", 1, 0)  # SO_LINGER: close sends RST


class Way(Enum):
    """Direction of a byte."""

    TO_SERVER = "to-server"  # from the node that dialed
    TO_CLIENT = "to-client"


class How(Enum):
    """What happens behind the last byte."""

    RESET = "reset"
    END = "end"
    SWALLOW = "swallow"


@dataclass(frozen=True, slots=True)
class Cut:
    """Behind `after_bytes` bytes in direction `way`."""

    way: Way
    after_bytes: int
    how: How


@dataclass(eq=False)
class _Connection:
    """Two sockets; what was read from one and not yet written to the other, per direction."""

    client: socket.socket
    server: socket.socket
    cut: Cut | None
    passed: dict[Way, int] = field(default_factory=lambda: dict.fromkeys(Way, 0))
    waiting: dict[Way, bytearray] = field(default_factory=lambda: {way: bytearray() for way in Way})
    swallowing: bool = False

    def source(self, way: Way) -> socket.socket:
        return self.client if way is Way.TO_SERVER else self.server

    def sink(self, way: Way) -> socket.socket:
        return self.server if way is Way.TO_SERVER else self.client


class Proxy:
    """Listens on `listen`, passes on to `server`; runs in a thread from `with` to the end of the block."""

    def __init__(self, listen: tuple[str, int], server: tuple[str, int]) -> None:
        self._server = server
        self._listener = socket.create_server(listen)
        self._listener.setblocking(False)
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._listener, selectors.EVENT_READ, None)
        self._wake, self._woken = socket.socketpair()
        self._selector.register(self._woken, selectors.EVENT_READ, None)
        self._change = threading.Condition()
        self._orders: list[Callable[[], None]] = []
        self._connections: set[_Connection] = set()
        self._next: Cut | None = None
        self._done = 0  # cuts that happened
        self._total = dict.fromkeys(Way, 0)  # of the last connection
        self._ending = False
        self._thread = threading.Thread(target=self._run, name="proxy", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._order(self._end)
        self._thread.join(GIVE_UP_S)
        assert not self._thread.is_alive()

    # -- what the test asks --------------------------------

    def arm(self, cut: Cut) -> int:
        """End what is up now, and the next connection as `cut` says.  A ticket for `happened`."""
        with self._change:
            ticket = self._done
        self._order(lambda: self._arm(cut))
        return ticket

    def happened(self, ticket: int) -> None:
        """Wait until the cut that was armed has happened."""
        with self._change:
            assert self._change.wait_for(lambda: self._done > ticket, GIVE_UP_S), f"{self._next} never happened"

    def passed(self, way: Way) -> int:
        """Bytes of the last connection so far."""
        with self._change:
            return self._total[way]

    def _order(self, order: Callable[[], None]) -> None:
        """Have it done in the proxy's thread, and wait for that."""
        done = threading.Event()

        def carry_out() -> None:
            order()
            done.set()

        self._orders.append(carry_out)
        self._wake.send(b"!")
        assert done.wait(GIVE_UP_S), "the proxy does not answer"

    # -- the thread --------------------------------

    def _run(self) -> None:
        while not self._ending:
            for key, mask in self._selector.select():
                if key.fileobj is self._listener:
                    self._accept()
                elif isinstance(key.data, _Connection):
                    if key.data in self._connections:
                        self._serve(key.data, key.fileobj, mask)
                else:
                    self._woken.recv(_CHUNK)
            while self._orders:
                self._orders.pop(0)()

    def _arm(self, cut: Cut) -> None:
        self._next = cut
        for connection in list(self._connections):
            self._close(connection, abort=True)

    def _end(self) -> None:
        for connection in list(self._connections):
            self._close(connection, abort=True)
        self._selector.close()
        for sock in (self._listener, self._wake, self._woken):
            sock.close()
        self._ending = True

    def _accept(self) -> None:
        client, _ = self._listener.accept()
        try:
            server = socket.create_connection(self._server, timeout=GIVE_UP_S)
        except OSError:
            client.close()  # nobody is there; the dialer tries again
            return
        connection = _Connection(client, server, self._next)
        self._next = None
        self._connections.add(connection)
        with self._change:
            self._total = connection.passed
        for sock in (client, server):
            sock.setblocking(False)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self._selector.register(sock, selectors.EVENT_READ, connection)

    def _serve(self, connection: _Connection, sock: object, mask: int) -> None:
        inward = Way.TO_SERVER if sock is connection.client else Way.TO_CLIENT
        outward = Way.TO_CLIENT if inward is Way.TO_SERVER else Way.TO_SERVER
        try:
            if mask & selectors.EVENT_READ and not self._read(connection, inward):
                return
            self._write(connection, inward)
            if connection in self._connections:
                self._write(connection, outward)
        except BlockingIOError:
            pass
        except OSError:
            self._close(connection, abort=True)

    def _read(self, connection: _Connection, way: Way) -> bool:
        data = connection.source(way).recv(_CHUNK)
        if not data:
            self._close(connection, abort=False)
            return False
        if not connection.swallowing:
            connection.waiting[way] += data
        return True

    def _write(self, connection: _Connection, way: Way) -> None:
        waiting, cut = connection.waiting[way], connection.cut
        room = len(waiting)
        if cut is not None and cut.way is way:
            room = min(room, cut.after_bytes - connection.passed[way])
        sent = connection.sink(way).send(memoryview(waiting)[:room]) if room else 0
        del waiting[:sent]
        with self._change:
            connection.passed[way] += sent
        if cut is not None and cut.way is way and connection.passed[way] == cut.after_bytes:
            self._cut(connection, cut)
        else:
            self._watch(connection)

    def _cut(self, connection: _Connection, cut: Cut) -> None:
        connection.cut = None
        if cut.how is How.SWALLOW:
            connection.swallowing = True
            for waiting in connection.waiting.values():
                waiting.clear()
            self._watch(connection)
        else:
            self._close(connection, abort=cut.how is How.RESET)
        with self._change:
            self._done += 1
            self._change.notify_all()

    def _watch(self, connection: _Connection) -> None:
        for way in Way:
            mask = selectors.EVENT_READ | (selectors.EVENT_WRITE if connection.waiting[way] else 0)
            self._selector.modify(connection.sink(way), mask, connection)

    def _close(self, connection: _Connection, *, abort: bool) -> None:
        self._connections.discard(connection)
        if connection.cut is not None and self._next is None:
            self._next = connection.cut
        for sock in (connection.client, connection.server):
            self._selector.unregister(sock)
            if abort:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _ABORT)
            sock.close()
