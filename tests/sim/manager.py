# SPDX-License-Identifier: Apache-2.0
"""The cluster manager and the operator: who is promoted, fenced, started again; and what ends a split brain.

The manager promotes only a node that holds all that was acknowledged (it stands for a fencing constraint that is in
place before a node goes on alone); `unwise` faults are operators who overrule it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from replicator.core.actions import CommandDone, Notice
from replicator.core.events import ClientOpened
from tests.sim.checkers import SequencesGrow
from tests.sim.node import Node
from tests.sim.world import MS, SECOND

if TYPE_CHECKING:
    from tests.sim.run import Run

TICK_NS = 10 * MS


class Manager:
    """Everything that is done on purpose."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self.promoting: set[int] = set()
        self.given_up: set[int] = set()  # nodes whose data the operator threw away
        self.away: set[int] = set()  # nodes that come back only in the liveness phase
        self.prefer: int | None = None
        self.target: Node | None = None
        self._lineages: dict[tuple[int, int], tuple[int, bool]] = {}

    # --- as time goes by

    def tick(self) -> None:
        """Keep one Primary on a node with all the data."""
        run = self.run
        self.merge()
        run.refresh_authority()
        run.look()
        undecided = run.healing and not run.still_one()
        if not run.primaries() and not self.promoting and not undecided:
            nodes = [node for node in run.world.nodes.values() if self._may_lead(node)]
            if nodes:
                chosen = [node for node in nodes if node.id == self.prefer]
                self.promote((chosen or nodes)[run.rng.randrange(len(chosen or nodes))])
        run.world.after(TICK_NS * 2 if run.healing else TICK_NS, self.tick)

    def _may_lead(self, node: Node) -> bool:
        run = self.run
        good = all(run.good(node.id, number) for number in run.swarm.volumes)
        return good and not node.stopped and node.id in run.branch_of[node.id].authority

    def ask(self, node: Node, verb: str, **args: object) -> None:
        """A command to a node that is up, with the checkers looking at the answer."""
        if not node.up:
            return
        life = node.life

        def done(answer: CommandDone) -> None:
            if node.life == life:
                for checker in self.run.checkers:
                    checker.answered(node, verb, answer)

        node.command(verb, done, **args)

    def promote(self, node: Node, *, force: bool = False, unwise: bool = False) -> None:
        """Ask a node to be Primary.  `unwise`: whether or not it has everything."""
        run, life = self.run, node.life
        self.promoting.add(node.id)
        self.prefer = None

        def done(answer: CommandDone) -> None:
            self.promoting.discard(node.id)
            for checker in run.checkers:
                checker.answered(node, "primary --force" if force else "primary", answer)
            if answer.ok:
                if unwise and not (node.id in run.branch_of[node.id].authority and len(run.primaries()) == 1):
                    run.fork(node)
                if force:
                    run.sometimes("forced promotion")
                node.opened += 1
                node.step(ClientOpened(0, 0, True, "the workload"))

        node.command("primary", done, force=force)

        def died() -> None:
            if node.life != life:
                self.promoting.discard(node.id)
            elif node.id in self.promoting:
                run.world.after(20 * MS, died)

        run.world.after(20 * MS, died)

    def noticed(self, node: Node, notice: Notice) -> None:
        """Remember who was a target; one that has every block, stable, holds what the source held."""
        run = self.run
        if notice.code == "resync-finished" and "blocks" in notice.fields and run.swarm.protocol != "A":
            source, branch = run.other(node), run.branch_of[node.id]
            if source.id in branch.holding[notice.fields["volume"]]:
                branch.caught_up(notice.fields["volume"], {node.id})
        branch = run.branch_of[node.id]
        if notice.code == "sync-decision" and notice.fields["rule"] == "equal":
            self._equal(node, notice.fields["volume"])
        if notice.code == "disk-failed":
            self._disk_failed(node, notice)
        if notice.code == "role" and notice.fields["role"] == "Primary":
            assert node.resource is not None
            for number, volume in node.resource.volumes.items():
                alone = not any(replica.replicating for replica in volume.replicas.values())
                if alone and node.id in branch.holding[number]:
                    branch.lies_on(number, {node.id})  # it leads without its peer: what it shows counts
        if notice.code == "role" and notice.fields["role"] == "Secondary":
            for oracle in run.branch_of[node.id].oracles.values():
                oracle.settled()  # clients that were cut off heard no answer; nothing is written later
        if notice.code == "sync-decision" and notice.fields["outcome"] == "target":
            self.target = node
        if notice.code == "disk-state" and notice.fields["disk"] == "Inconsistent":
            branch.loses(node.id, notice.fields["volume"])  # thrown away, or a mixture until it is synced

    def _equal(self, node: Node, number: int) -> None:
        """Both copies are the same, at a moment in which nothing is under way."""
        branch, both = self.run.branch_of[node.id], {node.id, self.run.other(node).id}
        if both <= branch.nodes and both & branch.holding[number]:
            branch.caught_up(number, both)

    def _disk_failed(self, node: Node, notice: Notice) -> None:
        branch, number = self.run.branch_of[node.id], notice.fields["volume"]
        if branch.holding[number] == {node.id}:
            branch.all_lost_power(number)  # the last good copy: what was not FLUSHed is uncertain, here and elsewhere
        elif "metadata" not in notice.fields["operation"] and not self._believed(node):
            branch.holding[number].discard(node.id)

    def _believed(self, node: Node) -> bool:
        """Under protocol A a Primary whose disk comes back may be ahead."""
        return self.run.swarm.protocol == "A" and node in self.run.primaries()

    def begin(self) -> None:
        """Remember the lineages from which the run starts."""
        for key in self.run.stored:
            self._lineages[key] = self._lineage(*key)

    def _lineage(self, node_id: int, volume: int) -> tuple[int, bool]:
        found = self.run.stored[node_id, volume].superblock
        return (found.current, any(peer.survivor for peer in found.peers)) if found is not None else (0, False)

    def metadata(self, node: Node, volume: int) -> None:
        """Whoever begins a generation that its peer has not is alone: nobody else may lead."""
        run = self.run
        before, now = self._lineages[node.id, volume], self._lineage(node.id, volume)
        self._lineages[node.id, volume] = now
        begins = now[0] != before[0] and now[0] | 1 != self._lineage(run.other(node).id, volume)[0] | 1
        branch = run.branch_of[node.id]
        if begins and node.id in branch.holding[volume]:
            branch.lies_on(volume, {node.id})

    def merge(self) -> None:
        """Whoever was the target of the last resync has the source's history now."""
        run = self.run
        if not run.established():
            return
        if self.target is not None:
            run.joins(self.target, run.other(self.target))
            self.given_up.discard(self.target.id)
            self.target = None
        elif not run.still_one():
            # Equal, without a resync: right only if one of them had nothing of its own.
            one, other = run.world.nodes.values()
            if run.branch_of[one.id].has_all_of(run.branch_of[other.id]):
                run.joins(other, one)
            elif run.branch_of[other.id].has_all_of(run.branch_of[one.id]):
                run.joins(one, other)
            else:
                run.fail("SplitBrainStays", "two histories became one without a resync")

    # --- what dies

    def die(self, *nodes: Node, power: bool) -> None:
        """Kill processes or cut the power, at one moment; what the oracle may then expect."""
        run = self.run
        nodes = tuple(node for node in nodes if node.up)
        together = len(nodes) > 1
        for node in nodes:
            run.watch.dies(node, power=power, together=together)
        for node in nodes:
            self._received(node)
        primaries = run.primaries()
        for node in nodes:
            cuts = node.die(power=power)
            if any(cut.torn for cut in cuts):
                run.sometimes("a write was torn")
            self.promoting.discard(node.id)
            if node in primaries:
                for oracle in run.branch_of[node.id].oracles.values():
                    oracle.died()
        if power:
            self._lost_power(nodes, primaries)
        for node in nodes:
            if node not in primaries:
                self._unrecorded(node)
        for node in nodes:
            run.died(node)

    def _received(self, node: Node) -> None:
        """Under protocol B a Secondary acknowledges what it has not written yet."""
        run = self.run
        branch = run.branch_of[node.id]
        if run.swarm.protocol == "B" and node not in run.primaries():
            assert node.resource is not None
            for number, volume in node.resource.volumes.items():
                if volume.path.in_flight and not branch.loses(node.id, number):
                    branch.all_lost_power(number)

    def _unrecorded(self, node: Node) -> None:
        """A Secondary that had everything died before it recorded that: a crashed Primary may be believed instead."""
        run = self.run
        branch = run.branch_of[node.id]
        for number, holding in branch.holding.items():
            mine, theirs = self._lineage(node.id, number), self._lineage(run.other(node).id, number)
            if holding == {node.id} and not mine[1] and mine[0] | 1 == theirs[0] | 1:
                branch.all_lost_power(number)

    def _watched(self, node: Node) -> bool:
        """The other node will notice that this Primary is gone, and record that it survived."""
        other = self.run.other(node)
        return other.resource is not None and other.resource.connections[node.id].connected

    def _lost_power(self, nodes: tuple[Node, ...], primaries: list[Node]) -> None:
        run = self.run
        for node in nodes:
            branch = run.branch_of[node.id]
            for number, holding in branch.holding.items():
                if not branch.oracles[number].lacks(node.disks[number].data.seen):
                    continue  # everything was stable
                believed = node in primaries and (run.swarm.protocol == "A" or not self._watched(node))
                others = [run.world.nodes[who] for who in holding - {node.id}]
                if len(nodes) > 1 or believed or all(other.up and not run.good(other.id, number) for other in others):
                    branch.all_lost_power(number)  # it is believed when it comes back, as a disk alone would be
                    if not others:
                        run.sometimes("last good copy lost power")
                    continue
                survived = self._lineage(node.id, number)[1] and holding != {node.id}  # it flushed before it said so
                if not survived and branch.lost_power(node.id, number):
                    run.sometimes("last good copy lost power")

    def boot(self, node: Node) -> None:
        """Start it, if it is off and not away; its clock counts from anywhere."""
        if not node.up and node.id not in self.away:
            node.boot(ahead_ns=self.run.rng.randrange(1 << 50))

    def boot_later(self, node: Node, share: float) -> None:
        """Within half a second."""
        self.run.world.after(int(share * share * SECOND / 2), lambda: self.boot(node))

    def replace_disk(self, node: Node) -> None:
        """The operator throws this copy away: fresh metadata, as after `create-md --force`."""
        assert not node.up
        run = self.run
        for disk in node.disks.values():
            disk.create_md(bytes([0x70 + node.id]) * 16)
        run.checker(SequencesGrow).forget(node)
        self.given_up.add(node.id)
        run.rotten.discard(node.id)
        run.loses(node)
        run.sometimes("disk replaced")

    # --- the liveness phase

    def heal(self) -> None:
        """No fault is left, and everything is switched on."""
        run = self.run
        run.world.trace(9, "liveness phase")
        run.world.network.heal()
        run.traps.clear()
        if self.away:
            run.sometimes("stale node came back")
        self.away.clear()
        for node in run.world.nodes.values():
            for disk in node.disks.values():
                disk.mend()
            if node.stopped:
                node.go_on()
            self.boot(node)
            if not run.still_one() and node in run.primaries():
                self.ask(node, "secondary", force=True)  # or the would-be target is a Primary: a conflict for ever
        self._nudge()

    def _nudge(self) -> None:
        """What an operator types until all is well; never anything that gives data up."""
        run = self.run
        self._conflict()
        for node in run.world.nodes.values():
            self._repair(node)
            if node.up:
                for verb in ("attach", "connect", "resume-sync"):
                    node.command(verb, lambda _: None)
        run.world.after(300 * MS, self._nudge)

    def _repair(self, node: Node) -> None:
        """Metadata that was rotten and refused is recreated, when the other copy has everything."""
        run = self.run
        resource = node.resource
        if resource is None or node.id not in run.rotten:
            return
        if run.other(node).id not in run.branch_of[node.id].authority:
            return
        if any(volume.error and volume.attached is None for volume in resource.volumes.values()):
            run.sometimes("attach refused")
            self.die(node, power=False)
            self.replace_disk(node)
            self.boot(node)

    def split(self) -> bool:
        """Both sides know that they went different ways, and neither does anything about it."""
        return all("split-brain" in self._codes(node) for node in self.run.world.nodes.values())

    @staticmethod
    def _codes(node: Node) -> set[str]:
        if node.resource is None:
            return set()
        return {reason["code"] for reason in node.resource.status()["reasons"]}  # type: ignore[attr-defined]

    def _conflict(self) -> None:
        """A Primary on a copy that would be the target: the operator makes it Secondary."""
        for node in self.run.primaries():
            connections = node.resource.connections.values() if node.resource is not None else ()
            reasons = " ".join(connection.reason for connection in connections)
            if "conflict" in reasons or "exposed-data" in reasons:
                self.ask(node, "secondary", force=True)

    def give_one_up(self) -> None:
        """The operator decides whose data counts, as `status` tells to."""
        run = self.run
        run.sometimes("both went on alone")
        run.world.run(limit=SECOND)
        if not self.split():
            run.fail("SplitBrainStays", "a split brain went away by itself")
        for branch in run.branches:
            for number, oracle in branch.oracles.items():
                node = run.world.nodes[min(branch.holding[number] or branch.nodes)]
                for sector in oracle.possible:
                    fault = oracle.wrong(sector, node.disks[number].data.seen[sector * 512 : (sector + 1) * 512])
                    if fault is not None:
                        run.fail("SplitBrainStays", f"node {node.id} volume {number}: {fault}")
        loser = run.world.nodes[run.rng.randrange(2)]
        if run.still_one() and loser.id in run.branch_of[loser.id].authority:
            # A fork of a Primary that acknowledged nothing in it: the other copy has everything.
            loser = run.other(loser)
        run.world.trace(9, f"node {loser.id} is given up")
        kept = run.other(loser)
        if run.still_one() and kept.id not in run.branch_of[kept.id].authority:
            run.fork(kept)  # (protocol A: it lacks a suffix)
        self.die(loser, power=False)
        run.joins(loser, run.other(loser))
        self.replace_disk(loser)
        self.boot(loser)
