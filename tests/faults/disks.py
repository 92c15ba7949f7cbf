# SPDX-License-Identifier: Apache-2.0
"""Disks that misbehave, below a real daemon: no kernel module, no device mapper.

`FaultyDisk` is a file that nbdfuse shows and nbdkit serves, with filters between the two and the *platter* (a plain
file) that does the harm:

    daemon -> file (FUSE) -> nbdfuse -> nbdkit: pause -> [cache] -> delay -> error -> platter

With the cache (write-back) a write sits in nbdkit until a flush, as in a disk's volatile cache; killing nbdkit is a
power cut.  Errors are switched by files: nbdkit looks at each request whether they are there.

A process in the middle of a request to a dead or frozen FUSE server cannot be killed, so whoever ends a node ends its
disk first.
"""

from __future__ import annotations

import os
import select
import socket
import subprocess
import tempfile
from pathlib import Path

import pytest

from tests.faults.network import need
from tests.integration.cluster import GIVE_UP_S, MIB


def need_faulty_disks() -> None:
    """Skip unless nbdkit and FUSE are here."""
    need("nbdkit", "nbdfuse", "fusermount3")
    if not os.access("/dev/fuse", os.R_OK | os.W_OK):
        pytest.skip("no /dev/fuse that we may use")


class FaultyDisk:
    """One disk, without power at first.  `path` is what the daemon opens."""

    def __init__(self, directory: Path, *, size_bytes: int, volatile: bool = False, delay_ms: int = 0) -> None:
        self.platter = directory / "platter"
        self.platter.parent.mkdir(parents=True)
        with self.platter.open("wb") as file:
            file.truncate(size_bytes)
        self._volatile = volatile
        self._delay_ms = delay_ms
        self._switches = {kind: directory / f"fail-{kind}" for kind in ("pread", "pwrite", "zero", "trim", "flush")}
        self._mount = directory / "mount"
        self._mount.mkdir()
        self.path = self._mount / "disk"
        self._short = Path(tempfile.mkdtemp(prefix="rdisk-"))  # a socket's path is short
        self._processes: list[subprocess.Popen[bytes]] = []
        self._log = directory / "log"
        self._mounted = False

    # -- power --------------------------------

    def power_on(self) -> None:
        """Serve what is on the platter."""
        assert not self._processes
        server, control = self._short / "nbd", self._short / "pause"
        for stale in (server, control):
            stale.unlink(missing_ok=True)
        command = ["nbdkit", "--foreground", "--exit-with-parent", "-U", str(server), "--threads", "8"]
        # Below a cache "slow" and "fails" are what a flush is; without one they are what each request is.
        command += ["--filter=pause"] + ["--filter=cache"] * self._volatile
        command += ["--filter=delay"] * bool(self._delay_ms) + ["--filter=error"]
        command += ["file", str(self.platter), f"pause-control={control}"]
        if self._delay_ms:
            command += [f"delay-write={self._delay_ms}ms", f"delay-read={self._delay_ms}ms"]
        if self._volatile:
            command += ["cache=writeback", "cache-min-block-size=4K"]
        command += ["error=EIO"]
        for kind in ("pread", "pwrite", "zero", "trim"):
            switch = self._switches["flush"] if self._volatile and kind != "pread" else self._switches[kind]
            command += [f"error-{kind}-rate=100%", f"error-{kind}-file={switch}"]
        self._start(command)
        self._mounted = True
        self._start(["nbdfuse", str(self.path), f"nbd+unix:///?socket={server}"])

    def power_off(self) -> None:
        """Now: what was not flushed is lost (of a volatile disk), what the daemon waits for is an error."""
        for process in self._processes:
            process.kill()
        for process in self._processes:
            process.wait(GIVE_UP_S)
        self._processes.clear()
        if self._mounted:  # the kernel still has it, and `ismount` does not know a mount without a server
            self._mounted = False
            subprocess.run(["fusermount3", "-u", "-z", str(self._mount)], check=False, capture_output=True)

    def remove(self) -> None:
        """The end; harmless when it was called before."""
        self.power_off()
        for left in (*self._short.iterdir(), self._short) if self._short.exists() else ():
            left.rmdir() if left.is_dir() else left.unlink()

    def _start(self, command: list[str]) -> None:
        """Start a program that writes its process id when it is ready, and wait for that."""
        said = self._short / "ready"
        os.mkfifo(said)
        reader = os.open(said, os.O_RDONLY | os.O_NONBLOCK)
        try:
            with self._log.open("ab") as log:
                process = subprocess.Popen(
                    [command[0], "-P", str(said), *command[1:]], stdin=subprocess.DEVNULL, stdout=log, stderr=log
                )
            self._processes.append(process)
            ready = select.select([reader], [], [], GIVE_UP_S)[0] and os.read(reader, 100)
            assert ready, f"{command[0]} is not ready: {self._log.read_text()}"
        finally:
            os.close(reader)
            said.unlink()

    # -- faults --------------------------------

    def fail(self, *kinds: str) -> None:
        """EIO from now on for pread, pwrite, zero or trim; "flush" (volatile disks): the cache cannot be written."""
        assert not self._volatile or set(kinds) <= {"pread", "flush"}, "a write into a cache does not fail"
        for kind in kinds:
            self._switches[kind].touch()

    def mend(self) -> None:
        """No more errors."""
        for switch in self._switches.values():
            switch.unlink(missing_ok=True)

    def freeze(self) -> None:
        """Nothing is answered from now on.  Requests under way are finished first."""
        self._pause(b"p", b"P")

    def thaw(self) -> None:
        """Go on."""
        self._pause(b"r", b"R")

    def _pause(self, order: bytes, answer: bytes) -> None:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as control:
            control.settimeout(GIVE_UP_S)
            control.connect(str(self._short / "pause"))
            control.sendall(order)
            assert control.recv(1) == answer


class FullDisk:
    """A small tmpfs for a sparse file that is larger than it.  Needs root."""

    def __init__(self, directory: Path, *, size_bytes: int, room_bytes: int) -> None:
        directory.mkdir(parents=True)
        self._directory = directory
        self._room_bytes = room_bytes
        options = f"size={room_bytes},mode=0700"
        done = subprocess.run(
            ["mount", "-n", "-t", "tmpfs", "-o", options, "tmpfs", str(directory)],
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            pytest.skip(f"needs root: {done.stderr.strip()}")
        self.path = directory / "disk"
        with self.path.open("wb") as file:
            file.truncate(size_bytes)

    def enlarge(self) -> None:
        """Room for everything (an administrator extended the file system)."""
        size = self.path.stat().st_size + 8 * MIB
        subprocess.run(
            ["mount", "-n", "-o", f"remount,size={size}", str(self._directory)], check=True, capture_output=True
        )

    def remove(self) -> None:
        """Unmount."""
        subprocess.run(["umount", "-n", "-l", str(self._directory)], check=True, capture_output=True)
