# SPDX-License-Identifier: Apache-2.0
"""What every fault test does: two nodes, clients that write down what they see, a manager, and the checks at the end.

The test plays the cluster manager: it never promotes a node before the old Primary is certainly dead.
"""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from itertools import count
from pathlib import Path
from typing import Final

from replicator.control.client import call
from replicator.drivers.nbd_client import NbdClient
from tests.faults.disks import FaultyDisk
from tests.faults.history import BLOCK, Clients, History, read_block, values_of
from tests.faults.linearizable import INITIAL, Kind, Operation
from tests.faults.network import HOSTS, Network
from tests.integration.cluster import GIVE_UP_S, MIB, NODES, Status, TwoNodes, alone, connected, synced

SIZE: Final = 24 * MIB
#: Few, so that clients meet; in two extents of the activity log.
BLOCKS: Final = (0, 1, 2, 1023, 1024, 1025)
#: For writes that are never repeated; behind what single tests write for themselves.
ONCE: Final = range(4200, 6100)
#: A peer is lost only when the test takes it away: on a busy machine a second is nothing.
PATIENT: Final = {"ping-timeout": "140ms", "timeout": "140ms", "connect-interval": "150ms"}
TRIES_MAX: Final = 20
PATIENT_NET: Final = 'ping-interval = "60s"\nko-count = 255'
#: A dead peer is noticed soon; losing a living one on a busy machine must be harmless to the test.
NERVOUS: Final = {"ping-timeout": "300ms", "timeout": "300ms", "connect-interval": "350ms"}
NERVOUS_NET: Final = 'ping-interval = "350ms"\nko-count = 4'


class Story:
    """Two nodes that mirror, one of them Primary, and a history."""

    def __init__(self, nodes: TwoNodes, disks: Mapping[str, FaultyDisk], metadata: Mapping[str, FaultyDisk]) -> None:
        self.nodes = nodes
        self.disks = disks
        self.metadata = metadata
        self.size_bytes = 0  # of the volume
        self.primary, self.secondary = NODES
        self.history = History()
        self.values = count(1)
        self.once = iter(ONCE)
        self._clients: list[Clients] = []
        self._stopped: dict[str, int] = {}  # node -> pid of its stopped process

    # -- clients --------------------------------

    def connect(self) -> NbdClient:
        """To the Primary, as the test knows it now."""
        return self.nodes.nbd(self.primary)

    def clients(self, *, seed: int, number: int = 4, flush_share: float = 0.05) -> Clients:
        """Clients at work; they are stopped at the end in any case."""
        made = Clients(
            self.history,
            self.connect,
            blocks=BLOCKS,
            seed=seed,
            number=number,
            flush_share=flush_share,
            values=self.values,
            once=self.once,
        )
        self._clients.append(made)
        return made

    def close(self) -> None:
        """Before the nodes are killed."""
        for clients in self._clients:
            clients.abandon()
        for node in list(self._stopped):
            self.resume(node)

    # -- the manager --------------------------------

    def promote(self, *, force: bool = False) -> None:
        call(self.nodes.control(self.primary), "primary", {"force": True} if force else {}, timeout_s=GIVE_UP_S)

    def swap(self) -> None:
        """The names: who was Secondary is to be Primary."""
        self.primary, self.secondary = self.secondary, self.primary

    def fail_over(self) -> None:
        """The old Primary is dead; once the survivor knows, it becomes Primary."""
        assert self.primary not in self.nodes.processes, f"{self.primary} was not fenced"
        self.nodes.wait(self.secondary, alone)
        self.swap()
        self.promote()

    def start(self, node: str) -> None:
        """Start it; its disk has to be attached."""
        said = self.nodes.start(node)
        assert said["ready"] and said["attach"]["ok"], f"{node}: {said}\n{self.nodes.logs()}"

    def stop(self, node: str) -> None:
        """SIGSTOP; done when no thread of it runs any more."""
        process = self.nodes.processes[node]
        self._stopped[node] = process.pid
        process.send_signal(signal.SIGSTOP)
        os.waitid(os.P_PID, process.pid, os.WSTOPPED | os.WNOWAIT)

    def stop_mirroring_primary(self) -> None:
        """SIGSTOP the Primary while everything it acknowledged is on both copies.

        A nervous Primary may have lost its peer on a busy machine, and then acknowledged alone; a manager that has no
        fencing policy must not fail over from that, nor do we.
        """
        for _ in range(TRIES_MAX):
            self.stop(self.primary)
            if self._mirrors(self.primary):
                return
            self.resume(self.primary)
            self.synced()
        raise AssertionError(f"{self.primary} keeps losing its peer\n{self.nodes.logs()}")

    def _mirrors(self, node: str) -> bool:
        """What a node last logged of its peer."""
        lines = (json.loads(line) for line in (self.nodes.base / f"{node}.log").read_text().splitlines() if line)
        states = [line for line in lines if line["event"] in ("connection-state", "replication-state")]
        return bool(states[-1].get("replication") == "Established")

    def resume(self, node: str) -> None:
        """SIGCONT."""
        os.kill(self._stopped.pop(node), signal.SIGCONT)

    def kill(self, node: str) -> None:
        """SIGKILL, also of a stopped process."""
        self._stopped.pop(node, None)
        self.nodes.kill(node)

    def power_cut(self, *victims: str) -> None:
        """Process and disk at once; what the disk had not made stable is gone.

        The process is stopped first, so that it does not see its disk go.  Nobody waits for a thread of it that is in
        the middle of a request: the disk would finish that.
        """
        for node in victims:
            self.nodes.processes[node].send_signal(signal.SIGSTOP)
        for node in victims:
            self.disks[node].power_off()
        for node in victims:
            self.kill(node)
        for node in victims:
            self.disks[node].power_on()

    def new_era(self, held: Mapping[int, int]) -> None:
        """After a power cut of everything: what is there now is what there is; nothing older may come back."""
        self.history = History()
        for block, value in held.items():
            if value != INITIAL:
                self.history.add(Operation(99, Kind.WRITE, block, value, -2, -1))

    # -- the checks --------------------------------

    def synced(self) -> None:
        """Wait until both say that the copies are equal; a split brain would never end."""
        for node in NODES:
            self.nodes.wait(node, self._synced)

    def _synced(self, status: Status) -> bool:
        self.no_parting(status)
        return synced(status)

    def no_parting(self, status: Status) -> None:
        state = status["connections"][0]["connection-state"]
        assert state != "StandAlone", f"{status['reasons']}\n{self.nodes.logs()}"

    def wait_connected(self) -> None:
        for node in NODES:
            self.nodes.wait(node, connected)

    def read_all(self) -> dict[int, int]:
        """Every block, from the Primary, into the history; block -> value (of its first sector)."""
        written = {operation.block for operation in self.history.operations}
        with self.connect() as client:
            return {block: read_block(self.history, client, 99, block)[0] for block in sorted({*BLOCKS, *written})}

    def check_history(self) -> None:
        """What the clients saw, one disk could have done."""
        assert self.history.count(Kind.WRITE) and self.history.count(Kind.READ), "nothing was recorded"
        found = self.history.violations()
        assert not found, "\n".join(map(str, found[:3])) + f"\n{self.nodes.logs()}"

    def finish(self) -> None:
        """The clients end, the copies become equal, the history is judged, and the disks are compared, whole."""
        for clients in self._clients:
            clients.stop()
        self.synced()
        self.read_all()
        self.check_history()
        self.compare()

    def compare(self) -> None:
        """Both nodes go down in order; without power what was on their disks must be equal, and what clients saw."""
        expected = self.read_all()
        for node in (self.primary, self.secondary):
            call(self.nodes.control(node), "down", timeout_s=GIVE_UP_S)
            assert self.nodes.ended(node) == 0
        copies = []
        for node in NODES:
            if node in self.disks:
                self.disks[node].power_off()
            platter = self.disks[node].platter if node in self.disks else self.nodes.disk(node)
            copies.append(platter.read_bytes()[: self.size_bytes])
        differing = [
            block
            for block in range(self.size_bytes // BLOCK)
            if copies[0][block * BLOCK : (block + 1) * BLOCK] != copies[1][block * BLOCK : (block + 1) * BLOCK]
        ]
        assert not differing, f"the copies differ in blocks {differing[:10]}\n{self.nodes.logs()}"
        for block, value in expected.items():
            assert values_of(block, copies[0][block * BLOCK : (block + 1) * BLOCK])[0] == value, f"block {block}"


@contextmanager
def story(
    tmp_path: Path,
    *,
    timing: Mapping[str, str],
    net: str,
    network: Network | None = None,
    volatile: Iterable[str] = (),
    faulty: Iterable[str] = (),
    faulty_metadata: Iterable[str] = (),
    slow_ms: Mapping[str, int] | None = None,
    disks: Mapping[str, Path] | None = None,
    security: str = "clear",
    prefix: Mapping[str, Sequence[str]] | None = None,
    protocol: str = "C",
    before: Callable[[TwoNodes], None] = lambda _: None,
    size_bytes: int = SIZE,
) -> Iterator[Story]:
    """A pair that mirrors, alpha Primary; everything ends with the block.

    `volatile` and `faulty` nodes get a `FaultyDisk`, past the page cache, whose requests `slow_ms` delays; those of
    `faulty_metadata` one for their metadata, which is external then on every node; `disks` names files for the
    others.  `prefix` starts a node's daemon.  `before` runs before the first command.
    """
    hosts: Mapping[str, str] = {}
    if network is not None:
        hosts, prefix = HOSTS, {node: network.prefix(node) for node in NODES}
        net += "\nclear-off-loopback = true"
    with ExitStack() as stack:
        made: dict[str, FaultyDisk] = {}
        for node in sorted({*volatile, *faulty}):
            made[node] = FaultyDisk(
                tmp_path / f"faulty-{node}",
                size_bytes=size_bytes,
                volatile=node in {*volatile},
                delay_ms=(slow_ms or {}).get(node, 0),
            )
        areas = {node: FaultyDisk(tmp_path / f"metadata-{node}", size_bytes=4 * MIB) for node in faulty_metadata}
        for disk in (*made.values(), *areas.values()):
            stack.callback(disk.remove)
            disk.power_on()
        files = {node: disk.path for node, disk in made.items()} | dict(disks or {})
        nodes = TwoNodes(
            tmp_path,
            metadata="external" if areas else "internal",
            io="direct" if made else "buffered",
            security=security,
            size_bytes=size_bytes,
            net=net,
            disk="al-extents = 67",
            protocol=protocol,
            timing=timing,
            hosts=hosts,
            prefix=prefix or {},
            disks=files,
            metadata_files={node: area.path for node, area in areas.items()},
        )
        found = Story(nodes, made, areas)
        stack.callback(nodes.close)
        for disk in (*made.values(), *areas.values()):  # a process that waits for a frozen disk cannot be killed
            stack.callback(disk.power_off)
        stack.callback(found.close)
        before(nodes)
        begin(found, security)
        yield found


def begin(found: Story, security: str) -> None:
    """From new disks to a mirror with a Primary."""
    nodes = found.nodes
    if security == "tls":
        nodes.exchange_keys()
    with ThreadPoolExecutor(len(NODES)) as both:  # most of a test is waiting for Python to start
        list(both.map(lambda node: nodes.cli(node, "create-md", "r0", check=True), NODES))
        list(both.map(found.start, NODES))
    found.wait_connected()
    call(nodes.control("alpha"), "new-current-uuid", {"volume": 0, "clear_bitmap": True}, timeout_s=GIVE_UP_S)
    found.synced()
    found.promote()
    with found.connect() as client:
        found.size_bytes = client.size_bytes
