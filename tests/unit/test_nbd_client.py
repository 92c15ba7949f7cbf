# SPDX-License-Identifier: Apache-2.0
"""Our NBD client against scripted servers: what it makes of refusals, nonsense and endings."""

from __future__ import annotations

import itertools
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from replicator.drivers.nbd_client import NbdClient
from replicator.nbd.negotiation import Export
from replicator.nbd.session import NbdSession

EXPORT = Export(name="r0/0", size_bytes=1 << 20)


@contextmanager
def serving(path: Path, talk: Callable[[socket.socket], None]) -> Iterator[str]:
    """One connection, handled by `talk` in a thread."""
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen(1)

        def serve() -> None:
            with listener.accept()[0] as sock:
                talk(sock)

        thread = threading.Thread(target=serve)
        thread.start()
        yield str(path)
        thread.join()


def session_talk(export: Export, requests: int, error: int = 0) -> Callable[[socket.socket], None]:
    """Serve with the real session, and end the connection after so many requests."""

    def talk(sock: socket.socket) -> None:
        session = NbdSession({"": export}, itertools.count())
        left = requests
        while True:
            for buffer in session.take_output():
                sock.sendall(buffer)
            if not left and session.export is not None:
                return
            data = sock.recv(65536)
            if not data:
                return
            session.receive(data)
            for request in session.take_requests():
                left -= 1
                session.reply(request.token, error, bytes(request.size))

    return talk


def test_a_refusal_carries_the_servers_words(tmp_path: Path) -> None:
    refused = Export(name="r0/0", size_bytes=0, refused="r0/0 is Secondary on alpha")
    with (
        serving(tmp_path / "s", session_talk(refused, 0)) as path,
        pytest.raises(PermissionError, match="r0/0 is Secondary on alpha"),
    ):
        NbdClient(path)


def test_an_unknown_export_is_not_found(tmp_path: Path) -> None:
    with (
        serving(tmp_path / "s", session_talk(EXPORT, 0)) as path,
        pytest.raises(FileNotFoundError, match="no export is named 'other'"),
    ):
        NbdClient(path, "other")


def test_a_servers_error_has_its_errno(tmp_path: Path) -> None:
    with (
        serving(tmp_path / "s", session_talk(EXPORT, 9, error=28)) as path,
        NbdClient(path) as client,
        pytest.raises(OSError, match="WRITE 512 bytes at 0") as caught,
    ):
        client.write(0, bytes(512))
    assert caught.value.errno == 28


def test_the_end_of_the_connection_is_a_connection_error(tmp_path: Path) -> None:
    with serving(tmp_path / "s", session_talk(EXPORT, 1)) as path, NbdClient(path) as client:
        assert client.read(0, 512) == bytes(512)
        with pytest.raises(ConnectionError):
            client.flush()


def test_a_detached_socket_is_in_transmission(tmp_path: Path) -> None:
    with serving(tmp_path / "s", session_talk(EXPORT, 1)) as path:
        client = NbdClient(path)
        assert (client.size_bytes, client.block_min) == (1 << 20, 512)
        with client.detach() as sock:
            client.close()  # must not end what was given away
            sock.sendall(struct.pack(">IHHQQI", 0x25609513, 0, 3, 77, 0, 0))
            assert sock.recv(16) == struct.pack(">IIQ", 0x67446698, 0, 77)


@pytest.mark.parametrize(
    "greeting",
    [
        b"HTTP/1.1 400 Bad Request\r\n",
        b"NBDMAGICIHAVEOPT\0\0",
        b"NBDMAGICIHAVEOPT\0\3" + bytes(20),
        b"NBDMAGICIHAVEOPT\0\3" + struct.pack(">QIII", 0x3E889045565A9, 7, 1 << 31 | 1, 0),
        b"NBDMAGICIHAVEOPT\0\3" + struct.pack(">QIII", 0x3E889045565A9, 7, 3, 1 << 30),
        b"NBD",
    ],
)
def test_nonsense_is_a_connection_error(tmp_path: Path, greeting: bytes) -> None:
    def talk(sock: socket.socket) -> None:
        sock.sendall(greeting)
        sock.shutdown(socket.SHUT_WR)
        with suppress(ConnectionResetError):  # a client that leaves with bytes unread resets the connection
            while sock.recv(4096):
                pass

    with serving(tmp_path / "s", talk) as path, pytest.raises(ConnectionError):
        NbdClient(path)
