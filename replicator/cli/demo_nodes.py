# SPDX-License-Identifier: Apache-2.0
"""The two nodes of the demonstration: real processes, each with a directory of its own, on 127.0.0.1.

However it ends, the processes and the directory go (`keep` keeps the directory).
"""

from __future__ import annotations

import os
import random
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Final

from replicator.control.client import call, stream
from replicator.errors import NotRunning, Refused, ReplicatorError

RESOURCE: Final = "demo"
WAIT_S: Final = 30.0
SOCKET_PATH_MAX: Final = 100  #: the kernel takes 107 bytes
LOG_LINES: Final = 8
_PASSING = ("in-transient-state", "peer-is-primary")  # refusals that time may mend after a crash


class DemoFailed(ReplicatorError):
    """What was to be shown is not so."""


class Node:
    """One node: its directory, its process."""

    def __init__(self, root: Path, name: str, number: int, port: int) -> None:
        self.name = name
        self.number = number
        self.address = f"127.0.0.1:{port}"
        self.directory = root / name
        self.run_dir = self.directory / "run"
        self.key_dir = self.directory / "keys"
        self.disk = self.directory / "disk"
        self.log = self.directory / "log"
        self.process: subprocess.Popen[bytes] | None = None
        self.run_dir.mkdir(parents=True)
        self._control = str(self.run_dir / f"{RESOURCE}.sock")
        self._environ = os.environ | {
            "REPLICATOR_CONFIG_DIR": str(root),
            "REPLICATOR_RUN_DIR": str(self.run_dir),
            "REPLICATOR_KEY_DIR": str(self.key_dir),
            "REPLICATOR_NODE": name,
        }

    @property
    def nbd(self) -> str:
        """The path of its NBD socket."""
        return str(self.run_dir / f"{RESOURCE}.0.nbd")

    @property
    def uri(self) -> str:
        """The same for nbdcopy and fio."""
        return f"nbd+unix:///{RESOURCE}%2F0?socket={self.nbd}"

    def section(self) -> str:
        """Its part of the configuration."""
        return (
            f'[node.{self.name}]\nid = {self.number}\naddress = "{self.address}"\n'
            f'[node.{self.name}.volume.0]\ndisk = "{self.disk}"\n'
        )

    # -- its process --------------------------------

    def command(self, *words: str) -> None:
        """`replicator WORDS` on this node; raises DemoFailed with what it said."""
        command = [sys.executable, "-m", "replicator", *words]
        done = subprocess.run(command, env=self._environ, capture_output=True, text=True, check=False)
        if done.returncode:
            raise DemoFailed(f"replicator {' '.join(words)} on {self.name}: {done.stderr.strip()}")

    def start(self) -> None:
        """Run its process and wait until its disk is attached."""
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "replicator", "run", RESOURCE],
                env=self._environ,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,  # Ctrl-C is for us, and we end it
            )
        self.wait("its disk", lambda status: status["devices"][0]["disk-state"] not in ("Attaching", "Diskless"))

    def kill(self) -> None:
        """SIGKILL: no farewell, no flush."""
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self.process = None

    def down(self) -> None:
        """End it in order."""
        assert self.process is not None
        self.tell("down")
        code = self.process.wait(WAIT_S)
        self.process = None
        if code:
            raise DemoFailed(f"the process of {self.name} ended with exit code {code}")

    def last_words(self) -> str:
        """The end of its log."""
        with suppress(FileNotFoundError):
            lines = self.log.read_text(errors="replace").splitlines()[-LOG_LINES:]
            return "".join(f"  {self.name}: {line[:400]}\n" for line in lines)
        return ""

    # -- its control socket --------------------------------

    def tell(self, verb: str, **args: object) -> None:
        """One verb, repeated while it is refused because something passing is in the way.  Raises Refused."""
        deadline_s = time.monotonic() + WAIT_S
        while True:
            try:
                call(self._control, verb, args, WAIT_S)
                return
            except Refused as refused:
                if refused.code not in _PASSING or time.monotonic() > deadline_s:
                    raise
            time.sleep(0.05)

    def status(self) -> Mapping[str, Any]:
        """The present state.  Raises NotRunning."""
        return call(self._control, "status")

    def wait(self, what: str, good: Callable[[Mapping[str, Any]], bool]) -> None:
        """Until `good(status)`; raises DemoFailed when that takes too long or the process ended."""
        deadline_s = time.monotonic() + WAIT_S
        last: Mapping[str, Any] = {}
        while time.monotonic() < deadline_s:
            if self.process is not None and self.process.poll() is not None:
                raise DemoFailed(f"the process of {self.name} ended with exit code {self.process.returncode}")
            with suppress(NotRunning):
                last = self.status()
                if good(last):
                    return
            time.sleep(0.05)
        why = "; ".join(str(reason["text"]) for reason in last.get("reasons", []))
        raise DemoFailed(f"{self.name} did not get {what} within {WAIT_S:.0f} s", hint=why)

    def changes(self) -> Iterator[Mapping[str, Any]]:
        """The state now, and whenever it changes.  Raises NotRunning, also when that takes too long."""
        for message in stream(self._control, "events", {"status": True}, WAIT_S):
            status = message.get("status")
            if isinstance(status, dict):
                yield status


@contextmanager
def scene(*, keep: bool) -> Iterator[tuple[Node, Node]]:
    """A temporary directory with two nodes that were never started; all of it is gone afterwards."""
    root = Path(tempfile.mkdtemp(prefix="replicator-demo-"))
    nodes: list[Node] = []
    try:
        if len(f"{root}/alpha/run/{RESOURCE}.sock") > SOCKET_PATH_MAX:
            raise DemoFailed(f"{root} is too long for UNIX sockets", hint="set TMPDIR to a shorter path")
        for number, (name, port) in enumerate(zip(("alpha", "beta"), free_ports(2), strict=True)):
            nodes.append(Node(root, name, number, port))
        yield nodes[0], nodes[1]
    except (ReplicatorError, OSError):
        for node in nodes:
            sys.stderr.write(node.last_words())
        raise
    finally:
        for node in nodes:
            node.kill()
        if keep:
            print(f"kept: {root}")
        else:
            shutil.rmtree(root, ignore_errors=True)


def free_ports(count: int) -> list[int]:
    """Ports of 127.0.0.1 that nobody listens on, below the ephemeral range."""
    found: list[int] = []
    for port in random.sample(range(20000, 32000), 200):
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", port))
            found.append(port)
        if len(found) == count:
            return found
    raise DemoFailed("200 ports between 20000 and 32000 of 127.0.0.1 are all in use")
