# SPDX-License-Identifier: Apache-2.0
"""Which rare situation is this?  Looks at the nodes when something happens, and counts (`situations.py`)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from replicator.core.actions import Notice
from replicator.core.events import Io
from replicator.core.states import Disk as DiskState
from tests.sim.node import Node

if TYPE_CHECKING:
    from tests.sim.run import Run


class Watch:
    """Counts situations of one run."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self._syncing: set[int] = set()  # nodes that died while a resync was running
        self._replications: dict[tuple[int, int], str] = {}
        self.lost_at: dict[int, int] = {}  # node -> when it last learned that its link is gone

    def replications(self, node: Node) -> set[str]:
        """Of every volume."""
        resource = node.resource
        if resource is None:
            return set()
        return {
            replica.replication.value for volume in resource.volumes.values() for replica in volume.replicas.values()
        }

    def dies(self, node: Node, *, power: bool, together: bool) -> None:
        """A node is about to die."""
        run, resource = self.run, node.resource
        assert resource is not None
        how = "power cut" if power else "kill"
        states = self.replications(node)
        for state in ("SyncTarget", "SyncSource"):
            if state in states:
                run.sometimes(f"{how} while {state}")
                if node.id in self._syncing:
                    run.sometimes("crash again before the resync ended")
                self._syncing.add(node.id)
        if states & {"WFBitMapS", "WFBitMapT"} or any(not c.settled for c in resource.connections.values()):
            run.sometimes("crash in a round")
        if together:
            run.sometimes("both power-cut" if power else "both killed")
            if power and any(
                volume.path.in_flight or self._writes_metadata(node) for volume in resource.volumes.values()
            ):
                run.sometimes("both power-cut in a metadata write")
        self._in_the_middle(node, power=power)

    def _in_the_middle(self, node: Node, *, power: bool) -> None:
        run, resource = self.run, node.resource
        assert resource is not None
        if node.id in run.manager.promoting:
            run.sometimes("crash in a promotion")
        if resource.roles.busy == "demotion":
            run.sometimes("crash in a demotion")
        for volume in resource.volumes.values():
            if volume.disk is DiskState.ATTACHING:
                run.sometimes("crash in an attach")
            attached = volume.attached
            if power and attached is not None and attached.log.in_flight:
                run.sometimes("power cut in an activity log transaction")
            if power and volume._writing_pages:
                run.sometimes("power cut in a bitmap write-out")

    @staticmethod
    def _writes_metadata(node: Node) -> bool:
        resource = node.resource
        assert resource is not None
        return any(
            volume.attached is not None
            and (volume.attached.ledger.busy or volume.attached.log.in_flight or volume._writing_pages)
            for volume in resource.volumes.values()
        )

    def noticed(self, node: Node, notice: Notice) -> None:
        """The core reported something."""
        look = {
            "sync-decision": self._decision,
            "replication-state": self._replication,
            "connection-state": self._connection,
            "disk-failed": self._disk_failed,
            "metadata-note": self._note,
            "attach-failed": self._refused,
            "bitmap-damaged": lambda *_: self.run.sometimes("rotten bitmap page"),
            "resync-finished": lambda *_: self._syncing.clear(),
        }.get(notice.code)
        if look is not None:
            look(node, notice)

    def _decision(self, node: Node, notice: Notice) -> None:
        rule, outcome = notice.fields["rule"], notice.fields["outcome"]
        if rule == "survivor-self":
            self.run.sometimes("survivor was the source")
        elif rule == "crashed-primary-self":
            self.run.sometimes("crashed Primary stayed the source")
        elif outcome == "target":
            assert node.resource is not None
            attached = node.resource.volumes[notice.fields["volume"]].attached
            if rule.startswith("bitmap") and attached is not None and attached.ledger.durable.crashed_primary:
                self.run.sometimes("crashed Primary became the target")
        if rule.startswith("just-created-") and outcome == "source":
            self.run.sometimes("full sync")

    def _replication(self, node: Node, notice: Notice) -> None:
        key, state = (node.id, notice.fields["volume"]), notice.fields["replication"]
        before = self._replications.get(key)
        self._replications[key] = state
        if state == "Off" and before in ("SyncTarget", "SyncSource"):
            self.run.sometimes("resync interrupted by the network")
        elif state.startswith("PausedSync"):
            self.run.sometimes("resync paused")

    def _connection(self, node: Node, notice: Notice) -> None:
        if notice.fields["connection"] == "Connected":
            return
        self.lost_at[node.id] = self.run.world.now
        reason = str(notice.fields["reason"])
        if node.replies and node in self.run.primaries():
            self.run.sometimes("link lost between a write and its acknowledgement")
        if "anew" in reason:
            self.run.sometimes("half-open link replaced")
        if "does not answer pings" in reason or "does not acknowledge" in reason:
            self.run.sometimes("silent peer given up")

    def _disk_failed(self, node: Node, notice: Notice) -> None:
        assert node.resource is not None
        replicas = node.resource.volumes[notice.fields["volume"]].replicas.values()
        if node in self.run.primaries() and any(replica.has_good_data for replica in replicas):
            self.run.sometimes("gone on diskless")
        if "flush" in notice.fields["operation"]:
            self.run.sometimes("flush failed")
        if "metadata" in notice.fields["operation"]:
            self.run.sometimes("metadata write failed")

    def _note(self, node: Node, notice: Notice) -> None:
        if node.id in self.run.rotten:
            log = "activity log" in notice.fields["text"]
            self.run.sometimes("rotten activity log" if log else "rotten superblock")

    def _refused(self, node: Node, notice: Notice) -> None:
        if node.id in self.run.rotten and "superblock" in notice.fields["reason"]:
            self.run.sometimes("rotten superblock")

    def replied(self, node: Node, volume_number: int, io: Io) -> None:
        """A client's request succeeded."""
        assert node.resource is not None
        volume = node.resource.volumes[volume_number]
        if io is Io.READ and volume.disk is DiskState.INCONSISTENT:
            self.run.sometimes("read on an Inconsistent Primary")
        elif io is not Io.READ and any(replica.syncing for replica in volume.replicas.values()):
            self.run.sometimes("write into a running resync")

    def moment(self) -> None:
        """Now and then."""
        for node in self.run.world.nodes.values():
            if node.resource is None:
                continue
            for volume in node.resource.volumes.values():
                if volume.path._cold and volume.attached and volume.attached.log.hot_count >= 9:
                    self.run.sometimes("write waited for a hot extent")
                if volume.path._unforked or volume.path._ripe:
                    self.run.sometimes("write waited for a fork point")
