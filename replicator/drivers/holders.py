# SPDX-License-Identifier: Apache-2.0
"""Who holds a block device open: for the refusal of a demotion, and for the sentence that explains it.

The kernel only says "busy".  An operator at three in the morning needs names: the processes that have the
device open, the file systems mounted from it, swap, and devices stacked on it (LVM, dm-crypt, md).
"""

from __future__ import annotations

import os
import stat
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Holder:
    """One reason why a device is busy; `pid` is 0 for everything but a process."""

    kind: str  # process | mount | swap | device
    name: str
    pid: int = 0

    def __str__(self) -> str:
        match self.kind:
            case "process":
                return f"process {self.name} (pid {self.pid})"
            case "mount":
                return f"file system mounted at {self.name}"
            case "swap":
                return f"swap on {self.name}"
            case _:
                return f"device {self.name} is stacked on it"


def holders(path: Path, *, proc: Path = Path("/proc"), sys: Path = Path("/sys")) -> list[Holder]:
    """Who holds the device at `path` (a link is followed); empty when nobody does or it does not exist.

    Seen from this process's mount namespace, and complete for root only.
    """
    try:
        node = path.resolve(strict=True)
        status = node.stat()
    except OSError:
        return []
    if not stat.S_ISBLK(status.st_mode):
        return []
    major_minor = f"{os.major(status.st_rdev)}:{os.minor(status.st_rdev)}"
    found = [Holder("mount", where) for where in mounts_of(_read(proc / "self/mountinfo"), node, major_minor)]
    found += [Holder("swap", str(node)) for line in _read(proc / "swaps").splitlines() if _swaps_on(line, node)]
    found += [Holder("device", entry.name) for entry in _entries(sys / "dev/block" / major_minor / "holders")]
    return found + _openers(proc, status.st_rdev)


def mounts_of(mountinfo: str, node: Path, major_minor: str) -> list[str]:
    """Mount points of a device, from the text of /proc/PID/mountinfo.

    By number, and by source as well: btrfs mounts carry a number of their own.
    """
    points = []
    for line in mountinfo.splitlines():
        left, _, right = line.partition(" - ")
        fields, source = left.split(" "), right.split(" ")
        if len(fields) < 6 or len(source) < 2:
            continue
        if fields[2] == major_minor or _same(unescape(source[1]), node):
            points.append(unescape(fields[4]))
    return points


def unescape(text: str) -> str:
    r"""Undo the kernel's \ooo for blank, tab, newline and backslash."""
    head, *tail = text.split("\\")
    return head + "".join(chr(int(part[:3], 8)) + part[3:] if part[:3].isdigit() else "\\" + part for part in tail)


def _same(source: str, node: Path) -> bool:
    return source.startswith("/dev/") and Path(source).resolve() == node


def _swaps_on(line: str, node: Path) -> bool:
    return _same(unescape(line.split(" ", 1)[0].rstrip("\t")), node)


def _openers(proc: Path, device: int) -> list[Holder]:
    """Processes with an open descriptor of the device, in order of pid."""
    found = []
    for entry in sorted((e for e in _entries(proc) if e.name.isdigit()), key=lambda e: int(e.name)):
        if any(_is_device(fd, device) for fd in _entries(entry / "fd")):
            name = _read(entry / "comm").strip() or "?"
            found.append(Holder("process", name, int(entry.name)))
    return found


def _is_device(fd: Path, device: int) -> bool:
    try:
        # Only what lives under /dev is worth a stat: one through a dead network file system would hang.
        if not os.readlink(fd).startswith("/dev/"):
            return False
        status = fd.stat()
    except OSError:
        return False  # closed meanwhile
    return stat.S_ISBLK(status.st_mode) and status.st_rdev == device


def _entries(directory: Path) -> list[Path]:
    try:
        return sorted(directory.iterdir())
    except OSError:
        return []  # gone, or not ours to look into


def _read(path: Path) -> str:
    try:
        return path.read_text(errors="replace")
    except OSError:
        return ""
