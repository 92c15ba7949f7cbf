# SPDX-License-Identifier: Apache-2.0
"""A small NBD client: for our own tools and tests, and for handing a connected socket to the kernel.

It speaks fixed newstyle with GO and simple replies, which is what the kernel's client expects to find after
the handshake (`detach`).  Calls block; `submit_write` and `poll` keep many writes in flight.

Errors: what the server answers is an `OSError` with its errno; a connection that ends or talks nonsense is a
`ConnectionError`, after which the client is useless.
"""

from __future__ import annotations

import os
import select
import socket
from types import TracebackType
from typing import Self

from replicator.nbd import constants as c
from replicator.nbd.constants import Command, Info, Option, Rep, Transmission
from replicator.nbd.requests import Buffer

_CHUNK_SIZE = c.PAYLOAD_MAX
_ZERO_CHUNK_SIZE = 1 << 30  #: fits a u32 and every block size
_OPTION_REPLY_MAX = 1 << 16


class NbdClient:
    """One connection to one export of a server on a UNIX socket.

    Raises ConnectionError if there is no server or it does not speak NBD, PermissionError if it refuses the
    export (with its message), FileNotFoundError if it knows no such export or there is no socket.
    """

    def __init__(self, path: str, export: str = "", *, timeout_s: float | None = None) -> None:
        self.size_bytes = 0
        self.flags = Transmission(0)
        self.block_min = 1  #: offsets and lengths are multiples of it
        self._cookie = 0
        self._open: dict[int, int] = {}  # cookie -> bytes of data its reply carries
        self._done: list[tuple[int, int]] = []
        self._sock: socket.socket | None = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            self._sock.settimeout(timeout_s)
            self._sock.connect(path)
            self._handshake(export)
        except BaseException:
            self._sock.close()
            raise

    # -- life --------------------------------

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Say goodbye (DISC) and close; harmless when the connection is gone or was detached."""
        if self._sock is None:
            return
        sock, self._sock = self._sock, None
        try:
            sock.sendall(c.REQUEST.pack(c.REQUEST_MAGIC, 0, Command.DISC, 0, 0, 0))
        except OSError:
            pass
        sock.close()

    def detach(self) -> socket.socket:
        """Give the connected socket away (to the kernel); the client is useless afterwards."""
        assert not self._open, "requests are in flight"
        sock = self._connected()
        self._sock = None
        return sock

    # -- blocking --------------------------------

    def read(self, offset: int, size: int) -> bytes:
        """Read `size` bytes."""
        parts = []
        for start in range(offset, offset + size, _CHUNK_SIZE):
            length = min(_CHUNK_SIZE, offset + size - start)
            parts.append(self._call(Command.READ, 0, start, length, data_size=length))
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def write(self, offset: int, data: Buffer, *, fua: bool = False) -> None:
        """Write; with `fua` it is stable when this returns."""
        view = memoryview(data)
        for start in range(0, len(view), _CHUNK_SIZE):
            part = view[start : start + _CHUNK_SIZE]
            flags = c.CMD_FLAG_FUA if fua else 0
            self._call(Command.WRITE, flags, offset + start, len(part), part)

    def flush(self) -> None:
        """Make every write answered so far stable."""
        self._call(Command.FLUSH, 0, 0, 0)

    def trim(self, offset: int, size: int, *, fua: bool = False) -> None:
        """Give a range back."""
        self._in_chunks(Command.TRIM, c.CMD_FLAG_FUA if fua else 0, offset, size)

    def zero(self, offset: int, size: int, *, fua: bool = False, keep: bool = False) -> None:
        """Make a range zero; with `keep` it stays allocated."""
        flags = (c.CMD_FLAG_FUA if fua else 0) | (c.CMD_FLAG_NO_HOLE if keep else 0)
        self._in_chunks(Command.WRITE_ZEROES, flags, offset, size)

    # -- pipelined --------------------------------

    @property
    def in_flight(self) -> int:
        """Writes submitted whose answer was not read yet."""
        return len(self._open)

    def submit_write(self, offset: int, data: Buffer, *, fua: bool = False) -> int:
        """Send a write (at most 32 MiB) without waiting for its answer; returns its cookie."""
        return self._submit(Command.WRITE, c.CMD_FLAG_FUA if fua else 0, offset, len(data), data)

    def poll(self, timeout_s: float | None = 0.0) -> list[tuple[int, int]]:
        """The (cookie, errno) of every submitted write answered since the last call.

        Waits up to `timeout_s` for the first one (None: for ever); does not wait when nothing is in flight.
        """
        while self._open and self._readable(0.0 if self._done else timeout_s):
            cookie, error, _ = self._next_reply()
            self._done.append((cookie, error))
        done, self._done = self._done, []
        return done

    # -- transmission --------------------------------

    def _connected(self) -> socket.socket:
        if self._sock is None:
            raise ConnectionError("the connection is closed")
        return self._sock

    def _readable(self, timeout_s: float | None) -> bool:
        poller = select.poll()
        poller.register(self._connected(), select.POLLIN)
        return bool(poller.poll(None if timeout_s is None else timeout_s * 1000))

    def _in_chunks(self, command: Command, flags: int, offset: int, size: int) -> None:
        for start in range(offset, offset + size, _ZERO_CHUNK_SIZE):
            self._call(command, flags, start, min(_ZERO_CHUNK_SIZE, offset + size - start))

    def _submit(
        self, command: Command, flags: int, offset: int, size: int, data: Buffer = b"", data_size: int = 0
    ) -> int:
        self._cookie += 1
        header = c.REQUEST.pack(c.REQUEST_MAGIC, flags, command, self._cookie, offset, size)
        self._open[self._cookie] = data_size
        sock = self._connected()
        sent = sock.sendmsg((header, data))
        if sent < len(header):
            sock.sendall(header[sent:])
            sent = len(header)
        if sent < len(header) + len(data):
            sock.sendall(memoryview(data)[sent - len(header) :])
        return self._cookie

    def _call(
        self, command: Command, flags: int, offset: int, size: int, data: Buffer = b"", data_size: int = 0
    ) -> bytes:
        """Ask and wait for the answer; answers of submitted writes that come first are kept for `poll`."""
        own = self._submit(command, flags, offset, size, data, data_size)
        while True:
            cookie, error, answer = self._next_reply()
            if cookie != own:
                self._done.append((cookie, error))
            elif error:
                raise OSError(error, os.strerror(error), f"{command.name} {size} bytes at {offset}")
            else:
                return answer

    def _next_reply(self) -> tuple[int, int, bytes]:
        magic, error, cookie = c.SIMPLE.unpack(self._receive(c.SIMPLE.size))
        if magic != c.SIMPLE_MAGIC:
            raise ConnectionError(f"a reply begins with {magic:#x}")
        if cookie not in self._open:
            raise ConnectionError(f"a reply for cookie {cookie}, which was not asked")
        size = self._open.pop(cookie)
        return cookie, error, b"" if error else self._receive(size)

    def _receive(self, size: int) -> bytes:
        sock = self._connected()
        data = bytearray(size)
        view, filled = memoryview(data), 0
        while filled < size:
            count = sock.recv_into(view[filled:])
            if not count:
                raise ConnectionError("the server closed the connection")
            filled += count
        return bytes(data)

    # -- handshake --------------------------------

    def _handshake(self, export: str) -> None:
        magic, option_magic, flags = c.GREETING.unpack(self._receive(c.GREETING.size))
        if (magic, option_magic) != (c.NBDMAGIC, c.IHAVEOPT) or not flags & c.FLAG_FIXED_NEWSTYLE:
            raise ConnectionError("the server does not speak NBD (fixed newstyle)")
        sock = self._connected()
        name = export.encode()
        body = c.U32.pack(len(name)) + name + c.U16.pack(1) + c.U16.pack(Info.BLOCK_SIZE)
        mine = flags & (c.FLAG_FIXED_NEWSTYLE | c.FLAG_NO_ZEROES)
        sock.sendall(c.CLIENT_FLAGS.pack(mine) + c.OPTION.pack(c.IHAVEOPT, Option.GO, len(body)) + body)
        while True:
            magic, option, kind, length = c.OPTION_REPLY.unpack(self._receive(c.OPTION_REPLY.size))
            if magic != c.OPTION_REPLY_MAGIC or option != Option.GO or length > _OPTION_REPLY_MAX:
                raise ConnectionError(f"a bad answer to GO: magic {magic:#x} option {option} length {length}")
            answer = self._receive(length)
            if kind == Rep.ACK:
                return
            if kind == Rep.INFO:
                self._take_info(answer)
            else:
                raise _refusal(kind, answer, export)

    def _take_info(self, answer: bytes) -> None:
        (kind,) = c.U16.unpack_from(answer) if len(answer) >= c.U16.size else (-1,)
        if kind == Info.EXPORT and len(answer) == c.INFO_EXPORT.size:
            _, self.size_bytes, flags = c.INFO_EXPORT.unpack(answer)
            self.flags = Transmission(flags)
        elif kind == Info.BLOCK_SIZE and len(answer) == c.INFO_BLOCK_SIZE.size:
            self.block_min = c.INFO_BLOCK_SIZE.unpack(answer)[1]


def _refusal(kind: int, answer: bytes, export: str) -> OSError:
    reason = answer.decode(errors="replace")
    if kind == Rep.ERR_POLICY:
        return PermissionError(reason)
    if kind == Rep.ERR_UNKNOWN:
        return FileNotFoundError(reason or f"the server has no export '{export}'")
    return ConnectionError(f"the server refuses export '{export}': {reason} ({kind:#x})")
