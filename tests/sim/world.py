# SPDX-License-Identifier: Apache-2.0
"""Nodes, disks and links under one clock and one seed.

The only clock is the heap of (time, order, call).  The core under test is the real one; frames travel as the bytes of
the wire format and are decoded at the other end, in pieces.  Nothing here reads a real clock or the real random source.
"""

from __future__ import annotations

import heapq
import itertools
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

from replicator.core import actions as act
from replicator.core import events as ev
from replicator.core.options import Options
from replicator.core.resource import Resource
from replicator.core.wire import FrameDecoder, Kind, encode
from tests.sim.disk import Disk

US = 1_000
MS = 1_000_000
SECOND = 1_000_000_000


@dataclass
class Rates:
    """What this run misbehaves like; drawn from the seed."""

    disk_us: int = 100
    net_us: int = 200
    cut_frames: bool = True
    steady: bool = False  # every delay is the same, and nothing is drawn: for traces that people read


@dataclass
class End:
    """One side of a link."""

    node: int
    number: int  # as that node's core knows it
    decoder: FrameDecoder = field(default_factory=FrameDecoder)
    sent_agree: bool = False
    got_agree: bool = False
    up: bool = True


@dataclass
class Link:
    """One TCP connection: in order or dead, per direction."""

    ends: tuple[End, End]
    alive: bool = True
    stalled: list[bool] = field(default_factory=lambda: [False, False])  # direction from ends[i]
    queues: list[list[bytes]] = field(default_factory=lambda: [[], []])
    ready_at: list[int] = field(default_factory=lambda: [0, 0])


class Node:
    """A machine: its disks survive, its process may be killed."""

    def __init__(self, world: World, node_id: int, options: Options, disks: dict[int, Disk]) -> None:
        self.world = world
        self.id = node_id
        self.options = options
        self.disks = disks
        self.resource: Resource | None = None
        self.life = 0  # which process this is; completions of an earlier one are dropped
        self.answers: dict[int, act.CommandDone] = {}
        self.handlers: dict[int, Callable[[act.CommandDone], object]] = {}
        self.replies: dict[int, Callable[[act.Reply], None]] = {}
        self.notices: list[act.Notice] = []
        self.pending: set[int] = set()  # disk operations not completed, by serial
        self.in_flight: dict[int, tuple[Disk, Callable[[], None]]] = {}
        self.closing: dict[int, int] = {}
        self._turn_due = False
        self._tick_at: int | None = None
        self.opened = 0

    @property
    def up(self) -> bool:
        """The process runs."""
        return self.resource is not None

    def boot(self) -> None:
        """Start the process: attach and connect."""
        assert self.resource is None
        self.life += 1
        self.resource = Resource(self.options, self.world.new_id)
        self.world.trace(self.id, "boot")
        self.command("attach", lambda _: self.command("connect"))

    def command(self, verb: str, then: Callable[[act.CommandDone], object] | None = None, **args: object) -> int:
        """An operator's command; `then` gets the answer."""
        token = next(self.world.serial)
        if then is not None:
            self.handlers[token] = then
        self.step(ev.Command(token, verb, args))
        return token

    def request(self, then: Callable[[act.Reply], None], io: ev.Io, offset: int, size: int, **more: object) -> None:
        """A client's request on volume 0 unless `volume` is given."""
        token = next(self.world.serial)
        self.replies[token] = then
        volume = more.pop("volume", 0)
        self.step(ev.ClientRequest(volume, token, io, offset, size, **more))  # type: ignore[arg-type]

    def step(self, event: ev.Event) -> None:
        """Hand an event to the core; actions are taken at the end of the turn."""
        if self.resource is None:
            return
        self.resource.step(event, self.world.now)
        if not self._turn_due:
            self._turn_due = True
            life = self.life
            self.world.after(0, lambda: self._turn(life))

    def _turn(self, life: int) -> None:
        if life != self.life or self.resource is None:
            return
        self._turn_due = False
        for action in self.resource.drain():
            self.world.perform(self, action)
        deadline = self.resource.deadline
        if deadline is not None and (
            self._tick_at is None or deadline < self._tick_at or self._tick_at <= self.world.now
        ):
            due = max(deadline, self.world.now + 1)
            self._tick_at = due
            self.world.after(due - self.world.now, lambda: self._tick(life, due))

    def _tick(self, life: int, due: int) -> None:
        if life == self.life and self._tick_at == due:
            self._tick_at = None
            self.step(ev.Tick())

    def die(self, *, power: bool) -> None:
        """Kill the process (operations handed over may or may not happen), or cut the power."""
        assert self.resource is not None
        self.world.trace(self.id, "power cut" if power else "kill")
        self.resource = None
        self.life += 1
        self._turn_due = False
        self._tick_at = None
        self.opened = 0
        rng = self.world.rng
        for _, apply in self.in_flight.values():
            if rng.random() < 0.5:
                apply()
        self.in_flight.clear()
        self.replies.clear()
        self.handlers.clear()
        self.closing.clear()
        if power:
            for disk in self.disks.values():
                disk.power_cut(rng)
        self.world.node_died(self)


class World:
    """Everything, from one seed."""

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)
        self.now = 1
        self.serial = itertools.count(1)
        self._heap: list[tuple[int, int, Callable[[], object]]] = []
        self.nodes: dict[int, Node] = {}
        self.links: list[Link] = []
        self.link_ends: dict[tuple[int, int], tuple[Link, int]] = {}
        self.partitioned = False
        self.rates = Rates()
        self.lines: list[str] = []
        self.drop_before: Callable[[int, Kind], bool] | None = None  # cut the link instead of sending this
        self.noticed: Callable[[Node, act.Notice], None] | None = None
        self.frames_sent: dict[Kind, int] = {}

    def new_id(self) -> int:
        """A generation id."""
        return self.rng.getrandbits(63) << 1 | 0x10

    def trace(self, node: int, text: str) -> None:
        """One line of the trace."""
        self.lines.append(f"{self.now / MS:12.3f} {node} {text}")

    def after(self, delay: int, call: Callable[[], object]) -> None:
        """Call later (nanoseconds)."""
        heapq.heappush(self._heap, (self.now + delay, next(self.serial), call))

    def run(
        self, until: Callable[[], bool] | None = None, limit: int = 60 * SECOND, events_max: int = 2_000_000
    ) -> bool:
        """Run until the condition holds; False if `limit` simulated ns pass first."""
        end = self.now + limit
        for _ in range(events_max):
            if until is not None and until():
                return True
            if not self._heap or self._heap[0][0] > end:
                self.now = max(self.now, end)
                return until is None or until()
            when, _, call = heapq.heappop(self._heap)
            self.now = max(self.now, when)
            call()
        raise AssertionError("livelock: too many events")

    # --- building

    def add_node(self, node_id: int, options: Options, disks: dict[int, Disk]) -> Node:
        """A machine that is off."""
        node = self.nodes[node_id] = Node(self, node_id, options, disks)
        return node

    # --- actions

    def perform(self, node: Node, action: act.Action, /) -> None:
        """Do what the core asked for, later."""
        name = type(action).__name__
        handler = getattr(self, f"_do_{name.lower()}")
        handler(node, action)

    def _disk_op(
        self, node: Node, volume: int, token: int, apply: Callable[[Disk], bytes | None], stable: str = ""
    ) -> None:
        disk = node.disks[volume]
        life = node.life
        serial = next(self.serial)

        def effect() -> None:
            if not disk.broken:
                apply(disk)

        node.in_flight[serial] = (disk, effect)

        def complete() -> None:
            if node.life != life:
                return
            del node.in_flight[serial]
            error = disk.error
            data: bytes = b""
            if not error:
                data = apply(disk) or b""
                if stable == "meta":
                    disk.meta.flush()
                elif stable == "data":
                    if disk.fail_flush:
                        error = 5
                    else:
                        disk.data.flush()
            node.step(ev.DiskDone(token, error, data))
            self._maybe_closed(node, volume)

        self.after(self._disk_delay(), complete)

    def _disk_delay(self) -> int:
        if self.rates.steady:
            return self.rates.disk_us * US
        spread = self.rng.random()
        base = self.rates.disk_us * US
        return int(base * (0.2 + spread * (20 if spread > 0.97 else 2)))

    def _do_readdata(self, node: Node, a: act.ReadData) -> None:
        self._disk_op(node, a.volume, a.token, lambda disk: bytes(disk.data.seen[a.offset : a.offset + a.size]))

    def _do_writedata(self, node: Node, a: act.WriteData) -> None:
        data = bytes(a.data)
        self._disk_op(node, a.volume, a.token, lambda disk: disk.data.write(a.offset, data), "data" if a.fua else "")

    def _do_zerodata(self, node: Node, a: act.ZeroData) -> None:
        self._disk_op(node, a.volume, a.token, lambda d: d.data.write(a.offset, bytes(a.size)), "data" if a.fua else "")

    def _do_flushdata(self, node: Node, a: act.FlushData, /) -> None:
        # The flush covers what was complete when it was asked for: writes applied later stay in the cache.
        disk, life = node.disks[a.volume], node.life
        covered = list(disk.data.cache)
        serial = next(self.serial)
        node.in_flight[serial] = (disk, lambda: None)

        def complete() -> None:
            if node.life != life:
                return
            del node.in_flight[serial]
            error = disk.error or (5 if disk.fail_flush else 0)
            if not error:
                disk.data.flush_these(covered)
            node.step(ev.DiskDone(a.token, error))
            self._maybe_closed(node, a.volume)

        self.after(self._disk_delay() * 3, complete)

    def _do_writemeta(self, node: Node, a: act.WriteMeta) -> None:
        pieces = [(offset, bytes(data)) for offset, data in a.pieces]

        def apply(disk: Disk) -> None:
            for offset, data in pieces:
                disk.meta.write(disk.fixed_base + offset, data)

        self._disk_op(node, a.volume, a.token, apply, "meta")

    def _do_opendisk(self, node: Node, a: act.OpenDisk) -> None:
        disk, life = node.disks[a.volume], node.life

        def opened() -> None:
            if node.life != life:
                return
            if disk.broken:
                node.step(ev.DiskOpenFailed(a.volume, "input/output error"))
            else:
                node.step(ev.DiskOpened(a.volume, disk.size, disk.fixed(), disk.bitmaps()))

        self.after(self._disk_delay(), opened)

    def _do_closedisk(self, node: Node, a: act.CloseDisk) -> None:
        node.closing[a.volume] = node.life
        self._maybe_closed(node, a.volume)

    def _maybe_closed(self, node: Node, volume: int) -> None:
        if node.closing.get(volume) != node.life:
            return
        if any(disk is node.disks[volume] for disk, _ in node.in_flight.values()):
            return
        del node.closing[volume]
        life = node.life
        self.after(1, lambda: node.step(ev.DiskClosed(volume)) if node.life == life else None)

    def _do_reply(self, node: Node, a: act.Reply) -> None:
        node.replies.pop(a.token)(a)

    def _do_commanddone(self, node: Node, a: act.CommandDone) -> None:
        self.trace(node.id, f"command done ok={a.ok} {a.code} {a.message}")
        handler = node.handlers.pop(a.token, None)
        node.answers[a.token] = a
        if handler is not None:
            handler(a)

    def _do_notice(self, node: Node, a: act.Notice) -> None:
        node.notices.append(a)
        if self.noticed is not None:
            self.noticed(node, a)
        self.trace(node.id, f"{a.code} {' '.join(f'{k}={v}' for k, v in a.fields.items())}")

    def _do_cutclients(self, node: Node, a: act.CutClients) -> None:
        for client in range(node.opened):
            self.after(1, partial(node.step, ev.ClientClosed(a.volume, client)))
        node.opened = 0

    # --- the network

    def _do_dial(self, node: Node, a: act.Dial) -> None:
        life = node.life
        peer = self.nodes[a.peer]

        def arrive() -> None:
            if node.life != life:
                return
            if self.partitioned or not peer.up:
                node.step(ev.DialFailed(a.peer, "connection refused"))
                return
            ends = (End(node.id, next(self.serial)), End(peer.id, next(self.serial)))
            link = Link(ends)
            self.links.append(link)
            for side, end in enumerate(ends):
                self.link_ends[end.node, end.number] = (link, side)
            nonce = self.rng.randbytes(32)
            node.step(ev.LinkUp(ends[0].number, peer.id, True, nonce))
            peer.step(ev.LinkUp(ends[1].number, node.id, False, nonce))

        self.after(self._net_delay(), arrive)

    def _net_delay(self) -> int:
        if self.rates.steady:
            return self.rates.net_us * US
        return int(self.rates.net_us * US * (0.2 + self.rng.random() * 2))

    def _do_send(self, node: Node, a: act.Send) -> None:
        found = self.link_ends.get((node.id, a.link))
        if found is None:
            return
        link, side = found
        if not link.alive or not link.ends[side].up:
            return
        kind = a.frame.kind
        if self.drop_before is not None and self.drop_before(node.id, kind):
            self.trace(node.id, f"cut before {kind.name}")
            self.cut(link)
            return
        self.frames_sent[kind] = self.frames_sent.get(kind, 0) + 1
        if kind is Kind.AGREE:
            link.ends[side].sent_agree = True
        raw = b"".join(bytes(part) for part in encode(a.frame))
        pieces = [raw]
        if self.rates.cut_frames and len(raw) > 1 and self.rng.random() < 0.2:
            at = self.rng.randrange(1, len(raw))
            pieces = [raw[:at], raw[at:]]
        for piece in pieces:
            self._transmit(link, side, piece)

    def _transmit(self, link: Link, side: int, piece: bytes) -> None:
        when = max(link.ready_at[side], self.now) + self._net_delay() // 4
        link.ready_at[side] = when
        link.queues[side].append(piece)
        self.after(when - self.now, lambda: self._deliver(link, side))

    def _deliver(self, link: Link, side: int) -> None:
        if not link.alive or link.stalled[side] or not link.queues[side]:
            return
        piece = link.queues[side].pop(0)
        end = link.ends[1 - side]
        node = self.nodes[end.node]
        if not end.up or not node.up:
            return
        frames = end.decoder.feed(piece)
        if any(frame.kind is Kind.AGREE for frame in frames):
            end.got_agree = True
        if end.decoder.handshake_only and end.got_agree and end.sent_agree:
            frames = [*frames, *end.decoder.open_all()]
        if frames:
            node.step(ev.LinkFrames(end.number, frames))
            if end.decoder.handshake_only and end.got_agree:
                self.after(1, lambda: self._open_late(link, 1 - side))

    def _open_late(self, link: Link, side: int) -> None:
        end = link.ends[side]
        if link.alive and end.up and end.decoder.handshake_only and end.sent_agree:
            frames = end.decoder.open_all()
            if frames:
                self.nodes[end.node].step(ev.LinkFrames(end.number, frames))

    def stall(self, link: Link, side: int, *, stalled: bool) -> None:
        """One direction stops without an error, or goes on."""
        link.stalled[side] = stalled
        if not stalled:
            for _ in link.queues[side]:
                self.after(1, lambda: self._deliver(link, side))

    def _do_closelink(self, node: Node, a: act.CloseLink) -> None:
        found = self.link_ends.get((node.id, a.link))
        if found is None:
            return
        link, side = found
        end = link.ends[side]
        if not end.up:
            return
        end.up = False
        self.after(1, lambda: node.step(ev.LinkDown(end.number, a.reason)))
        other = link.ends[1 - side]
        when = max(link.ready_at[side], self.now) + self._net_delay()

        def seen() -> None:
            if other.up and link.alive and not link.stalled[side]:
                other.up = False
                self.nodes[other.node].step(ev.LinkDown(other.number, "closed by the peer"))

        self.after(when - self.now, seen)

    def cut(self, link: Link) -> None:
        """A reset: both sides learn of it, each in its own time."""
        if not link.alive:
            return
        link.alive = False
        for end in link.ends:
            if end.up:
                end.up = False
                node = self.nodes[end.node]
                self.after(self._net_delay(), partial(self._reset, node, end, node.life))

    @staticmethod
    def _reset(node: Node, end: End, life: int) -> None:
        if node.life == life:
            node.step(ev.LinkDown(end.number, "connection reset"))

    def cut_all(self) -> None:
        """Reset every link."""
        for link in self.links:
            self.cut(link)

    def node_died(self, node: Node) -> None:
        """Its links end; the peers learn of it."""
        for link in self.links:
            if link.alive and any(end.node == node.id for end in link.ends):
                for end in link.ends:
                    if end.node == node.id:
                        end.up = False
                self.cut(link)
