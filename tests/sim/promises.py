# SPDX-License-Identifier: Apache-2.0
"""Checkers of what clients were promised: where the bytes are when it is said, and that they are there in the end."""

from __future__ import annotations

import errno

from replicator.core.geometry import SECTOR
from replicator.core.states import Disk as DiskState
from tests.sim.checker import Checker
from tests.sim.node import Node
from tests.sim.oracle import Issued, shown

_DISKS = {"disk_broken", "disk_flush", "disk_meta", "disk_read", "disk_write", "freeze", "rot"}
_MAY_FAIL = _DISKS | {"blank", "detach", "invalidate"}


class AcknowledgedIsWritten(Checker):
    """At the answer the bytes are where they must be: of a write on the disks, of FLUSH and FUA stable."""

    invariants = ("I-1", "I-2", "I-3", "I-5")

    def replied(self, node: Node, volume: int, write: Issued, error: int) -> None:
        if error:
            return
        oracle = self.run.branch_of[node.id].oracles[volume]
        holders = self._holders(node, volume, flush=False)
        for holder in holders:
            data = holder.disks[volume].data
            for area, what in ((data.seen, "written"), (data.stable, "stable"))[: 2 if write.fua else 1]:
                for sector in range(write.first, write.first + write.count):
                    newer = {
                        other.value
                        for other in (oracle.writes[number] for number in oracle.possible[sector])
                        if other.issued >= write.issued or not other.over or (other.acked or 0) >= write.issued
                    }
                    value = shown(area, sector)
                    if value != write.value and value not in newer and value >= 0:
                        self.run.fail(
                            self,
                            f"write {write.number} was acknowledged and is not {what} on node {holder.id}: volume "
                            f"{volume} sector {sector} shows {value}",
                        )

    def flushed(self, node: Node, volume: int, started: int) -> None:
        oracle = self.run.branch_of[node.id].oracles[volume]
        undone: dict[int, set[int]] = {}
        for when, sector, numbers in oracle.removed:
            if when >= started:
                undone.setdefault(sector, set()).update(numbers)
        for holder in self._holders(node, volume, flush=True):
            stable = holder.disks[volume].data.stable
            for sector, numbers in oracle.possible.items():
                value = shown(stable, sector)
                if value >= 0 and value not in {
                    oracle.writes[number].value for number in numbers | undone.get(sector, set())
                }:
                    self.run.fail(
                        self,
                        f"FLUSH was acknowledged and node {holder.id} is not stable: volume {volume} sector {sector} "
                        f"shows {value}",
                    )

    def _holders(self, node: Node, volume: int, *, flush: bool) -> list[Node]:
        """Where it has to be: here, and (protocol C; for a FLUSH also B) on the peer's good copy."""
        run = self.run
        nodes = []
        for number in run.holders(node, volume):
            holder = run.world.nodes[number]
            resource = holder.resource
            if resource is None or holder.stopped or resource.volumes[volume].disk is not DiskState.UP_TO_DATE:
                continue
            if holder is not node:
                if run.swarm.protocol == "A" or (run.swarm.protocol == "B" and not flush):
                    continue
                if not any(connection.connected for connection in resource.connections.values()):
                    continue
            nodes.append(holder)
        return nodes


class FailsWithReason(Checker):
    """A Primary on its own good disk fails no write, as long as no disk failed in this run."""

    invariants = ("I-10", "I-32")

    def replied(self, node: Node, volume: int, write: Issued, error: int) -> None:
        if error not in (0, errno.EIO, errno.EPERM):
            self.run.fail(self, f"write {write.number} ended with errno {error}")
        if error == errno.EIO and node.resource is not None and not _MAY_FAIL & set(self.run.swarm.kinds):
            here = node.resource.volumes[volume]
            if here.serving and here.disk is DiskState.UP_TO_DATE:
                self.run.fail(self, f"write {write.number} failed, and the disk of its Primary is UpToDate")


class PromisedIsThere(Checker):
    """At the end the copies show what was acknowledged, and FLUSHed data after the power cuts of the run."""

    invariants = ("I-1", "I-2", "I-3", "I-7")

    def converged(self) -> None:
        for branch in self.run.branches:
            for number, oracle in branch.oracles.items():
                seen = self.run.world.nodes[min(branch.nodes)].disks[number].data.seen
                for sector in sorted(oracle.possible):
                    fault = oracle.wrong(sector, seen[sector * SECTOR : (sector + 1) * SECTOR])
                    if fault is not None:
                        self.run.fail(self, f"volume {number}: {fault}")
