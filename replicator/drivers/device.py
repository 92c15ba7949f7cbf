# SPDX-License-Identifier: Apache-2.0
"""A real /dev node for an export: which kind, and the manager that makes and removes it beside the loop.

QEMU, fio, nbdcopy use the NBD socket and need none of this.  A file system on this host does: it gets kernel
nbd where the kernel has it, nbdfuse with a loop device where it has not, and a clear reason where neither can
be had.

Attaching talks to our own NBD server, which the loop's thread serves.  So it must never run in that thread:
the manager has one worker thread, takes its jobs in order, and reports back in the loop.
"""

from __future__ import annotations

import os
import queue
import subprocess
import threading
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

from replicator.drivers.fuse_loop import TOOLS, FuseLoop, find_tool
from replicator.drivers.holders import Holder, holders
from replicator.drivers.kernel_nbd import Dialled, KernelNbd, Tuning
from replicator.drivers.nbd_client import NbdClient
from replicator.drivers.nbd_netlink import Netlink
from replicator.drivers.node import DEV_DIR, RUN_DIR, Device, Export
from replicator.errors import DiskError, ReplicatorError

__all__ = [
    "DEV_DIR",
    "RUN_DIR",
    "Abilities",
    "Choice",
    "Device",
    "DeviceManager",
    "Export",
    "Holder",
    "Outcome",
    "choose",
    "holders",
    "make_device",
    "probe",
]

Wish = Literal["auto", "nbd", "fuse", "none"]
_MEND_S = 1.0
_DIAL_S = 10.0


@dataclass(frozen=True, slots=True)
class Abilities:
    """Why this host cannot make a node of a kind; "" when it can."""

    no_nbd: str
    no_fuse: str


@dataclass(frozen=True, slots=True)
class Choice:
    """The kind of node to make, and for "none" the reason, as a sentence."""

    kind: Literal["nbd", "fuse", "none"]
    reason: str = ""


def probe() -> Abilities:
    """Look at this host; loads the nbd module when that is possible."""
    if os.geteuid() != 0:
        return Abilities(no_nbd="it needs root", no_fuse="it needs root")
    return Abilities(no_nbd=_why_no_nbd(), no_fuse=_why_no_fuse())


def choose(wish: Wish, abilities: Abilities) -> Choice:
    """Which kind of node to make.

    "auto" never fails: it takes the best there is, or none with the reason.  Raises DiskError when a kind was
    asked for by name and cannot be had.
    """
    if wish == "none":
        return Choice("none", "no device node is configured")
    if wish == "nbd" and abilities.no_nbd:
        raise DiskError(f"no kernel nbd: {abilities.no_nbd}", hint='set device = "auto"')
    if wish == "fuse" and abilities.no_fuse:
        raise DiskError(f"no nbdfuse with a loop device: {abilities.no_fuse}", hint='set device = "auto"')
    if wish != "fuse" and not abilities.no_nbd:
        return Choice("nbd")
    if not abilities.no_fuse:
        return Choice("fuse")
    return Choice("none", f"no kernel nbd: {abilities.no_nbd}; no nbdfuse: {abilities.no_fuse}")


def make_device(choice: Choice, export: Export, tuning: Tuning | None = None) -> Device | None:
    """The device object for an export; None when there is to be no node.  Touches nothing yet."""
    match choice.kind:
        case "nbd":
            return KernelNbd(export, lambda: _dial(export), Netlink, tuning or Tuning())
        case "fuse":
            return FuseLoop(export)
        case "none":
            return None


def _dial(export: Export) -> Dialled:
    try:
        client = NbdClient(str(export.socket), export.name, timeout_s=_DIAL_S)
    except TimeoutError as error:
        raise DiskError(f"{export.socket} did not answer within {_DIAL_S:.0f} s") from error
    return Dialled(client.detach(), client.size_bytes, client.flags)


def _why_no_nbd() -> str:
    if not Path("/sys/module/nbd").exists():
        modprobe = find_tool("modprobe")
        if modprobe is not None:
            # nbds_max=0: nodes are made on demand, not sixteen in advance
            subprocess.run([modprobe, "-q", "nbd", "nbds_max=0"], capture_output=True, check=False, timeout=30)
    try:
        Netlink().close()
    except DiskError:
        return "the kernel has no nbd module, or it is not loaded and cannot be"
    return ""


def _why_no_fuse() -> str:
    if not Path("/dev/fuse").is_char_device():
        return "there is no /dev/fuse"
    if not Path("/dev/loop-control").is_char_device():
        return "there is no /dev/loop-control"
    missing = [tool for tool in TOOLS if find_tool(tool) is None]
    return f"not installed: {', '.join(missing)}" if missing else ""


# ------------------------------------------------------------------------------------------- the manager


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a job ended: the node (None after a detach or a failure), and what went wrong ("" for nothing)."""

    volume: int
    node: Path | None
    error: str = ""


Done = Callable[[Outcome], None]


@dataclass(frozen=True, slots=True)
class _Job:
    what: Literal["attach", "detach", "resize"]
    volume: int
    size_bytes: int
    done: Done


class DeviceManager:
    """Attaches, detaches and looks after the nodes of one resource's volumes.

    Public methods and all callbacks belong to the loop's thread; devices are touched by the worker only.
    Jobs run one after another, in the order they were asked for.  A job that fails with a ReplicatorError or
    OSError reports it; any other exception is raised in the loop's thread, where it ends the process.
    """

    def __init__(
        self,
        devices: dict[int, Device],
        call_from_thread: Callable[[Callable[[], None]], None],
        trouble: Callable[[int, str], None],
        mend_interval_s: float = _MEND_S,
    ) -> None:
        """`call_from_thread` is the loop's; `trouble(volume, sentence)` reports an attached node that is in
        trouble or was repaired ("" when all is well again)."""
        self._devices = devices
        self._call = call_from_thread
        self._trouble = trouble
        self._mend_interval_s = mend_interval_s
        self._jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._nodes: dict[int, Path] = {}
        self._attached: set[int] = set()  # the worker's own view
        self._reported: dict[int, str] = {}  # likewise
        # A daemon thread: a process that must end does not wait for a hanging kernel.
        self._worker = threading.Thread(target=self._work, name="device", daemon=True)
        self._worker.start()

    def attach(self, volume: int, done: Done) -> None:
        """Make the volume's node; `done` follows, in the loop."""
        self._jobs.put(_Job("attach", volume, 0, done))

    def detach(self, volume: int, done: Done) -> None:
        """Remove the volume's node, or what an earlier run left of it; `done` follows."""
        self._jobs.put(_Job("detach", volume, 0, done))

    def resize(self, volume: int, size_bytes: int, done: Done) -> None:
        """Tell the kernel a new size; `done` follows."""
        self._jobs.put(_Job("resize", volume, size_bytes, done))

    def node(self, volume: int) -> Path | None:
        """The node of an attached volume."""
        return self._nodes.get(volume)

    def holders(self, volume: int) -> list[Holder]:
        """Who holds the volume's node; empty when it has none."""
        node = self._nodes.get(volume)
        return [] if node is None else holders(node)

    def close(self, timeout_s: float = 30.0) -> bool:
        """Let queued jobs end and stop the worker; False when it still hangs after that time.

        Nodes stay as they are: detach them first, or leave them for the next run to take over.
        """
        self._jobs.put(None)
        self._worker.join(timeout_s)
        return not self._worker.is_alive()

    # -- the worker's thread -----------------------------------------------------------------------

    def _work(self) -> None:
        try:
            while True:
                try:
                    job = self._jobs.get(timeout=self._mend_interval_s)
                except queue.Empty:
                    self._mend_all()
                    continue
                if job is None:
                    return
                outcome = self._run(job)
                self._call(partial(self._finish, job, outcome))
        except BaseException as error:  # a broken invariant: let it end the process, not just this thread
            broken = error

            def fall() -> None:
                raise broken

            self._call(fall)

    def _run(self, job: _Job) -> Outcome:
        device = self._devices[job.volume]
        try:
            match job.what:
                case "attach":
                    node = device.attach()
                    self._attached.add(job.volume)
                    return Outcome(job.volume, node)
                case "detach":
                    self._attached.discard(job.volume)
                    device.detach()
                    return Outcome(job.volume, None)
                case "resize":
                    device.resize(job.size_bytes)
                    return Outcome(job.volume, self._nodes.get(job.volume))
        except (ReplicatorError, OSError) as error:
            return Outcome(job.volume, None, f"{job.what} of the device node failed: {error}")

    def _mend_all(self) -> None:
        for volume in sorted(self._attached):
            try:
                mended = self._devices[volume].mend()
                sentence = "lost connections of the device node were replaced" if mended else ""
            except (ReplicatorError, OSError) as error:
                sentence = f"the device node is in trouble: {error}"
            if self._reported.get(volume, "") != sentence:
                self._reported[volume] = sentence
                self._call(partial(self._trouble, volume, sentence))

    # -- the loop's thread -------------------------------------------------------------------------

    def _finish(self, job: _Job, outcome: Outcome) -> None:
        if job.what == "attach" and outcome.node is not None:
            self._nodes[job.volume] = outcome.node
        elif job.what == "detach" and not outcome.error:
            self._nodes.pop(job.volume, None)
        job.done(outcome)
