# SPDX-License-Identifier: Apache-2.0
"""The invariants, one small class each; docs/simulation.md has the whole list and who checks what else.

Registers (I-1..I-4, I-7, I-25, I-31: what a client may see) live in `oracle.py`, because reads feed them; what clients
were promised is checked in `promises.py`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from replicator.core.actions import CommandDone, Notice
from replicator.core.generations import JUST_CREATED
from replicator.core.geometry import (
    BLOCK,
    SECTOR,
)
from replicator.core.resync import SyncTarget
from replicator.core.states import Disk as DiskState
from replicator.core.states import Role
from tests.sim.checker import Checker
from tests.sim.disk import LARGE
from tests.sim.node import Node
from tests.sim.oracle import Issued
from tests.sim.promises import AcknowledgedIsWritten, FailsWithReason, PromisedIsThere
from tests.sim.stored import as_mask, lowest

if TYPE_CHECKING:
    from tests.sim.run import Run


class DifferenceIsKnown(Checker):
    """Wherever the copies differ, one side knows: a bit, a hot extent, or an epoch that holds it hot."""

    invariants = ("I-5", "I-11", "I-12", "I-17", "I-19")

    def __init__(self, run: Run) -> None:
        super().__init__(run)
        self.different = dict.fromkeys(run.swarm.volumes, 0)  # a bit per block

    def moment(self) -> None:
        still = self.run.still()
        for number in self.run.swarm.volumes:
            different = self.compare(number)
            if different:
                self._check(number, different, still=still)

    def died(self, node: Node) -> None:
        for number in self.run.swarm.volumes:
            different = self.compare(number)
            if different:
                self._check(number, different, still=False)

    def compare(self, number: int) -> int:
        """Where the copies differ; looks only at what was touched since it looked last."""
        first, second = (node.disks[number].data for node in self.run.world.nodes.values())
        if not first.touched and not second.touched:
            return self.different[number]
        known = self.different[number]
        for block in first.touched | second.touched:
            part = slice(block * BLOCK, (block + 1) * BLOCK)
            if first.seen[part] == second.seen[part]:
                known &= ~(1 << block)
            else:
                known |= 1 << block
        first.touched.clear()
        second.touched.clear()
        self.different[number] = known
        return known

    def _check(self, number: int, different: int, *, still: bool) -> None:
        unknown = different
        for node in self.run.world.nodes.values():
            marked = self._marks(node, number, still=still)
            if marked is None:
                return
            unknown &= ~marked
        if unknown:
            self.run.fail(self, f"volume {number} block {lowest(unknown)} differs and nobody knows")

    def _marks(self, node: Node, number: int, *, still: bool) -> int | None:
        """What this node knows, a bit per block; None: that everything may differ."""
        stored = self.run.stored[node.id, number]
        attached = node.resource.volumes[number].attached if node.resource is not None else None
        if attached is None:
            return stored.marked
        peer = self.run.other(node).id
        found = attached.ledger.durable
        slot = found.slot_of(peer)
        if slot is None or found.current == JUST_CREATED or found.peers[slot].full_sync:
            return None
        mask = as_mask(attached.bitmaps[peer])
        return mask if still else mask | (stored.marked or 0)  # while writes are under way, the log on the disk counts


class OneWriter(Checker):
    """Two Primaries only after somebody promoted a copy that could not ask; never while they are connected."""

    invariants = ("I-6",)

    def moment(self) -> None:
        primaries = self.run.primaries()
        if len(primaries) < 2:
            return
        if len({id(self.run.branch_of[node.id]) for node in primaries}) < 2:
            self.run.fail(self, "two Primaries on one history")
        if all(self._replicates(node) for node in primaries):
            self.run.fail(self, "two Primaries replicate to each other")

    @staticmethod
    def _replicates(node: Node) -> bool:
        assert node.resource is not None
        return not node.stopped and any(
            replica.replicating and replica.carried_out
            for volume in node.resource.volumes.values()
            for replica in volume.replicas.values()
        )

    def replied(self, node: Node, volume: int, write: Issued, error: int) -> None:
        if error == 0 and (node.resource is None or node.resource.roles.role is not Role.PRIMARY):
            self.run.fail(self, f"write {write.number} was acknowledged by a node that is not Primary")


class NothingAfterDemotion(Checker):
    """`secondary` and `down` are answered when nothing is in flight."""

    invariants = ("I-6", "I-27")

    def answered(self, node: Node, verb: str, answer: CommandDone) -> None:
        if verb == "secondary" and answer.ok:
            self.run.world.after(1, lambda: self._check(node))  # when the turn is over

    def _check(self, node: Node) -> None:
        if node.writes and node.resource is not None and node.resource.roles.role is not Role.PRIMARY:
            self.run.fail(self, f"demoted with {len(node.writes)} writes unanswered")


class GoodDataForPromotion(Checker):
    """Without force only UpToDate data is promoted, and what it claims is stable before the answer."""

    invariants = ("I-8", "I-16")

    def answered(self, node: Node, verb: str, answer: CommandDone) -> None:
        if verb not in ("primary", "primary --force") or not answer.ok or node.resource is None:
            return
        for number, volume in node.resource.volumes.items():
            good = volume.disk is DiskState.UP_TO_DATE or any(r.has_good_data for r in volume.replicas.values())
            if not good:
                self.run.fail(self, f"volume {number} is {volume.disk.word} on a promoted node, and no peer is better")
            found = self.run.stored[node.id, number].superblock
            if volume.serving and volume.attached is not None and (found is None or not found.primary_indicator):
                self.run.fail(self, f"volume {number} of a Primary has no stable PrimaryIndicator")


class GenerationBeforeAck(Checker):
    """Before a write that the peer lacks is acknowledged, a generation that the peer has not is stable here."""

    invariants = ("I-15", "I-16")

    def replied(self, node: Node, volume: int, write: Issued, error: int) -> None:
        if not error:
            self.run.world.after(1, lambda: self._check(node, volume, write))  # when the turn is over

    def _check(self, node: Node, volume: int, write: Issued) -> None:
        if node.resource is None or write.issued <= self.run.watch.lost_at.get(node.id, 0):
            return  # (what was under way when the link went is marked, and forks at once)
        here = node.resource.volumes[volume]
        first, last = write.first * SECTOR // BLOCK, ((write.first + write.count) * SECTOR - 1) // BLOCK
        lacking = self.run.checker(DifferenceIsKnown).compare(volume) >> first & (1 << last - first + 1) - 1
        for peer, replica in here.replicas.items():
            if replica.replicating or here.attached is None or replica.link is not None or not lacking:
                continue
            mine, theirs = (
                self.run.stored[node.id, volume].superblock,
                self.run.stored[peer, volume].superblock,
            )
            if mine is None or theirs is None or theirs.current == JUST_CREATED:
                continue
            if mine.current | 1 == theirs.current | 1 and not (theirs.outdated or not theirs.consistent):
                self.run.fail(
                    self,
                    f"write {write.number} was acknowledged alone, and both copies are of generation {mine.current:x}",
                )


class TargetIsMarked(Checker):
    """A copy that is being overwritten is Inconsistent on its disk, from before the first block to after the last."""

    invariants = ("I-16", "I-21")

    def moment(self) -> None:
        for node in self.run.world.nodes.values():
            if node.resource is None:
                continue
            for number, volume in node.resource.volumes.items():
                for peer, replica in volume.replicas.items():
                    if isinstance(replica.steps.sync, SyncTarget) and volume.dirty_count(peer):
                        self._check(node, number)

    def _check(self, node: Node, number: int) -> None:
        found = self.run.stored[node.id, number].superblock
        if found is not None and found.consistent:
            self.run.fail(self, f"volume {number} is being overwritten, and its superblock says Consistent")


class NeverBackwards(Checker):
    """A copy is overwritten only by one that has all that was acknowledged in its history."""

    invariants = ("I-4", "I-9", "I-13", "I-14")

    def noticed(self, node: Node, notice: Notice) -> None:
        if notice.code != "sync-decision" or notice.fields["outcome"] != "target":
            return
        run, number = self.run, notice.fields["volume"]
        source = run.other(node)
        mine, theirs = run.branch_of[node.id], run.branch_of[source.id]
        if mine is theirs:
            run.refresh_authority()
            holding = mine.holding[number]
            if node.id in holding and source.id not in holding:
                run.fail(self, f"volume {number}: {notice.fields['rule']}: a copy with everything is to be overwritten")
        elif not theirs.has_all_of(mine) and node.id not in run.manager.given_up:
            run.fail(self, f"volume {number}: {notice.fields['rule']}: an acknowledged history is dropped silently")


class MirroredDecisions(Checker):
    """Both nodes come to mirrored results; equal generations with dirty bits are never "no sync"."""

    invariants = ("I-13", "I-20")

    def moment(self) -> None:
        nodes = [node for node in self.run.world.nodes.values() if node.resource is not None]
        if len(nodes) < 2 or not self.run.still():
            return
        one, other = (node.resource for node in nodes)
        assert one is not None and other is not None
        for number in self.run.swarm.volumes:
            here, there = (
                r.volumes[number].replicas[self.run.other(n).id] for r, n in ((one, nodes[0]), (other, nodes[1]))
            )
            if not (here.carried_out and there.carried_out and here.decision and there.decision):
                continue
            if here.link is None or there.link is None or here._round != there._round:
                continue
            if here.decision.outcome is not there.decision.outcome.mirrored:
                self.run.fail(self, f"volume {number}: {here.decision} here, {there.decision} there")


class SequencesGrow(Checker):
    """The superblock's sequence on a disk never goes back; a valid copy stays valid while the other is written."""

    invariants = ("I-28", "monotonic")

    def __init__(self, run: Run) -> None:
        super().__init__(run)
        self.newest: dict[tuple[int, int], int] = {}

    def metadata(self, node: Node, volume: int) -> None:
        key = node.id, volume
        stored = self.run.stored[key]
        if stored.fault:
            self.run.fail(self, f"node {node.id} volume {volume} wrote metadata that cannot be used: {stored.fault}")
        sequence = stored.sequence
        if sequence < self.newest.get(key, 0):
            self.run.fail(self, f"superblock sequence {sequence} after {self.newest[key]}")
        self.newest[key] = sequence

    def forget(self, node: Node) -> None:
        """Its metadata was made anew."""
        for number in node.disks:
            self.newest.pop((node.id, number), None)


class AttachAfterCrash(Checker):
    """After any crash a disk attaches without manual action, unless it was broken on purpose."""

    invariants = ("I-17",)

    def noticed(self, node: Node, notice: Notice) -> None:
        if notice.code != "attach-failed":
            return
        disk = node.disks[notice.fields["volume"]]
        if not disk.broken and not disk.fail_meta and not disk.fail_flush and node.id not in self.run.rotten:
            self.run.fail(self, f"attach was refused: {notice.fields}")


class EqualOnceQuiet(Checker):
    """UpToDate copies are byte for byte equal once nothing is in flight, and nobody thinks otherwise."""

    invariants = ("I-20", "I-21", "I-25", "I-26")

    def moment(self) -> None:
        if self.run.still() and self.run.established():
            self._compare()

    def converged(self) -> None:
        self._compare()
        for number in self.run.swarm.volumes:
            first, second = (node.disks[number].data.seen for node in self.run.world.nodes.values())
            if first[:LARGE] != second[:LARGE]:
                self.run.fail(
                    self, f"volume {number}: the copies differ, and the comparison of what was touched does not"
                )

    def _compare(self) -> None:
        different = self.run.checker(DifferenceIsKnown)
        for number in self.run.swarm.volumes:
            wrong = different.compare(number)
            if wrong:
                self.run.fail(self, f"volume {number}: both are UpToDate, and block {lowest(wrong)} differs")
            for node in self.run.world.nodes.values():
                assert node.resource is not None
                if node.resource.volumes[number].dirty_count(self.run.other(node).id):
                    self.run.fail(self, f"volume {number}: established, and node {node.id} still has dirty bits")


class NoBusyLoop(Checker):
    """A node whose clock runs asks for a tick that is ahead, and its clock is its own."""

    invariants = ("I-30",)

    def moment(self) -> None:
        for node in self.run.world.nodes.values():
            if node.resource is not None and not node.stopped:
                deadline = node.resource.deadline
                if deadline is not None and deadline > node.now + 3600 * 1_000_000_000:
                    self.run.fail(self, f"node {node.id} waits an hour for its next tick")


CHECKERS: tuple[type[Checker], ...] = (
    DifferenceIsKnown,
    OneWriter,
    NothingAfterDemotion,
    GoodDataForPromotion,
    GenerationBeforeAck,
    TargetIsMarked,
    NeverBackwards,
    MirroredDecisions,
    SequencesGrow,
    AttachAfterCrash,
    EqualOnceQuiet,
    NoBusyLoop,
    AcknowledgedIsWritten,
    FailsWithReason,
    PromisedIsThere,
)
