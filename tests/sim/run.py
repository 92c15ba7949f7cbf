# SPDX-License-Identifier: Apache-2.0
"""One run: clients, a cluster manager, an operator and faults, all from the tape; checkers look on.

Safety phase: whatever the tape says happens.  Liveness phase: faults stop, both nodes are switched on, and within a
bound they must be Connected and UpToDate, byte for byte equal, and show what was acknowledged; after two nodes went on
alone they must both say so instead, and agree again once the operator has given one copy up.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import NoReturn, TypeVar

from replicator.core.actions import Notice, Reply
from replicator.core.events import Io
from replicator.core.geometry import SECTOR
from replicator.core.states import Disk as DiskState
from replicator.core.states import Role
from tests.sim.build import boot, established, ready, two_nodes
from tests.sim.checker import Checker
from tests.sim.checkers import CHECKERS
from tests.sim.faults import FAULTS
from tests.sim.manager import Manager
from tests.sim.node import Node
from tests.sim.oracle import GARBAGE, Branch, Issued, Oracle, fill
from tests.sim.situations import SITUATIONS
from tests.sim.stored import Stored
from tests.sim.tape import Fault, Op, Tape
from tests.sim.traps import Traps
from tests.sim.watch import Watch
from tests.sim.world import MS, SECOND, US, World

C = TypeVar("C", bound=Checker)

CONVERGE_NS = 60 * SECOND
_IO = {"write": Io.WRITE, "trim": Io.TRIM, "zero": Io.ZERO}


class Violation(AssertionError):
    """A checker, or the bound of the liveness phase."""

    def __init__(self, checker: str, text: str) -> None:
        super().__init__(f"{checker}: {text}")
        self.checker = checker


class Run:
    """One tape."""

    def __init__(self, tape: Tape) -> None:
        self.tape, self.swarm = tape, tape.swarm
        self.rng = random.Random(f"run {tape.seed}")
        swarm = tape.swarm
        self.world: World = two_nodes(tape.seed, size=swarm.size_bytes, volumes=swarm.volumes, **swarm.options)
        self.world.rates.disk_us, self.world.rates.net_us = swarm.disk_us, swarm.net_us
        self.number = 0
        self.over = False
        self.healing = False
        branch = Branch(set(self.world.nodes), {number: Oracle() for number in swarm.volumes})
        branch.local_flush = swarm.protocol == "A"
        self.branch_of: dict[int, Branch] = dict.fromkeys(self.world.nodes, branch)
        self.rotten: set[int] = set()  # nodes whose metadata was damaged
        self.seen: dict[str, int] = {}
        self.stored = {
            (node.id, number): Stored(disk, self.other(node).id)
            for node in self.world.nodes.values()
            for number, disk in node.disks.items()
        }
        self.checkers: list[Checker] = [kind(self) for kind in CHECKERS]
        self.manager = Manager(self)
        self.traps = Traps(self)
        self.watch = Watch(self)
        self.left = len(tape.clients)

    # --- facts

    def checker(self, kind: type[C]) -> C:
        """The checker of a class."""
        return next(checker for checker in self.checkers if isinstance(checker, kind))

    def other(self, node: Node) -> Node:
        """The peer."""
        return self.world.nodes[1 - node.id]

    def sometimes(self, what: str) -> None:
        """A rare situation was reached."""
        assert what in SITUATIONS, what
        self.seen[what] = self.seen.get(what, 0) + 1

    def fail(self, checker: Checker | str, text: str) -> NoReturn:
        """The first violation ends the run."""
        name = checker if isinstance(checker, str) else type(checker).__name__
        self.world.trace(9, f"VIOLATION {name}: {text}")
        raise Violation(name, text)

    def primaries(self) -> list[Node]:
        """Nodes that serve."""
        return [
            node
            for node in self.world.nodes.values()
            if node.resource is not None and node.resource.roles.role is Role.PRIMARY
        ]

    def established(self) -> bool:
        """Both mirrored and UpToDate."""
        return established(self.world)

    def still(self) -> bool:
        """Both run on their disks, and nothing is in flight."""
        for node in self.world.nodes.values():
            resource = node.resource
            if resource is None or node.stopped or not resource.log.idle or node.in_flight:
                return False
            for volume in resource.volumes.values():
                if volume.attached is None or volume.path.in_flight:
                    return False
        return not any(link.busy for link in self.world.network.links)

    def whole(self, node: Node) -> bool:
        """Its copy is of one moment (a mixture would show nothing that can be checked)."""
        assert node.resource is not None
        return all(volume.disk > DiskState.INCONSISTENT for volume in node.resource.volumes.values())

    @property
    def branches(self) -> list[Branch]:
        """The histories that somebody is in, each once."""
        return list({id(branch): branch for branch in self.branch_of.values()}.values())

    # --- who has what

    def holders(self, node: Node, number: int) -> set[int]:
        """Where a write to this volume lies when it is acknowledged now by this Primary."""
        assert node.resource is not None
        volume = node.resource.volumes[number]
        here = {node.id} if volume.disk is DiskState.UP_TO_DATE else set()
        return here | {peer for peer, replica in volume.replicas.items() if replica.has_good_data}

    def good(self, who: int, number: int) -> bool:
        """This node itself calls its copy UpToDate (a Primary may not have heard yet that it is not)."""
        resource = self.world.nodes[who].resource
        return resource is not None and resource.volumes[number].disk is DiskState.UP_TO_DATE

    def refresh_authority(self) -> None:
        """Copies that caught up count again."""
        primaries = self.primaries()
        for node in primaries:
            if self.caught_up(node):
                branch = self.branch_of[node.id]
                for number in branch.holding:
                    branch.caught_up(number, {who for who in self.holders(node, number) if self.good(who, number)})
        if not primaries and self.established():
            for branch in self.branch_of.values():
                for number in branch.holding:
                    branch.caught_up(number, branch.nodes)

    def loses(self, node: Node, number: int | None = None) -> None:
        """This node's copy may lack something from now on."""
        for volume in self.swarm.volumes if number is None else (number,):
            self.branch_of[node.id].loses(node.id, volume)

    def caught_up(self, node: Node) -> bool:
        """Under protocol A the peer has everything only when nothing is on its way."""
        assert node.resource is not None
        return self.swarm.protocol != "A" or not any(
            connection.unwritten_bytes for connection in node.resource.connections.values()
        )

    def fork(self, node: Node) -> None:
        """This node is promoted though others may know more: a history of its own begins with what it has."""
        old = self.branch_of[node.id]
        complete = not any(oracle.lacks(node.disks[number].data.seen) for number, oracle in old.oracles.items())
        oracles = {}
        for number, oracle in old.oracles.items():
            area = node.disks[number].data.seen
            if self.swarm.protocol == "A":
                hole = oracle.hole(area)
                if hole is not None:
                    self.fail("SuffixOnly", f"volume {number}: {hole}")
                if oracle.lacks(area):
                    self.sometimes("a suffix was lost")
                    complete = True  # (what the protocol allows to be lost is no history that must be kept)
            oracles[number] = oracle.fork(area)
        old.nodes.discard(node.id)
        for number in oracles:
            old.leaves(node.id, number)
        self.branch_of[node.id] = Branch({node.id}, oracles, old)
        self.branch_of[node.id].complete = complete
        self.world.trace(node.id, f"begins a history of its own ({'complete' if complete else 'incomplete'})")

    def joins(self, node: Node, source: Node) -> None:
        """Its copy was made equal to the source's."""
        mine, theirs = self.branch_of[node.id], self.branch_of[source.id]
        if mine is theirs:
            return
        mine.nodes.discard(node.id)
        for number in mine.holding:
            mine.leaves(node.id, number)
        theirs.nodes.add(node.id)
        self.branch_of[node.id] = theirs
        self.world.trace(node.id, "joins the other's history")

    # --- the clients

    def client(self, who: int, at: int = 0) -> None:
        """The next request of a client, after its pause."""
        ops = self.tape.clients[who]
        if at >= len(ops):
            self.left -= 1
            return
        self.world.after(ops[at].pause_us * US, lambda: self._ask(who, at))

    def _ask(self, who: int, at: int) -> None:
        found = self.primaries()
        if self.over:
            self.left -= 1
            return
        if not found:
            self.world.after(5 * MS, lambda: self._ask(who, at))
            return
        node, op = found[who % len(found)], self.tape.clients[who][at]
        session, answered = (node.life, node.cuts), False

        def then() -> None:
            nonlocal answered
            assert not answered
            answered = True
            self.client(who, at + 1)

        def gone() -> None:  # a client that lost its server tries its next request elsewhere
            if not answered:
                if (node.life, node.cuts) != session:
                    then()
                else:
                    self.world.after(20 * MS, gone)

        self.world.after(20 * MS, gone)
        {"read": self._read, "flush": self._flush}.get(op.kind, self._write)(node, op, then)

    def _write(self, node: Node, op: Op, then: Callable[[], None]) -> None:
        self.number += 1
        branch = self.branch_of[node.id]
        write = Issued(self.number, op.first, op.count, self.world.now, zero=op.kind != "write", fua=op.fua)
        branch.oracles[op.volume].issue(write)

        def done(reply: Reply) -> None:
            for checker in self.checkers:
                checker.replied(node, op.volume, write, reply.error)
            if reply.error == 0:
                holders = self.holders(node, op.volume)
                if self.swarm.protocol == "A" and node.id in holders:
                    holders = {node.id}
                elif self.swarm.protocol == "A":
                    branch.caught_up(op.volume, holders)  # in order: what it acknowledges includes all before
                if holders:  # (when the acknowledgement and the end of the link came together, nobody is)
                    branch.lies_on(op.volume, holders)
                branch.oracles[op.volume].ack(write, self.world.now)
                self.watch.replied(node, op.volume, Io.WRITE)
            else:
                write.over = True
            then()

        data = fill(write.number, op.count) if op.kind == "write" else b""
        node.request(done, _IO[op.kind], op.first * SECTOR, op.count * SECTOR, data=data, fua=op.fua, volume=op.volume)

    def _read(self, node: Node, op: Op, then: Callable[[], None]) -> None:
        started, oracle = self.world.now, self.branch_of[node.id].oracles[op.volume]

        def done(reply: Reply) -> None:
            if reply.error == 0:
                fault = oracle.read(op.first, bytes(reply.data), started, self.world.now)
                if fault is not None:
                    self.fail("ReadsAreCurrent", f"read from node {node.id} volume {op.volume}: {fault}")
                self.watch.replied(node, op.volume, Io.READ)
            then()

        node.request(done, Io.READ, op.first * SECTOR, op.count * SECTOR, volume=op.volume)

    def _flush(self, node: Node, op: Op, then: Callable[[], None]) -> None:
        started, branch = self.world.now, self.branch_of[node.id]

        def done(reply: Reply) -> None:
            if reply.error == 0:
                for checker in self.checkers:
                    checker.flushed(node, op.volume, started)
                branch.oracles[op.volume].flushed(started)
                holders = self.holders(node, op.volume)
                branch.flushed_on(op.volume, holders & {node.id} if self.swarm.protocol == "A" else holders)
            then()

        node.request(done, Io.FLUSH, 0, 0, volume=op.volume)

    # --- the run

    def execute(self) -> None:
        """All phases; `Violation` (or an AssertionError of the core) when something is wrong."""
        world = self.world
        self._start()
        self.manager.begin()
        world.noticed, world.at_moment, world.at_metadata = self._noticed, self.traps.moment, self._metadata
        for who in range(len(self.tape.clients)):
            self.client(who)
        self.manager.tick()
        for fault in self.tape.faults:
            world.after(fault.at_us * US, lambda fault=fault: self._happen(fault))  # type: ignore[misc]
        world.run(limit=self.swarm.duration_ms * MS)
        self._settle()

    def _start(self) -> None:
        world = self.world
        if self.swarm.first_sync == "skip":
            ready(world)
            return
        for number in self.swarm.volumes:
            area = world.nodes[1].disks[number].data
            area.damage(0, (GARBAGE.to_bytes(8, "big") * (self.swarm.size_bytes // 8)))
            area.touched.update(range(-(-self.swarm.size_bytes // 4096)))
        boot(world)
        met = lambda: all(  # noqa: E731
            node.resource is not None and all(c.connected and c.settled for c in node.resource.connections.values())
            for node in world.nodes.values()
        )
        if not world.run(met, limit=10 * SECOND):
            self.fail("Liveness", "two new nodes do not meet")
        for number in self.swarm.volumes:
            self.branch_of[1].leaves(1, number)
        world.nodes[0].command("primary", force=True)
        world.run(lambda: bool(self.primaries()), limit=10 * SECOND)
        self.sometimes("full sync")

    def _happen(self, fault: Fault) -> None:
        if not self.healing:
            self.world.trace(9, f"fault {fault.kind}")
            FAULTS[fault.kind](self, fault)
            self.look()

    def look(self) -> None:
        """Let the checkers look."""
        for checker in self.checkers:
            checker.moment()
        self.watch.moment()

    def died(self, node: Node) -> None:
        """Let the checkers look at what a crash left."""
        for checker in self.checkers:
            checker.died(node)

    def _noticed(self, node: Node, notice: Notice) -> None:
        for checker in self.checkers:
            checker.noticed(node, notice)
        self.manager.noticed(node, notice)
        self.watch.noticed(node, notice)

    def _metadata(self, node: Node, volume: int) -> None:
        for checker in self.checkers:
            checker.metadata(node, volume)
        self.manager.metadata(node, volume)

    def _settle(self) -> None:
        world = self.world
        self.healing = True
        self.manager.heal()
        # Once in 10 ms is often enough to ask whether all is well.
        if not self._until(lambda: self._good() or self.manager.split(), CONVERGE_NS):
            self.fail("Liveness", f"no convergence: {self._whys()}")
        if not self._good():
            self.manager.give_one_up()
            if not self._until(self._good, CONVERGE_NS):
                self.fail("Liveness", f"no convergence after the split brain: {self._whys()}")
        if not self._until(lambda: self.left == 0 or self._idle(), 20 * SECOND):
            self.fail("Liveness", "requests hang")
        self.over = True
        if not self._until(lambda: self._idle() and self.still(), 10 * SECOND):
            self.fail("Liveness", "requests hang")
        world.run(limit=300 * MS)
        if not self._until(lambda: self._good() and self.still(), 10 * SECOND):
            self.fail("Liveness", f"it does not stay well: {self._whys()}")
        self.refresh_authority()
        for checker in self.checkers:
            checker.converged()

    def _good(self) -> bool:
        self.manager.merge()
        if not self.established() or len(self.primaries()) != 1 or not self.still_one():
            return False
        return all(node.resource is not None and not node.resource.roles.busy for node in self.world.nodes.values())

    def still_one(self) -> bool:
        """One history is left."""
        return len(self.branches) == 1

    def _idle(self) -> bool:
        return all(not node.replies for node in self.world.nodes.values())

    def _until(self, condition: Callable[[], bool], limit: int) -> bool:
        end = self.world.now + limit
        while not condition():
            if self.world.now >= end:
                return False
            self.world.run(limit=10 * MS)
        return True

    def _whys(self) -> list[object]:
        return [node.resource.status()["reasons"] if node.resource else "down" for node in self.world.nodes.values()]
