# SPDX-License-Identifier: Apache-2.0
"""The frontend over real UNIX sockets in a temporary directory, turned by hand."""

from __future__ import annotations

import itertools
import os
import socket
import stat
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest

from replicator.core.actions import Reply
from replicator.core.events import ClientClosed, ClientOpened, ClientRequest, Event, Io
from replicator.drivers import frontend as module
from replicator.drivers.frontend import Frontend
from replicator.drivers.loop import Loop
from replicator.errors import DiskError
from replicator.nbd.negotiation import Export

GO = b"\0\0\0\3IHAVEOPT" + struct.pack(">IIIH", 7, 6, 0, 0)
EXPORT = Export(name="r0/0", size_bytes=64 << 20)
ANSWERED_BYTES = 18 + (20 + 12) + (20 + 14) + 20  # greeting, INFO_EXPORT, INFO_BLOCK_SIZE, ACK


def ask(command: int, offset: int = 0, size: int = 0, data: bytes = b"", cookie: int = 1) -> bytes:
    return struct.pack(">IHHQQI", 0x25609513, 0, command, cookie, offset, size) + data


class Bench:
    """A frontend whose loop takes one turn at a time; the events it posted are kept."""

    def __init__(self, path: Path) -> None:
        self.loop = Loop()
        self.path = str(path)
        self.frontend = Frontend(self.loop, 3, self.path, "r0/0", itertools.count(1))
        self.frontend.listen()
        self.frontend.export(EXPORT)
        self.events: list[Event] = []

    def turn(self, count: int = 1) -> None:
        """`count` turns; a wake-up makes each of them end."""

        def step(events: list[Event], _now: int) -> None:
            self.events += events
            self.loop.stop()

        for _ in range(count):
            self.loop.wake()
            self.loop.run(step, lambda: None)

    def take(self) -> list[Event]:
        events, self.events = self.events, []
        return events

    def connect(self) -> socket.socket:
        client = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        client.settimeout(5)
        client.connect(self.path)
        return client

    def client(self) -> socket.socket:
        """A client in transmission."""
        client = self.connect()
        client.sendall(GO)
        self.turn(3)
        assert len(client.recv(ANSWERED_BYTES, socket.MSG_WAITALL)) == ANSWERED_BYTES
        return client


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    made = Bench(tmp_path / "s")
    yield made
    made.frontend.close()
    made.loop.close()


def test_a_request_becomes_an_event_and_a_reply_an_answer(bench: Bench) -> None:
    with bench.client() as client:
        who = f"pid {os.getpid()} {os.readlink('/proc/self/exe')}"
        assert bench.take() == [ClientOpened(3, 1, True, who)]
        client.sendall(ask(1, 512, 512, b"x" * 512) + ask(0, 0, 512, cookie=2))
        bench.turn()
        assert bench.take() == [
            ClientRequest(3, 1, Io.WRITE, 512, 512, b"x" * 512),
            ClientRequest(3, 2, Io.READ, 0, 512),
        ]
        assert bench.frontend.reply(Reply(2, 0, b"r" * 512))
        assert bench.frontend.reply(Reply(1, 5))
        bench.turn()
        expected = struct.pack(">IIQ", 0x67446698, 0, 2) + b"r" * 512 + struct.pack(">IIQ", 0x67446698, 5, 1)
        assert client.recv(4096) == expected


def test_clients_tells_who_holds_the_device(bench: Bench) -> None:
    with bench.client() as client, bench.connect():
        client.sendall(ask(3))
        bench.turn()
        bench.turn()
        first, second = bench.frontend.clients()
        assert first == {
            "client": 1,
            "pid": os.getpid(),
            "uid": os.getuid(),
            "process": os.readlink("/proc/self/exe"),
            "state": "writable",
            "in_flight": 1,
        }
        assert second["state"] == "negotiating"


def test_a_late_reply_for_a_vanished_client_is_dropped_once(bench: Bench) -> None:
    with bench.client() as client:
        client.sendall(ask(3) + ask(3))
        bench.turn()
    bench.turn()
    assert bench.take()[-1] == ClientClosed(3, 1)
    assert bench.frontend.clients() == []
    assert bench.frontend.reply(Reply(1, 0))
    assert not bench.frontend.reply(Reply(1, 0))
    assert bench.frontend.reply(Reply(2, 0))
    assert not bench.frontend.reply(Reply(99, 0))


def test_a_client_that_never_chose_is_not_mentioned(bench: Bench) -> None:
    with bench.connect() as client:
        client.sendall(GO[:10])
        bench.turn(2)
    bench.turn()
    assert bench.take() == []
    assert bench.frontend.clients() == []


def test_disconnect_closes_after_the_last_answer(bench: Bench) -> None:
    with bench.client() as client:
        client.sendall(ask(3) + ask(2))
        bench.turn()
        bench.take()
        bench.turn()
        assert bench.take() == []
        assert bench.frontend.clients()[0]["state"] == "closing"
        bench.frontend.reply(Reply(1, 0))
        bench.turn()
        assert len(client.recv(100)) == 16
        assert client.recv(100) == b""
        bench.turn()
        assert bench.take() == [ClientClosed(3, 1)]


def test_a_refused_export_keeps_its_clients_until_they_are_cut(bench: Bench) -> None:
    with bench.client() as client:
        bench.frontend.export(Export(name="r0/0", size_bytes=EXPORT.size_bytes, refused="no longer Primary"))
        client.sendall(ask(3))
        bench.turn()
        assert isinstance(bench.take()[-1], ClientRequest)
        with bench.connect() as late:
            late.sendall(GO)
            bench.turn(3)
            assert b"no longer Primary" in late.recv(4096)
            assert bench.frontend.cut_all("demoted by force") == 2
        bench.turn()
        assert bench.take() == [ClientClosed(3, 1)]
        assert client.recv(10) == b""
        assert bench.frontend.reply(Reply(1, 0))


def test_a_client_that_does_not_read_is_not_read_either(bench: Bench) -> None:
    with bench.client() as client:
        client.sendall(ask(0, 0, 32 << 20) * 4)
        bench.turn()
        assert len(bench.take()) == 65  # two reads in pieces, and that it opened
        for token in range(1, 65):
            bench.frontend.reply(Reply(token, 0, bytes(1 << 20)))
        bench.turn(5)
        assert len(bench.take()) == 32  # what the socket took made room for one read more, not for two
        received = 0
        while not bench.events:
            received += len(client.recv(1 << 20))
            bench.turn()
        assert received >= 16 << 20  # 32 MiB less what the socket's buffer holds (a few MiB)
        assert len(bench.take()) == 32


def test_the_number_of_clients_is_bounded_and_idle_ones_make_room(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "CLIENTS_MAX", 2)
    with bench.client() as _working, bench.connect() as idle, bench.connect() as third:
        bench.turn(3)
        assert [client["client"] for client in bench.frontend.clients()] == [1, 3]
        assert len(idle.recv(100)) == 18
        assert idle.recv(100) == b""
        third.sendall(GO)
        bench.turn(2)
        with bench.connect() as fourth:
            bench.turn(2)
            assert fourth.recv(100) == b""


def test_the_socket_is_private_and_removed_at_the_end(tmp_path: Path) -> None:
    bench = Bench(tmp_path / "s")
    made = os.stat(bench.path)
    assert stat.S_ISSOCK(made.st_mode)
    assert stat.S_IMODE(made.st_mode) == 0o600
    bench.frontend.close()
    assert not os.path.lexists(bench.path)
    bench.loop.close()


def test_a_stale_socket_is_replaced_and_a_living_one_is_not(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as stale:
        stale.bind(str(tmp_path / "s"))
    bench = Bench(tmp_path / "s")
    other = Frontend(bench.loop, 0, bench.path, "r0/0", itertools.count())
    with pytest.raises(DiskError, match="another process serves it"):
        other.listen()
    bench.turn(2)
    with bench.client() as client:
        assert client.fileno() >= 0
    os.unlink(bench.path)
    Path(bench.path).write_text("somebody else's")
    bench.frontend.close()
    assert Path(bench.path).read_text() == "somebody else's"
    with pytest.raises(DiskError, match="not a socket"):
        other.listen()
    bench.loop.close()


@pytest.mark.parametrize("path", ["missing/s", "x" * 200])
def test_an_unusable_path_is_a_clear_error(tmp_path: Path, path: str) -> None:
    loop = Loop()
    with pytest.raises(DiskError, match="cannot listen on"):
        Frontend(loop, 0, str(tmp_path / path), "r0/0", itertools.count()).listen()
    loop.close()
