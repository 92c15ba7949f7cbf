# SPDX-License-Identifier: Apache-2.0
"""Two real cores over the fake disks and the fake link of the simulator, driven step by step.

A test says what the clients, the operator and the world do, and looks at states, notices, replies and the bytes on the
disks.  Blocks are numbered; a written block is filled with one byte value, so content can be read off.  `hooks` see
every frame at the moment it is sent: they count, stall the link or cut it.
"""

from __future__ import annotations

import errno
import random
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

from replicator.core import superblock
from replicator.core.actions import Action, CommandDone, Notice, ReadData, Reply, WriteMeta
from replicator.core.connection import Connection
from replicator.core.events import ClientClosed, ClientOpened, DiskDone, Io, Tick
from replicator.core.geometry import BLOCK, PAGE
from replicator.core.replica import Replica
from replicator.core.resource import Resource
from replicator.core.states import Role
from replicator.core.superblock import Superblock
from replicator.core.volume import Volume
from replicator.core.wire import Kind
from tests.sim.build import boot, established, ready, two_nodes
from tests.sim.network import Link
from tests.sim.node import Node
from tests.sim.world import MS, SECOND

MIB = 1 << 20
EVENTS_MAX = 60_000  # far beyond what any test needs: more is a busy loop

Hook = Callable[[int, Kind], bool]


@dataclass
class Asked:
    """A request or a command and, later, its answer."""

    reply: Reply | None = None
    answers: list[CommandDone] = field(default_factory=list)

    @property
    def answer(self) -> CommandDone:
        """Of a command that ended."""
        assert len(self.answers) == 1, self.answers
        return self.answers[0]


class Mirror:
    """alpha (node 0) and beta (node 1).  `start`: "established", "booted" or "off"."""

    def __init__(
        self,
        *,
        start: str = "established",
        primary: int | None = None,
        size: int = MIB,
        volumes: tuple[int, ...] = (0,),
        seed: int = 1,
        **options: Any,
    ) -> None:
        self.world = two_nodes(seed, size=size, volumes=volumes, **options)
        self.alpha, self.beta = self.world.nodes[0], self.world.nodes[1]
        self.hooks: list[Hook] = []
        self.world.network.drop_before = self._sent
        self._held: set[int] = set()  # nodes from which nothing more is sent
        self._kept: list[tuple[Link, int, bytes]] = []
        self._transmit = self.world.network.transmit
        self.world.network.transmit = self._hold  # type: ignore[method-assign]
        if start == "established":
            ready(self.world)
        elif start == "booted":
            boot(self.world)
            self.run(lambda: self.connection(self.alpha).settled and self.connection(self.alpha).connected)
            self.pause()
        if primary is not None:
            self.done(self.node(primary), "primary")
            if start == "established":
                self.run(lambda: self.connection(self.node(1 - primary)).role is Role.PRIMARY)

    def _sent(self, node: int, kind: Kind) -> bool:
        return any([hook(node, kind) for hook in self.hooks])  # noqa: C419 - each hook sees each frame

    def _hold(self, link: Link, side: int, piece: bytes) -> None:
        if link.ends[side].node in self._held:
            self._kept.append((link, side, piece))
        else:
            self._transmit(link, side, piece)

    # --- who

    def node(self, node_id: int) -> Node:
        """By number."""
        return self.world.nodes[node_id]

    def peer(self, node: Node) -> Node:
        """The other one."""
        return self.world.nodes[1 - node.id]

    def resource(self, node: Node) -> Resource:
        """The core of a running node."""
        assert node.resource is not None
        return node.resource

    def volume(self, node: Node, number: int = 0) -> Volume:
        """A volume of a running node."""
        return self.resource(node).volumes[number]

    def replica(self, node: Node, number: int = 0) -> Replica:
        """What a node knows of the other's copy."""
        return self.volume(node, number).replicas[1 - node.id]

    def connection(self, node: Node) -> Connection:
        """To the other node."""
        return self.resource(node).connections[1 - node.id]

    # --- time

    def run(self, until: Callable[[], bool], limit: int = 60 * SECOND) -> None:
        """Until it holds; it must, and without a busy loop."""
        assert self.world.run(until, limit, EVENTS_MAX), "\n".join(["never:", *self.world.lines[-25:]])

    def pause(self, ns: int = 200 * MS) -> None:
        """Let the world go on for a while."""
        end = self.world.now + ns
        self.world.run(None, ns, EVENTS_MAX)
        self.world.now = max(self.world.now, end)

    def establish(self) -> None:
        """Until both are mirrored and UpToDate."""
        self.run(lambda: established(self.world))

    # --- clients

    def ask(
        self, node: Node, io: Io, block: int = 0, blocks: int = 1, *, value: int = 0, volume: int = 0, **more: Any
    ) -> Asked:
        """Hand a request to a node; do not wait."""
        asked = Asked()

        def done(reply: Reply) -> None:
            asked.reply = reply

        data = bytes([value]) * (BLOCK * blocks) if io is Io.WRITE else b""
        size = 0 if io is Io.FLUSH else blocks * BLOCK
        node.request(done, io, block * BLOCK, size, data=data, volume=volume, **more)
        return asked

    def wait(self, asked: Asked) -> Reply:
        """Its reply."""
        self.run(lambda: asked.reply is not None)
        assert asked.reply is not None
        return asked.reply

    def write(self, node: Node, block: int, value: int, blocks: int = 1, **more: Any) -> None:
        """Write and wait for success."""
        reply = self.wait(self.ask(node, Io.WRITE, block, blocks, value=value, **more))
        assert reply.error == 0, reply.error

    def read(self, node: Node, block: int, blocks: int = 1, volume: int = 0) -> bytes:
        """Read and wait for success."""
        reply = self.wait(self.ask(node, Io.READ, block, blocks, volume=volume))
        assert reply.error == 0, reply.error
        return bytes(reply.data)

    def flush(self, node: Node) -> None:
        """FLUSH and wait for success."""
        assert self.wait(self.ask(node, Io.FLUSH)).error == 0

    def open(self, node: Node, client: int = 0) -> None:
        """A client opens volume 0."""
        node.opened = client + 1
        node.step(ClientOpened(0, client, True, f"client {client}"))

    def close(self, node: Node, client: int = 0) -> None:
        """It goes."""
        node.step(ClientClosed(0, client))

    # --- the operator

    def begin(self, node: Node, verb: str, **args: Any) -> Asked:
        """Give a command; do not wait."""
        asked = Asked()
        node.command(verb, asked.answers.append, **args)
        return asked

    def command(self, node: Node, verb: str, **args: Any) -> CommandDone:
        """Give a command and wait for its answer."""
        asked = self.begin(node, verb, **args)
        self.run(lambda: bool(asked.answers))
        return asked.answer

    def done(self, node: Node, verb: str, **args: Any) -> None:
        """A command that must succeed."""
        answer = self.command(node, verb, **args)
        assert answer.ok, answer

    def switch(self, old: Node) -> None:
        """Make the other one Primary."""
        self.done(old, "secondary")
        self.run(lambda: self.connection(self.peer(old)).role is Role.SECONDARY)
        self.done(self.peer(old), "primary")

    # --- the world

    def partition(self) -> None:
        """No link, and none can be made."""
        self.world.network.partitioned = True
        self.world.network.cut_all()
        self.run(lambda: all(n.resource is None or not self.connection(n).connected for n in (self.alpha, self.beta)))

    def heal(self) -> None:
        """Links can be made again."""
        self.world.network.partitioned = False

    def cut(self) -> None:
        """Reset the link; it comes back by itself."""
        self.world.network.cut_all()
        self.pause(50 * MS)

    def stall(self, sender: Node, *, stalled: bool = True) -> None:
        """What this node sends on the newest link hangs, or flows again."""
        self._held.discard(sender.id)
        for kept in [kept for kept in self._kept if kept[0].ends[kept[1]].node == sender.id]:
            self._kept.remove(kept)
            self._transmit(*kept)
        link = self.world.network.links[-1]
        side = 0 if link.ends[0].node == sender.id else 1
        self.world.network.stall(link, side, stalled=stalled)

    def kill(self, node: Node) -> None:
        """kill -9."""
        node.die(power=False)

    def power_cut(self, node: Node) -> None:
        """All that was not flushed is lost (the whole cache, not a part of it)."""
        node.in_flight.clear()
        for disk in node.disks.values():
            disk.data.cache.clear()
            disk.data.seen[:] = disk.data.stable
        node.die(power=True)

    def restart(self, *nodes: Node) -> None:
        """Switch on."""
        for node in nodes:
            node.boot()

    def fill(self, node: Node, data: bytes) -> None:
        """Change a disk behind the program's back, stable."""
        for area in (node.disks[0].data.seen, node.disks[0].data.stable):
            area[: len(data)] = data

    def rename_resource(self, node: Node, resource_id: bytes) -> None:
        """Give the metadata of a node that is off another resource id."""
        disk = node.disks[0]
        changed = replace(self.superblock(node), resource_id=resource_id)
        disk.meta.write(disk.fixed_base, superblock.encode(changed, 1000) + superblock.encode(changed, 1001))
        disk.meta.flush()

    def slow_disks(self, us: int = 10_000_000) -> None:
        """What is handed to a disk from now on takes about so long (until `fast_disks`)."""
        self.world.rates.disk_us = us

    def fast_disks(self) -> None:
        """The usual speed."""
        self.world.rates.disk_us = 100

    def change_options(self, node: Node, **changes: object) -> None:
        """Other settings for the next boot."""
        node.options = replace(node.options, **changes)  # type: ignore[arg-type]

    # --- frames

    def cut_at(self, kind: Kind, sender: Node | None = None) -> list[int]:
        """Cut the link instead of sending the next frame of this kind; the list is filled when it happened."""
        happened: list[int] = []

        def hook(node: int, sent: Kind) -> bool:
            if happened or sent is not kind or (sender is not None and node != sender.id):
                return False
            happened.append(node)
            return True

        self.hooks.append(hook)
        return happened

    def on_frame(self, kind: Kind, act: Callable[[], object], sender: Node | None = None) -> list[int]:
        """Call `act` right before the next frame of this kind is sent."""
        happened: list[int] = []

        def hook(node: int, sent: Kind) -> bool:
            if not happened and sent is kind and (sender is None or node == sender.id):
                happened.append(node)
                act()
            return False

        self.hooks.append(hook)
        return happened

    def stall_at(self, kind: Kind, sender: Node) -> list[int]:
        """From the next frame of this kind on, nothing of this sender arrives; what it sent before does."""
        return self.on_frame(kind, lambda: self._held.add(sender.id), sender)

    def hold(self, sender: Node) -> None:
        """From now on nothing this sender says arrives, on any link; what it sent before does (see `stall`)."""
        self._held.add(sender.id)

    def drop_held(self) -> None:
        """What hung is lost with its link; nothing hangs any more."""
        self._held.clear()
        self._kept.clear()

    def stall_resync(self, source: Node) -> None:
        """From now on the answers of this source to resync requests hang (and all that it sends behind them)."""
        for kind in (Kind.RESYNC_DATA, Kind.RESYNC_ZERO, Kind.RESYNC_EQUAL):
            self.stall_at(kind, source)

    def sent(self, kind: Kind) -> int:
        """Frames of this kind so far, of both."""
        return self.world.network.frames_sent.get(kind, 0)

    # --- what the cores ask for

    def actions(self, name: str) -> list[tuple[int, Any]]:
        """(node, action) of every action of this type from now on."""
        seen: list[tuple[int, Any]] = []
        self.watch(lambda node, action: seen.append((node.id, action)) if type(action).__name__ == name else None)
        return seen

    def on_reply(self, node: Node, act: Callable[[], object]) -> None:
        """Call `act` at the moment a reply leaves."""
        self.watch(lambda who, action: act() if who is node and isinstance(action, Reply) else None)

    def fail(self, node: Node, when: Callable[[Any], bool], *, after_ns: int = MS) -> None:
        """Operations of its disk of which this holds end with EIO, a little later; everything else works."""
        perform = self.world.perform

        def failing(who: Node, action: Any) -> None:
            if who is node and when(action):
                self.world.after(after_ns, lambda: who.step(DiskDone(action.token, errno.EIO)))
            else:
                perform(who, action)

        self.world.perform = failing  # type: ignore[method-assign]

    def fail_reads(self, node: Node) -> None:
        """Reads of its data end with EIO; everything else works."""
        self.fail(node, lambda action: isinstance(action, ReadData))

    def lose_disk(self, node: Node) -> None:
        """Its disk is broken, and the core learns of it now (as from a failed flush)."""
        node.disks[0].broken = True
        if node.resource is not None:
            self.volume(node).disk_error("flush", errno.EIO)
            node.step(Tick())

    def fail_metadata(self, node: Node) -> None:
        """Metadata writes end with EIO; everything else works."""
        self.fail(node, lambda action: isinstance(action, WriteMeta))

    def watch(self, look: Callable[[Node, Action], object]) -> None:
        """Call `look` with every action before it is carried out."""
        perform = self.world.perform

        def watched(node: Node, action: Action) -> None:
            look(node, action)
            perform(node, action)

        self.world.perform = watched  # type: ignore[method-assign]

    # --- what to look at

    def block(self, node: Node, block: int, volume: int = 0) -> int:
        """The value a block on a node's disk is filled with (-1: it is torn)."""
        return _value(node.disks[volume].data.seen, block)

    def stable(self, node: Node, block: int, volume: int = 0) -> int:
        """The same, of what would survive a power cut."""
        return _value(node.disks[volume].data.stable, block)

    def identical(self, volume: int = 0) -> bool:
        """Both disks, byte for byte."""
        return bool(self.alpha.disks[volume].data.seen == self.beta.disks[volume].data.seen)

    def superblock(self, node: Node, volume: int = 0) -> Superblock:
        """As a node that starts now would read it."""
        fixed = bytes(node.disks[volume].meta.stable[node.disks[volume].fixed_base :])
        return superblock.choose(fixed[:PAGE], fixed[PAGE : 2 * PAGE]).superblock

    def dirty(self, node: Node, volume: int = 0) -> set[int]:
        """Dirty blocks towards the other node."""
        attached = self.volume(node, volume).attached
        assert attached is not None
        bitmap = attached.bitmaps[1 - node.id]
        return {block for block in range(bitmap.block_count) if bitmap.any_dirty(block, 1)}

    def disk(self, node: Node, volume: int = 0) -> str:
        """The state of a disk."""
        return self.volume(node, volume).disk.word

    def state(self, node: Node) -> str:
        """Of the connection."""
        return self.connection(node).state.value

    def replication(self, node: Node, volume: int = 0) -> str:
        """Of a volume."""
        return self.replica(node, volume).replication.value

    def role(self, node: Node) -> str:
        """Of the node."""
        return self.resource(node).roles.role.value

    def notices(self, node: Node, code: str) -> list[Notice]:
        """All of one code."""
        return [notice for notice in node.notices if notice.code == code]

    def rule(self, node: Node) -> str:
        """That decided the last round."""
        return str(self.notices(node, "sync-decision")[-1].fields["rule"])

    def reasons(self, node: Node) -> dict[str, str]:
        """code -> text, each with something to do."""
        entries = self.resource(node).status()["reasons"]
        assert isinstance(entries, list)
        assert all(entry["text"] and entry["do"] for entry in entries), entries
        return {entry["code"]: entry["text"] for entry in entries}


def _value(area: bytearray, block: int) -> int:
    part = bytes(area[block * BLOCK : (block + 1) * BLOCK])
    return part[0] if part == part[:1] * BLOCK else -1


def noise(seed: int, size: int) -> bytes:
    """Bytes without zero blocks."""
    return random.Random(seed).randbytes(size)
