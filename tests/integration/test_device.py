# SPDX-License-Identifier: Apache-2.0
"""Real nodes: nbdfuse and a loop device over an independent NBD server; kernel nbd where the kernel has
it."""

from __future__ import annotations

import os
import queue
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Literal

import pytest

from replicator.drivers.device import Abilities, Choice, DeviceManager, Outcome, choose, make_device, probe
from replicator.drivers.fuse_loop import FuseLoop
from replicator.drivers.holders import holders, mounts_of
from replicator.drivers.node import Device, Export
from replicator.errors import DiskError, Refused

MIB = 1 << 20
SIZE = 64 * MIB
PATTERN = bytes(range(256)) * 16


def require_fuse() -> None:
    if os.geteuid() != 0:
        pytest.skip("needs root to make loop devices")
    if not Path("/dev/fuse").exists():
        pytest.skip("no /dev/fuse")
    if not Path("/dev/loop-control").exists():
        pytest.skip("no loop devices")
    for program in ("nbdfuse", "nbdkit"):
        if shutil.which(program) is None:
            pytest.skip(f"needs {program}")


def require_kernel_nbd() -> None:
    if reason := probe().no_nbd:
        pytest.skip(f"no kernel nbd: {reason}")
    if shutil.which("nbdkit") is None:
        pytest.skip("needs nbdkit")


class Nbdkit:
    """A disk in memory, served by somebody else's NBD server."""

    def __init__(self, socket: Path) -> None:
        self.socket = socket
        pid_file = socket.with_suffix(".pid")
        self.process = subprocess.Popen(
            [
                "nbdkit",
                "--foreground",
                "--exit-with-parent",
                "-U",
                socket,
                "-P",
                pid_file,
                "memory",
                str(SIZE),
            ]
        )
        eventually(lambda: pid_file.exists() and pid_file.stat().st_size > 0)

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        self.socket.unlink(missing_ok=True)


def eventually(true: Callable[[], bool], seconds: float = 30.0) -> None:
    """Wait for a condition; the time is a bound on hanging, not an assertion about speed."""
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.02)


@pytest.fixture
def served(tmp_path: Path) -> Iterator[Export]:
    server = Nbdkit(tmp_path / "nbd.sock")
    yield Export("r0", 0, server.socket, dev_dir=tmp_path / "dev", run_dir=tmp_path / "run")
    server.close()


@pytest.fixture(params=["fuse", "nbd"])
def export(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[Device, Export]]:
    """A detached device of either kind; whatever the test leaves is removed."""
    if request.param == "fuse":
        require_fuse()
    else:
        require_kernel_nbd()
    export = request.getfixturevalue("served")
    device = make_device(Choice("fuse" if request.param == "fuse" else "nbd"), export)
    assert device is not None
    yield device, export
    device.detach()


def loops_over(directory: Path) -> list[str]:
    files = Path("/sys/block").glob("loop*/loop/backing_file")
    return [name for name in (file.read_text().strip() for file in files) if name.startswith(str(directory))]


def mounted_under(directory: Path) -> bool:
    return str(directory) in Path("/proc/self/mountinfo").read_text()


def write_and_read(path: Path, offset: int) -> bytes:
    """Through the node, past the page cache of the writer: write, fsync, drop, read."""
    fd = os.open(path, os.O_RDWR)
    try:
        os.pwrite(fd, PATTERN, offset)
        os.fsync(fd)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        return os.pread(fd, len(PATTERN), offset)
    finally:
        os.close(fd)


def test_data_goes_through_node_and_link(export: tuple[Device, Export]) -> None:
    device, names = export
    node = device.attach()
    assert node.is_block_device()
    assert names.link.resolve() == node
    assert write_and_read(names.link, 3 * MIB) == PATTERN
    fd = os.open(node, os.O_RDONLY)
    assert os.lseek(fd, 0, os.SEEK_END) == SIZE
    assert os.pread(fd, 4096, 3 * MIB) == PATTERN
    os.close(fd)


def test_detach_leaves_nothing_behind_and_data_stays(export: tuple[Device, Export], tmp_path: Path) -> None:
    device, names = export
    write_and_read(device.attach(), 0)
    device.detach()
    assert not names.link.is_symlink()
    assert loops_over(tmp_path) == []
    assert not mounted_under(tmp_path)
    assert list(names.run_dir.glob("*")) == []
    node = device.attach()  # and it can come back
    assert node.read_bytes()[: len(PATTERN)] == PATTERN


def test_the_next_run_copes_with_what_a_killed_one_left(export: tuple[Device, Export], tmp_path: Path) -> None:
    device, names = export
    write_and_read(device.attach(), 0)
    kind: Literal["fuse", "nbd"] = "fuse" if isinstance(device, FuseLoop) else "nbd"
    successor = make_device(Choice(kind), names)  # it knows nothing of the first
    assert successor is not None
    node = successor.attach()
    assert names.link.resolve() == node
    assert node.read_bytes()[: len(PATTERN)] == PATTERN
    assert len(loops_over(tmp_path)) == (1 if kind == "fuse" else 0)
    successor.detach()
    assert loops_over(tmp_path) == []


def test_a_process_is_a_holder_and_its_loop_device_is_not_pulled_away(
    served: Export, monkeypatch: pytest.MonkeyPatch
) -> None:
    require_fuse()
    monkeypatch.setattr("replicator.drivers.fuse_loop._HELD_S", 0.0)
    device = FuseLoop(served)
    node = device.attach()
    with node.open("rb") as file:
        holder = subprocess.Popen(["sleep", "600"], stdin=file)
    try:
        assert [(h.kind, h.name, h.pid) for h in holders(served.link)] == [("process", "sleep", holder.pid)]
        with pytest.raises(DiskError, match=rf"held: process sleep \(pid {holder.pid}\)"):
            device.detach()
        assert served.link.resolve() == node
        assert write_and_read(served.link, MIB) == PATTERN
    finally:
        holder.kill()
        holder.wait()
    eventually(lambda: holders(node) == [])
    device.detach()


def test_a_mount_is_a_holder(served: Export, tmp_path: Path) -> None:
    require_fuse()
    if shutil.which("mkfs.ext4") is None:
        pytest.skip("needs mkfs.ext4")
    device = FuseLoop(served)
    node = device.attach()
    where = tmp_path / "a mount"
    where.mkdir()
    try:
        subprocess.run(["mkfs.ext4", "-q", node], check=True)
        subprocess.run(["mount", node, where], check=True)
        (where / "file").write_bytes(PATTERN)
        assert [str(h) for h in holders(node) if h.kind == "mount"] == [f"file system mounted at {where}"]
    finally:
        subprocess.run(["umount", where], check=False)
        device.detach()
    assert holders(node) == []


def test_resize_of_an_attached_fuse_node_is_refused(served: Export) -> None:
    require_fuse()
    device = FuseLoop(served)
    device.resize(SIZE)
    device.attach()
    with pytest.raises(Refused):
        device.resize(2 * SIZE)
    device.detach()


def test_no_server_is_an_error_that_says_so_and_leaves_nothing(tmp_path: Path) -> None:
    require_fuse()
    export = Export("r0", 0, tmp_path / "absent", dev_dir=tmp_path / "dev", run_dir=tmp_path / "run")
    with pytest.raises(DiskError, match="nbdfuse ended with status"):
        FuseLoop(export).attach()
    assert list(export.run_dir.glob("*")) == []
    assert not mounted_under(tmp_path)


# ------------------------------------------------------------------------------------------- without devices


class FakeDevice:
    """A node that is made or not as the test wants."""

    def __init__(self, fault: Exception | None = None) -> None:
        self.fault = fault
        self.mends = 0
        self.trouble: Exception | None = None

    def attach(self) -> Path:
        if self.fault:
            raise self.fault
        return Path("/dev/nbd0")

    def detach(self) -> None:
        if self.fault:
            raise self.fault

    def mend(self) -> bool:
        self.mends += 1
        if self.trouble:
            raise self.trouble
        return False

    def resize(self, size_bytes: int) -> None:
        self.mends = 0


class Inbox:
    """Stands for the loop: what threads ask it to call waits here."""

    def __init__(self) -> None:
        self.calls: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self.outcomes: list[Outcome] = []
        self.troubles: list[tuple[int, str]] = []

    def turn(self) -> None:
        self.calls.get(timeout=30)()

    def manager(self, device: Device) -> DeviceManager:
        return DeviceManager(
            {0: device}, self.calls.put, lambda v, s: self.troubles.append((v, s)), mend_interval_s=0.01
        )


def test_the_manager_reports_in_the_loop() -> None:
    inbox = Inbox()
    manager = inbox.manager(FakeDevice())
    manager.attach(0, inbox.outcomes.append)
    assert manager.node(0) is None
    inbox.turn()
    assert inbox.outcomes == [Outcome(0, Path("/dev/nbd0"))]
    assert manager.node(0) == Path("/dev/nbd0")
    manager.detach(0, inbox.outcomes.append)
    inbox.turn()
    assert inbox.outcomes[-1] == Outcome(0, None)
    assert manager.node(0) is None
    assert manager.close()


def test_a_failure_is_an_outcome() -> None:
    inbox = Inbox()
    manager = inbox.manager(FakeDevice(DiskError("no more loop devices")))
    manager.attach(0, inbox.outcomes.append)
    inbox.turn()
    assert inbox.outcomes == [Outcome(0, None, "attach of the device node failed: no more loop devices")]
    assert manager.close()


def test_a_bug_ends_the_process_and_not_only_the_thread() -> None:
    inbox = Inbox()
    manager = inbox.manager(FakeDevice(AssertionError("broken")))
    manager.attach(0, inbox.outcomes.append)
    with pytest.raises(AssertionError, match="broken"):
        inbox.turn()
    assert inbox.outcomes == []
    assert manager.close()


def test_trouble_is_told_once_and_so_is_its_end() -> None:
    inbox = Inbox()
    device = FakeDevice()
    manager = inbox.manager(device)
    manager.attach(0, inbox.outcomes.append)
    inbox.turn()
    device.trouble = DiskError("nbdfuse ended")
    inbox.turn()
    seen = device.mends
    eventually(lambda: device.mends > seen + 2)
    device.trouble = None
    inbox.turn()
    assert inbox.troubles == [(0, "the device node is in trouble: nbdfuse ended"), (0, "")]
    assert manager.close()


@pytest.mark.parametrize(
    ("no_nbd", "no_fuse", "kind"), [("", "", "nbd"), ("x", "", "fuse"), ("", "x", "nbd"), ("x", "y", "none")]
)
def test_auto_takes_the_best_there_is(no_nbd: str, no_fuse: str, kind: str) -> None:
    choice = choose("auto", Abilities(no_nbd, no_fuse))
    assert choice.kind == kind
    assert bool(choice.reason) == (kind == "none")


def test_a_kind_that_was_asked_for_by_name_is_that_kind_or_an_error() -> None:
    can, cannot = Abilities("", ""), Abilities("no module", "no /dev/fuse")
    assert choose("fuse", can).kind == "fuse"
    assert choose("nbd", can).kind == "nbd"
    assert choose("none", can).kind == "none"
    with pytest.raises(DiskError, match="no module"):
        choose("nbd", cannot)
    with pytest.raises(DiskError, match="no /dev/fuse"):
        choose("fuse", cannot)


def test_mounts_are_found_by_number_and_by_source_with_blanks_decoded() -> None:
    text = (
        "30 1 7:5 / /srv/my\\040data rw,relatime shared:1 - ext4 /dev/loop5 rw\n"
        "31 1 0:44 / /b rw - btrfs /dev/loop5 rw\n"
        "32 1 7:6 / /c rw - ext4 /dev/loop6 rw\n"
    )
    assert mounts_of(text, Path("/dev/loop5"), "7:5") == ["/srv/my data", "/b"]
