# SPDX-License-Identifier: Apache-2.0
"""`expect ...`: what must hold whatever the trace says.

An expectation prints nothing and fails on its own, also with --rewrite: a trace can be rewritten by accident, a lost
write cannot be blessed that way.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

from replicator.core import activity
from replicator.core.bitmap import Bitmap
from replicator.core.generations import same
from replicator.core.geometry import (
    ACTIVITY_BLOCKS,
    ACTIVITY_OFFSET,
    BLOCK,
    PAGE,
    block_count,
    blocks_of_extent,
)
from tests.scenarios.scenario import Scenario, ScenarioError, Words, blocks_in, read_words
from tests.scenarios.words import NAMES, errno_word, spans
from tests.sim.node import Node

Expectation: TypeAlias = Callable[[Scenario, Words], None]
EXPECTATIONS: dict[str, Expectation] = {}


def expectation(name: str) -> Callable[[Expectation], Expectation]:
    """Register what may follow `expect`."""

    def register(hold: Expectation) -> Expectation:
        EXPECTATIONS[name] = hold
        return hold

    return register


def expect(scenario: Scenario, words: Words) -> None:
    """The command: the word behind `expect` chooses."""
    what = words.next("what is expected")
    if what not in EXPECTATIONS:
        raise ScenarioError(f"nothing is known about expecting {what}")
    EXPECTATIONS[what](scenario, words)


def _hold(held: bool, otherwise: str) -> None:
    if not held:
        raise ScenarioError(f"expected otherwise: {otherwise}")


# --- data


@expectation("equal")
def _equal(scenario: Scenario, words: Words) -> None:
    """Both copies, byte for byte; what was acknowledged is on them."""
    for number in scenario.mirror.alpha.options.volumes:
        differing = _differing(scenario, number)
        _hold(not differing, f"blocks {spans(differing)} of volume {number} differ")
    for node in (scenario.mirror.alpha, scenario.mirror.beta):
        _keeps(scenario, node, stable=False)


@expectation("different")
def _different(scenario: Scenario, words: Words) -> None:
    volume = words.number("volume", 0)
    asked, differing = set(blocks_in(words.named.pop("blocks"))), _differing(scenario, volume)
    _hold(asked == differing, f"blocks {spans(differing)} differ")


def _differing(scenario: Scenario, volume: int) -> set[int]:
    one, other = (bytes(node.disks[volume].data.seen[:]) for node in (scenario.mirror.alpha, scenario.mirror.beta))
    if one == other:
        return set()
    blocks = range(-(-max(len(one), len(other)) // BLOCK))
    return {n for n in blocks if one[n * BLOCK : (n + 1) * BLOCK] != other[n * BLOCK : (n + 1) * BLOCK]}


@expectation("value")
def _value(scenario: Scenario, words: Words) -> None:
    """expect value 7 on alpha blocks=3 [stable]: on its disk."""
    value = int(words.next("a value"))
    node, stable, volume = _on(scenario, words), words.flag("stable"), words.number("volume", 0)
    area = node.disks[volume].data
    for block in blocks_in(words.named.pop("blocks")):
        part = bytes((area.stable if stable else area.seen)[block * BLOCK : (block + 1) * BLOCK])
        _hold(part == bytes([value]) * len(part), f"block {block} of {NAMES[node.id]} is {read_words(part)}")


def _on(scenario: Scenario, words: Words) -> Node:
    if words.next("on") != "on":
        raise ScenarioError("`on NODE` is missing")
    return scenario.node(words.next("a node"))


@expectation("kept")
def _kept(scenario: Scenario, words: Words) -> None:
    """expect kept on alpha [stable]: every acknowledged write, or a later one."""
    node = _on(scenario, words)
    _keeps(scenario, node, stable=words.flag("stable"))


def _keeps(scenario: Scenario, node: Node, *, stable: bool) -> None:
    for volume, blocks in scenario.written.items():
        data = node.disks[volume].data
        area = data.stable if stable else data.seen
        for block, history in blocks.items():
            acknowledged = [at for at, one in enumerate(history) if one.ask.error == 0]
            last = acknowledged[-1] if acknowledged else -1
            allowed = {one.value for one in history[max(last, 0) :]} | ({0} if last < 0 else set())
            whole = all(one.whole for one in history[max(last, 0) :])
            part = bytes(area[block * BLOCK : (block + 1) * BLOCK])
            right = part == part[:1] * len(part) if whole else True
            found = part[0] if whole else history[-1].value
            _hold(
                right and found in allowed,
                f"block {block} of {NAMES[node.id]} is {read_words(part)}, acknowledged or later: {sorted(allowed)}",
            )


@expectation("read")
def _read(scenario: Scenario, words: Words) -> None:
    """expect read 0 7: what the last read returned, equal neighbours once."""
    value = " ".join(words.plain)
    words.plain.clear()
    assert scenario.last is not None
    found = read_words(scenario.last.data)
    _hold(scenario.last.error == 0 and found == value, f"the last read returned {found}")


# --- answers


@expectation("ok")
def _ok(scenario: Scenario, words: Words) -> None:
    one = scenario.last
    _hold(
        one is not None and (one.error == 0 or (one.answer is not None and one.answer.ok)), "the last answer is not ok"
    )


@expectation("error")
def _error(scenario: Scenario, words: Words) -> None:
    """expect error EIO."""
    name, one = words.next("an errno"), scenario.last
    _hold(one is not None and one.error is not None and errno_word(one.error) == name, "the last reply is another")


@expectation("refused")
def _refused(scenario: Scenario, words: Words) -> None:
    """expect refused code [-2]."""
    code, number = words.next("a code"), words.plain.pop(0) if words.plain else "0"
    answer = scenario.last.answer if scenario.last is not None else None
    held = answer is not None and not answer.ok and (answer.code, answer.number) == (code, int(number))
    _hold(held, f"the last answer is {answer}")


@expectation("waiting")
def _waiting(scenario: Scenario, words: Words) -> None:
    """What was begun last has no answer yet."""
    _hold(scenario.last is not None and scenario.last.open, "it is answered")


@expectation("answered")
def _answered(scenario: Scenario, words: Words) -> None:
    waiting = [one.what for one in scenario.asked if one.open]
    _hold(not waiting, f"still open: {', '.join(waiting)}")


# --- states


@expectation("state")
def _state(scenario: Scenario, words: Words) -> None:
    """expect state alpha disk=UpToDate connection=StandAlone."""
    node = scenario.running(words)
    found = scenario.trace.states(node)
    if not words.named:
        raise ScenarioError("which state?")
    for key in list(words.named):
        if key not in found:
            raise ScenarioError(f"states are {', '.join(found)}")
        wanted = words.named.pop(key)
        _hold(found[key] == wanted, f"{key} of {NAMES[node.id]} is {found[key]}")


@expectation("off")
def _off(scenario: Scenario, words: Words) -> None:
    scenario.off(words)


@expectation("marked")
def _marked(scenario: Scenario, words: Words) -> None:
    """expect marked alpha blocks=0-3 [exactly]: dirty towards the other node."""
    node, exactly, volume = scenario.running(words), words.flag("exactly"), words.number("volume", 0)
    asked, found = set(blocks_in(words.named.pop("blocks"))), scenario.mirror.dirty(node, volume)
    _hold(asked == found if exactly else asked <= found, f"dirty at {NAMES[node.id]}: {spans(found)}")


@expectation("known")
def _known(scenario: Scenario, words: Words) -> None:
    """Wherever the copies differ, one node knows: a bit, or a hot extent (decision 0001, V1)."""
    for volume in scenario.mirror.alpha.options.volumes:
        known = _dirty_or_hot(scenario, scenario.mirror.alpha, volume)
        known |= _dirty_or_hot(scenario, scenario.mirror.beta, volume)
        unknown = _differing(scenario, volume) - known
        _hold(not unknown, f"blocks {spans(unknown)} of volume {volume} differ and nobody knows")


def _dirty_or_hot(scenario: Scenario, node: Node, volume: int) -> set[int]:
    disk = node.disks[volume]
    fixed = disk.fixed()
    blocks = block_count(disk.size)
    if node.resource is not None and scenario.mirror.volume(node, volume).attached is not None:
        found = scenario.mirror.dirty(node, volume)
    else:
        bitmap, _ = Bitmap.decode(disk.bitmaps()[0], blocks, 0)
        found = {block for block in range(blocks) if bitmap.any_dirty(block, 1)}
    ring = fixed[ACTIVITY_OFFSET : ACTIVITY_OFFSET + ACTIVITY_BLOCKS * PAGE]
    for extent in activity.recover(ring).extents:
        first, count = blocks_of_extent(extent, blocks)
        found |= set(range(first, first + count))
    return found


@expectation("generation")
def _generation(scenario: Scenario, words: Words) -> None:
    """expect generation alpha same|new (since `mark`), or expect generation equal|different (of the two)."""
    word = words.next("same, new, equal or different")
    if word in NAMES:
        node, wanted = scenario.node(word), words.next("same or new")
        kept = same(scenario.mirror.superblock(node).current, scenario.marked[node.id])
        _hold(wanted == ("same" if kept else "new"), f"the generation of {word} is {'the same' if kept else 'new'}")
    else:
        one, other = (
            scenario.mirror.superblock(node).current for node in (scenario.mirror.alpha, scenario.mirror.beta)
        )
        equal = same(one, other)
        _hold(word == ("equal" if equal else "different"), f"they are {'equal' if equal else 'different'}")


@expectation("flag")
def _flag(scenario: Scenario, words: Words) -> None:
    """expect flag alpha consistent|... on|off: in the superblock as it would be read now; `fork`: a fork point."""
    node = scenario.node(words.next("a node"))
    flag, wanted, volume = words.next("a flag"), words.next("on or off"), words.number("volume", 0)
    found = scenario.mirror.superblock(node, volume)
    name = flag.replace("-", "_")
    if name == "fork":
        value = bool(found.peers[0].bitmap_id)
    elif hasattr(found.peers[0], name):
        value = bool(getattr(found.peers[0], name))
    elif isinstance(getattr(found, name, None), bool):
        value = getattr(found, name)
    else:
        raise ScenarioError(f"there is no flag {flag}")
    _hold(wanted == ("on" if value else "off"), f"{flag} of {NAMES[node.id]} is {'on' if value else 'off'}")


@expectation("notice")
def _notice(scenario: Scenario, words: Words) -> None:
    """expect notice alpha code [key=value ...]: some notice of it since `mirror` or `nodes`."""
    found, text = _notices(scenario, words)
    _hold(found, f"there is no notice {text}")


@expectation("no-notice")
def _no_notice(scenario: Scenario, words: Words) -> None:
    found, text = _notices(scenario, words)
    _hold(not found, f"there is a notice {text}")


def _notices(scenario: Scenario, words: Words) -> tuple[bool, str]:
    node, code = scenario.node(words.next("a node")), words.next("a code")
    wanted = dict(words.named)
    words.named.clear()
    found = any(
        all(str(notice.fields.get(key)).replace(" ", "_") == value for key, value in wanted.items())
        for notice in scenario.mirror.notices(node, code)
    )
    return found, f"{code} {wanted or ''}".strip()


@expectation("reason")
def _reason(scenario: Scenario, words: Words) -> None:
    """expect reason alpha split-brain: `status` says why something is not as it should be."""
    node, code = scenario.running(words), words.next("a code")
    found = scenario.mirror.reasons(node)
    _hold(code in found, f"the reasons are {', '.join(found) or 'none'}")


@expectation("sent")
def _sent(scenario: Scenario, words: Words) -> None:
    """expect sent KIND n: frames of this kind, of both nodes, since `mirror` or `nodes`."""
    kind, count = words.next("a kind"), int(words.next("a number"))
    found = scenario.trace.sent[kind]
    _hold(found == count, f"{found} frames {kind} were sent")


@expectation("time")
def _time(scenario: Scenario, words: Words) -> None:
    """expect time 5s-7s: simulated time since `time` (or the begin)."""
    scenario.check_time(words.next("from-to"), _hold)
