# SPDX-License-Identifier: Apache-2.0
"""Server and client of the control socket over a real socket, the server on the real loop in a thread."""

from __future__ import annotations

import os
import socket
import stat
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from replicator.control.client import call, stream
from replicator.control.messages import Reply, Request, decode_reply, encode
from replicator.drivers import controller as controller_module
from replicator.drivers.controller import CONNECTIONS_MAX, REQUESTS_MAX, UNSENT_BYTES_MAX, Controller
from replicator.drivers.loop import Loop
from replicator.errors import DiskError, NotRunning, Refused


class Server:
    """A loop in a thread with a controller that knows a few verbs."""

    def __init__(self, path: str) -> None:
        self.loop = Loop()
        self.closed: list[int] = []
        self.closed_one = threading.Event()
        self.waiting: list[int] = []
        self.asked = threading.Event()
        self.control = Controller(self.loop, path, self.handle, self.on_close)
        self.thread = threading.Thread(target=self.loop.run, args=(lambda _events, _now: None, lambda: None))
        self.thread.start()

    def handle(self, token: int, request: Request) -> None:
        answers: dict[str, Callable[[], object]] = {
            "echo": lambda: self.control.reply(token, Reply(True, data=request.args)),
            "refuse": lambda: self.control.reply(
                token, Reply(False, "no-data", -2, "no good data here", "connect first")
            ),
            "count": lambda: [self.control.reply(token, Reply(True, data={"n": n}, final=n == 3)) for n in (1, 2, 3)],
            "flood": lambda: [
                self.control.reply(token, Reply(True, data={"x": "y" * 2**19}, final=False)) for _ in range(40)
            ],
            "unsayable": lambda: self.control.reply(token, Reply(True, data={"x": "y" * 2**20})),
            "wait": lambda: self.waiting.append(token),
            "release": self.release,
            "hang-up": self.control.close,
        }
        answers[request.verb]()
        self.asked.set()

    def release(self) -> None:
        for token in reversed(self.waiting):
            self.control.reply(token, Reply(True, data={"released": True}))

    def on_close(self, token: int) -> None:
        self.closed.append(token)
        self.closed_one.set()

    def stop(self) -> None:
        self.loop.call_from_thread(self.loop.stop)
        self.thread.join(10)
        assert not self.thread.is_alive()


@pytest.fixture
def path(tmp_path: Path) -> str:
    return str(tmp_path / "r0.sock")


@pytest.fixture
def server(path: str) -> Iterator[Server]:
    running = Server(path)
    yield running
    running.stop()
    if running.control._spare is not None:
        running.control.close()
    running.loop.close()


def connected(path: str) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX)
    sock.settimeout(10)
    sock.connect(path)
    return sock


def replies(sock: socket.socket) -> list[Reply]:
    with sock, sock.makefile("rb") as file:
        return [decode_reply(line.rstrip(b"\n")) for line in file]


def test_a_question_is_answered(server: Server, path: str) -> None:
    assert call(path, "echo", {"a": [1, "ä"]}) == {"a": [1, "ä"]}
    assert stat.S_IMODE(os.stat(path).st_mode) == 0o600


def test_a_refusal_keeps_code_number_and_hint(server: Server, path: str) -> None:
    with pytest.raises(Refused, match="no good data here") as caught:
        call(path, "refuse")
    assert (caught.value.code, caught.value.number, caught.value.exit_code) == ("no-data", -2, 17)
    assert caught.value.hint == "connect first"


def test_a_stream_ends_with_its_final_answer(server: Server, path: str) -> None:
    assert list(stream(path, "count")) == [{"n": 1}, {"n": 2}, {"n": 3}]


def test_an_answer_too_long_becomes_an_error(server: Server, path: str) -> None:
    with pytest.raises(Refused, match="is longer than"):
        call(path, "unsayable")


def test_nobody_there_says_how_to_start(path: str) -> None:
    with pytest.raises(NotRunning) as caught:
        call(path, "status")
    assert caught.value.hint == "replicator up r0"
    with pytest.raises(NotRunning):
        call("/" + "x" * 200, "status")


def test_no_answer_in_time_is_not_running(server: Server, path: str) -> None:
    with pytest.raises(NotRunning, match="no answer to wait within"):
        call(path, "wait", timeout_s=0.05)
    assert server.closed_one.wait(10)  # and the command that waited is cancelled
    assert server.closed == [1]


def test_a_server_that_goes_away_is_not_running(server: Server, path: str) -> None:
    with pytest.raises(NotRunning, match="ended before it answered"):
        call(path, "hang-up")
    assert not os.path.exists(path)


def test_requests_in_flight_are_answered_in_any_order(server: Server, path: str) -> None:
    sock = connected(path)
    sock.sendall(b"".join(encode(Request("wait", {}, number)) for number in (7, 8)))
    sock.sendall(encode(Request("release", {}, 9)))
    with sock, sock.makefile("rb") as file:
        assert [decode_reply(file.readline().rstrip()).id for _ in range(2)] == [8, 7]


@pytest.mark.parametrize(
    "line",
    [b"nonsense\n", b"\xff\n", b"x" * 70_000, encode(Request("wait", {}, 1)) * 2],
    ids=["words", "bytes", "length", "id"],
)
def test_a_client_that_breaks_the_protocol_is_told_and_cut(server: Server, path: str, line: bytes) -> None:
    sock = connected(path)
    sock.sendall(line)
    assert [reply.code for reply in replies(sock)] == ["protocol"]
    assert call(path, "echo", {"still": "there"}) == {"still": "there"}


def test_a_slow_reader_is_cut_with_the_reason(server: Server, path: str) -> None:
    sock = connected(path)
    sock.sendall(encode(Request("flood", {})))
    assert server.asked.wait(10)
    found = replies(sock)
    assert found[-1].code == "too-slow"
    assert str(UNSENT_BYTES_MAX) in found[-1].message
    assert len(found) < 40
    assert server.closed == [1]


def test_requests_of_one_connection_are_bounded(server: Server, path: str) -> None:
    sock = connected(path)
    sock.sendall(b"".join(encode(Request("wait", {}, n + 1)) for n in range(REQUESTS_MAX + 1)))
    with sock, sock.makefile("rb") as file:
        reply = decode_reply(file.readline().rstrip())
    assert (reply.code, reply.id) == ("busy", REQUESTS_MAX + 1)


def test_connections_are_bounded(server: Server, path: str) -> None:
    held = [connected(path) for _ in range(CONNECTIONS_MAX)]
    with pytest.raises(Refused, match="control connections are open already"):
        call(path, "echo")
    for sock in held:
        sock.close()


def test_another_user_is_refused(server: Server, path: str) -> None:
    server.control._users = {os.geteuid() + 1}
    with pytest.raises(Refused, match="may not control this resource"):
        call(path, "echo")


def test_a_stale_socket_is_replaced_and_a_live_one_is_not(path: str) -> None:
    stale = socket.socket(socket.AF_UNIX)
    stale.bind(path)
    stale.close()
    server = Server(path)
    try:
        with pytest.raises(Refused, match="another process serves"):
            Controller(server.loop, path, lambda _token, _request: None)
        assert call(path, "echo", {"a": 1}) == {"a": 1}
    finally:
        server.stop()
        server.control.close()
        server.loop.close()


def test_an_unsafe_place_is_refused(tmp_path: Path) -> None:
    loop = Loop()
    tmp_path.chmod(0o777)
    with pytest.raises(DiskError, match="everybody may write"):
        Controller(loop, str(tmp_path / "r0.sock"), lambda _token, _request: None)
    tmp_path.chmod(0o700)
    (tmp_path / "r0.sock").write_text("precious")
    with pytest.raises(DiskError, match="is not a socket"):
        Controller(loop, str(tmp_path / "r0.sock"), lambda _token, _request: None)
    with pytest.raises(DiskError, match="too long"):
        Controller(loop, str(tmp_path / ("x" * 120)), lambda _token, _request: None)
    loop.close()


def test_a_token_that_was_never_given_out_is_a_broken_invariant(server: Server, path: str) -> None:
    assert call(path, "echo") == {}
    with pytest.raises(AssertionError):
        server.control.reply(2, Reply(True))
    assert server.control.reply(1, Reply(True)) is False


def test_the_client_imports_little() -> None:
    code = "import sys, replicator.control.client; print(*sys.modules)"
    environ = os.environ | {"PYTHONPATH": str(Path(controller_module.__file__).parents[2])}
    names = subprocess.run([sys.executable, "-c", code], env=environ, capture_output=True, text=True, check=True)
    assert not {"ssl", "dataclasses", "asyncio", "logging", "subprocess", "structlog"} & set(names.stdout.split())
