# SPDX-License-Identifier: Apache-2.0
"""What must come out of a crash, whatever was lost: the checkers.

`check_reading` looks at an image alone.  `together` starts both nodes from images: first without a link, so that each
attaches for itself, then with one.  `beside_the_living` plays the workload again up to the moment of the crash: the
other node's process lives on, keeps what it knows, and may be promoted.

A checker raises AssertionError with a sentence.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from replicator.core import sealed, superblock
from replicator.core.generations import UNSET, same
from replicator.core.geometry import BLOCK, PAGE, SECTOR
from replicator.core.states import Role
from replicator.core.superblock import Superblock
from tests.crash.enumerate import Left
from tests.crash.image import Image, read, shown
from tests.crash.operations import Operation, Scene
from tests.crash.record import Crash, Moment, Volatile, allowed
from tests.sim.build import established
from tests.sim.node import Node
from tests.sim.world import MS
from tests.unit.mirror import Mirror

NEW_BLOCK = 250  # no workload writes it
FULL = ("just-created", "history", "inconsistent")
PER_BLOCK = BLOCK // SECTOR


@dataclass(frozen=True, slots=True)
class Case:
    """A crash of `victim` at `moment`, which left it `image`; the other node has `other`.

    `lost`: the nodes whose caches are gone.
    """

    operation: Operation
    moment: Moment
    victim: int
    image: Image
    other: Image
    lost: frozenset[int]

    @property
    def promised_without(self) -> frozenset[int]:
        """Whose caches count as lost when both processes died at once.

        With the survivor's process dies what it knew of a Primary's crash: only a Primary that lost nothing counts.
        """
        found = read(self.other).superblock
        whole = self.lost != {0, 1} and found is not None and found.primary_indicator and not forked(self.image)
        return self.lost if whole else frozenset({0, 1})

    @property
    def images(self) -> tuple[Image, Image]:
        """By node."""
        return (self.image, self.other) if self.victim == 0 else (self.other, self.image)

    def __str__(self) -> str:
        names = ("alpha", "beta")
        lost = " and ".join(names[node] for node in sorted(self.lost)) or "nobody"
        return (
            f"{self.operation.name}: {names[self.victim]} crashed after event {self.moment.index} "
            f"({names[self.moment.node]}: {self.moment.what}), power lost: {lost}"
        )


# --- an image alone


def check_reading(left: Left) -> None:
    """Metadata after a power cut is the last stable one or one that was on its way: never a mixture, never unknown."""
    reading, moment = left.reading, left.moment
    before = read(moment.stable[left.node])
    assert reading.superblock is not None, f"attach would be refused: {reading.refusal}"
    assert before.superblock is not None
    on_the_way = [found for write in moment.volatile[left.node] for found in _superblocks(write)]
    assert reading.superblock in (before.superblock, *on_the_way), "a superblock that nobody wrote"
    assert reading.next_sequence >= before.next_sequence, "the sequence of the superblock went back"
    assert not reading.unknown, "the activity log is unknown after a mere power cut"
    assert reading.log_sequence >= before.log_sequence, "the sequence of the activity log went back"
    assert reading.damaged == 0, "a power cut damaged a bitmap sector"


def _superblocks(write: Volatile) -> list[Superblock]:
    raw = b"".join(data for (where, number), data in write.sectors if where == "meta" and 0 <= number < 16)
    verdicts = [sealed.unseal(superblock.MAGIC, raw[at : at + PAGE]) for at in range(0, len(raw), PAGE)]
    return [superblock.unpack(verdict.body) for verdict in verdicts if isinstance(verdict, sealed.Sealed)]


# --- both nodes from their disks


def together(case: Case) -> str:
    """Both start from images; returns what the victim's copy said it is, and the rule that decided."""
    scene = Scene(case.operation.settings, case.images, seed=case.operation.seed + 1)
    m = scene.m
    victim, other = m.node(case.victim), m.node(1 - case.victim)
    scene.unplug()
    word = _attach(m, victim)
    check_claim(case, word)
    _attach(m, other)
    differing = _differing(*case.images)
    known = m.dirty(victim) | m.dirty(other)
    m.heal()
    scene.join()
    rule = str((m.notices(victim, "sync-decision") or m.notices(other, "sync-decision"))[0].fields["rule"])
    if not any(full in rule for full in FULL):
        assert differing <= known, f"blocks {sorted(differing - known)} differ and nobody knew ({rule})"
    check_end(m, case, allowed(case.moment.promises, case.promised_without))
    return f"{word}, {rule.removesuffix('-self').removesuffix('-peer')}"


def _attach(m: Mirror, node: Node) -> str:
    m.restart(node)
    m.run(lambda: bool(m.notices(node, "attached") or m.notices(node, "attach-failed")))
    assert m.notices(node, "attached"), f"attach was refused: {m.notices(node, 'attach-failed')}"
    m.pause(50 * MS)
    return m.disk(node)


def _differing(first: Image, second: Image) -> set[int]:
    places = {place for place in first.sectors.keys() | second.sectors.keys() if place[0] == "data"}
    return {
        number // PER_BLOCK for where, number in places if first.get((where, number)) != second.get((where, number))
    }


def forked(image: Image) -> bool:
    """This copy went on alone (or was about to): it counts from then on, and the other's is old."""
    found = read(image).superblock
    return found is not None and found.was_up_to_date and found.peers[0].bitmap_id != UNSET


def check_claim(case: Case, word: str) -> None:
    """A copy that says UpToDate (or Outdated: old, but whole) shows a moment that there was, not a mixture.

    What it promised, alone or with the other, is there.  Of what only the other has, it shows all or nothing.
    """
    if word not in ("UpToDate", "Outdated", "Consistent"):
        return
    me, image = case.victim, case.image
    mine = tuple(
        replace(p, acked=p.acked and me in p.copies and (p.flushed or me not in case.lost), flushed=True)
        for p in case.moment.promises
    )
    fault = _wrong(image, allowed(mine, case.lost))
    assert fault is None, f"{word}, but {fault}"
    last = {sector: p for p in case.moment.promises for sector in range(p.first, p.first + p.count)}
    shown = {
        image.get(("data", sector)) == bytes([promise.value]) * SECTOR
        for sector, promise in last.items()
        if promise.acked and me not in promise.copies
    }
    assert len(shown) < 2, f"{word}, but a mixture of its own moment and the other's"


def _wrong(image: Image, may: dict[int, set[int]]) -> str | None:
    for sector, values in may.items():
        raw = image.get(("data", sector))
        if raw != raw[:1] * SECTOR or raw[0] not in values:
            return f"sector {sector} shows {raw[0]}, allowed are {sorted(values)}"
    return None


# --- the other node lives


def beside_the_living(case: Case, *, take_over: bool) -> str:
    """The workload again, up to the crash; the survivor goes on (and is promoted), then the victim is switched on."""
    scene = case.operation.scene()
    m, rec = scene.m, scene.rec
    victim, other = m.node(case.victim), m.node(1 - case.victim)
    rec.stop_at, rec.victim = case.moment.index, case.victim
    try:
        case.operation.setup(scene)
        rec.start()
        case.operation.act(scene)
        scene.m.pause()
    except Crash:
        pass
    assert rec.moments[case.moment.index].what == case.moment.what, "the workload is not the same when it runs again"
    rec.stop_at = None
    whole = _holds_everything(case)
    rec.strike(victim, case.image, forked=forked(case.image))
    m.pause()
    word = "down" if not other.up else m.disk(other)
    took_over = take_over and whole and _take_over(m, other)
    scene.let_flow()
    m.heal()
    m.restart(*(node for node in (victim, other) if not node.up))
    _nudge(m, other)
    scene.join()
    rule = str(m.notices(victim, "sync-decision")[-1].fields["rule"]).removesuffix("-self").removesuffix("-peer")
    may = allowed(tuple(rec.promises), frozenset())
    check_end(m, case, may)
    return f"survivor {word}{' took over' if took_over else ''}, {rule}"


def _holds_everything(case: Case) -> bool:
    """The survivor has all that was acknowledged, and the victim did not go on without it."""
    survivor = 1 - case.victim
    return not forked(case.image) and all(survivor in p.holders for p in case.moment.promises if p.acked)


def _take_over(m: Mirror, node: Node) -> bool:
    """Promote the survivor, if it can be: then it must be possible."""
    if not node.up or m.disk(node) != "UpToDate" or m.connection(node).state.value == "StandAlone":
        return False
    if m.resource(node).roles.role is not Role.PRIMARY:
        m.done(node, "primary")
    m.write(node, NEW_BLOCK, 99)
    m.flush(node)
    return True


def _nudge(m: Mirror, node: Node) -> None:
    """What an operator undoes: a disk or a link that was let go by a command."""
    if node.up:
        if m.disk(node) == "Diskless":
            m.command(node, "attach")
        m.command(node, "connect")


# --- the end


def check_end(m: Mirror, case: Case, may: dict[int, set[int]]) -> None:
    """Equal copies, nothing promised is lost, no generation is taken back, and the mirror works."""
    nodes = (m.alpha, m.beta)
    found = [m.superblock(node) for node in nodes]
    if not established(m.world):
        assert all(not sb.consistent and same(sb.current, 4) for sb in found), "fresh copies that claim something"
        return
    assert m.identical(), "the copies differ at the end"
    ends = [Image.of(node.disks[0]) for node in nodes]
    for node in nodes:
        for sector, values in may.items():
            value = shown(node.disks[0], sector)
            assert value in values, f"node {node.id}: sector {sector} shows {value}, allowed are {sorted(values)}"
    assert same(found[0].current, found[1].current), "one mirror with two generations"
    assert all(sb.peers[0].bitmap_id == UNSET and not sb.crashed_primary for sb in found), found
    assert all(sb.consistent and sb.was_up_to_date for sb in found), found
    for image, end in zip(case.images, ends, strict=True):
        before, after = read(image), read(end)
        assert before.superblock is not None
        assert not any(same(found[0].current, old) for old in before.superblock.history), "back to an old generation"
        assert after.next_sequence >= before.next_sequence, "the sequence of the superblock went back"
    primary = next((node for node in nodes if m.resource(node).roles.role is Role.PRIMARY), None)
    if primary is None:
        primary = m.node(case.victim)
        m.done(primary, "primary")
    m.write(primary, NEW_BLOCK, 98)
    m.flush(primary)
    assert m.identical(), "the copies differ after a write"
    assert m.dirty(m.alpha) == m.dirty(m.beta) == set()
