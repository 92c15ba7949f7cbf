# SPDX-License-Identifier: Apache-2.0
"""Make this process fit to sit under a file system.

The kernel writes dirty pages through us.  If serving such a write needs memory that only becomes free when
the write is done, machine and daemon wait for each other for ever.  So: our pages are locked (nothing of us
is swapped to a device that we serve), the kernel is told that we clean pages for it (PR_SET_IO_FLUSHER:
allocations on our behalf do not re-enter file systems), and the out-of-memory killer passes us by, because
killing us frees nothing.

Each measure is an attempt.  `harden` returns what could not be had, as sentences for the log and for the
status; only one condition is fatal: asserts switched off, because a broken invariant must end the process.
"""

from __future__ import annotations

import ctypes
import gc
import os
import resource
import socket
from collections.abc import Callable, Collection
from pathlib import Path

from replicator.errors import UsageError

MCL_CURRENT = 1
MCL_FUTURE = 2
PR_SET_DUMPABLE = 4
PR_SET_IO_FLUSHER = 57
OOM_SCORE_ADJ_NEVER = -1000
_SD_LISTEN_FDS_START = 3

Libc = Callable[..., int]


def harden() -> list[str]:
    """Do all of it; what failed, one sentence each.  Raises UsageError under `python -O`.

    Call it after the configuration is read and modules are imported, before threads start and devices are
    attached.
    """
    require_asserts(enabled=__debug__)
    attempts = (lock_memory, be_io_flusher, hide_from_oom_killer, forbid_dumps)
    gc.collect()
    gc.freeze()  # what is alive now stays alive: collections need not walk it again
    return [complaint for attempt in attempts if (complaint := attempt())]


def require_asserts(*, enabled: bool) -> None:
    """Refuse to serve data without assertions."""
    if not enabled:
        raise UsageError(
            "assertions are switched off (python -O or PYTHONOPTIMIZE)",
            hint="they are part of the product: start it without -O and unset PYTHONOPTIMIZE",
        )


def lock_memory() -> str:
    """Lock present and future pages; "" or what was wrong.

    Under a finite RLIMIT_MEMLOCK that we cannot raise, MCL_FUTURE would make later allocations fail, which is
    worse than being swapped; then nothing is locked.
    """
    try:
        resource.setrlimit(resource.RLIMIT_MEMLOCK, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    except (OSError, ValueError):
        soft, _hard = resource.getrlimit(resource.RLIMIT_MEMLOCK)
        if soft != resource.RLIM_INFINITY and not _has_ipc_lock():
            return (
                f"memory is not locked: RLIMIT_MEMLOCK is {soft} bytes and cannot be raised, "
                "so the daemon may be swapped out (LimitMEMLOCK=infinity in the unit helps)"
            )
    errno = _call("mlockall", MCL_CURRENT | MCL_FUTURE)
    return f"memory is not locked: mlockall: {os.strerror(errno)}" if errno else ""


def be_io_flusher() -> str:
    """Tell the kernel that we are in the way of its write-back; "" or what was wrong."""
    errno = _call("prctl", PR_SET_IO_FLUSHER, 1, 0, 0, 0)
    if not errno:
        return ""
    return (
        f"PR_SET_IO_FLUSHER is not set: {os.strerror(errno)}; "
        "under memory pressure a file system on this host's device may deadlock (CAP_SYS_RESOURCE is needed)"
    )


def hide_from_oom_killer(path: Path = Path("/proc/self/oom_score_adj")) -> str:
    """Get the lowest out-of-memory score that is allowed; "" or what was wrong."""
    try:
        present = int(path.read_text())
    except (OSError, ValueError) as error:
        return f"the out-of-memory score is unknown: {error}"
    for score in (OOM_SCORE_ADJ_NEVER, -999, -900, -500, 0):
        if score > present:
            break
        try:
            path.write_text(f"{score}\n")
        except OSError:
            continue
        present = score
        break
    if present == OOM_SCORE_ADJ_NEVER:
        return ""
    return f"the out-of-memory killer may choose this process: oom_score_adj is {present}, -1000 was refused"


def forbid_dumps() -> str:
    """No core dumps and no ptrace by others: users' data and the link's key are in memory."""
    errno = _call("prctl", PR_SET_DUMPABLE, 0, 0, 0, 0)
    return f"core dumps are not switched off: {os.strerror(errno)}" if errno else ""


def close_stray_fds(keep: Collection[int] = ()) -> list[int]:
    """Close descriptors above standard error that whoever started us left open; the ones that were closed.

    Sockets passed by systemd (LISTEN_FDS) and the ones in `keep` stay.  Call it first of all, before anything
    of our own is open.
    """
    passed = 0
    if os.environ.get("LISTEN_PID") == str(os.getpid()):
        passed = int(os.environ.get("LISTEN_FDS", "0") or "0")
    spared = {0, 1, 2, *keep, *range(_SD_LISTEN_FDS_START, _SD_LISTEN_FDS_START + passed)}
    closed = []
    for fd in sorted(int(name) for name in os.listdir("/proc/self/fd")):
        if fd in spared:
            continue
        try:
            os.close(fd)
        except OSError:
            continue  # the descriptor of the listing itself
        closed.append(fd)
    return closed


class Notifier:
    """Speaks systemd's notification protocol; silent when nobody asked (NOTIFY_SOCKET unset).

    Never blocks and never fails: the service manager's troubles are not the volume's.
    """

    def __init__(self, address: str | None) -> None:
        self._address = _notify_address(address)
        self._socket: socket.socket | None = None
        if self._address is not None:
            self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC)
            self._socket.setblocking(False)

    @classmethod
    def from_environment(cls) -> Notifier:
        """Take the address from NOTIFY_SOCKET, and remove it so that no child of ours speaks for us."""
        return cls(os.environ.pop("NOTIFY_SOCKET", None))

    def ready(self, status: str) -> bool:
        """The resource is served."""
        return self._send(f"READY=1\nSTATUS={_one_line(status)}\nMAINPID={os.getpid()}")

    def status(self, status: str) -> bool:
        """One line for `systemctl status`."""
        return self._send(f"STATUS={_one_line(status)}")

    def stopping(self) -> bool:
        """The stop has begun."""
        return self._send("STOPPING=1")

    def watchdog(self) -> bool:
        """The loop turned; to be sent twice per WatchdogSec at least."""
        return self._send("WATCHDOG=1")

    def extend_timeout(self, usec: int) -> bool:
        """A start or stop takes longer; wait this many microseconds more."""
        return self._send(f"EXTEND_TIMEOUT_USEC={usec}")

    def close(self) -> None:
        """Close the socket."""
        if self._socket is not None:
            self._socket.close()
            self._socket = None

    def _send(self, text: str) -> bool:
        if self._socket is None or self._address is None:
            return False
        try:
            self._socket.sendto(text.encode(), self._address)
        except OSError:
            return False
        return True


def watchdog_interval_ns(environ: dict[str, str] | None = None) -> int | None:
    """Half of what systemd allows between two WATCHDOG=1, in nanoseconds; None when it does not watch us."""
    env = os.environ if environ is None else environ
    if env.get("WATCHDOG_PID", str(os.getpid())) != str(os.getpid()):
        return None
    usec = env.get("WATCHDOG_USEC", "")
    return int(usec) * 1000 // 2 if usec.isdigit() and int(usec) > 0 else None


def _notify_address(address: str | None) -> str | bytes | None:
    """NOTIFY_SOCKET as a socket address; a leading @ is the abstract namespace."""
    if not address:
        return None
    if address[0] == "@":
        return b"\0" + os.fsencode(address[1:])
    return address if address[0] == "/" else None


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _has_ipc_lock() -> bool:
    """CAP_IPC_LOCK (bit 14) is effective: RLIMIT_MEMLOCK does not bind us."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("CapEff:"):
            return bool(int(line.split()[1], 16) >> 14 & 1)
    return False


def _call(name: str, *arguments: int) -> int:
    """Call a C library function that returns 0 or -1 and sets errno; that errno, 0 for success."""
    library = ctypes.CDLL(None, use_errno=True)
    function: Libc = getattr(library, name)
    # prctl is variadic: its arguments are longs, and ctypes would pass ints
    return ctypes.get_errno() if function(*(ctypes.c_long(value) for value in arguments)) != 0 else 0
