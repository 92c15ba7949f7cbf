# SPDX-License-Identifier: Apache-2.0
"""What two running cores ask of their disks, in order, and what was promised to whom meanwhile.

The recorder listens at the core's own interface: actions as they are carried out, completions as they are delivered.
From these it keeps its own model of what is stable and what is not:

- a write is volatile from the moment it was asked for: handed over, it may or may not happen;
- `WriteMeta`, and a data write with FUA, are stable at their completion;
- other data writes are stable when a flush ends that was asked for after their completion.

After every such event, frame, reply and command there is a `Moment` at which the power may go.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

from replicator.core import actions as act
from replicator.core import events as ev
from replicator.core.generations import UNSET
from replicator.core.geometry import BLOCK, SECTOR
from replicator.core.states import Disk as DiskState
from tests.crash.image import Image, Sectors, sectors_of
from tests.sim.build import established
from tests.sim.node import Node
from tests.unit.mirror import Mirror


class Crash(BaseException):
    """The moment that was asked for has come (no `except Exception` on the way may take it)."""


@dataclass(frozen=True, slots=True)
class Volatile:
    """A write that a power cut may lose, keep, or tear."""

    serial: int
    sectors: Sectors
    completed: bool = False


@dataclass(frozen=True, slots=True)
class Promise:
    """A client's write.

    `holders`: nodes that it may be asked from.  A node that is let go by the operator, or that a Primary went on
    without, is no holder any more, whatever its disk says.  `copies`: nodes whose copy says that it has it.
    """

    first: int  # sector
    count: int
    value: int
    acked: bool = False
    flushed: bool = False
    holders: frozenset[int] = frozenset()
    copies: frozenset[int] = frozenset()

    def guaranteed(self, lost: frozenset[int]) -> bool:
        """It must survive a power cut of these nodes."""
        return self.acked and (self.flushed or bool(self.holders - lost))


Promises = tuple[Promise, ...]


def allowed(promises: Promises, lost: frozenset[int]) -> dict[int, set[int]]:
    """Sector -> the values that it may show after a power cut of these nodes (values of untouched sectors are 0)."""
    found: dict[int, set[int]] = {}
    for promise in promises:
        for sector in range(promise.first, promise.first + promise.count):
            if promise.guaranteed(lost):
                found[sector] = {promise.value}
            else:
                found.setdefault(sector, {0}).add(promise.value)
    return found


def after_crash(promises: Iterable[Promise], lost: frozenset[int]) -> Promises:
    """What is still promised when these nodes have lost their caches."""
    return tuple(
        replace(p, holders=p.holders if p.flushed else p.holders - lost)
        if p.guaranteed(lost)
        else replace(p, acked=False)
        for p in promises
    )


@dataclass(frozen=True, slots=True)
class Moment:
    """After event `index`, which concerned `node`."""

    index: int
    node: int
    what: str
    stable: tuple[Image, Image]
    volatile: tuple[tuple[Volatile, ...], tuple[Volatile, ...]]
    promises: Promises
    up: tuple[bool, bool]

    def kept(self, node: int) -> Image:
        """Nothing is lost."""
        return self.stable[node].changed(pair for write in self.volatile[node] for pair in write.sectors)


class Recorder:
    """Watches a `Mirror` from its beginning.  `stop_at`: (index, node): raise `Crash` there."""

    def __init__(self, mirror: Mirror, images: tuple[Image, Image] | None = None) -> None:
        self.mirror = mirror
        self.moments: list[Moment] = []
        self.stop_at: int | None = None
        self.victim = 0
        self.recording = False
        self._due = False
        self._count = 0
        nodes = (mirror.alpha, mirror.beta)
        self._stable = list(images or (Image.of(node.disks[0]) for node in nodes))
        self._volatile: list[list[Volatile]] = [[], []]
        #: By node and token: the data write that is then complete, or the serials that are then stable.
        self._operations: dict[tuple[int, int], Volatile | tuple[int, ...]] = {}
        self.steps = 0  # durable steps so far
        self._clients: dict[tuple[int, int], int | tuple[int, ...]] = {}
        self.promises: list[Promise] = []
        self._left: set[int] = set()
        for node in nodes:
            self._listen(node)
        self._perform = mirror.world.perform
        mirror.world.perform = self._performed  # type: ignore[method-assign]
        self._run = mirror.world.run
        mirror.world.run = self._ran  # type: ignore[method-assign]

    def adopt(self, promises: Promises, cached: tuple[Sectors, Sectors] = ((), ())) -> None:
        """Go on from an earlier life: what was promised, what lies in the caches."""
        self.promises = list(promises)
        for node, sectors in enumerate(cached):
            if sectors:
                self._volatile[node] = [Volatile(0, sectors, completed=True)]

    # --- hooks

    def _listen(self, node: Node) -> None:
        step = node.step

        def stepped(event: ev.Event) -> None:
            if isinstance(event, ev.DiskDone) and node.up:
                self._completed(node, event)
            elif isinstance(event, ev.ClientRequest) and node.up:
                self._asked(node, event)
            elif isinstance(event, ev.Command):
                self._commanded(node, event.verb)
            step(event)
            if isinstance(event, ev.DiskDone):
                self._event(node, "completed")

        node.step = stepped  # type: ignore[method-assign]

    def _ran(self, until: Callable[[], bool] | None = None, *args: int, **more: int) -> bool:
        def check() -> bool:
            if self._due:
                raise Crash
            return until is not None and until()

        done: bool = self._run(check, *args, **more)
        return done or until is None

    def _performed(self, node: Node, action: act.Action, /) -> None:
        if isinstance(action, act.WriteData | act.ZeroData | act.WriteMeta):
            self._submitted(node, action)
        elif isinstance(action, act.FlushData):
            covers = tuple(write.serial for write in self._volatile[node.id] if write.completed)
            self._operations[node.id, action.token] = covers
        elif isinstance(action, act.Reply):
            self._replied(node, action)
        elif not isinstance(action, act.Send | act.CommandDone):
            self._perform(node, action)
            return
        self._perform(node, action)
        kind = f" {action.frame.kind.name}" if isinstance(action, act.Send) else ""
        self._event(node, type(action).__name__ + kind)

    # --- the model of the disks

    def _submitted(self, node: Node, action: act.WriteData | act.ZeroData | act.WriteMeta) -> None:
        self._count += 1
        match action:
            case act.WriteData(offset=offset, data=data):
                sectors = sectors_of("data", offset, bytes(data))
            case act.ZeroData(offset=offset, size=size):
                sectors = sectors_of("data", offset, bytes(size))
            case act.WriteMeta(pieces=pieces):
                sectors = tuple(pair for at, raw in pieces for pair in sectors_of("meta", at, bytes(raw)))
        write = Volatile(self._count, sectors)
        self._volatile[node.id].append(write)
        at_once = isinstance(action, act.WriteMeta) or action.fua
        self._operations[node.id, action.token] = (write.serial,) if at_once else write

    def _completed(self, node: Node, event: ev.DiskDone) -> None:
        operation = self._operations.pop((node.id, event.token), None)
        if operation is None or event.error:
            return
        mine = self._volatile[node.id]
        if isinstance(operation, Volatile):
            mine[mine.index(operation)] = replace(operation, completed=True)
            return
        covered = [write for write in mine if write.serial in operation]
        self.steps += 1
        self._stable[node.id] = self._stable[node.id].changed(pair for write in covered for pair in write.sectors)
        newest = {place: write.serial for write in covered for place, _ in write.sectors}
        # Over what was stable a disk puts nothing older (FUA over a cached write).
        self._volatile[node.id] = [
            replace(write, sectors=tuple(pair for pair in write.sectors if newest.get(pair[0], -1) < write.serial))
            for write in mine
            if write.serial not in operation
        ]

    def _seen(self, node: int) -> Image:
        """What a read returns: what is complete."""
        complete = [write for write in self._volatile[node] if write.completed]
        return self._stable[node].changed(pair for write in complete for pair in write.sectors)

    def power_cut(self, node: Node) -> None:
        """All that is not stable is lost; part of a workload."""
        self._volatile[node.id].clear()
        self._drop(node)
        self.mirror.power_cut(node)
        self.promises = list(after_crash(self.promises, frozenset({node.id})))
        self._event(node, "power cut")

    def kill(self, node: Node) -> None:
        """kill -9 when nothing is in flight; part of a workload."""
        assert all(write.completed for write in self._volatile[node.id]), "let it settle first"
        self._drop(node)
        self.mirror.kill(node)
        self._event(node, "kill")

    def strike(self, node: Node, image: Image, *, forked: bool) -> None:
        """This node loses power now and is left with `image`; what its cache alone had is not promised any more.

        `forked`: the image says that it went on alone, so what the other has does not count.
        """
        self.recording = self._due = False
        self.stop_at = None
        node.in_flight.clear()
        if node.up:
            node.die(power=False)
        image.load(node.disks[0], over=self._seen(node.id))
        self._stable[node.id] = image
        self._volatile[node.id].clear()
        self._drop(node)
        lost = frozenset({0, 1} if forked else {node.id})
        self.promises = list(after_crash(self.promises, lost))

    def _drop(self, node: Node) -> None:
        self._operations = {key: value for key, value in self._operations.items() if key[0] != node.id}
        self._clients = {key: value for key, value in self._clients.items() if key[0] != node.id}

    # --- promises to clients

    def _commanded(self, node: Node, verb: str) -> None:
        """An operator who lets a Secondary's copy go gives up what only it may have."""
        if verb in ("down", "detach", "disconnect") and self.mirror.role(node) == "Secondary":
            self._left.add(node.id)
        elif verb in ("attach", "connect"):
            self._left.discard(node.id)

    def _asked(self, node: Node, event: ev.ClientRequest) -> None:
        if event.io is ev.Io.FLUSH:
            self._clients[node.id, event.token] = tuple(n for n, promise in enumerate(self.promises) if promise.acked)
        elif event.io is not ev.Io.READ:
            self._clients[node.id, event.token] = len(self.promises)
            value = bytes(event.data)[0] if event.io is ev.Io.WRITE else 0
            self.promises.append(Promise(event.offset // SECTOR, event.size // SECTOR, value))

    def _replied(self, node: Node, reply: act.Reply) -> None:
        subject = self._clients.pop((node.id, reply.token), None)
        if subject is None or reply.error:
            return
        if isinstance(subject, tuple):
            for number in subject:
                self.promises[number] = replace(self.promises[number], flushed=True)
            return
        volume = self.mirror.volume(node)
        holders = {peer for peer, replica in volume.replicas.items() if replica.has_good_data}
        holders |= {node.id} if volume.disk is DiskState.UP_TO_DATE else set()
        self.promises[subject] = replace(
            self.promises[subject], acked=True, holders=frozenset(holders), copies=frozenset(holders)
        )

    def _refresh_holders(self) -> None:
        gone, bad = set(self._left), set()
        for node in (self.mirror.alpha, self.mirror.beta):
            volume = self.mirror.volume(node) if node.resource is not None else None
            if volume is None or volume.attached is None:
                continue
            if volume.disk in (DiskState.INCONSISTENT, DiskState.OUTDATED):
                gone.add(node.id)
            if not volume.ledger.durable.was_up_to_date:
                bad.add(node.id)
            elif volume.ledger.slot(1 - node.id).bitmap_id != UNSET:
                gone.add(1 - node.id)  # this node went on alone: it counts, also if it loses its cache
        both = frozenset({0, 1}) if established(self.mirror.world) and not gone else frozenset()
        if both or gone or bad:
            self.promises = [
                replace(p, holders=(p.holders | both) - gone, copies=(p.copies | both) - bad) if p.acked else p
                for p in self.promises
            ]

    # --- moments

    def _event(self, node: Node, what: str) -> None:
        if not self.recording:
            return
        self._refresh_holders()
        nodes = (self.mirror.alpha, self.mirror.beta)
        index = len(self.moments)
        self.moments.append(
            Moment(
                index,
                node.id,
                what,
                (self._stable[0], self._stable[1]),
                (tuple(self._volatile[0]), tuple(self._volatile[1])),
                tuple(self.promises),
                (nodes[0].up, nodes[1].up),
            )
        )
        if index == self.stop_at:
            if node.id == self.victim:
                raise Crash
            self._due = True  # the other node's turn ends first: it lives on

    def start(self) -> None:
        """From now on every event is a moment; the first one is now."""
        self.check_model()
        self.recording = True
        self._event(self.mirror.alpha, "begin")

    def check_model(self) -> None:
        """What the recorder believes is what the fake disks hold."""
        for node in (self.mirror.alpha, self.mirror.beta):
            assert all(write.completed for write in self._volatile[node.id]), "something is in flight"
            image, disk = self._seen(node.id), node.disks[0]
            assert image.fixed() == disk.fixed(), f"node {node.id}: the fixed part is not what was recorded"
            assert image.bitmap() == disk.bitmaps()[0], f"node {node.id}: the bitmap is not what was recorded"
            for block in sorted({number * SECTOR // BLOCK for where, number in image.sectors if where == "data"}):
                raw = image.span("data", block * BLOCK, BLOCK)
                assert self.mirror.block(node, block) == (raw[0] if raw == raw[:1] * BLOCK else -1), block
