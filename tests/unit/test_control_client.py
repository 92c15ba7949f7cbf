# SPDX-License-Identifier: Apache-2.0
"""The control client: one question, its answers, and every way in which there is none."""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from replicator.control.client import call, stream
from replicator.control.messages import Reply, Request, decode_request, encode
from replicator.errors import NotRunning, ProtocolError, Refused

NOBODY = 65534
Behaviour = Callable[[socket.socket], None]


class Server:
    """Listens at `path` and serves one client with `behave`."""

    def __init__(self, path: Path, behave: Behaviour) -> None:
        self.path = str(path)
        self.asked: list[Request] = []
        self._behave = behave
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._listener.bind(self.path)
        self._listener.listen(1)
        self._thread = threading.Thread(target=self._serve)

    def __enter__(self) -> Server:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._thread.join(10)
        self._listener.close()
        assert not self._thread.is_alive()

    def _serve(self) -> None:
        client, _ = self._listener.accept()
        with client:
            self._behave(client)

    def read(self, client: socket.socket) -> None:
        """Take the request."""
        line = b""
        while not line.endswith(b"\n"):
            line += client.recv(4096)
        self.asked.append(decode_request(line))


def answering(path: Path, *replies: Reply | bytes, until_closed: bool = False) -> Server:
    """A server that reads the request and says this."""

    def behave(client: socket.socket) -> None:
        server.read(client)
        client.sendall(b"".join(encode(reply) if isinstance(reply, Reply) else reply for reply in replies))
        if until_closed:
            assert client.recv(1) == b""

    server = Server(path, behave)
    return server


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "r0.sock"


def test_a_call_says_what_was_asked_and_returns_the_final_answer(path: Path) -> None:
    with answering(path, Reply(True, data={"n": 1}, final=False), Reply(True, data={"n": 2})) as server:
        assert call(server.path, "status", {"volume": 3}) == {"n": 2}
    assert server.asked == [Request("status", {"volume": 3})]


def test_a_stream_yields_each_answer_as_it_comes_and_leaves_out_an_empty_last_one(path: Path) -> None:
    replies = [Reply(True, data={"n": 1}, final=False), Reply(True, final=False), Reply(True)]
    with answering(path, *replies) as server:
        assert list(stream(server.path, "events2")) == [{"n": 1}, {}]


def test_a_stream_that_ends_with_data_yields_it(path: Path) -> None:
    with answering(path, Reply(True, data={"n": 1})) as server:
        assert list(stream(server.path, "wait", timeout_s=10)) == [{"n": 1}]


def test_answers_cut_anywhere_are_put_together(path: Path) -> None:
    def behave(client: socket.socket) -> None:
        server.read(client)
        for byte in encode(Reply(True, data={"text": "büro"})):
            client.sendall(bytes([byte]))

    with Server(path, behave) as server:
        assert call(server.path, "status") == {"text": "büro"}


def test_a_refusal_is_the_servers_own(path: Path) -> None:
    reply = Reply(False, "peer-is-primary", -1, "no", "say it there")
    with answering(path, reply) as server, pytest.raises(Refused) as caught:
        call(server.path, "primary")
    refused = caught.value
    assert (refused.code, refused.number, refused.message, refused.hint) == reply[1:5]


def test_a_refusal_that_came_before_the_request_was_sent_is_heard(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A server with too many clients answers at once and closes; what we send then meets a closed socket."""
    closed = threading.Event()

    class Late(socket.socket):
        """Connects, and is not scheduled again before the other side has closed."""

        def connect(self, address: str, /) -> None:  # type: ignore[override]
            super().connect(address)
            assert closed.wait(10)

    def behave(client: socket.socket) -> None:
        client.sendall(encode(Reply(False, "busy", message="too many clients", id=0)))
        client.shutdown(socket.SHUT_RDWR)
        closed.set()

    with Server(path, behave) as server:
        monkeypatch.setattr(socket, "socket", Late)
        with pytest.raises(Refused, match="too many clients"):
            call(server.path, "status")


def test_an_answer_to_another_request_is_a_broken_protocol(path: Path) -> None:
    with answering(path, Reply(True, id=9)) as server, pytest.raises(ProtocolError, match="request 9 came"):
        call(server.path, "status")


def test_what_is_no_reply_is_a_broken_protocol(path: Path) -> None:
    with answering(path, b"220 mail.example.org ESMTP\r\n") as server, pytest.raises(ProtocolError):
        call(server.path, "status")


def test_a_process_that_ends_before_its_answer_is_not_running(path: Path) -> None:
    with answering(path, Reply(True, final=False)) as server, pytest.raises(NotRunning) as caught:
        call(server.path, "down")
    assert caught.value.message == f"r0 is not running here: {path}: it ended before it answered"
    assert caught.value.hint == "replicator up r0"


def test_nobody_listens(path: Path) -> None:
    with pytest.raises(NotRunning, match="no such file or directory"):
        call(str(path), "status")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as left_over:
        left_over.bind(str(path))
    with pytest.raises(NotRunning, match="connection refused"):
        list(stream(str(path), "status"))


def test_no_answer_in_time_names_the_verb_and_how_to_look(path: Path) -> None:
    with answering(path, until_closed=True) as server, pytest.raises(NotRunning) as caught:
        call(server.path, "primary", timeout_s=0.05)
    assert caught.value.message == "no answer to primary within 0.05 s"
    assert "replicator status r0" in caught.value.hint


def test_answers_that_go_on_do_not_stretch_the_time(path: Path) -> None:
    def behave(client: socket.socket) -> None:
        server.read(client)
        client.settimeout(10)
        try:
            while True:
                client.sendall(encode(Reply(True, final=False)))
        except (BrokenPipeError, ConnectionResetError):
            pass  # the client has gone

    with Server(path, behave) as server, pytest.raises(NotRunning, match=r"within 0\.05 s"):
        list(stream(server.path, "events2", timeout_s=0.05))


def test_who_has_no_time_gets_no_answer(path: Path) -> None:
    with pytest.raises(NotRunning, match="no answer to status within 0 s"):
        call(str(path), "status", timeout_s=0)


def test_a_socket_that_may_not_be_used_is_a_refusal(path: Path) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        listener.bind(str(path))
        listener.listen(1)
        path.chmod(0)
        was_root = os.geteuid() == 0
        if was_root:
            os.seteuid(NOBODY)  # to root nothing is forbidden
        try:
            with pytest.raises(Refused) as caught:
                call(str(path), "status")
        finally:
            if was_root:
                os.seteuid(0)
    assert (caught.value.code, caught.value.hint) == ("not-permitted", "run as root")
