# SPDX-License-Identifier: Apache-2.0
"""Foreign NBD clients against a running, connected Primary; afterwards both disks are equal byte for byte.

Every test ends the same way: `secondary` (which waits until everything is stable on both), then the data areas
of the two backing files are compared.  The clients' own verification says that what they wrote is what is there.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from replicator.control.client import call
from tests.integration.cluster import GIVE_UP_S, MIB, NODES, TwoNodes, synced

SIZE = 48 * MIB
TOOL_S = 60
Start = Callable[..., "Pair"]


def run(*command: str, status: int = 0) -> str:
    """Run a foreign program; what it printed.  Skips when it is not installed."""
    if shutil.which(command[0]) is None:
        pytest.skip(f"needs {command[0]}")
    done = subprocess.run(command, capture_output=True, text=True, timeout=TOOL_S, check=False)
    assert done.returncode == status, f"{command}: {done.returncode}\n{done.stdout}{done.stderr}"
    return done.stdout + done.stderr


class Pair:
    """Two connected nodes; alpha is Primary."""

    def __init__(self, nodes: TwoNodes) -> None:
        self.nodes = nodes
        nodes.create_md()
        nodes.start_both()
        nodes.cli("alpha", "new-current-uuid", "--clear-bitmap", "r0", check=True)
        for node in NODES:
            nodes.wait(node, synced)
        self.promote()
        with nodes.nbd("alpha") as client:
            self.size_bytes = client.size_bytes

    def uri(self, node: str = "alpha") -> str:
        return f"nbd+unix:///r0%2F0?socket={self.nodes.nbd_path(node)}"

    def promote(self) -> None:
        call(self.nodes.control("alpha"), "primary", timeout_s=GIVE_UP_S)

    def written_blocks_are_equal(self) -> bytes:
        """`secondary`, then compare the disks; returns the data.  alpha is Primary again afterwards."""
        call(self.nodes.control("alpha"), "secondary", timeout_s=GIVE_UP_S)
        status = self.nodes.wait("alpha", synced)
        assert status["connections"][0]["peer_devices"][0]["out-of-sync"] == 0
        alpha, beta = (self.nodes.data(node, self.size_bytes) for node in NODES)
        assert len(alpha) == self.size_bytes
        assert alpha == beta, f"the copies differ\n{self.nodes.logs()}"
        self.promote()
        return alpha


@contextmanager
def running(directory: Path, *, protocol: str = "C", **settings: str) -> Iterator[Pair]:
    with TwoNodes(directory, size_bytes=SIZE, **settings) as nodes:  # type: ignore[arg-type]
        for node in NODES:
            path = nodes.config_dir(node) / "r0.toml"
            # A slow machine under load is no dead peer: what is tested here is data, not failure detection.
            patience = path.read_text().replace("[disk]", 'ko-count = 255\nping-interval = "60s"\n[disk]', 1)
            path.write_text(f'protocol = "{protocol}"\n{patience}')
        if settings.get("security") == "tls":
            nodes.exchange_keys()
        yield Pair(nodes)


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    with running(tmp_path_factory.mktemp("interop")) as started:
        yield started


def test_nbdinfo_tells_size_and_abilities(pair: Pair) -> None:
    export = json.loads(run("nbdinfo", "--json", pair.uri()))["exports"][0]
    assert export["export-name"] == "r0/0" and export["export-size"] == pair.size_bytes
    for ability in ("can_flush", "can_fua", "can_trim", "can_zero", "can_multi_conn"):
        assert export[ability], ability
    assert not export["is_read_only"]
    (extent,) = json.loads(run("nbdinfo", "--map", "--json", pair.uri()))
    assert (extent["offset"], extent["length"], extent["type"]) == (0, pair.size_bytes, 0)


def test_nbdcopy_there_and_back(pair: Pair, tmp_path: Path) -> None:
    there, back = tmp_path / "there", tmp_path / "back"
    there.write_bytes(os.urandom(pair.size_bytes))
    run("nbdcopy", "--flush", str(there), pair.uri())
    run("nbdcopy", pair.uri(), str(back))
    run("cmp", str(there), str(back))
    assert pair.written_blocks_are_equal() == there.read_bytes()


def test_qemu_io_writes_zeroes_discards_flushes_and_forces(pair: Pair) -> None:
    commands = [
        "write -P 0xaa 0 4M",
        "read -P 0xaa 0 4M",
        "write -z 1M 64k",
        "write -z -u 1088k 60k",
        "read -P 0 1M 124k",
        "discard 2M 1M",
        "write -f -P 0x55 3M 512",
        "write -P 0x66 3584k 37k",
        "aio_write -P 0x77 5M 2M",
        "aio_write -P 0x78 8M 2M",
        "aio_flush",
        "flush",
        "read -P 0x55 3M 512",
        "read -P 0x66 3584k 37k",
        "read -P 0x77 5M 2M",
        "read -P 0x78 8M 2M",
        "read -P 0xaa 0 1M",
    ]
    arguments = [word for command in commands for word in ("-c", command)]
    said = run("qemu-io", "-f", "raw", "-t", "none", "-d", "unmap", *arguments, pair.uri())
    assert "Pattern verification failed" not in said
    data = pair.written_blocks_are_equal()
    assert data[:MIB] == b"\xaa" * MIB
    assert data[MIB : MIB + 124 * 1024] == bytes(124 * 1024)
    assert data[3 * MIB : 3 * MIB + 512] == b"\x55" * 512
    assert data[8 * MIB : 10 * MIB] == b"\x78" * (2 * MIB)


def fio(pair: Pair, *options: str) -> None:
    if "nbd" not in run("fio", "--enghelp").split():
        pytest.skip("needs fio with ioengine=nbd")
    run(
        "fio", "--name=verify", "--ioengine=nbd", f"--uri={pair.uri()}", "--iodepth=32", "--randrepeat=0",
        "--verify=crc32c", "--verify_fatal=1", "--verify_state_save=0", *options,
    )  # fmt: skip


@pytest.mark.parametrize(
    "options",
    [
        ["--rw=randwrite", "--bs=4k", "--size=16m"],
        ["--rw=randrw", "--bsrange=512-128k", "--bs_unaligned=0", "--size=24m", "--fsync=64"],
        ["--rw=write", "--bs=1m", "--size=32m"],
    ],
    ids=["randwrite-4k", "randrw-mixed-fsync", "sequential-1m"],
)
def test_fio_verifies_what_it_wrote(pair: Pair, options: list[str]) -> None:
    fio(pair, *options)
    assert any(pair.written_blocks_are_equal())


def test_fio_on_four_connections_at_once(pair: Pair) -> None:
    fio(pair, "--rw=randrw", "--bs=4k", "--numjobs=4", "--size=8m", "--offset_increment=8m")
    assert any(pair.written_blocks_are_equal())


LIBNBD = """
import nbd, sys
h = nbd.NBD()
h.set_strict_mode(0)
h.connect_uri(sys.argv[1])
size = h.get_size()
assert h.can_multi_conn() and h.can_fua() and h.can_zero() and h.can_trim()
cookies = [h.aio_pwrite(nbd.Buffer.from_bytearray(bytearray([n]) * 65536), n * 65536) for n in range(1, 65)]
while h.aio_in_flight():
    h.poll(-1)
for cookie in cookies:
    assert h.aio_command_completed(cookie)
h.flush()
h.zero(65536, 65536, nbd.CMD_FLAG_NO_HOLE | nbd.CMD_FLAG_FUA)
h.trim(65536, 2 * 65536)
for n in range(3, 65):
    assert h.pread(65536, n * 65536) == bytearray([n]) * 65536, n
assert h.pread(65536, 65536) == bytearray(65536)
for wrong in (lambda: h.pread(512, size), lambda: h.pwrite(bytearray(512), size - 256)):
    try:
        wrong()
    except nbd.Error as error:
        print(error.errno)
    else:
        sys.exit("a request beyond the end was answered")
h.shutdown()
"""


def test_libnbd_from_python_with_many_in_flight(pair: Pair) -> None:
    python = "/usr/bin/python3"
    if (
        not Path(python).exists()
        or subprocess.run([python, "-c", "import nbd"], capture_output=True, check=False).returncode
    ):
        pytest.skip("needs python3-libnbd")
    said = run(python, "-c", LIBNBD, pair.uri())
    assert set(said.split()) <= {"EINVAL", "ENOSPC"} and len(said.split()) == 2, said
    data = pair.written_blocks_are_equal()
    assert data[64 * 65536 : 65 * 65536] == b"\x40" * 65536


def test_a_secondary_says_in_words_why_it_serves_nobody(pair: Pair) -> None:
    told = run("qemu-io", "-f", "raw", "-c", "read 0 512", pair.uri("beta"), status=1)
    assert "r0/0 is Secondary on beta, only a Primary serves it" in told


@pytest.mark.parametrize("protocol", ["A", "B"])
def test_protocols_a_and_b_end_with_equal_copies(tmp_path: Path, protocol: str) -> None:
    with running(tmp_path, protocol=protocol) as pair:
        assert pair.nodes.status("alpha")["protocol"] == protocol
        fio(pair, "--rw=randwrite", "--bs=4k", "--size=16m")
        assert any(pair.written_blocks_are_equal())


def test_over_tls_copies_end_equal(tmp_path: Path) -> None:
    with running(tmp_path, security="tls") as pair:
        assert pair.nodes.status("alpha")["connections"][0]["tls"]
        fio(pair, "--rw=randrw", "--bs=4k", "--size=16m", "--fsync=128")
        assert any(pair.written_blocks_are_equal())


@pytest.mark.parametrize("metadata", ["internal", "external"])
def test_with_direct_io_copies_end_equal(tmp_path: Path, metadata: str) -> None:
    probe = tmp_path / "probe"
    probe.write_bytes(bytes(4096))
    try:
        os.close(os.open(probe, os.O_RDONLY | os.O_DIRECT))
    except OSError as error:
        assert error.errno == errno.EINVAL
        pytest.skip(f"needs O_DIRECT on the file system of {tmp_path}")
    with running(tmp_path, io="direct", metadata=metadata) as pair:
        fio(pair, "--rw=randrw", "--bsrange=512-64k", "--size=16m", "--fsync=128")
        run(
            "qemu-io",
            "-f",
            "raw",
            "-t",
            "none",
            "-c",
            "write -P 0x11 513 777",
            "-c",
            "read -P 0x11 513 777",
            pair.uri(),
        )
        data = pair.written_blocks_are_equal()
        assert data[513 : 513 + 777] == b"\x11" * 777
