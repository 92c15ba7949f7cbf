# SPDX-License-Identifier: Apache-2.0
"""What two nodes did, as lines that people read.

The trace looks at three places of each node: the events that are handed to the core, the batch of actions of each turn,
and each action when it is carried out.  States are compared once per turn, so what is printed are the states in which
the core rests.  A metadata write is printed when it is stable, a frame when it is sent.  No line carries a time, and no
line depends on anything that was drawn.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from replicator.core.actions import (
    Action,
    CommandDone,
    CutClients,
    FlushData,
    Notice,
    Send,
    WriteData,
    WriteMeta,
    ZeroData,
)
from replicator.core.events import DiskDone, Event
from replicator.core.states import Connection as ConnectionState
from replicator.core.superblock import Superblock
from replicator.core.wire import Frame, Kind
from tests.scenarios.words import (
    NAMES,
    STREAM,
    Generations,
    Said,
    errno_word,
    frame_words,
    meta_words,
    range_words,
    spans,
)
from tests.sim.node import Node
from tests.unit.mirror import Mirror

#: What `trace` may name.  Answers, replies and what the world does are always shown.
TOPICS = frozenset({"states", "notices", "frames", "disk", "data", "handshake", "pings"})
USUAL = frozenset({"states", "notices", "frames", "disk"})

_IN_STATES = frozenset({"role", "disk-state", "connection-state", "replication-state", "peer-role", "attached"})
_NOT_SHOWN = frozenset({"ours", "theirs", "peer", "size"})  # fields that other lines show better
_WHO = 16


@dataclass(slots=True)
class Line:
    """One line; lines of a stream with the same `who` and `what` become one."""

    who: str
    what: str
    blocks: set[int] | None = None
    more: str = ""
    stream: bool = False
    count: int = 1

    def __str__(self) -> str:
        text = f"{self.who:<{_WHO}}{self.what}"
        if self.blocks:
            text += f" {spans(self.blocks)}"
        if self.more:
            text += self.more if self.more[0] in ": " else f" {self.more}"
        return f"{text} x{self.count}" if self.count > 1 else text


class Trace:
    """The lines of one scenario; `take` hands them over block by block."""

    def __init__(self, mirror: Mirror) -> None:
        self.mirror = mirror
        self.names = Generations()
        self.topics = USUAL
        self.silent = True
        self._lines: list[Line] = []
        self._states: dict[int, dict[str, str]] = {}
        self._watched: dict[int, int] = {}  # node -> the life whose turns are seen
        self._disk: dict[tuple[int, int, int], Action] = {}  # (node, life, token) -> what is under way
        self._superblocks: dict[tuple[int, int], Superblock] = {}
        self._sequences: dict[int, dict[int, tuple[int, int]]] = {0: {}, 1: {}}
        self.sent: Counter[str] = Counter()
        self._frame: Frame | None = None
        self._volumes = len(mirror.alpha.options.volumes)
        self._attach()

    # --- where it looks

    def _attach(self) -> None:
        network = self.mirror.world.network
        dropped = network.drop_before
        assert dropped is not None

        def sending(node: int, kind: Kind) -> bool:
            drop = dropped(node, kind)
            self._sent(node, kind, drop=drop)
            return drop

        network.drop_before = sending
        for node in (self.mirror.alpha, self.mirror.beta):
            self._listen(node)
        self.mirror.watch(self._acts)

    def _listen(self, node: Node) -> None:
        step = node.step

        def heard(event: Event) -> None:
            self._event(node, event)
            if node.resource is not None and self._watched.get(node.id) != node.life:
                self._watch_turns(node)
            step(event)

        node.step = heard  # type: ignore[method-assign]
        if node.resource is not None:
            self._watch_turns(node)

    def _watch_turns(self, node: Node) -> None:
        resource = self.mirror.resource(node)
        self._watched[node.id] = node.life
        self._states[node.id] = self.states(node)
        drain = resource.drain

        def turn() -> list[Action]:
            batch = drain()
            self._turn(node, batch)
            return batch

        resource.drain = turn  # type: ignore[method-assign]

    # --- what it sees

    def _event(self, node: Node, event: Event) -> None:
        if not isinstance(event, DiskDone):
            return
        action = self._disk.pop((node.id, node.life, event.token), None)
        who = f"{NAMES[node.id]} disk"
        if isinstance(action, WriteMeta):
            self._meta(node, action, event.error)
        elif isinstance(action, FlushData):
            self._add("disk", Line(who, "data flush" + (f": {errno_word(event.error)}" if event.error else " done")))
        elif isinstance(action, WriteData | ZeroData):
            size = action.size if isinstance(action, ZeroData) else len(action.data)
            what = "zero" if isinstance(action, ZeroData) else "write"
            more = errno_word(event.error) if event.error else ""
            where = range_words(action.offset, size)
            self._add("data", Line(who, f"data {what} {where}{' FUA' if action.fua else ''}", more=more))

    def _meta(self, node: Node, action: WriteMeta, error: int) -> None:
        key = (node.id, action.volume)
        words, after = meta_words([(at, bytes(data)) for at, data in action.pieces], self._superblocks[key], self.names)
        if not error:
            self._superblocks[key] = after
        for said in words:
            text = self._of_volume(action.volume, said) + (f": {errno_word(error)}" if error else "")
            self._add("disk", Line(f"{NAMES[node.id]} disk", text))

    def _acts(self, node: Node, action: Action) -> None:
        """An action is about to be carried out."""
        if isinstance(action, Send):
            self._frame = action.frame
        elif isinstance(action, WriteMeta | FlushData | WriteData | ZeroData):
            self._disk[node.id, node.life, action.token] = action
            key = (node.id, action.volume)
            if isinstance(action, WriteMeta) and key not in self._superblocks:
                self._superblocks[key] = self.mirror.superblock(node, action.volume)
        elif isinstance(action, Notice):
            self._notice(node, action)
        elif isinstance(action, CutClients):
            self.add(NAMES[node.id], "clients cut off")

    def _sent(self, node: int, kind: Kind, *, drop: bool) -> None:
        who = f"{NAMES[node]} -> {NAMES[1 - node]}"
        if drop:
            self.add("link", f"cut before {kind.name} from {NAMES[node]}")
            return
        frame = self._frame
        assert frame is not None and frame.kind is kind
        self.sent[kind.name] += 1
        if kind in (Kind.WRITE, Kind.TRIM, Kind.ZERO):
            self._sequences[node][frame.sequence] = (frame.offset, frame.size)
        if kind in (Kind.HELLO, Kind.AGREE):
            topic = "handshake"
        elif kind in (Kind.PING, Kind.PONG):
            topic = "pings"
        else:
            topic = "frames"
        if topic in self.topics:
            said: Said = frame_words(frame, self.names, self._sequences[1 - node])
            line = Line(who, self._of_volume(frame.volume, said.what), said.blocks, said.more)
            line.stream = kind in STREAM and not said.more
            self._add(topic, line)

    def _notice(self, node: Node, notice: Notice) -> None:
        if notice.code in _IN_STATES:
            return
        fields = {key: value for key, value in notice.fields.items() if key not in _NOT_SHOWN}
        if self._volumes == 1:
            fields.pop("volume", None)
        text = " ".join([notice.code, *(f"{key}={value}" for key, value in fields.items())])
        self._add("notices", Line(f"{NAMES[node.id]} says", self.names.in_text(text)))

    def _turn(self, node: Node, batch: list[Action]) -> None:
        before, now = self._states.get(node.id, {}), self.states(node)
        self._states[node.id] = now
        changed = {key: value for key, value in now.items() if before.get(key) != value}
        if changed:
            text = " ".join(f"{key}={value}" for key, value in changed.items())
            self._add("states", Line(NAMES[node.id], text + self._why(node, changed, batch)))

    def _why(self, node: Node, changed: dict[str, str], batch: list[Action]) -> str:
        state = changed.get("connection")
        if state in (ConnectionState.UNCONNECTED.value, ConnectionState.STANDALONE.value):
            return f" ({self.names.in_text(self.mirror.connection(node).reason)})"
        reasons = [
            str(action.fields["reason"])
            for action in batch
            if isinstance(action, Notice) and action.code == "disk-state"
        ]
        return f" ({reasons[-1]})" if reasons and any(key.startswith("disk") for key in changed) else ""

    def states(self, node: Node) -> dict[str, str]:
        """What `expect state` can ask for, of a running node."""
        mirror = self.mirror
        peer = mirror.connection(node).role
        found = {
            "role": mirror.role(node),
            "connection": mirror.state(node),
            "peer-role": peer.value if peer is not None else "Unknown",
        }
        for number in node.options.volumes:
            mark = f".{number}" if self._volumes > 1 else ""
            found[f"disk{mark}"] = mirror.disk(node, number)
            found[f"replication{mark}"] = mirror.replication(node, number)
            found[f"peer-disk{mark}"] = mirror.replica(node, number).disk.word
        return found

    # --- lines

    def _of_volume(self, number: int, text: str) -> str:
        return f"volume {number} {text}" if self._volumes > 1 else text

    def _add(self, topic: str, line: Line) -> None:
        if topic in self.topics and not self.silent:
            self._keep(line)

    def _keep(self, line: Line) -> None:
        if line.stream:
            for earlier in reversed(self._lines):
                if not earlier.stream:
                    break
                if (earlier.who, earlier.what, earlier.more) == (line.who, line.what, line.more):
                    earlier.count += 1
                    if earlier.blocks is not None and line.blocks is not None:
                        earlier.blocks |= line.blocks
                    return
        self._lines.append(line)

    def add(self, who: str, text: str) -> None:
        """A line that is shown whatever the topics are."""
        if not self.silent:
            self._lines.append(Line(who, self.names.in_text(text)))

    def add_reply(self, who: str, what: str, blocks: set[int], more: str) -> None:
        """A reply to a client: a stream of its own."""
        self._keep(Line(who, what, blocks, more, stream=True))

    def answered(self, node: Node, verb: str, answer: CommandDone) -> None:
        """How an operator's command ended."""
        if answer.ok:
            self.add(NAMES[node.id], f"{verb}: ok")
        else:
            number = f" {answer.number}" if answer.number else ""
            self.add(NAMES[node.id], f"{verb}: refused{number} {answer.code}: {answer.message}")

    def forget_disk(self, node: Node) -> None:
        """Its metadata is another one now."""
        for number in node.options.volumes:
            self._superblocks.pop((node.id, number), None)

    def take(self) -> list[str]:
        """The lines since the last call."""
        lines, self._lines = self._lines, []
        return [str(line) for line in lines]
