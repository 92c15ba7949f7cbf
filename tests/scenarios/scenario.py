# SPDX-License-Identifier: Apache-2.0
"""One scenario while it is carried out: the two nodes, what was asked of them, and what is wrong with their disks.

The scenario remembers every write and its answer, so that `expect kept` can say what a copy must return: for each block
the newest acknowledged value, or one that was written later and not acknowledged.
"""

from __future__ import annotations

import errno
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from typing import Any

from replicator.core.actions import Action, CommandDone, FlushData, ReadData, Reply, WriteData, WriteMeta, ZeroData
from replicator.core.events import DiskDone, Io
from replicator.core.geometry import BLOCK
from replicator.core.options import Options
from tests.scenarios.trace import USUAL, Trace
from tests.scenarios.words import NAMES, blocks_of, errno_word, range_words
from tests.sim.build import ready
from tests.sim.disk import Disk
from tests.sim.node import Node
from tests.sim.world import MS, SECOND, US
from tests.unit.mirror import MIB, Mirror

FAULTS = frozenset({"broken", "writes-fail", "reads-fail", "flush-fails", "metadata-fails", "frozen"})
TIMES = {"ms": MS, "us": US, "s": SECOND}
SIZES = {"KiB": 1024, "MiB": MIB}


class ScenarioError(Exception):
    """A line that cannot be understood, or an expectation that does not hold."""


class Words:
    """The words behind a verb; all of them have to be taken."""

    def __init__(self, words: list[str]) -> None:
        self.plain = [word for word in words if "=" not in word]
        self.named = dict(word.split("=", 1) for word in words if "=" in word)

    def next(self, what: str) -> str:
        """The next word without a name."""
        if not self.plain:
            raise ScenarioError(f"{what} is missing")
        return self.plain.pop(0)

    def flag(self, word: str) -> bool:
        """Whether a word is there."""
        if word in self.plain:
            self.plain.remove(word)
            return True
        return False

    def number(self, name: str, default: int) -> int:
        """name=NUMBER."""
        return int(self.named.pop(name, default))

    def end(self) -> None:
        """Nothing may be left."""
        left = self.plain + [f"{name}={value}" for name, value in self.named.items()]
        if left:
            raise ScenarioError(f"not understood: {' '.join(left)}")


def blocks_in(text: str) -> list[int]:
    """0-2,7 is [0, 1, 2, 7]."""
    found: list[int] = []
    for part in text.split(",") if text != "none" else []:
        first, _, last = part.partition("-")
        found += range(int(first), int(last or first) + 1)
    return found


def with_unit(text: str, units: dict[str, int]) -> int:
    """200ms in nanoseconds, 12MiB in bytes, or a plain number."""
    for unit, factor in units.items():
        if text.endswith(unit):
            return int(text.removesuffix(unit)) * factor
    return int(text)


def option(name: str, text: str) -> object:
    """A field of Options: name and value as the scenario spells them."""
    if name.endswith("_ns"):
        return with_unit(text, TIMES)
    return with_unit(text, SIZES) if text[0].isdigit() else text


@dataclass(slots=True)
class Asked:
    """A request or a command that was begun."""

    node: Node
    what: str
    error: int | None = None
    data: bytes = b""
    answer: CommandDone | None = None
    gone: bool = False  # with the process

    @property
    def open(self) -> bool:
        """No answer yet."""
        return self.error is None and self.answer is None and not self.gone


@dataclass(slots=True)
class Written:
    """One value of one block in the order of asking."""

    value: int
    ask: Asked
    whole: bool  # the whole block


@dataclass(slots=True)
class Scenario:
    """One file being carried out."""

    _mirror: Mirror | None = None
    _trace: Trace | None = None
    topics: frozenset[str] = USUAL
    last: Asked | None = None  # what `expect refused` is about
    asked: list[Asked] = field(default_factory=list)
    armed: list[tuple[str, list[int]]] = field(default_factory=list)
    written: dict[int, dict[int, list[Written]]] = field(default_factory=dict)  # volume -> block -> history
    faults: dict[int, set[str]] = field(default_factory=lambda: {0: set(), 1: set()})
    frozen: list[tuple[Node, int, Action]] = field(default_factory=list)
    saved: dict[int, dict[int, Disk]] = field(default_factory=dict)
    marked: dict[int, int] = field(default_factory=dict)  # node -> the generation `mark` saw
    since: int = 0

    @property
    def mirror(self) -> Mirror:
        """The two nodes."""
        if self._mirror is None:
            raise ScenarioError("there are no nodes yet: begin with `mirror` or `nodes`")
        return self._mirror

    @property
    def trace(self) -> Trace:
        """What is printed."""
        assert self._trace is not None
        return self._trace

    def lines(self) -> list[str]:
        """What came out since the last call."""
        return self._trace.take() if self._trace is not None else []

    def end(self) -> None:
        """What was prepared has happened, what was asked has been answered."""
        never = [what for what, happened in self.armed if not happened]
        if never:
            raise ScenarioError(f"never happened: {'; '.join(never)}")
        waiting = [one.what for one in self.asked if one.open]
        if waiting:
            raise ScenarioError(f"never answered: {'; '.join(waiting)}")

    # --- who and what

    def node(self, name: str) -> Node:
        """alpha or beta."""
        if name not in NAMES:
            raise ScenarioError(f"{name} is not a node")
        return self.mirror.node(NAMES.index(name))

    def running(self, words: Words) -> Node:
        """The node named next, which must be on."""
        node = self.node(words.next("a node"))
        if node.resource is None:
            raise ScenarioError(f"{NAMES[node.id]} is off")
        return node

    def off(self, words: Words) -> Node:
        """The node named next, which must be off."""
        node = self.node(words.next("a node"))
        if node.resource is not None:
            raise ScenarioError(f"{NAMES[node.id]} is running")
        return node

    def loose(self, words: Words) -> Node:
        """The node named next, whose disks nobody uses now."""
        node = self.node(words.next("a node"))
        if node.resource is not None and any(volume.attached for volume in self.mirror.resource(node).volumes.values()):
            raise ScenarioError(f"{NAMES[node.id]} uses its disk")
        return node

    def build(self, words: Words, *, start: str) -> None:
        """Two nodes."""
        if self._mirror is not None:
            raise ScenarioError("there are two nodes already")
        primary = words.named.pop("primary", "")
        size = with_unit(words.named.pop("size", "1MiB"), SIZES)
        volumes = tuple(blocks_in(words.named.pop("volumes", "0")))
        options: dict[str, Any] = {
            name: option(name, words.named.pop(name)) for name in list(words.named) if name in OPTIONS
        }
        self._mirror = mirror = Mirror(start="off", size=size, volumes=volumes, **options)
        mirror.world.rates.steady = True
        mirror.world.rates.cut_frames = False
        self._spoil()
        self._trace = Trace(mirror)
        self._trace.topics = self.topics
        if start == "established":
            self._establish(primary)
        self.since = mirror.world.now
        self._trace.sent.clear()
        self._trace.silent = False

    def _establish(self, primary: str) -> None:
        mirror = self.mirror
        ready(mirror.world)
        if primary:
            node = self.node(primary)
            mirror.done(node, "primary")
            mirror.run(lambda: mirror.role(node) == "Primary" and mirror.connection(mirror.peer(node)).role is not None)
        mirror.pause(SECOND)
        self.mark()

    def mark(self) -> None:
        """Remember the generations as they are on the disks."""
        for node in (self.mirror.alpha, self.mirror.beta):
            self.marked[node.id] = self.mirror.superblock(node).current

    def status(self, node: Node) -> None:
        """One line."""
        silent, self.trace.silent = self.trace.silent, False
        if node.resource is None:
            self.trace.add(NAMES[node.id], "off")
        else:
            self.trace.add(NAMES[node.id], " ".join(f"{key}={word}" for key, word in self.trace.states(node).items()))
        self.trace.silent = silent

    def check_time(self, limits: str, hold: Callable[[bool, str], None]) -> None:
        """Simulated time since `time`."""
        least, _, most = limits.partition("-")
        passed = self.mirror.world.now - self.since
        within = with_unit(least, TIMES) <= passed <= with_unit(most, TIMES)
        hold(within, f"{passed // MS} ms have passed")

    # --- disks that fail

    def _spoil(self) -> None:
        world = self.mirror.world
        perform = world.perform

        def spoiled(node: Node, action: Action) -> None:
            if node.resource is None:
                return  # it was killed in the middle of its own turn
            faults = self.faults[node.id]
            on_disk = isinstance(action, ReadData | WriteData | ZeroData | FlushData | WriteMeta)
            if on_disk and "frozen" in faults:
                self.frozen.append((node, node.life, action))
            elif (
                ("reads-fail" in faults and isinstance(action, ReadData))
                or ("writes-fail" in faults and isinstance(action, WriteData | ZeroData))
                or ("metadata-fails" in faults and isinstance(action, WriteMeta))
            ):
                world.after(MS, lambda: node.step(DiskDone(action.token, errno.EIO)))
            else:
                perform(node, action)

        world.perform = spoiled  # type: ignore[method-assign]

    def spoil(self, node: Node, fault: str, *, on: bool) -> None:
        """Begin or end a fault."""
        faults = self.faults[node.id]
        faults.add(fault) if on else faults.discard(fault)
        for disk in node.disks.values():
            disk.broken = "broken" in faults
            disk.fail_flush = "flush-fails" in faults
        if "frozen" not in faults:
            held, self.frozen = self.frozen, [one for one in self.frozen if one[0] is not node]
            for who, life, action in held:
                if who is node and life == node.life:
                    self.mirror.world.perform(node, action)

    # --- requests

    def request(self, node: Node, io: Io, offset: int, size: int, value: int, *, volume: int, fua: bool) -> Asked:
        """Hand a request to a node."""
        words = "" if io is Io.FLUSH else f" {range_words(offset, size)}"
        one = Asked(node, f"{io.value}{words}")
        blocks = blocks_of(offset, size)
        if io not in (Io.READ, Io.FLUSH):
            for block in range(offset // BLOCK, -(-(offset + size) // BLOCK)):
                self.written.setdefault(volume, {}).setdefault(block, []).append(
                    Written(value, one, blocks is not None)
                )

        def done(reply: Reply) -> None:
            one.error, one.data = reply.error, bytes(reply.data)
            end = f"{errno_word(reply.error)}"
            if io is Io.READ and not reply.error:
                end = read_words(one.data)
            self._show_reply(node, io, blocks, words, value, end)

        self.asked.append(one)
        data = bytes([value]) * size if io is Io.WRITE else b""
        more: dict[str, object] = {"fua": True} if fua else {}
        node.request(done, io, offset, size, data=data, volume=volume, **more)
        self.last = one
        return one

    def _show_reply(self, node: Node, io: Io, blocks: set[int] | None, words: str, value: int, end: str) -> None:
        fill = f" = {value}" if io is Io.WRITE else ""
        if io in (Io.READ, Io.FLUSH) or blocks is None:
            self.trace.add(NAMES[node.id], f"{io.value}{words}{fill}: {end}")
        else:
            self.trace.add_reply(NAMES[node.id], io.value, blocks, f"{fill}: {end}")

    def wait(self, asked: list[Asked]) -> None:
        """Until all of these are answered."""
        self.mirror.run(lambda: not any(one.open for one in asked))

    def operate(self, verb: str, words: Words) -> None:
        """An operator's command."""
        begin = words.named.pop("begin") == "1"
        node = self.running(words)
        args: dict[str, object] = {
            flag: True for flag in ("force", "clear_bitmap") if words.flag(flag.replace("_", "-"))
        }
        if "volume" in words.named or verb in ("invalidate", "invalidate-remote", "new-current-uuid"):
            args["volume"] = words.number("volume", 0)
        one = Asked(node, f"{verb} on {NAMES[node.id]}")

        def done(answer: CommandDone) -> None:
            one.answer = answer
            self.trace.answered(node, verb, answer)

        self.asked.append(one)
        self.last = one
        node.command(verb, done, **args)
        if not begin:
            self.wait([one])

    def died(self, node: Node) -> None:
        """Its clients and operators get no answer any more."""
        for one in self.asked:
            if one.node is node and one.open:
                one.gone = True
        self.trace.forget_disk(node)


OPTIONS = {found.name for found in fields(Options)} - {"resource", "node_id", "node_name", "peers", "volumes"}


def read_words(data: bytes) -> str:
    """The values of the blocks; equal neighbours once."""
    values: list[str] = []
    for at in range(0, len(data), BLOCK):
        part = data[at : at + BLOCK]
        word = str(part[0]) if part == part[:1] * len(part) else "mixed"
        if not values or values[-1] != word:
            values.append(word)
    return " ".join(values)
