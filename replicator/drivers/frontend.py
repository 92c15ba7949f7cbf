# SPDX-License-Identifier: Apache-2.0
"""The NBD socket of one volume: who is connected, and whose token is whose.

The listener is a UNIX socket that only its owner may open.  Each client has an `NbdSession`, which decides
all about the protocol; here bytes are moved, pieces of work become core events, replies find their client.

Invariants
- A token stays in `_owners` from the event to its reply, also when the client is gone by then: a late reply
  is dropped, a reply with a token that was never ours is reported to the caller (`reply` returns False).
- `ClientOpened` precedes, and `ClientClosed` follows, every `ClientRequest` of a client.  A client that never
  got an export is never mentioned to the core.
- A client is read only while its session wants data, so what it can make us hold is bounded.
- An export that becomes refused leaves its clients alone; only `cut_all` and `close` end them.
"""

from __future__ import annotations

import errno
import os
import socket
import stat
import struct
from collections import deque
from collections.abc import Callable, Iterator
from typing import TypedDict

from replicator.core.actions import Reply
from replicator.core.events import ClientClosed, ClientOpened, ClientRequest, Io
from replicator.drivers.loop import READ, WRITE, Loop
from replicator.errors import DiskError
from replicator.nbd.negotiation import Export
from replicator.nbd.requests import Buffer, Kind
from replicator.nbd.session import NbdSession

CLIENTS_MAX = 64  #: clients of one volume; kernel nbd and qemu use a few connections each
BACKLOG = 16
RECEIVE_SIZE = 256 * 1024  #: bytes read from a client per turn: one system call for sixty 4 KiB writes
SOCKET_BUFFER_SIZE = 4 << 20  #: asked for; the system may give less
BUFFERS_PER_SEND_MAX = min(1024, os.sysconf("SC_IOV_MAX"))

_IO = {Kind.READ: Io.READ, Kind.WRITE: Io.WRITE, Kind.FLUSH: Io.FLUSH, Kind.TRIM: Io.TRIM, Kind.ZERO: Io.ZERO}
_PEERCRED = struct.Struct("=iII")
_NO_DESCRIPTORS = (errno.EMFILE, errno.ENFILE)


class ClientStatus(TypedDict):
    """What an operator sees of one client."""

    client: int
    pid: int
    uid: int
    process: str  #: path of its program, or its name, or ""
    state: str  #: negotiating | writable | read-only | closing
    in_flight: int  #: requests (pieces) not answered


def process_of(pid: int) -> str:
    """Path of a process's program, its short name if the path is hidden from us, else ""."""
    try:
        return os.readlink(f"/proc/{pid}/exe")
    except OSError:
        pass
    try:
        with open(f"/proc/{pid}/comm", encoding="utf-8", errors="replace") as comm:
            return comm.read().strip()
    except OSError:
        return ""


class _Client:
    """One connection: its socket, its session, and the bytes on their way out."""

    def __init__(self, number: int, sock: socket.socket, session: NbdSession) -> None:
        self.number = number
        self.sock = sock
        self.session = session
        credentials = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _PEERCRED.size)
        self.pid, self.uid, _ = _PEERCRED.unpack(credentials)
        self.process = process_of(self.pid)  # now: a client may hand its socket to the kernel and exit
        self.opened = False
        self.gone = False
        self.mask = 0
        self._pending: deque[Buffer] = deque()

    @property
    def who(self) -> str:
        return f"pid {self.pid} {self.process}".rstrip()

    @property
    def unsent(self) -> bool:
        return bool(self._pending)

    def send(self) -> None:
        """Send as much as the socket takes.  Raises OSError if the connection is broken."""
        self._pending.extend(self.session.take_output())
        while self._pending:
            if len(self._pending) <= BUFFERS_PER_SEND_MAX:
                batch = list(self._pending)
            else:
                batch = [self._pending[index] for index in range(BUFFERS_PER_SEND_MAX)]
            try:
                count = self.sock.sendmsg(batch)
            except (BlockingIOError, InterruptedError):
                return
            self._drop(count)
            self.session.sent(count)
            self._pending.extend(self.session.take_output())  # room was made: more may have been answered

    def _drop(self, count: int) -> None:
        while count:
            first = self._pending[0]
            if count < len(first):
                self._pending[0] = memoryview(first)[count:]
                return
            count -= len(first)
            self._pending.popleft()

    def status(self) -> ClientStatus:
        if self.session.closing:
            state = "closing"
        elif self.session.export is None:
            state = "negotiating"
        else:
            state = "read-only" if self.session.export.read_only else "writable"
        return ClientStatus(
            client=self.number,
            pid=self.pid,
            uid=self.uid,
            process=self.process,
            state=state,
            in_flight=self.session.in_flight_count,
        )


class Frontend:
    """The NBD clients of one volume.

    `name` is the export's name ("RES/VOL"); clients may also ask for "".  `tokens` is shared by all frontends
    of the process.  Nothing is served before `export` was called.
    """

    def __init__(
        self, loop: Loop, volume: int, path: str, name: str, tokens: Iterator[int], owner_mode: int = 0o600
    ) -> None:
        self.volume = volume
        self.path = path
        self.name = name
        self._loop = loop
        self._tokens = tokens
        self._mode = owner_mode
        self._exports: dict[str, Export] = {}
        self._clients: dict[int, _Client] = {}
        self._owners: dict[int, _Client] = {}
        self._due: dict[_Client, None] = {}  # clients to look after at the end of this turn
        self._next_client = 1
        self._listener: socket.socket | None = None
        self._inode: tuple[int, int] | None = None
        self._spare: int | None = None
        self._buffer = memoryview(bytearray(RECEIVE_SIZE))

    # -- what the daemon asks --------------------------------

    def listen(self) -> None:
        """Open the socket.  A stale one is replaced; raises `DiskError` if the path is in use or unusable."""
        assert self._listener is None, f"{self.path} is open already"
        _remove_stale(self.path)
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        try:
            os.fchmod(listener.fileno(), self._mode)  # before bind: the file never has another mode
            listener.bind(self.path)
            listener.listen(BACKLOG)
            made = os.stat(self.path)
        except OSError as error:
            listener.close()
            raise DiskError(f"cannot listen on {self.path}: {error.strerror or error}") from error
        self._inode = made.st_dev, made.st_ino
        self._listener = listener
        self._spare = os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)
        self._loop.register(listener, READ, self._on_connection)

    def export(self, export: Export) -> None:
        """Publish, change or (with `refused`) withhold the export, for clients that choose from now on."""
        assert export.name == self.name, f"export {export.name} published as {self.name}"
        self._exports[""] = self._exports[self.name] = export

    def reply(self, action: Reply) -> bool:
        """Hand a reply to its client.  False if the token is not (or no longer) one of ours."""
        client = self._owners.pop(action.token, None)
        if client is None:
            return False
        if not client.gone:
            client.session.reply(action.token, action.error, action.data)
            self._look_after(client)
        return True

    def cut_all(self, reason: str) -> int:
        """End every client now, whatever is in flight; returns how many.  `reason` is kept as their fault."""
        clients = list(self._clients.values())
        for client in clients:
            self._drop(client, reason)
        return len(clients)

    def close(self) -> None:
        """End every client, stop listening and remove the socket file (if it is still ours)."""
        if self._listener is not None:
            self._loop.unregister(self._listener)
            self._listener.close()
            self._listener = None
            try:
                found = os.lstat(self.path)
                if (found.st_dev, found.st_ino) == self._inode:
                    os.unlink(self.path)
            except FileNotFoundError:
                pass
        if self._spare is not None:
            os.close(self._spare)
            self._spare = None
        self.cut_all("the server ends")

    def clients(self) -> list[ClientStatus]:
        """Who is connected, oldest first."""
        return [client.status() for client in self._clients.values()]

    # -- connections --------------------------------

    def _on_connection(self, _mask: int) -> None:
        assert self._listener is not None
        try:
            sock, _ = self._listener.accept()
        except OSError as error:
            if error.errno in _NO_DESCRIPTORS:
                self._turn_away(self._listener)
            return  # anything else: this connection is over before it began
        sock.setblocking(False)
        if len(self._clients) >= CLIENTS_MAX and not self._make_room():
            sock.close()
            return
        for option in (socket.SO_SNDBUF, socket.SO_RCVBUF):
            sock.setsockopt(socket.SOL_SOCKET, option, SOCKET_BUFFER_SIZE)
        client = _Client(self._next_client, sock, NbdSession(self._exports, self._tokens))
        self._next_client += 1
        self._clients[client.number] = client
        client.mask = READ
        self._loop.register(sock, READ, self._on_ready(client))
        self._look_after(client)

    def _turn_away(self, listener: socket.socket) -> None:
        """Close a connection we have no descriptor for; left alone it would keep the loop spinning."""
        if self._spare is not None:
            os.close(self._spare)
            self._spare = None
        try:
            listener.accept()[0].close()
        except OSError:
            pass
        try:
            self._spare = os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)
        except OSError:
            pass  # somebody was faster; the next connection tries again

    def _make_room(self) -> bool:
        """Drop the oldest client that has not chosen an export: idle hagglers must not lock others out."""
        for client in self._clients.values():
            if client.session.export is None:
                self._drop(client, "too many clients")
                return True
        return False

    def _on_ready(self, client: _Client) -> Callable[[int], None]:
        def ready(mask: int) -> None:
            if mask & READ and client.session.wants_data:
                self._read(client)
            if not client.gone:
                self._look_after(client)

        return ready

    def _read(self, client: _Client) -> None:
        try:
            count = client.sock.recv_into(self._buffer)
        except (BlockingIOError, InterruptedError):
            return
        except OSError as error:
            self._drop(client, f"reading failed: {error.strerror}")
            return
        if count == 0:
            self._drop(client, "the client hung up")
            return
        client.session.receive(self._buffer[:count])
        self._forward(client)

    def _forward(self, client: _Client) -> None:
        """Turn what the session has accepted into core events."""
        session, volume, post = client.session, self.volume, self._loop.post
        if not client.opened and session.export is not None:
            client.opened = True
            post(ClientOpened(volume, client.number, not session.export.read_only, client.who))
        for request in session.take_requests():
            self._owners[request.token] = client
            post(
                ClientRequest(
                    volume,
                    request.token,
                    _IO[request.kind],
                    request.offset,
                    request.size,
                    request.data,
                    request.fua,
                    request.keep,
                )
            )

    def _look_after(self, client: _Client) -> None:
        if not self._due:
            self._loop.at_turn_end(self._settle)
        self._due[client] = None

    def _settle(self) -> None:
        """End of turn: send what was answered, forward what found room, adjust what is waited for."""
        due, self._due = self._due, {}
        for client in due:
            if client.gone:
                continue
            try:
                client.send()
            except OSError as error:
                self._drop(client, f"sending failed: {error.strerror}")
                continue
            self._forward(client)
            if client.session.finished:
                self._drop(client, client.session.fault)
            else:
                self._watch(client)

    def _watch(self, client: _Client) -> None:
        mask = (READ if client.session.wants_data else 0) | (WRITE if client.unsent else 0)
        if mask == client.mask:
            return
        if not mask:
            self._loop.unregister(client.sock)
        elif not client.mask:
            self._loop.register(client.sock, mask, self._on_ready(client))
        else:
            self._loop.modify(client.sock, mask, self._on_ready(client))
        client.mask = mask

    def _drop(self, client: _Client, reason: str) -> None:
        """End one connection.  Its tokens stay known until they are answered."""
        if client.mask:
            self._loop.unregister(client.sock)
            client.mask = 0
        client.gone = True
        client.session.fault = client.session.fault or reason
        client.sock.close()
        del self._clients[client.number]
        self._due.pop(client, None)
        if client.opened:
            self._loop.post(ClientClosed(self.volume, client.number))


def _remove_stale(path: str) -> None:
    """Remove a socket file nobody listens on.  Raises `DiskError` if the path is something else, or alive."""
    try:
        if not stat.S_ISSOCK(os.lstat(path).st_mode):
            raise DiskError(f"cannot listen on {path}: a file that is not a socket is in the way")
    except FileNotFoundError:
        return
    except OSError as error:
        raise DiskError(f"cannot listen on {path}: {error.strerror}") from error
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK) as probe:
        try:
            probe.connect(path)
        except ConnectionRefusedError:
            os.unlink(path)
            return
        except FileNotFoundError:
            return
        except BlockingIOError:
            pass  # a full backlog is a living listener
        except OSError as error:
            raise DiskError(f"cannot listen on {path}: {error.strerror or error}") from error
    raise DiskError(f"cannot listen on {path}: another process serves it", hint="stop it first, see ss -xlp")
