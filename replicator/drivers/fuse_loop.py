# SPDX-License-Identifier: Apache-2.0
"""A node without kernel nbd: nbdfuse shows the export as a file, a loop device makes a node of it.

For machines whose kernel has no nbd (containers, small cloud kernels).  Two differences from kernel nbd, both
told to the operator in the documentation: a restart of the daemon is an I/O error for whoever has the node
open, and the size is fixed while it is attached.

Order: mount, loop, link; undone in reverse.  Everything that exists can be found again without memory (the
mount point and the file behind a loop device carry the resource's name), so a run that was killed leaves
nothing that the next one cannot remove.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

from replicator.drivers.holders import holders, unescape
from replicator.drivers.node import Export, make_link, remove_link, wait_until
from replicator.errors import DiskError, Refused

_READY_S = 15.0
_GONE_S = 10.0
_HELD_S = 3.0  # udev and blkid look at a device for a moment
_TOOL_S = 30.0
_SBIN = os.pathsep.join((os.defpath, "/usr/sbin", "/sbin"))
TOOLS = ("nbdfuse", "losetup", "umount")


def find_tool(name: str) -> str | None:
    """Where a program is; the system's own directories count even when PATH does not have them."""
    return shutil.which(name) or shutil.which(name, path=_SBIN)


class FuseLoop:
    """One volume's /dev/loopN over nbdfuse."""

    def __init__(
        self,
        export: Export,
        sys_block: Path = Path("/sys/block"),
        mountinfo: Path = Path("/proc/self/mountinfo"),
    ) -> None:
        self._export = export
        self._sys_block = sys_block
        self._mountinfo = mountinfo
        self._mount = export.run_dir.resolve() / f"{export.resource}.{export.volume}.fuse"
        self._file = self._mount / "disk"
        self._pid_file = self._mount.with_suffix(".fuse-pid")
        self._error_file = self._mount.with_suffix(".fuse-err")
        self._child: subprocess.Popen[bytes] | None = None

    def attach(self) -> Path:
        """See `Device.attach`."""
        assert self._child is None, f"{self._export.identifier} is attached twice"
        self._clear()
        try:
            self._serve_file()
            node = self._make_loop()
            make_link(self._export, node)
        except BaseException:
            self._clear()
            raise
        return node

    def detach(self) -> None:
        """See `Device.detach`."""
        self._clear()

    def mend(self) -> bool:
        """Cannot mend; raises DiskError when nbdfuse is gone, because every request fails then."""
        if self._child is not None and (status := self._child.poll()) is not None:
            raise DiskError(
                f"nbdfuse for {self._export.identifier} ended with status {status}{self._said()}",
                hint="detach and attach the device",
            )
        return False

    def resize(self, size_bytes: int) -> None:
        """Refused while attached: nbdfuse asks for the size once."""
        if self._child is not None:
            raise Refused(
                "device-size-fixed",
                f"the node of {self._export.identifier} cannot become {size_bytes} bytes while attached",
                hint="demote and promote the resource, or use kernel nbd",
            )

    # -- upwards -----------------------------------------------------------------------------------

    def _serve_file(self) -> None:
        self._mount.mkdir(parents=True, exist_ok=True)
        command = [_tool("nbdfuse"), "--pidfile", str(self._pid_file), str(self._file)]
        if self._export.name:
            command.append(f"nbd+unix:///{self._export.name}?socket={self._export.socket}")
        else:
            command += ["--unix", str(self._export.socket)]
        with self._error_file.open("wb") as errors:
            # A session of its own: an interrupt at the daemon's terminal must not cut its device off.
            self._child = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=errors,
                stderr=errors,
                start_new_session=True,
                cwd="/",
            )
        child = self._child
        wait_until(lambda: child.poll() is not None or self._is_served(), seconds=_READY_S)
        if child.poll() is not None:
            raise DiskError(f"nbdfuse ended with status {child.returncode}{self._said()}")
        if not self._is_served():
            raise DiskError(f"nbdfuse did not serve {self._file} within {_READY_S:.0f} s{self._said()}")

    def _is_served(self) -> bool:
        """nbdfuse writes its pid file when it is ready."""
        try:
            return self._pid_file.stat().st_size > 0
        except OSError:
            return False

    def _make_loop(self) -> Path:
        said = _run([_tool("losetup"), "--find", "--show", "--direct-io=on", str(self._file)]).strip()
        node = Path(said)
        if not said.startswith("/dev/") or not node.is_block_device():
            raise DiskError(f"losetup made {said!r}, which is not a block device here")
        return node

    # -- downwards ---------------------------------------------------------------------------------

    def _clear(self) -> None:
        """Remove everything that carries our name, of this run or an earlier one."""
        for node in self._loops():
            self._require_free(node)  # before anything is touched
        remove_link(self._export)
        for node in self._loops():
            self._remove_loop(node)
        if self._is_mounted():
            self._unmount()
        self._end_child()
        self._pid_file.unlink(missing_ok=True)
        self._error_file.unlink(missing_ok=True)
        if self._mount.is_dir():
            self._mount.rmdir()

    def _loops(self) -> list[Path]:
        """Loop devices over our file."""
        found = []
        for backing in self._sys_block.glob("loop*/loop/backing_file"):
            try:
                name = backing.read_text().rstrip("\n")
            except OSError:
                continue  # released while we looked
            if name.removesuffix(" (deleted)") == str(self._file):
                found.append(Path("/dev", backing.parent.parent.name))
        return found

    def _require_free(self, node: Path) -> None:
        if not wait_until(lambda: not holders(node), seconds=_HELD_S):
            who = "; ".join(map(str, holders(node)))
            raise DiskError(f"{node} of {self._export.identifier} is held: {who}", hint="end its users first")

    def _remove_loop(self, node: Path) -> None:
        _run([_tool("losetup"), "--detach", str(node)])
        if not wait_until(lambda: node not in self._loops(), seconds=_GONE_S):
            raise DiskError(f"{node} of {self._export.identifier} was detached and is still in use")

    def _is_mounted(self) -> bool:
        lines = (line.split(" ") for line in self._mountinfo.read_text().splitlines())
        return any(unescape(fields[4]) == str(self._mount) for fields in lines)

    def _unmount(self) -> None:
        def gone() -> bool:
            if self._is_mounted():
                subprocess.run([_tool("umount"), str(self._mount)], capture_output=True, check=False, timeout=_TOOL_S)
            return not self._is_mounted()

        if not wait_until(gone, seconds=_GONE_S):
            # Without the loop device nobody of ours uses it: hide it, its last user ends it.
            _run([_tool("umount"), "--lazy", str(self._mount)])

    def _end_child(self) -> None:
        """nbdfuse ends by itself when its mount goes; one that never mounted is told to."""
        child, self._child = self._child, None
        if child is None:
            return
        try:
            child.wait(_GONE_S if self._is_served() else 0.1)
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()

    def _said(self) -> str:
        """What nbdfuse complained about, as the tail of a sentence."""
        try:
            text = " ".join(self._error_file.read_text(errors="replace").split())
        except OSError:
            return ""
        return f": {text[-300:]}" if text else ""


def _tool(name: str) -> str:
    path = find_tool(name)
    if path is None:
        raise DiskError(f"the program {name} is not installed")
    return path


def _run(command: list[str]) -> str:
    """Run a tool to its end; what it printed.  Raises DiskError with what it complained about."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=_TOOL_S)
    except subprocess.TimeoutExpired as error:
        raise DiskError(f"{' '.join(command)} did not end within {_TOOL_S:.0f} s") from error
    if done.returncode != 0:
        raise DiskError(f"{' '.join(command)} failed: {' '.join(done.stderr.split())}")
    return done.stdout
