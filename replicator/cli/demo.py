# SPDX-License-Identifier: Apache-2.0
"""`replicator demo`: two nodes on this machine, a crash in the middle of writing, and nothing is lost.

Everything is real except the distance: two processes, two backing files, TLS between them over loopback.  No
root is needed, and nothing remains.  Exit code 0 only if every acknowledged write is found, on the survivor
after the crash and on both copies at the end, and both backing files are equal byte for byte.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from types import FrameType
from typing import Any, Final

from replicator.cli.demo_nodes import RESOURCE, WAIT_S, DemoFailed, Node, scene
from replicator.cli.demo_writes import BLOCK, MIB, Ledger, Load, content, difference
from replicator.control.progress import ProgressPrinter, size_text
from replicator.drivers import keys
from replicator.drivers.nbd_client import NbdClient

DISK: Final = "128MiB"
EXPORT: Final = f"{RESOURCE}/0"
#: Who writes where.  Little of the disk on purpose: after a crash whole 4 MiB extents are copied again.
IMAGE_BYTES: Final = 8 * MIB
LOAD_BYTES: Final = 16 * MIB
FIO_OFFSET, FIO_BYTES = 40 * MIB, 4 * MIB
SURVIVOR_BYTES: Final = 40 * MIB
LOAD_S: Final = 2.0

CONFIG: Final = """\
protocol = "C"
[net]
connect-interval = "3s"
timeout = "2s"
ping-interval = "3s"
ping-timeout = "2s"
[disk]
io = "buffered"            # so that any file system will do
resync-max-rate = "16MiB"  # so that there is something to see
[device]
kind = "none"              # a /dev node needs root
[volume.0]
"""


def main(args: argparse.Namespace) -> int:
    """Run the demonstration; 0 if everything it shows held.  Raises DemoFailed with what did not.

    `args.keep`: leave the directory, with the logs and the disks.
    """
    previous = signal.signal(signal.SIGTERM, _interrupt)
    try:
        with scene(keep=args.keep) as (alpha, beta):
            Demo(alpha, beta).play()
    finally:
        signal.signal(signal.SIGTERM, previous)
    return 0


def _interrupt(_number: int, _frame: FrameType | None) -> None:
    """SIGTERM ends the demonstration as Ctrl-C does: with everything cleaned up."""
    raise KeyboardInterrupt


class Demo:
    """The story, step by step.  Every check raises DemoFailed."""

    def __init__(self, alpha: Node, beta: Node) -> None:
        self.alpha = alpha
        self.beta = beta
        self.ledger = Ledger()
        self.summary: list[tuple[str, str]] = []
        self._began_s = time.monotonic()
        self._colour = sys.stdout.isatty()

    def play(self) -> None:
        """All of it."""
        self.set_up()
        self.begin()
        self.write_together()
        self.crash()
        self.read_back(self.beta, "on beta, after the crash")
        self.go_on_alone()
        self.come_back()
        self.compare()
        self.conclude()

    # -- the acts --------------------------------

    def set_up(self) -> None:
        """Configuration, keys, metadata."""
        alpha, beta = self.alpha, self.beta
        root = alpha.directory.parent
        self.say(f"Two nodes, alpha and beta, live in {root}: a directory and a {DISK} file as disk for each.")
        (root / f"{RESOURCE}.toml").write_text(CONFIG + alpha.section() + beta.section())
        self.say("Each node makes a key, and is given the other's certificate: the link is TLS, pinned both ways.")
        for node in (alpha, beta):
            keys.generate(node.name, node.key_dir)
        for node, other in ((alpha, beta), (beta, alpha)):
            shutil.copy(
                other.key_dir / keys.CERTIFICATE_FILE,
                node.key_dir / keys.PEERS_DIRECTORY / f"{other.name}.crt",
            )
        self.say("create-md on both: fresh metadata at the tail of each disk. The copies hold no data yet.")
        for node in (alpha, beta):
            node.command("create-md", RESOURCE, "--size", DISK)

    def begin(self) -> None:
        """Up, no first sync, Primary."""
        alpha, beta = self.alpha, self.beta
        self.say("up on both: one process per node. They find each other, and neither has good data.")
        for node in (alpha, beta):
            node.start()
        for node in (alpha, beta):
            node.wait("connected", lambda status: _link(status) == "Connected")
        self.say("new-current-uuid --clear-bitmap: both files are empty, hence equal. No first sync is needed.")
        alpha.tell("new-current-uuid", volume=0, clear_bitmap=True)
        for node in (alpha, beta):
            node.wait("UpToDate", lambda status: _disks(status) == ("UpToDate", "UpToDate"))
        self.say("primary on alpha: from now on alpha serves the volume, and beta refuses to.")
        alpha.tell("primary")
        self.must(self.refuses(beta), "beta serves the volume although it is Secondary")

    def write_together(self) -> None:
        """Foreign programs first: they know nothing of us."""
        image = self.alpha.directory / "image"
        if shutil.which("nbdcopy"):
            self.say(f"nbdcopy writes an image of {size_text(IMAGE_BYTES)} through alpha's NBD socket.")
            blocks = {block: self.ledger.next_number() for block in range(IMAGE_BYTES // BLOCK)}
            image.write_bytes(b"".join(content(block, number) for block, number in blocks.items()))
            self.tool("nbdcopy", "--flush", str(image), self.alpha.uri)
            for block, number in blocks.items():
                self.ledger.acknowledge(block, number)
        else:
            self.say("nbdcopy is not installed (Debian: libnbd-bin): left out.")
        if self.has_fio():
            self.say(f"fio writes {size_text(FIO_BYTES)} in random order and verifies them.")
            self.fio(self.alpha, "--do_verify=1")
        else:
            self.say("fio with the nbd engine is not installed: left out.")

    def crash(self) -> None:
        """SIGKILL in the middle of the load, and the failover."""
        alpha, beta = self.alpha, self.beta
        before = self.ledger.answers
        self.say(f"Our own load: random 4 KiB writes, {LOAD_S:.0f} s, every acknowledged one is noted.")
        load = Load(alpha.nbd, EXPORT, self.ledger, LOAD_BYTES)
        load.start()
        time.sleep(LOAD_S)
        self.must(load.is_alive(), f"the load ended early: {load.ended_by}")
        self.say("SIGKILL to alpha's process, while it writes.")
        alpha.kill()
        killed_s = time.monotonic()
        load.join(WAIT_S)
        self.must(self.ledger.answers > before, "no write was acknowledged before the crash")
        self.note("acknowledged before the crash", f"{self.ledger.answers - before} writes in {LOAD_S:.0f} s")
        self.note("in flight at the crash", f"{len(self.ledger.doubtful)} writes, promised to nobody")
        self.say("primary on beta: it has seen alpha go, its copy is UpToDate, so it may.")
        beta.tell("primary")
        with NbdClient(beta.nbd, EXPORT, timeout_s=WAIT_S) as client:
            client.read(0, BLOCK)
        self.note("from the kill to the first read on beta", f"{time.monotonic() - killed_s:.2f} s")

    def read_back(self, node: Node, where: str) -> None:
        """Every acknowledged write is there."""
        blocks = len(self.ledger.acknowledged)
        self.say(f"Every block that was written is read back {where}.")
        with NbdClient(node.nbd, EXPORT, timeout_s=WAIT_S) as client:
            wrong = self.ledger.wrong(client.read)
        self.must(not wrong, f"{len(wrong)} of {blocks} blocks are wrong {where}, the first is {wrong[:1]}")
        self.note(f"read back {where}", f"{blocks} blocks, 0 wrong")
        if self.has_fio():
            self.fio(node, "--verify_only")
            self.note(f"fio's own check {where}", "passed")

    def go_on_alone(self) -> None:
        """The survivor writes: alpha's copy grows old."""
        before = self.ledger.answers
        self.say("beta goes on alone: it begins a new generation, and notes which blocks alpha misses.")
        load = Load(self.beta.nbd, EXPORT, self.ledger, SURVIVOR_BYTES)
        load.start()
        time.sleep(LOAD_S)
        load.finish()
        self.must(load.ended_by is None, f"a write on the survivor failed: {load.ended_by}")
        self.must(self.ledger.answers > before, "the survivor acknowledged no write")
        self.note("acknowledged by the survivor alone", f"{self.ledger.answers - before} writes")

    def come_back(self) -> None:
        """The dead node returns and gets what it missed, no more."""
        alpha, began_s = self.alpha, time.monotonic()
        self.say("alpha comes back. beta's copy descends from alpha's, so alpha gets the difference only.")
        alpha.start()
        columns = shutil.get_terminal_size().columns if sys.stdout.isatty() else 0
        progress = ProgressPrinter("  resync", _write, time.monotonic, columns)
        last: Mapping[str, Any] = {}
        for last in alpha.changes():
            peer = last["connections"][0]["peer_devices"][0]
            if peer["has-sync-details"]:
                total = peer["rs-total"] * 1024
                progress.update(total - peer["out-of-sync"] * 1024, total)
            self.must(_link(last) != "StandAlone", f"alpha and beta refuse each other: {last['reasons']}")
            if _disks(last) == ("UpToDate", "UpToDate") and peer["replication-state"] == "Established":
                break
        progress.finish()
        self.must(_disks(last) == ("UpToDate", "UpToDate"), "the resync did not end")
        travelled = last["connections"][0]["peer_devices"][0]["received"] * 1024
        size = last["devices"][0]["size"] * 1024
        self.must(travelled < size, f"{size_text(travelled)} travelled: that is a full sync")
        self.note("resync", f"{size_text(travelled)} travelled, of a device of {size_text(size)}")
        self.note("from start to UpToDate", f"{time.monotonic() - began_s:.1f} s, at 16 MiB/s on purpose")

    def compare(self) -> None:
        """Both ended in order, their disks compared from outside."""
        alpha, beta = self.alpha, self.beta
        self.read_back(beta, "on beta, at the end")
        size = beta.status()["devices"][0]["size"] * 1024
        self.say("secondary on beta, then down on both: everything is written, both processes end.")
        beta.tell("secondary")
        for node in (beta, alpha):
            node.down()
        self.say("The two backing files are compared byte for byte, and alpha's with what was acknowledged.")
        first = difference(alpha.disk, beta.disk, size)
        self.must(first is None, f"the copies differ, first at byte {first}")
        with alpha.disk.open("rb") as disk:
            wrong = self.ledger.wrong(lambda offset, length: os.pread(disk.fileno(), length, offset))
        self.must(not wrong, f"{len(wrong)} blocks are wrong in alpha's backing file")
        self.note("backing files", f"equal over all {size_text(size)}")

    def conclude(self) -> None:
        """The table."""
        self.note("acknowledged writes lost", f"0 of {self.ledger.answers}")
        width = max(len(what) for what, _ in self.summary)
        print()
        for what, value in self.summary:
            print(f"  {what:<{width}}  {value}")
        print(f"\nDone in {time.monotonic() - self._began_s:.0f} s. Nothing of it remains running.")

    # -- tools --------------------------------

    def say(self, sentence: str) -> None:
        """What happens now, and why."""
        now = f"[{time.monotonic() - self._began_s:5.1f} s]"
        print(f"\x1b[1;36m{now}\x1b[0m {sentence}" if self._colour else f"{now} {sentence}", flush=True)

    def note(self, what: str, value: str) -> None:
        """One line of the summary."""
        self.summary.append((what, value))

    def must(self, true: bool, otherwise: str) -> None:
        """What is shown has to hold."""
        if not true:
            raise DemoFailed(otherwise)

    def refuses(self, node: Node) -> bool:
        """A Secondary's export cannot be opened."""
        try:
            NbdClient(node.nbd, EXPORT, timeout_s=WAIT_S).close()
        except PermissionError:
            return True
        return False

    def has_fio(self) -> bool:
        """There is an fio that can speak NBD."""
        if not shutil.which("fio"):
            return False
        engines = subprocess.run(["fio", "--enghelp"], capture_output=True, text=True, check=False).stdout
        return "nbd" in engines.split()

    def fio(self, node: Node, how: str) -> None:
        """The same random writes each time (fio's seed is fixed): done, or only verified."""
        where = [f"--uri={node.uri}", f"--offset={FIO_OFFSET}", f"--size={FIO_BYTES}"]
        load = ["--rw=randwrite", "--bs=4k", "--iodepth=16", "--verify=crc32c", "--verify_fatal=1", how]
        self.tool("fio", "--name=demo", "--ioengine=nbd", *where, *load, cwd=node.directory)

    def tool(self, *command: str, cwd: Path | None = None) -> None:
        """A foreign program has to succeed."""
        done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False, timeout=WAIT_S)
        self.must(done.returncode == 0, f"{command[0]} failed: {(done.stderr or done.stdout).strip()[-400:]}")


def _link(status: Mapping[str, Any]) -> str:
    return str(status["connections"][0]["connection-state"])


def _disks(status: Mapping[str, Any]) -> tuple[str, str]:
    """Ours and the peer's."""
    peer = status["connections"][0]["peer_devices"][0]
    return str(status["devices"][0]["disk-state"]), str(peer["peer-disk-state"])


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()
