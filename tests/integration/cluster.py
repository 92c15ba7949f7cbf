# SPDX-License-Identifier: Apache-2.0
"""Two real nodes on this machine: real processes, real disks (files), a real link on loopback.

The daemons are started directly, so that a test holds their handles and can kill them.  Each node has its own
configuration, run and key directory; both read the same text.  Whatever happens, `close` leaves no process.
"""

from __future__ import annotations

import json
import os
import random
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import Any, Final, Self

from replicator.control.client import call, stream
from replicator.drivers.nbd_client import NbdClient
from replicator.errors import NotRunning

NODES = ("alpha", "beta")
MIB = 1 << 20
#: Only keeps a broken product from hanging the tests; no test waits this long for what it expects.
GIVE_UP_S = 30.0
PROJECT = Path(__file__).resolve().parents[2]

Status = Mapping[str, Any]

#: How fast a dead peer is noticed; `timing` of `TwoNodes` overrides single values.
TIMING: Final[Mapping[str, str]] = {"connect-interval": "500ms", "timeout": "400ms", "ping-timeout": "300ms"}


def free_ports(count: int) -> list[int]:
    """Ports nobody listens on, below the ephemeral range."""
    found: list[int] = []
    for port in random.sample(range(20000, 32000), 400):
        with socket.socket(socket.AF_INET) as sock:
            try:
                sock.bind(("127.0.0.1", port))
            except OSError:
                continue
        found.append(port)
        if len(found) == count:
            return found
    raise AssertionError("no free port")


class TwoNodes:
    """A resource `r0` on nodes alpha (id 0) and beta (id 1).

    `metadata` is "internal" or "external", `io` "direct" or "buffered", `security` "clear" or "tls"; `net`
    and `disk` are further lines of those sections.

    `timing` replaces values of `TIMING`.  `hosts` and `prefix` (a command that starts another one) put nodes into
    network namespaces; `disks` and `metadata_files` name files that exist already, by node, for volume 0.
    """

    def __init__(
        self,
        tmp_path: Path,
        *,
        metadata: str = "internal",
        io: str = "buffered",
        security: str = "clear",
        size_bytes: int = 64 * MIB,
        volumes: int = 1,
        net: str = "",
        disk: str = "",
        protocol: str = "C",
        timing: Mapping[str, str] = MappingProxyType({}),
        hosts: Mapping[str, str] = MappingProxyType({}),
        prefix: Mapping[str, Sequence[str]] = MappingProxyType({}),
        disks: Mapping[str, Path] = MappingProxyType({}),
        metadata_files: Mapping[str, Path] = MappingProxyType({}),
    ) -> None:
        self.base = tmp_path
        self._hosts = dict.fromkeys(NODES, "127.0.0.1") | dict(hosts)
        self._prefix = {node: list(prefix.get(node, ())) for node in NODES}
        self._disks = disks
        self._metadata_files = metadata_files
        self.volumes = range(volumes)
        # A socket's path is short; pytest's directories are not.
        self._short = Path(tempfile.mkdtemp(prefix="rep-"))
        self.processes: dict[str, subprocess.Popen[bytes]] = {}
        self._logs: dict[str, Path] = {}
        net = "\n".join([*(f'{key} = "{value}"' for key, value in {**TIMING, **timing}.items()), net])
        text = self._config(protocol, metadata, io, security, net, disk)
        for node in NODES:
            for directory in (self.config_dir(node), self.run_dir(node), self._disk_dir(node)):
                directory.mkdir(parents=True)
            path = self.config_dir(node) / "r0.toml"
            path.write_text(text)
            path.chmod(0o644)
            for volume in self.volumes:
                if self.disk(node, volume).parent == self._disk_dir(node):
                    with self.disk(node, volume).open("wb") as file:
                        file.truncate(size_bytes)

    # -- places --------------------------------

    def config_dir(self, node: str) -> Path:
        return self.base / node / "etc"

    def key_dir(self, node: str) -> Path:
        return self.base / node / "keys"

    def run_dir(self, node: str) -> Path:
        return self._short / node

    def _disk_dir(self, node: str) -> Path:
        return self.base / node / "disks"

    def disk(self, node: str, volume: int = 0) -> Path:
        if volume == 0 and node in self._disks:
            return self._disks[node]
        return self._disk_dir(node) / f"{volume}.img"

    def _metadata(self, node: str, volume: int) -> Path:
        if volume == 0 and node in self._metadata_files:
            return self._metadata_files[node]
        return self._disk_dir(node) / f"{volume}.md"

    def control(self, node: str) -> str:
        return str(self.run_dir(node) / "r0.sock")

    def nbd_path(self, node: str, volume: int = 0) -> str:
        return str(self.run_dir(node) / f"r0.{volume}.nbd")

    def environment(self, node: str) -> dict[str, str]:
        return os.environ | {
            "PYTHONPATH": str(PROJECT),
            "REPLICATOR_CONFIG_DIR": str(self.config_dir(node)),
            "REPLICATOR_RUN_DIR": str(self.run_dir(node)),
            "REPLICATOR_KEY_DIR": str(self.key_dir(node)),
            "REPLICATOR_NODE": node,
        }

    def _config(self, protocol: str, metadata: str, io: str, security: str, net: str, disk: str) -> str:
        lines = [
            *([f'protocol = "{protocol}"'] if protocol != "C" else []),
            "[net]",
            f'security = "{security}"',
            net,
            "[disk]",
            f'io = "{io}"',
            disk,
            "[device]",
            'kind = "none"',
        ]
        lines += [f"[volume.{volume}]" for volume in self.volumes]
        for number, (node, port) in enumerate(zip(NODES, free_ports(2), strict=True)):
            lines += [f"[node.{node}]", f"id = {number}", f'address = "{self._hosts[node]}:{port}"']
            for volume in self.volumes:
                lines += [f"[node.{node}.volume.{volume}]", f'disk = "{self.disk(node, volume)}"']
                if metadata == "external":
                    lines.append(f'metadata = "{self._metadata(node, volume)}"')
        return "\n".join(lines) + "\n"

    # -- doing --------------------------------

    def cli(self, node: str, *args: str, check: bool = False) -> subprocess.CompletedProcess[str]:
        """Run one command as `node`; with `check` it has to succeed."""
        done = subprocess.run(
            [sys.executable, "-m", "replicator", *args],
            env=self.environment(node),
            capture_output=True,
            text=True,
            timeout=GIVE_UP_S,
            check=False,
        )
        if check:
            said = f"{done.stdout}{done.stderr}{self.logs()}"
            assert done.returncode == 0, f"{node}: {args}: {done.returncode}\n{said}"
        return done

    def exchange_keys(self) -> None:
        """keygen on both, and each gets the other's certificate."""
        for node in NODES:
            self.cli(node, "keygen", check=True)
        for node, other in (NODES, NODES[::-1]):
            pinned = self.key_dir(node) / "peers" / f"{other}.crt"
            shutil.copy(self.key_dir(other) / "node.crt", pinned)
            pinned.chmod(0o644)

    def create_md(self) -> None:
        """Fresh metadata on both."""
        for node in NODES:
            self.cli(node, "create-md", "r0", check=True)

    def start(self, node: str) -> dict[str, Any]:
        """Start the daemon of a node; what it says when it is ready."""
        assert node not in self.processes, f"{node} runs already"
        reader, writer = os.pipe2(os.O_CLOEXEC)
        log = self._logs.setdefault(node, self.base / f"{node}.log")
        with log.open("ab") as output:
            self.processes[node] = subprocess.Popen(
                [*self._prefix[node], sys.executable, "-m", "replicator", "run", "r0", "--ready-fd", str(writer)],
                env=self.environment(node),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                pass_fds=(writer,),
            )
        os.close(writer)
        with open(reader, "rb", buffering=0) as ready:
            assert select.select([ready], [], [], GIVE_UP_S)[0], f"{node} is not ready\n{self.logs()}"
            line = ready.readall()
        assert line, f"{node} ended before it was ready\n{self.logs()}"
        said: dict[str, Any] = json.loads(line)
        return said

    def start_both(self) -> None:
        """Start both, and wait until they are connected."""
        for node in NODES:
            said = self.start(node)
            assert said["ready"] and said["attach"]["ok"], f"{node}: {said}\n{self.logs()}"
        for node in NODES:
            self.wait(node, connected)

    def kill(self, node: str) -> None:
        """kill -9."""
        process = self.processes.pop(node)
        process.kill()
        process.wait()

    def ended(self, node: str) -> int:
        """Wait for a daemon that was told to end; its exit code."""
        return self.processes.pop(node).wait(GIVE_UP_S)

    def terminate(self, node: str) -> int:
        """SIGTERM; the exit code."""
        self.processes[node].send_signal(signal.SIGTERM)
        return self.ended(node)

    def wait(self, node: str, predicate: Callable[[Status], object]) -> Status:
        """Follow the event stream until `predicate(status)`; that status."""
        found: Any = None
        try:
            for message in stream(self.control(node), "events", {"status": True}, GIVE_UP_S):
                found = message.get("status", found)
                if found is not None and predicate(found):
                    status: Status = found
                    return status
        except Exception as error:
            raise AssertionError(f"{node}: waiting failed: {error}; last {found}\n{self.logs()}") from error
        raise AssertionError(f"{node} ended while a test waited for it; last {found}\n{self.logs()}")

    def status(self, node: str) -> Status:
        """One look."""
        found: list[Status] = json.loads(self.cli(node, "status", "r0", "--json", check=True).stdout)
        return found[0]

    def nbd(self, node: str, volume: int = 0) -> NbdClient:
        """An NBD client of a volume."""
        return NbdClient(self.nbd_path(node, volume), f"r0/{volume}", timeout_s=GIVE_UP_S)

    def data(self, node: str, size_bytes: int, volume: int = 0) -> bytes:
        """The data area of a disk whose daemon is down."""
        with self.disk(node, volume).open("rb") as file:
            return file.read(size_bytes)

    def logs(self) -> str:
        """What the daemons wrote, for a failing test's message."""
        return "".join(f"--- {node}\n{log.read_text()[-6000:]}\n" for node, log in self._logs.items())

    # -- the end --------------------------------

    def close(self) -> None:
        """Kill what runs, also what `up` detached, and remove what is ours."""
        for node in list(self.processes):
            self.kill(node)
        for node in NODES:
            try:
                pid = call(self.control(node), "ping")["pid"]
            except NotRunning:
                continue
            assert isinstance(pid, int)
            handle = os.pidfd_open(pid)
            signal.pidfd_send_signal(handle, signal.SIGKILL)
            select.select([handle], [], [], GIVE_UP_S)
            os.close(handle)
        shutil.rmtree(self._short, ignore_errors=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def connected(status: Status) -> bool:
    """Every peer is connected, and the copies have been compared."""
    return all(
        connection["connection-state"] == "Connected"
        and all(peer["peer-disk-state"] != "DUnknown" for peer in connection["peer_devices"])
        for connection in status["connections"]
    )


def synced(status: Status) -> bool:
    """Both copies of every volume are UpToDate and replicate."""
    return all(device["disk-state"] == "UpToDate" for device in status["devices"]) and all(
        peer["replication-state"] == "Established" and peer["peer-disk-state"] == "UpToDate"
        for connection in status["connections"]
        for peer in connection["peer_devices"]
    )


def alone(status: Status) -> bool:
    """No peer is connected."""
    return all(connection["connection-state"] != "Connected" for connection in status["connections"])
