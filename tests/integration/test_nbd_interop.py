# SPDX-License-Identifier: Apache-2.0
"""Foreign NBD clients against our frontend and loop, over a volume that is a bytearray."""

from __future__ import annotations

import errno
import itertools
import json
import os
import shutil
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from replicator.core.actions import Reply
from replicator.core.events import ClientRequest, Event, Io
from replicator.drivers.frontend import Frontend
from replicator.drivers.loop import Loop
from replicator.drivers.nbd_client import NbdClient
from replicator.nbd.negotiation import Export

MIB = 1 << 20
SIZE = 32 * MIB


class Server:
    """A frontend on a real loop in a thread; the "core" answers from memory in the same turn."""

    def __init__(self, path: Path) -> None:
        self.memory = bytearray(SIZE)
        self.path = str(path)
        self.seen: set[tuple[Io, bool]] = set()
        self.loop = Loop()
        self.frontend = Frontend(self.loop, 0, self.path, "r0/0", itertools.count(1))
        self.frontend.export(Export(name="r0/0", size_bytes=SIZE))
        self.frontend.listen()
        self.thread = threading.Thread(target=self.loop.run, args=(self.turn, lambda: None))
        self.thread.start()

    @property
    def uri(self) -> str:
        return f"nbd+unix:///r0/0?socket={self.path}"

    def turn(self, events: list[Event], _now: int) -> None:
        for event in events:
            if isinstance(event, ClientRequest):
                assert self.frontend.reply(self.answer(event))

    def answer(self, event: ClientRequest) -> Reply:
        self.seen.add((event.io, event.fua))
        start, end = event.offset, event.offset + event.size
        if event.io is Io.READ:
            return Reply(event.token, 0, bytes(self.memory[start:end]))
        if event.io is Io.WRITE:
            self.memory[start:end] = event.data
        elif event.io is not Io.FLUSH:
            self.memory[start:end] = bytes(event.size)
        return Reply(event.token, 0)

    def refuse(self, reason: str) -> None:
        refused = Export(name="r0/0", size_bytes=SIZE, refused=reason)
        self.loop.call_from_thread(lambda: self.frontend.export(refused))

    def close(self) -> None:
        def end() -> None:
            self.frontend.close()
            self.loop.stop()

        self.loop.call_from_thread(end)
        self.thread.join()
        self.loop.close()


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    running = Server(tmp_path / "n.sock")
    yield running
    running.close()


def run(*command: str, status: int = 0) -> str:
    if shutil.which(command[0]) is None:
        pytest.skip(f"needs {command[0]}")
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == status, f"{command}: {done.stdout}{done.stderr}"
    return done.stdout + done.stderr


def test_nbdinfo_sees_the_export_and_one_allocated_extent(server: Server) -> None:
    export = json.loads(run("nbdinfo", "--json", server.uri))["exports"][0]
    assert export["export-name"] == "r0/0"
    assert export["export-size"] == SIZE
    assert export["block_size_minimum"] == 512
    assert export["block_size_preferred"] == 4096
    assert export["block_size_maximum"] == 32 * MIB
    assert export["contexts"] == ["base:allocation"]
    for ability in ("can_flush", "can_fua", "can_trim", "can_zero", "can_multi_conn", "can_df"):
        assert export[ability], ability
    assert not export["is_read_only"]
    (extent,) = json.loads(run("nbdinfo", "--map", "--json", server.uri))
    assert (extent["offset"], extent["length"], extent["type"]) == (0, SIZE, 0)
    assert "r0/0" in run("nbdinfo", "--list", f"nbd+unix:///?socket={server.path}")


def test_qemu_io_shows_why_an_export_is_refused(server: Server) -> None:
    server.refuse("r0/0 is Secondary on alpha; promote it first")
    told = run("qemu-io", "-f", "raw", "-c", "read 0 512", server.uri, status=1)
    assert "r0/0 is Secondary on alpha; promote it first" in told


def test_nbdcopy_there_and_back(server: Server, tmp_path: Path) -> None:
    there, back = tmp_path / "there", tmp_path / "back"
    there.write_bytes(os.urandom(SIZE))
    run("nbdcopy", "--flush", str(there), server.uri)
    assert server.memory == there.read_bytes()
    run("nbdcopy", server.uri, str(back))
    run("cmp", str(there), str(back))


def test_qemu_io_writes_zeroes_discards_and_flushes(server: Server) -> None:
    commands = [
        "write -P 0xaa 0 4M",
        "read -P 0xaa 0 4M",
        "write -z 1M 64k",
        "read -P 0 1M 64k",
        "discard 2M 1M",
        "write -f -P 0x55 3M 512",
        "flush",
        "read -P 0x55 3M 512",
        "read -P 0xaa 0 1M",
    ]
    arguments = [word for command in commands for word in ("-c", command)]
    run("qemu-io", "-f", "raw", "-t", "none", "-d", "unmap", *arguments, server.uri)
    assert server.memory[:MIB] == b"\xaa" * MIB
    assert server.memory[2 * MIB : 3 * MIB] == bytes(MIB)
    assert {(Io.ZERO, False), (Io.TRIM, False), (Io.FLUSH, False), (Io.WRITE, True)} <= server.seen


def test_fio_verifies_what_it_wrote(server: Server) -> None:
    if "nbd" not in run("fio", "--enghelp").split():
        pytest.skip("needs fio with ioengine=nbd")
    run(
        "fio",
        "--name=verify",
        "--ioengine=nbd",
        f"--uri={server.uri}",
        "--rw=randwrite",
        "--bs=4k",
        "--iodepth=32",
        "--size=8m",
        "--verify=crc32c",
        "--verify_fatal=1",
        "--verify_state_save=0",
    )
    assert any(server.memory)


def test_our_client_blocking_and_pipelined(server: Server) -> None:
    with NbdClient(server.path, "r0/0") as client:
        assert client.size_bytes == SIZE
        data = os.urandom(3 * MIB)
        client.write(512, data, fua=True)
        assert client.read(512, len(data)) == data
        client.zero(512, 4096)
        client.trim(8192, 4096)
        client.flush()
        assert client.read(512, 4096) == bytes(4096)
        cookies = {client.submit_write(index * 4096, bytes([index]) * 4096) for index in range(200)}
        cookies.add(client.submit_write(SIZE, bytes(512)))
        answers: dict[int, int] = {}
        while client.in_flight:
            answers |= dict(client.poll(10))
        assert set(answers) == cookies
        assert sorted(set(answers.values())) == [0, errno.ENOSPC]
        with pytest.raises(OSError) as caught:
            client.read(SIZE, 512)
        assert caught.value.errno == errno.EINVAL
    for index in range(200):
        assert server.memory[index * 4096] == index
