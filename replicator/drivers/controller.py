# SPDX-License-Identifier: Apache-2.0
"""The control socket: operators and the agent ask, the core answers.

Only root and the user the process runs as may connect, and a socket is taken over only when nobody answers
on it.  Every request gets a token; answers may come at once, later and in any order.  The core is never
held up by a client: output that a client does not read is bounded; a client above the bound is told and cut.

Invariants: a token is live from `handler(token, request)` until its final reply or `on_close(token)`, never
both; no callback comes for a connection that was closed.
"""

from __future__ import annotations

import errno
import os
import socket
import stat
import struct
from collections import deque
from collections.abc import Callable
from typing import Protocol

from replicator.control.messages import (
    REPLY_BYTES_MAX,
    REQUEST_BYTES_MAX,
    LineSplitter,
    Reply,
    Request,
    decode_request,
    encode,
)
from replicator.drivers.loop import READ, WRITE, HasFileno
from replicator.errors import DiskError, ProtocolError, Refused

CONNECTIONS_MAX = 64
REQUESTS_MAX = 64  # in flight on one connection
UNSENT_BYTES_MAX = 4 * REPLY_BYTES_MAX  # a client that is merely slow may fall this far behind
LINGER_NS = 2_000_000_000  # a connection that is only being told why it is closed gets this long to listen
_ACCEPTS_PER_TURN = 16
_READ_BYTES = 64 * 1024
_PATH_BYTES_MAX = 107  # sun_path, less its terminator


class EventLoop(Protocol):
    """What the controller needs of `drivers.loop.Loop`."""

    def register(self, fileobj: int | HasFileno, mask: int, callback: Callable[[int], None]) -> None: ...
    def modify(self, fileobj: int | HasFileno, mask: int, callback: Callable[[int], None]) -> None: ...
    def unregister(self, fileobj: int | HasFileno) -> None: ...
    def call_at(self, when_ns: int, fn: Callable[[], None]) -> object: ...
    def now_ns(self) -> int: ...


class Controller:
    """Serves one resource's control socket on `loop`.

    `handler(token, request)` is called for every request; it (or anything later) answers with `reply`.
    `on_close(token)` is called for every request whose client went away before the final reply.
    Raises Refused when another process serves `path`, DiskError when the socket cannot be made safely.
    """

    def __init__(
        self,
        loop: EventLoop,
        path: str,
        handler: Callable[[int, Request], None],
        on_close: Callable[[int], None] = lambda _token: None,
    ) -> None:
        self._loop = loop
        self._path = path
        self._handler = handler
        self._on_close = on_close
        self._connections: set[_Connection] = set()
        self._tokens: dict[int, tuple[_Connection, int]] = {}
        self._token = 0
        self._listener = _listen(path)
        self._inode = os.stat(path).st_ino
        self._users = {0, os.geteuid()}
        # Given up for a moment when descriptors run out: so that a stranger's connection can be refused
        # instead of staying in the queue, where it would keep the loop from sleeping.
        self._spare: int | None = os.open("/dev/null", os.O_RDONLY | os.O_CLOEXEC)
        loop.register(self._listener, READ, self._on_listener)

    def reply(self, token: int, reply: Reply) -> bool:
        """Answer a request; False when its client is gone or it was answered for good already.

        An answer too long for the wire is replaced by an error.  A token that was never given out is a broken
        invariant.
        """
        assert 1 <= token <= self._token, f"control token {token} was never given out"
        if token not in self._tokens:
            return False
        connection, request_id = self._tokens[token]
        final = reply.final or not reply.ok
        try:
            line = encode(reply._replace(id=request_id, final=final))
        except ProtocolError as error:
            line = encode(_refusal("unsayable", error.message, request_id))
            final = True
        if final:
            del self._tokens[token]
            del connection.requests[request_id]
        connection.send(line)
        return True

    def close(self) -> None:
        """Stop listening, drop every connection (its requests get `on_close`), remove the socket."""
        self._loop.unregister(self._listener)
        try:
            if os.stat(self._path).st_ino == self._inode:  # not a successor's
                os.unlink(self._path)
        except FileNotFoundError:
            pass
        self._listener.close()
        for connection in list(self._connections):
            connection.close()
        if self._spare is not None:
            os.close(self._spare)
            self._spare = None

    # -- connections --------------------------------

    def _on_listener(self, _mask: int) -> None:
        for _ in range(_ACCEPTS_PER_TURN):
            try:
                sock, _address = self._listener.accept()
            except (BlockingIOError, ConnectionAbortedError):
                return
            except OSError as error:
                if error.errno not in (errno.EMFILE, errno.ENFILE) or self._spare is None:
                    raise
                self._drop_one()
                return
            self._admit(sock)

    def _admit(self, sock: socket.socket) -> None:
        sock.setblocking(False)
        _pid, uid, _gid = struct.unpack("iII", sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
        if uid not in self._users:
            _say(sock, _refusal("not-permitted", f"user {uid} may not control this resource", 0, "run as root"))
        elif len(self._connections) >= CONNECTIONS_MAX:
            message = f"{CONNECTIONS_MAX} control connections are open already"
            _say(sock, _refusal("too-many-connections", message, 0, "end some commands that wait"))
        else:
            self._connections.add(_Connection(self, self._loop, sock))

    def _drop_one(self) -> None:
        assert self._spare is not None
        os.close(self._spare)
        self._spare = None
        try:
            self._listener.accept()[0].close()
        except OSError:
            pass  # it went away by itself
        try:
            self._spare = os.open("/dev/null", os.O_RDONLY | os.O_CLOEXEC)
        except OSError:
            pass  # another thread took the descriptor; without a spare the next time is an error

    # -- called by a connection --------------------------------

    def request(self, connection: _Connection, request: Request) -> None:
        """A whole request arrived."""
        self._token += 1
        self._tokens[self._token] = (connection, request.id)
        connection.requests[request.id] = self._token
        self._handler(self._token, request)

    def forget_requests(self, connection: _Connection) -> None:
        """No more answers can reach this client."""
        tokens = list(connection.requests.values())
        connection.requests.clear()
        for token in tokens:
            del self._tokens[token]
        for token in tokens:
            self._on_close(token)

    def forget(self, connection: _Connection) -> None:
        """The connection is closed."""
        self._connections.discard(connection)


class _Connection:
    """One client: lines in, lines out.  `requests` maps the client's request ids to tokens."""

    __slots__ = (
        "_closing",
        "_loop",
        "_owner",
        "_queue",
        "_sent",
        "_sock",
        "_splitter",
        "_unsent",
        "requests",
    )

    def __init__(self, owner: Controller, loop: EventLoop, sock: socket.socket) -> None:
        self._owner = owner
        self._loop = loop
        self._sock: socket.socket | None = sock
        self._splitter = LineSplitter(REQUEST_BYTES_MAX)
        self._queue: deque[bytes] = deque()
        self._sent = 0  # bytes of the first queued line that are gone already
        self._unsent = 0
        self._closing = False
        self.requests: dict[int, int] = {}
        loop.register(sock, READ, self._on_ready)

    def send(self, line: bytes) -> None:
        """Queue a line, and send what the socket takes."""
        if self._sock is None or self._closing:
            return
        self._queue.append(line)
        self._unsent += len(line)
        self._flush()
        if self._unsent > UNSENT_BYTES_MAX:
            hint = "read faster, or ask again and start from the present state"
            self._cut("too-slow", f"more than {UNSENT_BYTES_MAX} bytes were not read", hint)

    def close(self) -> None:
        """Drop the connection now."""
        if self._sock is None:
            return
        self._loop.unregister(self._sock)
        self._sock.close()
        self._sock = None
        self._queue.clear()
        self._owner.forget(self)
        self._owner.forget_requests(self)

    def _on_ready(self, mask: int) -> None:
        if mask & WRITE:
            self._flush()
        if mask & READ and self._sock is not None:
            self._receive(self._sock)

    def _receive(self, sock: socket.socket) -> None:
        try:
            data = sock.recv(_READ_BYTES)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            self.close()
            return
        if self._closing:
            return  # what the client says now is not for us any more
        try:
            for line in self._splitter.feed(data):
                if self._sock is None or self._closing:  # the handler closed us, or an answer did
                    return
                self._take(decode_request(line))
        except ProtocolError as error:
            self._cut("protocol", error.message, "one JSON object with verb, args and id per line")

    def _take(self, request: Request) -> None:
        if request.id in self.requests:
            raise ProtocolError(f"request {request.id} is in flight already")
        if len(self.requests) >= REQUESTS_MAX:
            message = f"{REQUESTS_MAX} requests are in flight on this connection"
            self.send(encode(_refusal("busy", message, request.id, "wait for an answer")))
        else:
            self._owner.request(self, request)

    def _cut(self, code: str, message: str, hint: str) -> None:
        """Close after telling the client why, in place of everything it has not begun to receive."""
        if self._sock is None or self._closing:
            return
        del_from = 1 if self._sent else 0
        while len(self._queue) > del_from:
            self._unsent -= len(self._queue.pop())
        line = encode(_refusal(code, message, 0, hint))
        self._queue.append(line)
        self._unsent += len(line)
        self._closing = True
        self._loop.call_at(self._loop.now_ns() + LINGER_NS, self.close)
        self._owner.forget_requests(self)
        self._flush()

    def _flush(self) -> None:
        sock = self._sock
        while sock is not None and self._queue:
            try:
                count = sock.send(memoryview(self._queue[0])[self._sent :])
            except BlockingIOError:
                break
            except OSError:
                self.close()
                return
            self._sent += count
            self._unsent -= count
            if self._sent == len(self._queue[0]):
                self._queue.popleft()
                self._sent = 0
        if sock is None:
            return
        if self._closing and not self._queue:
            # Closing with unread input would make the client's end a reset.  So say that nothing follows,
            # and read on until the client hangs up or its time is over.
            try:
                sock.shutdown(socket.SHUT_WR)
            except OSError:
                self.close()
                return
        mask = WRITE if self._queue else 0
        mask |= 0 if self._closing and self._queue else READ
        self._loop.modify(sock, mask, self._on_ready)


def _refusal(code: str, message: str, request_id: int, hint: str = "") -> Reply:
    return Reply(ok=False, code=code, message=message, hint=hint, id=request_id)


def _say(sock: socket.socket, reply: Reply) -> None:
    # A fresh socket's buffer takes a short line whole; a client that is gone already misses nothing.
    try:
        sock.send(encode(reply))
    except OSError:
        pass
    sock.close()


def _listen(path: str) -> socket.socket:
    """A listening socket at `path`, mode 0600, put in place whole by a rename."""
    fresh = path + ".new"
    if len(os.fsencode(fresh)) > _PATH_BYTES_MAX:
        raise DiskError(f"{path} is too long for a socket", hint="set REPLICATOR_RUN_DIR to a shorter path")
    directory = os.path.dirname(path)
    try:
        os.makedirs(directory, mode=0o755, exist_ok=True)
        if os.stat(directory).st_mode & stat.S_IWOTH:
            hint = f"chmod o-w {directory}, or set REPLICATOR_RUN_DIR"
            raise DiskError(f"everybody may write to {directory}, and could take the socket's place", hint=hint)
        _refuse_second(path)
        try:
            os.unlink(fresh)
        except FileNotFoundError:
            pass
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK)
        try:
            listener.bind(fresh)
            os.chmod(fresh, 0o600)
            listener.listen(CONNECTIONS_MAX)
            os.rename(fresh, path)
        except BaseException:
            listener.close()
            raise
    except OSError as error:
        raise DiskError(f"the control socket {path} cannot be made: {error.strerror or error}") from error
    return listener


def _refuse_second(path: str) -> None:
    if not os.path.lexists(path):
        return
    if not stat.S_ISSOCK(os.lstat(path).st_mode):
        raise DiskError(f"{path} exists and is not a socket", hint="move it away")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC) as probe:
        probe.setblocking(False)  # a full queue means that somebody is there, however slow
        try:
            probe.connect(path)
        except (ConnectionRefusedError, FileNotFoundError):
            return
        except BlockingIOError:
            pass
    raise Refused("already-running", f"another process serves {path}", hint="replicator status")
