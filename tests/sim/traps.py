# SPDX-License-Identifier: Apache-2.0
"""Traps wait for a moment (a frame about to leave, a disk operation about to end) and crash or cut exactly there."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from tests.sim.node import Node
from tests.sim.situations import SITUATIONS
from tests.sim.tape import Fault

if TYPE_CHECKING:
    from tests.sim.run import Run

#: New ones at the end only: a tape names a moment by its place.
MOMENTS: Final = (
    "meta", "before meta", "flush", "before flush", "write", "before write", "read",
    "send HELLO", "send AGREE", "send ROLE", "send ROLE_REQUEST", "send ROLE_REPLY", "send VOLUME_STATE", "send BITMAP",
    "send BITMAP_END", "send SYNC_READY", "send SYNC_START", "send DISK_STATE", "send DISK_STATE_ACK",
    "send NEW_GENERATION", "send NEW_GENERATION_ACK", "send WRITE", "send RECEIVED", "send WRITTEN", "send FAILED",
    "send BARRIER", "send BARRIER_ACK", "send RESYNC_REQUEST", "send RESYNC_DATA", "send RESYNC_CONFIRM",
    "send RESYNC_DONE", "send RESYNC_DONE", "send GOODBYE",
)  # fmt: skip

_SITUATION: Final = {
    "send RESYNC_DONE": "last message of a resync lost",
    "send BITMAP": "link lost in the bitmap exchange",
    "send BITMAP_END": "link lost in the bitmap exchange",
    "send AGREE": "handshake cut",
    "send HELLO": "handshake cut",
}
_COUNTED: Final = {
    "send READ": "read from the peer",
    "send FAILED": "write failed at the Secondary",
}


class Traps:
    """Armed traps of a run."""

    def __init__(self, run: Run) -> None:
        self._run = run
        self._armed: list[Fault] = []

    def arm(self, fault: Fault) -> None:
        """Wait for its moment."""
        self._armed.append(fault)

    def clear(self) -> None:
        """Wait no more."""
        self._armed.clear()

    def moment(self, node_id: int, what: str) -> bool:
        """Something ends or is about to; True if the node died of it."""
        run = self._run
        if what in _COUNTED:
            run.sometimes(_COUNTED[what])
        elif what in SITUATIONS:
            run.sometimes(what)
        for fault in self._armed:
            if MOMENTS[int(fault.a * len(MOMENTS))] == what:
                self._armed.remove(fault)
                return self._spring(fault, run.world.nodes[node_id], what)
        return False

    def _spring(self, fault: Fault, node: Node, what: str) -> bool:
        run = self._run
        run.world.trace(node.id, f"trap: {what}")
        choice = int(fault.b * 6)
        if choice < 2:
            run.world.network.cut_all()
            if what in _SITUATION:
                run.sometimes(_SITUATION[what])
            return False
        victims = list(run.world.nodes.values()) if choice == 5 else [run.other(node)] if choice == 4 else [node]
        run.manager.die(*victims, power=choice != 3)
        for victim in victims:
            run.manager.boot_later(victim, fault.c)
        return node in victims
