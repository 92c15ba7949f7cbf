# SPDX-License-Identifier: Apache-2.0
"""The language of the scenario files: one command a line, carried out on two real cores.

README.md lists the commands.  A word with `=` is named, others are not; every word must be understood, so a misspelt
one is an error with its line and never a condition that is silently not checked.  What a command starts is traced; a
command that asks something (`write`, `primary`, ...) waits for the answer unless `begin` stands before it.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import TypeAlias

from replicator.core.events import Io
from replicator.core.geometry import BLOCK
from replicator.core.wire import Kind
from tests.scenarios.expect import expect
from tests.scenarios.scenario import (
    FAULTS,
    OPTIONS,
    SIZES,
    TIMES,
    Scenario,
    ScenarioError,
    Words,
    blocks_in,
    option,
    with_unit,
)
from tests.scenarios.trace import TOPICS
from tests.scenarios.words import NAMES, spans, superblock_facts
from tests.sim.disk import Disk
from tests.sim.world import MS, SECOND

VERBS = frozenset({
    "attach", "detach", "connect", "disconnect", "primary", "secondary", "invalidate", "invalidate-remote",
    "new-current-uuid", "pause-sync", "resume-sync", "down",
})  # fmt: skip
REQUESTS = {"write": Io.WRITE, "read": Io.READ, "flush": Io.FLUSH, "trim": Io.TRIM, "zero": Io.ZERO}

Command: TypeAlias = Callable[[Scenario, Words], None]
COMMANDS: dict[str, Command] = {"expect": expect}


def command(name: str) -> Callable[[Command], Command]:
    """Register a command."""

    def register(run: Command) -> Command:
        COMMANDS[name] = run
        return run

    return register


def carry_out(scenario: Scenario, line: str) -> list[str]:
    """Carry out one line; returns what came out."""
    words = line.split()
    verb = words.pop(0)
    begin = verb == "begin"
    if begin:
        verb = words.pop(0) if words else ""
        if verb not in VERBS and verb not in REQUESTS:
            raise ScenarioError(f"{verb or 'nothing'} cannot be begun")
    if verb not in COMMANDS:
        raise ScenarioError(f"there is no command {verb}")
    taken = Words(words)
    if verb in VERBS or verb in REQUESTS:
        taken.named["begin"] = "1" if begin else "0"
    COMMANDS[verb](scenario, taken)
    taken.end()
    return scenario.lines()


# --- the commands


@command("mirror")
def _mirror(scenario: Scenario, words: Words) -> None:
    scenario.build(words, start="established")


@command("nodes")
def _nodes(scenario: Scenario, words: Words) -> None:
    scenario.build(words, start="off")


@command("trace")
def _trace(scenario: Scenario, words: Words) -> None:
    topics = frozenset(words.plain)
    words.plain.clear()
    if not topics <= TOPICS | {"nothing"}:
        raise ScenarioError(f"topics are {', '.join(sorted(TOPICS))} or nothing")
    scenario.topics = topics - {"nothing"}
    if scenario._trace is not None:
        scenario._trace.topics = scenario.topics


@command("boot")
def _boot(scenario: Scenario, words: Words) -> None:
    nodes = [scenario.off(words)]
    while words.plain:
        nodes.append(scenario.off(words))
    for node in nodes:
        scenario.trace.add(NAMES[node.id], "boots")
        node.boot()
    scenario.mirror.pause(SECOND)


@command("run")
def _run(scenario: Scenario, words: Words) -> None:
    scenario.mirror.pause(with_unit(words.next("a duration"), TIMES))


@command("settle")
def _settle(scenario: Scenario, words: Words) -> None:
    scenario.mirror.pause(3 * SECOND)


@command("establish")
def _establish(scenario: Scenario, words: Words) -> None:
    scenario.mirror.establish()
    scenario.mirror.pause(SECOND)


@command("time")
def _time(scenario: Scenario, words: Words) -> None:
    now = scenario.mirror.world.now
    scenario.trace.add("time", f"{(now - scenario.since) // MS} ms")
    scenario.since = now


def _request(io: Io) -> Command:
    def run(scenario: Scenario, words: Words) -> None:
        begin = words.named.pop("begin") == "1"
        node = scenario.running(words)
        value, volume = words.number("value", 0), words.number("volume", 0)
        if io is Io.WRITE and value == 0:
            raise ScenarioError("write needs value=, not 0")
        fua = words.flag("fua")
        asked = [
            scenario.request(node, io, offset, size, value, volume=volume, fua=fua)
            for offset, size in _ranges(io, words)
        ]
        if not begin:
            scenario.wait(asked)

    return run


def _ranges(io: Io, words: Words) -> list[tuple[int, int]]:
    """block=3, blocks=0-3 (one request), each=0-3 (one request a block), bytes=512+1024."""
    if io is Io.FLUSH:
        return [(0, 0)]
    if "each" in words.named:
        return [(block * BLOCK, BLOCK) for block in blocks_in(words.named.pop("each"))]
    if "bytes" in words.named:
        offset, _, size = words.named.pop("bytes").partition("+")
        return [(int(offset), int(size))]
    blocks = blocks_in(words.named.pop("blocks", words.named.pop("block", "none")))
    if not blocks or blocks != list(range(blocks[0], blocks[-1] + 1)):
        raise ScenarioError("block=, blocks= (neighbours), each= or bytes= is missing")
    return [(blocks[0] * BLOCK, len(blocks) * BLOCK)]


def _verb(verb: str) -> Command:
    return lambda scenario, words: scenario.operate(verb, words)


COMMANDS.update({name: _request(io) for name, io in REQUESTS.items()})
COMMANDS.update({verb: _verb(verb) for verb in VERBS})


@command("open")
def _open(scenario: Scenario, words: Words) -> None:
    scenario.mirror.open(scenario.running(words))


@command("close")
def _close(scenario: Scenario, words: Words) -> None:
    scenario.mirror.close(scenario.running(words))


# --- the world


def _act(scenario: Scenario, words: Words) -> None:
    """cut, stall NODE, kill NODE, power-cut NODE."""
    verb = words.next("what to do")
    node = scenario.running(words)
    words.end()
    if verb == "stall":
        scenario.trace.add(NAMES[node.id], "what it sends from now on hangs")
        scenario.mirror.hold(node)
        return
    scenario.trace.add(NAMES[node.id], "killed" if verb == "kill" else "power cut")
    node.in_flight.clear()
    scenario.died(node)
    scenario.mirror.kill(node) if verb == "kill" else scenario.mirror.power_cut(node)


@command("cut")
def _cut(scenario: Scenario, words: Words) -> None:
    scenario.trace.add("link", "cut")
    scenario.mirror.drop_held()
    scenario.mirror.cut()


def _each(verb: str) -> Command:
    def run(scenario: Scenario, words: Words) -> None:
        names = list(words.plain)
        words.plain.clear()
        for name in names:
            _act(scenario, Words([verb, name]))
        if verb != "stall":
            scenario.mirror.drop_held()
            scenario.mirror.pause(50 * MS)

    return run


COMMANDS.update({verb: _each(verb) for verb in ("kill", "power-cut", "stall")})


@command("flow")
def _flow(scenario: Scenario, words: Words) -> None:
    node = scenario.running(words)
    scenario.trace.add(NAMES[node.id], "what it sends flows again")
    scenario.mirror.stall(node, stalled=False)
    scenario.mirror.pause(50 * MS)


@command("before")
def _before(scenario: Scenario, words: Words) -> None:
    """Arm a hook: it acts once, at the nth frame of this kind (of this sender), before that is sent."""
    kind = words.next("a kind of frame")
    text = f"before {kind} {' '.join(words.plain)}"
    sender = scenario.node(words.named.pop("from")).id if "from" in words.named else None
    left, action = words.number("nth", 1), list(words.plain)
    words.plain.clear()
    if kind not in Kind.__members__:
        raise ScenarioError(f"there is no frame {kind}")
    if not action or action[0] not in ("cut", "stall", "kill", "power-cut"):
        raise ScenarioError("before KIND [from=NODE] [nth=N] cut, stall, kill NODE or power-cut NODE")
    happened: list[int] = []

    def hook(node: int, sent: Kind) -> bool:
        nonlocal left
        if happened or sent.name != kind or sender not in (None, node):
            return False
        left -= 1
        if left:
            return False
        happened.append(node)
        if action == ["cut"]:
            return True
        _act(scenario, Words([*action, NAMES[node]] if action == ["stall"] else list(action)))
        return False

    scenario.mirror.hooks.append(hook)
    scenario.armed.append((text, happened))


@command("partition")
def _partition(scenario: Scenario, words: Words) -> None:
    scenario.trace.add("link", "partitioned")
    scenario.mirror.drop_held()
    scenario.mirror.partition()
    scenario.mirror.pause(50 * MS)


@command("heal")
def _heal(scenario: Scenario, words: Words) -> None:
    scenario.trace.add("link", "healed")
    scenario.mirror.heal()


@command("disk")
def _disk(scenario: Scenario, words: Words) -> None:
    node = scenario.node(words.next("a node"))
    what = words.next("a fault")
    scenario.trace.add(f"{NAMES[node.id]} disk", what)
    if what == "works":
        for fault in FAULTS:
            scenario.spoil(node, fault, on=False)
    elif what in FAULTS:
        scenario.spoil(node, what, on=True)
    else:
        raise ScenarioError(f"faults are {', '.join(sorted(FAULTS))}; or works")


@command("snapshot")
def _snapshot(scenario: Scenario, words: Words) -> None:
    node = scenario.node(words.next("a node"))
    scenario.saved[node.id] = copy.deepcopy(node.disks)


@command("put-back")
def _put_back(scenario: Scenario, words: Words) -> None:
    node = scenario.loose(words)
    if node.id not in scenario.saved:
        raise ScenarioError("there is no snapshot of it")
    node.disks.update(copy.deepcopy(scenario.saved[node.id]))
    scenario.trace.forget_disk(node)


@command("blank")
def _blank(scenario: Scenario, words: Words) -> None:
    node = scenario.loose(words)
    size = words.named.pop("size", "")
    for number, old in node.disks.items():
        node.disks[number] = Disk(
            with_unit(size, SIZES) if size else old.size,
            node_id=node.id,
            volume=number,
            peers=[1 - node.id],
            resource_id=bytes([node.id + 1]) * 16,
        )
    scenario.trace.forget_disk(node)


@command("fill")
def _fill(scenario: Scenario, words: Words) -> None:
    """Content that was there before; stable, and known to no bitmap."""
    value = words.number("value", 0)
    while words.plain:
        node = scenario.node(words.next("a node"))
        scenario.mirror.fill(node, bytes([value]) * node.disks[0].size)


@command("stranger")
def _stranger(scenario: Scenario, words: Words) -> None:
    scenario.mirror.rename_resource(scenario.off(words), b"another resource")


@command("options")
def _options(scenario: Scenario, words: Words) -> None:
    node = scenario.off(words)
    changes = {name: option(name, words.named.pop(name)) for name in list(words.named) if name in OPTIONS}
    if "protocol" in changes:
        changes["matching"] = (("protocol", str(changes["protocol"])),)
    scenario.mirror.change_options(node, **changes)


# --- questions


@command("status")
def _status(scenario: Scenario, words: Words) -> None:
    while words.plain:
        scenario.status(scenario.node(words.next("a node")))


@command("gi")
def _gi(scenario: Scenario, words: Words) -> None:
    while words.plain:
        node = scenario.node(words.next("a node"))
        for number in node.options.volumes:
            found = scenario.mirror.superblock(node, number)
            scenario.trace.add(f"{NAMES[node.id]} disk", superblock_facts(found, scenario.trace.names))


@command("bits")
def _bits(scenario: Scenario, words: Words) -> None:
    volume = words.number("volume", 0)
    while words.plain:
        node = scenario.running(words)
        scenario.trace.add(NAMES[node.id], f"dirty: {spans(scenario.mirror.dirty(node, volume))}")


@command("reasons")
def _reasons(scenario: Scenario, words: Words) -> None:
    node = scenario.running(words)
    for code, text in scenario.mirror.reasons(node).items():
        scenario.trace.add(f"{NAMES[node.id]} why", f"{code}: {text}")


@command("mark")
def _mark(scenario: Scenario, words: Words) -> None:
    scenario.mark()
