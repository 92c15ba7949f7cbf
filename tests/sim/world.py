# SPDX-License-Identifier: Apache-2.0
"""Nodes, disks and links under one clock and one seed.

The only clock is the heap of (time, order, call).  The core under test is the real one.  Nothing here reads a real
clock or the real random source; what a run wants to see or to break, it hooks in: `perform`, `moment`, `noticed`.
"""

from __future__ import annotations

import heapq
import itertools
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from replicator.core import actions as act
from replicator.core.options import Options
from tests.sim.disk import Disk
from tests.sim.network import Network
from tests.sim.node import Node

US = 1_000
MS = 1_000_000
SECOND = 1_000_000_000


@dataclass
class Rates:
    """How fast things are."""

    disk_us: int = 100
    net_us: int = 200
    cut_frames: bool = True  # frames arrive in pieces
    steady: bool = False  # every delay is the same, and nothing is drawn: for traces that people read


class World:
    """Everything, from one seed."""

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)
        self.now = 1
        self.serial = itertools.count(1)
        self._heap: list[tuple[int, int, Callable[[], object]]] = []
        self.nodes: dict[int, Node] = {}
        self.network = Network(self)
        self.rates = Rates()
        self.lines: list[str] = []
        self.noticed: Callable[[Node, act.Notice], None] | None = None
        #: called at each completion and each frame; True: the node died of it
        self.at_moment: Callable[[int, str], bool] | None = None
        self.at_metadata: Callable[[Node, int], None] | None = None
        self._handlers: dict[type, Callable[[Node, Any], object]] = {
            act.ReadData: Node.read_data,
            act.WriteData: Node.write_data,
            act.ZeroData: Node.zero_data,
            act.FlushData: Node.flush_data,
            act.WriteMeta: Node.write_meta,
            act.OpenDisk: Node.open_disk,
            act.CloseDisk: Node.close_disk,
            act.Reply: self._reply,
            act.CommandDone: self._command_done,
            act.Notice: self._notice,
            act.CutClients: Node.cut_clients,
            act.Dial: lambda node, a: self.network.dial(node, a.peer),
            act.Send: self._send,
            act.CloseLink: self.network.close,
        }

    def new_id(self) -> int:
        """A generation id."""
        return self.rng.getrandbits(63) << 1 | 0x10

    def trace(self, node: int, text: str) -> None:
        """One line of the trace."""
        self.lines.append(f"{self.now / MS:12.3f} {node} {text}")

    def add_node(self, node_id: int, options: Options, disks: dict[int, Disk]) -> Node:
        """A machine that is off."""
        node = self.nodes[node_id] = Node(self, node_id, options, disks)
        return node

    # --- time

    def after(self, delay: int, call: Callable[[], object]) -> None:
        """Call later (nanoseconds)."""
        heapq.heappush(self._heap, (self.now + delay, next(self.serial), call))

    def run(
        self, until: Callable[[], bool] | None = None, limit: int = 60 * SECOND, events_max: int = 2_000_000
    ) -> bool:
        """Run until the condition holds; False if `limit` simulated ns pass first."""
        end = self.now + limit
        heap, pop = self._heap, heapq.heappop
        for _ in range(events_max):
            if until is not None and until():
                return True
            if not heap or heap[0][0] > end:
                self.now = max(self.now, end)
                return until is None or until()
            when, _, call = pop(heap)
            self.now = max(self.now, when)
            call()
        raise AssertionError("livelock: too many events")

    def disk_delay(self) -> int:
        """How long the next disk operation takes."""
        if self.rates.steady:
            return self.rates.disk_us * US
        spread = self.rng.random()
        base = self.rates.disk_us * US
        return int(base * (0.2 + spread * (20 if spread > 0.97 else 2)))

    def net_delay(self) -> int:
        """How long the next message takes."""
        if self.rates.steady:
            return self.rates.net_us * US
        return int(self.rates.net_us * US * (0.2 + self.rng.random() * 2))

    # --- what happens

    def perform(self, node: Node, action: act.Action, /) -> None:
        """Do what the core asked for, later."""
        self._handlers[type(action)](node, action)

    def moment(self, node: int, what: str) -> bool:
        """Something ended or is about to; True if the node died of it."""
        return self.at_moment is not None and self.at_moment(node, what)

    def metadata_written(self, node: Node, volume: int) -> None:
        """A write of metadata is stable."""
        if self.at_metadata is not None:
            self.at_metadata(node, volume)

    def _send(self, node: Node, a: act.Send) -> None:
        if self.at_moment is None or not self.at_moment(node.id, f"send {a.frame.kind.name}"):
            self.network.send(node, a)

    @staticmethod
    def _reply(node: Node, a: act.Reply) -> None:
        node.writes.discard(a.token)
        node.replies.pop(a.token)(a)

    def _command_done(self, node: Node, a: act.CommandDone) -> None:
        self.trace(node.id, f"command done ok={a.ok} {a.code} {a.message}")
        handler = node.handlers.pop(a.token, None)
        node.answers[a.token] = a
        if handler is not None:
            handler(a)

    def _notice(self, node: Node, a: act.Notice) -> None:
        node.notices.append(a)
        if self.noticed is not None:
            self.noticed(node, a)
        self.lines.append(f"{self.now / MS:12.3f} {node.id} {a.code} {a.fields}")
