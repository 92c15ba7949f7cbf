# SPDX-License-Identifier: Apache-2.0
"""TCP as it is: in order or dead, per direction.

Frames travel as the bytes of the wire format and are decoded at the other end, in pieces.  A link may be delayed,
stall in one direction without an error, drain slowly, end on one side only (half-open), be reset after any byte, or
deliver a damaged byte that TCP's own checksum let pass.  Nodes may be unable to connect at all.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING

from replicator.core import actions as act
from replicator.core import events as ev
from replicator.core.wire import FrameDecoder, Kind, encode
from replicator.errors import ProtocolError

if TYPE_CHECKING:
    from tests.sim.node import Node
    from tests.sim.world import World

US = 1_000


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
    """One TCP connection.  Lists are per direction: [i] is what ends[i] sends."""

    ends: tuple[End, End]
    alive: bool = True
    stalled: list[bool] = field(default_factory=lambda: [False, False])
    queues: list[list[bytes]] = field(default_factory=lambda: [[], []])
    ready_at: list[int] = field(default_factory=lambda: [0, 0])
    left: list[int | None] = field(default_factory=lambda: [None, None])  # bytes until the reset
    slow_ns: list[int] = field(default_factory=lambda: [0, 0])  # per byte
    damage: list[bool] = field(default_factory=lambda: [False, False])  # the next piece has a wrong byte
    silent: bool = False  # half-open, and not even a reset comes back

    @property
    def busy(self) -> bool:
        """Something is on its way."""
        return self.alive and (bool(self.queues[0]) or bool(self.queues[1]))


class Network:
    """All links of a world."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.links: list[Link] = []
        self.ends: dict[tuple[int, int], tuple[Link, int]] = {}
        self.blocked: set[frozenset[int]] = set()  # pairs that cannot connect
        self.partitioned = False  # nobody can
        self.drop_before: Callable[[int, Kind], bool] | None = None  # cut the link instead of sending this
        self.frames_sent: dict[Kind, int] = {}

    @property
    def alive(self) -> list[Link]:
        """Links that are not dead on both sides."""
        return [link for link in self.links if link.alive]

    def reachable(self, one: int, other: int) -> bool:
        """A new connection could be made."""
        return not self.partitioned and frozenset((one, other)) not in self.blocked

    # --- making and using

    def dial(self, node: Node, peer_id: int) -> None:
        """Connect, or fail to."""
        life = node.life
        peer = self.world.nodes[peer_id]

        def arrive() -> None:
            if node.life != life:
                return
            if not peer.up or not self.reachable(node.id, peer.id):
                node.step(ev.DialFailed(peer_id, "connection refused"))
                return
            serial = self.world.serial
            ends = (End(node.id, next(serial)), End(peer.id, next(serial)))
            link = Link(ends)
            self.links.append(link)
            for side, end in enumerate(ends):
                self.ends[end.node, end.number] = (link, side)
            nonce = self.world.rng.randbytes(32)
            node.step(ev.LinkUp(ends[0].number, peer.id, True, nonce))
            peer.step(ev.LinkUp(ends[1].number, node.id, False, nonce))

        self.world.after(self.world.net_delay(), arrive)

    def send(self, node: Node, a: act.Send) -> None:
        """A frame leaves."""
        found = self.ends.get((node.id, a.link))
        if found is None:
            return
        link, side = found
        if not link.alive or not link.ends[side].up:
            return
        kind = a.frame.kind
        if self.drop_before is not None and self.drop_before(node.id, kind):
            self.world.trace(node.id, f"cut before {kind.name}")
            self.cut(link)
            return
        self.frames_sent[kind] = self.frames_sent.get(kind, 0) + 1
        if kind is Kind.AGREE:
            link.ends[side].sent_agree = True
        if not link.ends[1 - side].up:
            if not link.silent:
                self.cut(link)  # what is sent to a closed socket comes back as a reset
            return
        raw = b"".join([bytes(part) for part in encode(a.frame)])
        rates, rng = self.world.rates, self.world.rng
        pieces = [raw]
        if rates.cut_frames and rng.random() < 0.1:
            at = rng.randrange(1, len(raw))
            pieces = [raw[:at], raw[at:]]
        for piece in pieces:
            if not self.limit(link, side, piece):
                return

    def limit(self, link: Link, side: int, piece: bytes) -> bool:
        """Let a piece through, damaged or up to the byte after which the link is reset; False if that was it."""
        left = link.left[side]
        if link.damage[side]:
            link.damage[side] = False
            at = self.world.rng.randrange(len(piece))
            piece = piece[:at] + bytes([piece[at] ^ 0x10]) + piece[at + 1 :]
        if left is not None and len(piece) > left:
            if left:
                self.transmit(link, side, piece[:left])
                self.world.moment(link.ends[side].node, "reset in the middle of a frame")
            delay = max(0, link.ready_at[side] - self.world.now) + 1
            self.world.after(delay, lambda: self.cut(link))
            return False
        if left is not None:
            link.left[side] = left - len(piece)
        self.transmit(link, side, piece)
        return True

    def transmit(self, link: Link, side: int, piece: bytes) -> None:
        """Bytes go on their way."""
        world = self.world
        when = max(link.ready_at[side], world.now) + world.net_delay() // 4 + link.slow_ns[side] * len(piece)
        link.ready_at[side] = when
        link.queues[side].append(piece)
        world.after(when - world.now, lambda: self._deliver(link, side))

    def _deliver(self, link: Link, side: int) -> None:
        if not link.alive or link.stalled[side] or not link.queues[side]:
            return
        piece = link.queues[side].pop(0)
        end = link.ends[1 - side]
        node = self.world.nodes[end.node]
        if not end.up or not node.up:
            return
        try:
            frames = end.decoder.feed(piece)
            if any(frame.kind is Kind.AGREE for frame in frames):
                end.got_agree = True
            if end.decoder.handshake_only and end.got_agree and end.sent_agree:
                frames = [*frames, *end.decoder.open_all()]
        except ProtocolError as error:
            self._undecodable(link, 1 - side, str(error))
            return
        if frames:
            node.step(ev.LinkFrames(end.number, frames))
            if end.decoder.handshake_only and end.got_agree:
                self.world.after(1, lambda: self._open_late(link, 1 - side))

    def _undecodable(self, link: Link, side: int, why: str) -> None:
        """What the driver does: end the link on its side; the peer gets a reset."""
        end = link.ends[side]
        self.world.trace(end.node, f"link cut: {why}")
        self.world.moment(end.node, "damaged frame refused")
        end.up = False
        self.world.nodes[end.node].step(ev.LinkDown(end.number, why))
        self.cut(link)

    def _open_late(self, link: Link, side: int) -> None:
        end = link.ends[side]
        if link.alive and end.up and end.decoder.handshake_only and end.sent_agree:
            try:
                frames = end.decoder.open_all()
            except ProtocolError as error:
                self._undecodable(link, side, str(error))
                return
            if frames:
                self.world.nodes[end.node].step(ev.LinkFrames(end.number, frames))

    # --- ending

    def close(self, node: Node, a: act.CloseLink) -> None:
        """One side closes in good order; the other reads to the end first."""
        found = self.ends.get((node.id, a.link))
        if found is None:
            return
        link, side = found
        end = link.ends[side]
        if not end.up:
            return
        end.up = False
        life = node.life
        down = ev.LinkDown(end.number, a.reason)
        self.world.after(1, lambda: node.step(down) if node.life == life else None)
        other = link.ends[1 - side]
        when = max(link.ready_at[side], self.world.now) + self.world.net_delay()

        def seen() -> None:
            if other.up and link.alive and not link.stalled[side]:
                other.up = False
                self.world.nodes[other.node].step(ev.LinkDown(other.number, "closed by the peer"))

        self.world.after(when - self.world.now, seen)

    def stall(self, link: Link, side: int, *, stalled: bool) -> None:
        """One direction stops without an error, or goes on."""
        link.stalled[side] = stalled
        if not stalled:
            for _ in link.queues[side]:
                self.world.after(1, lambda: self._deliver(link, side))
            if not link.ends[side].up and link.ends[1 - side].up:
                self.world.after(2, lambda: self.cut(link))  # the end of the stream was behind it

    def cut(self, link: Link) -> None:
        """A reset: both sides learn of it, each in its own time."""
        if not link.alive:
            return
        link.alive = False
        for end in link.ends:
            if end.up:
                end.up = False
                node = self.world.nodes[end.node]
                self.world.after(self.world.net_delay(), partial(self._reset, node, end, node.life))
        self._forget()

    def half_open(self, link: Link, side: int, *, silent: bool) -> None:
        """One side learns that the link is dead; the other does not, until it sends (if `silent`: never)."""
        end = link.ends[side]
        if link.alive and end.up:
            end.up = False
            link.silent = silent
            self.world.nodes[end.node].step(ev.LinkDown(end.number, "connection reset"))

    @staticmethod
    def _reset(node: Node, end: End, life: int) -> None:
        if node.life == life:
            node.step(ev.LinkDown(end.number, "connection reset"))

    def cut_all(self) -> None:
        """Reset every link."""
        for link in self.alive:
            self.cut(link)

    def _forget(self) -> None:
        """Dead links, but for the newest, are of no interest."""
        self.links = [link for link in self.links[:-1] if link.alive] + self.links[-1:]

    def node_died(self, node: Node) -> None:
        """Its links end; the peers learn of it."""
        for link in self.alive:
            if any(end.node == node.id for end in link.ends):
                for end in link.ends:
                    if end.node == node.id:
                        end.up = False
                self.cut(link)

    def heal(self) -> None:
        """No fault of the network is left."""
        self.partitioned = False
        self.blocked.clear()
        for link in self.alive:
            link.left = [None, None]
            link.slow_ns = [0, 0]
            link.damage = [False, False]
            if link.silent:
                self.cut(link)
            for side in (0, 1):
                if link.stalled[side]:
                    self.stall(link, side, stalled=False)
