# SPDX-License-Identifier: Apache-2.0
"""One run: a workload, an operator, a cluster manager and faults, all drawn from the seed; then checks.

Safety phase: anything of the drawn kinds may happen.  Liveness phase: faults stop, both nodes are switched on, and
within a bound they must be Connected and UpToDate, byte for byte equal, and show what was acknowledged.
"""

from __future__ import annotations

import errno
import random
from dataclasses import dataclass, field

from replicator.core.actions import CommandDone, Notice, Reply
from replicator.core.events import ClientOpened, Io
from replicator.core.geometry import BLOCK, SECTOR
from replicator.core.states import Disk as DiskState
from replicator.core.states import Role
from tests.sim.build import established, ready, two_nodes
from tests.sim.oracle import Issued, Oracle, fill
from tests.sim.world import MS, SECOND, US, Node, World


@dataclass
class Swarm:
    """The faults of this run; a rate is the mean number of events per simulated second."""

    kill: float = 0.0
    power: float = 0.0
    cut: float = 0.0
    partition: float = 0.0
    stall: float = 0.0
    switch: float = 0.0
    operator: float = 0.0
    disk: float = 0.0
    options: dict[str, object] = field(default_factory=dict)
    size: int = 2 << 20
    volumes: tuple[int, ...] = (0,)

    @classmethod
    def draw(cls, rng: random.Random) -> Swarm:
        """Each kind is present in about half of the runs."""

        def rate(most: float) -> float:
            return rng.random() * most if rng.random() < 0.5 else 0.0

        options: dict[str, object] = {
            "protocol": rng.choice("CCCBA"),
            "checksum_sync": rng.choice(("auto", "always", "never")),
            "epoch_writes_max": rng.choice((1, 4, 64, 2048)),
            "epoch_time_ns": rng.choice((5, 50, 1000)) * MS,
            "activity_extents": rng.choice((9, 12, 1008)),
            "resync_max_rate": rng.choice((0, 0, 4 << 20)),
            "ping_interval_ns": SECOND,
            "ping_timeout_ns": SECOND // 2,
            "timeout_ns": SECOND // 2,
            "ko_count": 3,
            "handshake_timeout_ns": 2 * SECOND,
        }
        return cls(
            kill=rate(3), power=rate(2), cut=rate(5), partition=rate(2), stall=rate(2), switch=rate(3),
            operator=rate(4), disk=rate(0.5), options=options, size=rng.choice((1 << 20, 2 << 20, 2 << 20, 52 << 20)),
            volumes=rng.choice(((0,), (0,), (0, 1))),
        )  # fmt: skip


class Run:
    """One seed."""

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.rng = random.Random(f"run {seed}")
        self.swarm = Swarm.draw(self.rng)
        self.world: World = two_nodes(seed, size=self.swarm.size, volumes=self.swarm.volumes, **self.swarm.options)
        self.oracles = {number: Oracle() for number in self.swarm.volumes}
        self.number = 0
        self.over = False
        #: per volume, the nodes whose disk holds every acknowledged write
        self.holding = {number: {0, 1} for number in self.swarm.volumes}
        #: per volume, the blocks that differed when they were last compared
        self.different: dict[int, set[int]] = {number: set() for number in self.swarm.volumes}
        self.promoting = False
        self.stop_at = 0
        self.seen: dict[str, int] = {}
        self.fault: str | None = None

    def sometimes(self, what: str) -> None:
        """A rare situation was reached."""
        self.seen[what] = self.seen.get(what, 0) + 1

    # --- facts

    def primary(self) -> Node | None:
        """The node that serves; two are a broken invariant (I-6)."""
        found = [
            node
            for node in self.world.nodes.values()
            if node.resource is not None and node.resource.roles.role is Role.PRIMARY
        ]
        assert len(found) < 2, "two Primaries"
        return found[0] if found else None

    @property
    def authority(self) -> set[int]:
        """Nodes that hold everything."""
        return set.intersection(*self.holding.values())

    def holders(self, node: Node, number: int) -> set[int]:
        """Where a write to this volume lies when it is acknowledged now by this Primary."""
        assert node.resource is not None
        volume = node.resource.volumes[number]
        here = {node.id} if volume.disk is DiskState.UP_TO_DATE else set()
        return here | {peer for peer, replica in volume.replicas.items() if replica.has_good_data}

    def refresh_authority(self) -> None:
        """Copies that caught up count again."""
        node = self.primary()
        for number, holding in self.holding.items():
            if node is not None:
                if self.caught_up(node):
                    holding.update(self.holders(node, number))
            elif established(self.world):
                holding.update({0, 1})

    def loses(self, node: Node, number: int | None = None) -> None:
        """This node's copy may lack something from now on."""
        for volume in self.holding if number is None else (number,):
            if self.holding[volume] != {node.id}:  # the only good copy stays what it is, also on a disk that was let go
                self.holding[volume] -= {node.id}

    def caught_up(self, node: Node) -> bool:
        """Under protocol A the peer has everything only when nothing is on its way."""
        assert node.resource is not None
        return self.swarm.options["protocol"] != "A" or not any(
            connection.unwritten_bytes for connection in node.resource.connections.values()
        )

    def noticed(self, node: Node, notice: Notice) -> None:
        """A Primary that begins a generation has gone on alone: nobody else may be chosen."""
        if notice.code != "new-generation":
            return
        if node is self.primary() or notice.fields.get("reason") == "promotion":
            for number, holding in self.holding.items():
                if holding & {node.id}:
                    holding.intersection_update(self.holders(node, number))

    # --- the workload

    def client(self) -> None:
        """One request after the other to whoever is Primary."""
        if self.over:
            return
        node = self.primary()
        if node is None or self.number > 3000:
            self.world.after(5 * MS, self.client)
            return
        oracle_of = self.rng.choice(list(self.oracles))
        kind = self.rng.random()
        if kind < 0.68:
            self.write(node, oracle_of)
        elif kind < 0.88:
            self.read(node, oracle_of)
        else:
            self.flush(node, oracle_of)

    def again(self) -> None:
        """The next request of this client, a little later."""
        self.world.after(int(self.rng.expovariate(1) * 300 * US), self.client)

    def place(self) -> tuple[int, int]:
        """First sector and count: hot spots, block aligned and not, sometimes large."""
        sectors = self.swarm.size // SECTOR
        if self.rng.random() < 0.2:
            first, count = self.rng.randrange(sectors - 64), self.rng.randint(1, 63)
        else:
            first, count = self.rng.randrange(0, sectors - 8, 8), 8
        if self.rng.random() < 0.3:
            first = first % 256
        return first, count

    def write(self, node: Node, volume: int) -> None:
        """Write, trim or zero."""
        self.number += 1
        first, count = self.place()
        kind = self.rng.random()
        io = Io.WRITE if kind < 0.85 else Io.TRIM if kind < 0.93 else Io.ZERO
        write = Issued(self.number, first, count, self.world.now, zero=io is not Io.WRITE, fua=self.rng.random() < 0.1)
        oracle = self.oracles[volume]
        oracle.issue(write)

        def done(reply: Reply) -> None:
            if reply.error == 0:
                holders = self.holders(node, volume)
                if self.swarm.options["protocol"] == "A" and node.id in holders:
                    holders = {node.id}
                elif self.swarm.options["protocol"] == "A":
                    self.holding[volume] = set(holders)  # in order: what it acknowledges now includes all before
                if holders:  # (when the acknowledgement and the end of the link came together, nobody is)
                    self.holding[volume] &= holders
                oracle.ack(write, self.world.now)
            else:
                assert reply.error in (errno.EIO, errno.EPERM), reply
                write.over = True
                self.sometimes("write failed")
            self.again()

        data = fill(write.number, count) if io is Io.WRITE else b""
        node.request(done, io, first * SECTOR, count * SECTOR, data=data, fua=write.fua, volume=volume)

    def read(self, node: Node, volume: int) -> None:
        """Read and compare."""
        first, count = self.place()
        started = self.world.now

        def done(reply: Reply) -> None:
            if reply.error == 0:
                fault = self.oracles[volume].read(first, bytes(reply.data), started, self.world.now)
                if fault is not None:
                    self.fail(f"read from node {node.id} volume {volume}: {fault}")
            self.again()

        node.request(done, Io.READ, first * SECTOR, count * SECTOR, volume=volume)

    def flush(self, node: Node, volume: int) -> None:
        """FLUSH."""
        started = self.world.now

        def done(reply: Reply) -> None:
            if reply.error == 0:
                self.oracles[volume].flushed(started)
            self.again()

        node.request(done, Io.FLUSH, 0, 0, volume=volume)

    def fail(self, text: str) -> None:
        """The first fault counts."""
        if self.fault is None:
            self.fault = text
            self.world.trace(9, f"FAULT {text}")
            raise AssertionError(text)

    # --- the cluster manager

    def manage(self) -> None:
        """Restart dead nodes after a while; keep one Primary on a node with all the data."""
        if self.over:
            return
        self.refresh_authority()
        self.check_difference()
        for node in self.world.nodes.values():
            if not node.up and self.rng.random() < 0.1:
                node.boot()
        if self.primary() is None and not self.promoting:
            candidates = [self.world.nodes[i] for i in sorted(self.authority) if self.world.nodes[i].up]
            if candidates:
                self.promote(self.rng.choice(candidates))
        self.world.after(20 * MS, self.manage)

    def promote(self, node: Node) -> None:
        """Ask a node to be Primary; both are never asked at once."""
        self.promoting = True
        life = node.life
        swarm = self.swarm
        quiet = not (swarm.kill or swarm.power or swarm.cut or swarm.partition or swarm.stall or swarm.operator)
        if quiet and self.rng.random() < 0.2 and established(self.world):
            self.sometimes("two promotions raced")
            other = self.world.nodes[1 - node.id]
            if other.up:
                other.command("primary", lambda _: None)

        def done(answer: CommandDone) -> None:
            self.promoting = False
            if answer.ok:
                node.opened += 1
                node.step(ClientOpened(0, 0, True, "the workload"))

        node.command("primary", done)

        def died() -> None:
            if node.life != life:
                self.promoting = False
            elif self.promoting:
                self.world.after(50 * MS, died)

        self.world.after(50 * MS, died)

    def die(self, node: Node, *, power: bool) -> None:
        """Kill or cut the power; what the oracle may then expect."""
        was_primary = node.resource is not None and node.resource.roles.role is Role.PRIMARY
        if self.swarm.options["protocol"] == "B" and not was_primary:
            for holding in self.holding.values():
                if holding != {node.id}:
                    holding.discard(node.id)  # it may have acknowledged what it received and did not write
        if power:
            for number, holding in self.holding.items():
                if holding == {node.id}:
                    self.oracles[number].last_copy_lost_power()
                    self.sometimes("last good copy lost power")
                else:
                    holding.discard(node.id)
        resource = node.resource
        assert resource is not None
        states = {
            replica.replication.value for volume in resource.volumes.values() for replica in volume.replicas.values()
        }
        for state in states & {"SyncTarget", "SyncSource", "WFBitMapS", "WFBitMapT"}:
            self.sometimes(f"{'power cut' if power else 'kill'} while {state}")
        node.die(power=power)
        self.promoting = False
        if was_primary:
            for oracle in self.oracles.values():
                oracle.died()
            for _ in range(4):
                self.again()

    # --- faults

    def faults(self) -> None:
        """Draw the next fault of each kind."""
        for name in ("kill", "power", "cut", "partition", "stall", "switch", "operator", "disk"):
            rate = getattr(self.swarm, name)
            if rate:
                self.schedule(name, rate)

    def schedule(self, name: str, rate: float) -> None:
        """Poisson arrivals until the safety phase ends."""
        delay = int(self.rng.expovariate(rate) * SECOND)

        def happen() -> None:
            if self.over or self.world.now >= self.stop_at:
                return
            getattr(self, f"fault_{name}")()
            self.schedule(name, rate)

        self.world.after(delay, happen)

    def some_node(self) -> Node | None:
        """A node that is up."""
        up = [node for node in self.world.nodes.values() if node.up]
        return self.rng.choice(up) if up else None

    def fault_kill(self) -> None:
        """kill -9 of one process, or of both."""
        node = self.some_node()
        if node is not None:
            self.die(node, power=False)
            if self.rng.random() < 0.2:
                other = self.world.nodes[1 - node.id]
                if other.up:
                    self.sometimes("both killed")
                    self.die(other, power=False)

    def fault_power(self) -> None:
        """Power cut of one node; of both only together with the loss that the promise allows."""
        node = self.some_node()
        if node is None:
            return
        self.die(node, power=True)

    def fault_cut(self) -> None:
        """Reset the connection."""
        self.world.cut_all()

    def fault_partition(self) -> None:
        """No connection for a while."""
        world = self.world
        world.partitioned = True
        world.cut_all()

        def heal() -> None:
            world.partitioned = False

        world.after(int(self.rng.random() * 2 * SECOND), heal)

    def fault_stall(self) -> None:
        """One direction of the link hangs."""
        alive = [link for link in self.world.links if link.alive]
        if not alive:
            return
        link, side = alive[-1], self.rng.randrange(2)
        self.world.stall(link, side, stalled=True)
        self.world.after(int(self.rng.random() * 3 * SECOND), lambda: self.world.stall(link, side, stalled=False))

    def fault_switch(self) -> None:
        """Switch over in order: demote here; the manager promotes again."""
        node = self.primary()
        if node is not None and not self.promoting:
            self.sometimes("switch over")
            node.command("secondary", lambda _: None, force=True)

    def fault_operator(self) -> None:
        """Commands that are allowed at any time."""
        node = self.some_node()
        if node is None:
            return
        choice = self.rng.random()
        if choice < 0.4:
            node.command("disconnect", lambda _: None)
            self.world.after(int(self.rng.random() * SECOND), lambda: node.up and node.command("connect"))
        elif choice < 0.6:
            node.command("pause-sync", lambda _: None)
            self.world.after(int(self.rng.random() * SECOND), lambda: node.up and node.command("resume-sync"))
        elif choice < 0.8:
            if established(self.world):
                secondary = [n for n in self.world.nodes.values() if n is not self.primary()]
                self.sometimes("invalidate")
                volume = self.rng.choice(self.swarm.volumes)
                self.loses(secondary[0], volume)
                secondary[0].command("invalidate", lambda _: None, volume=volume)
        else:
            volume = self.rng.choice(self.swarm.volumes)
            victim = node

            def detached(answer: CommandDone) -> None:
                if answer.ok:
                    self.sometimes("detach")
                    self.loses(victim, volume)

            node.command("detach", detached, volume=volume)
            self.world.after(int(self.rng.random() * SECOND), lambda: node.up and node.command("attach"))

    def fault_disk(self) -> None:
        """A disk fails for a while (every operation, or only flush); only while another copy is good."""
        node = self.some_node()
        if node is None or not established(self.world) or self.authority != {0, 1}:
            return
        volume = self.rng.choice(self.swarm.volumes)
        disk = node.disks[volume]
        self.sometimes("disk failed")
        if self.rng.random() < 0.3:
            disk.fail_flush = True
        else:
            disk.broken = True

        def mend() -> None:
            disk.broken = disk.fail_flush = False
            if node.up:
                node.command("attach", lambda _: None)

        self.world.after(int(self.rng.random() * SECOND), mend)

    # --- checks

    def check_difference(self) -> None:
        """V1 where it can be seen from outside: both up, nothing in flight; what differs is marked on one side."""
        nodes = list(self.world.nodes.values())
        for node in nodes:
            resource = node.resource
            if resource is None or not resource.log.idle or node.in_flight:
                return
            for volume in resource.volumes.values():
                if volume.attached is None or volume.path.in_flight:
                    return
        for link in self.world.links:
            if link.alive and any(link.queues):
                return
        for number in self.swarm.volumes:
            for block in self.different_blocks(number):
                if not any(self.marked(node, number, block) for node in nodes):
                    self.fail(f"volume {number} block {block} differs and nobody knows")

    def different_blocks(self, number: int) -> list[int]:
        """Where the copies differ; looks only at what was touched since it looked last."""
        first, second = (node.disks[number].data for node in self.world.nodes.values())
        known = self.different[number]
        for block in first.touched | second.touched:
            part = slice(block * BLOCK, (block + 1) * BLOCK)
            (known.discard if first.seen[part] == second.seen[part] else known.add)(block)
        first.touched.clear()
        second.touched.clear()
        return sorted(known)

    @staticmethod
    def marked(node: Node, number: int, block: int) -> bool:
        """The bit towards the other node is set."""
        assert node.resource is not None
        volume = node.resource.volumes[number]
        assert volume.attached is not None
        return volume.attached.bitmaps[1 - node.id].any_dirty(block, 1)

    # --- the run

    def execute(self, seconds: float = 4.0) -> None:
        """Both phases; AssertionError with the seed when something is wrong."""
        world = self.world
        ready(world)
        world.noticed = self.noticed
        self.stop_at = world.now + int(seconds * SECOND)
        for _ in range(4):
            self.client()
        self.manage()
        self.faults()
        world.run(limit=int(seconds * SECOND))
        self.heal()
        if not world.run(lambda: established(world) and self.primary() is not None, limit=120 * SECOND):
            whys = [node.resource.status()["reasons"] if node.resource else "down" for node in world.nodes.values()]
            self.fail(f"no convergence: {whys}")
        self.over = True
        if not world.run(self.quiet, limit=30 * SECOND):
            self.fail("requests hang")
        world.run(limit=3 * SECOND)
        self.final()

    def heal(self) -> None:
        """End of the safety phase."""
        world = self.world
        world.trace(9, "liveness phase")
        world.partitioned = False
        for link in world.links:
            for side in (0, 1):
                if link.stalled[side]:
                    world.stall(link, side, stalled=False)
        for node in world.nodes.values():
            for disk in node.disks.values():
                disk.broken = disk.fail_flush = False
            if not node.up:
                node.boot()
            else:
                node.command("attach", lambda _: None)
                node.command("connect")
                node.command("resume-sync")

        def nudge() -> None:
            if self.over:
                return
            for node in world.nodes.values():
                if node.up:
                    node.command("attach", lambda _: None)
                    node.command("resume-sync", lambda _: None)
            world.after(SECOND, nudge)

        world.after(SECOND, nudge)

    def quiet(self) -> bool:
        """Nothing in flight anywhere."""
        return all(not node.replies and not node.in_flight for node in self.world.nodes.values())

    def final(self) -> None:
        """Byte for byte equal, and what was acknowledged is there."""
        for number, oracle in self.oracles.items():
            first, second = (node.disks[number].data.seen for node in self.world.nodes.values())
            if first != second:
                at = next(i for i in range(len(first)) if first[i] != second[i])
                self.fail(f"volume {number}: copies differ at byte {at}, block {at // BLOCK}")
            touched = sorted(oracle.possible)
            for sector in touched:
                fault = oracle.wrong(sector, bytes(first[sector * SECTOR : (sector + 1) * SECTOR]))
                if fault is not None:
                    self.fail(f"volume {number}: {fault}")
