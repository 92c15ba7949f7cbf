# SPDX-License-Identifier: Apache-2.0
"""An authenticated peer without honour, and an operator without judgement, against the real core.

The bytes choose a state to begin in (STARTS) and then, step by step, who acts: the peer with one or several well-formed
frames of any kind with any fields, the disk, a client, the operator, the clock, the network.  Fields are drawn so that
they often fit what the core waits for (its sequences, rounds, barriers, generation ids): nonsense is refused at the
door, near-sense is what finds bugs.  What must hold is in `victim`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, Final

from replicator.core import events as ev
from replicator.core import handshake_wire as hw
from replicator.core.handshake_wire import Hello, VolumeState, agree_hash
from replicator.core.wire import RULES, SECTOR, Frame, Kind
from tests.fuzz.dice import Dice
from tests.fuzz.victim import MIB, SECOND, SIZE, Metadata, Victim, Wire

BLOCK: Final = 4096
STEPS_MAX: Final = 100
GENERATION, OLDER, NEWER, JUST_CREATED = 0x1000, 0x2000, 0x3000, 4
GOOD: Final = VolumeState(disk=9, size_bytes=SIZE, current=GENERATION)

# ----------------------------------------------------------------------------------------- states to begin in


def _started(metadata: Metadata, protocol: str) -> Victim:
    victim = Victim(metadata, protocol)
    victim.command("attach")
    victim.complete_all()
    victim.command("connect")
    assert not victim.commands
    return victim


def _connected(victim: Victim, state: VolumeState, *, primary: bool = False) -> Victim:
    victim.greet(victim.link_up(), primary=primary)
    victim.complete_all()
    victim.compare(state)
    victim.complete_all()
    return victim


def handshake(protocol: str) -> Victim:
    """A connection where nobody has said who they are."""
    victim = _started(Metadata(), protocol)
    victim.link_up()
    return victim


def secondary(protocol: str) -> Victim:
    """Two Secondaries, UpToDate."""
    return _expect(_connected(_started(Metadata(), protocol), GOOD), "Established")


def replica(protocol: str) -> Victim:
    """The peer is Primary, we are its UpToDate Secondary."""
    state = replace(GOOD, primary=True)
    return _expect(_connected(_started(Metadata(), protocol), state, primary=True), "Established")


def primary(protocol: str) -> Victim:
    """We are Primary, the peer is our UpToDate Secondary."""
    victim = secondary(protocol)
    victim.command("primary")
    asked = victim.heard(Kind.ROLE_REQUEST)[-1]
    victim.say([Frame(Kind.ROLE_REPLY, sequence=asked.sequence, payload=b"\0")])
    victim.complete_all()
    assert victim.resource.primary
    return victim


def alone(protocol: str) -> Victim:
    """Primary without a peer, some blocks dirty."""
    victim = _started(Metadata(bitmap_id=OLDER, dirty=40), protocol)
    victim.command("primary")
    victim.complete_all()
    victim.ask(ev.Io.WRITE, 4 * MIB, 8192)
    victim.complete_all()
    assert victim.resource.primary and not victim.requests
    return victim


def _source(victim: Victim) -> Victim:
    _connected(victim, replace(GOOD, current=OLDER))
    victim.say([Frame(Kind.BITMAP_END), Frame(Kind.SYNC_READY)])
    victim.complete_all()
    return _expect(victim, "SyncSource")


def source(protocol: str) -> Victim:
    """The peer copies from us; both are Secondary."""
    return _source(_started(Metadata(bitmap_id=OLDER, dirty=40), protocol))


def primary_source(protocol: str) -> Victim:
    """The peer copies from us while we are Primary."""
    return _source(alone(protocol))


def target(protocol: str, *, primary: bool = False) -> Victim:
    """We copy from the peer."""
    state = replace(GOOD, current=NEWER, bitmap_id=GENERATION, dirty_count=200, primary=primary)
    victim = _connected(_started(Metadata(), protocol), state, primary=primary)
    chunk = Frame(Kind.BITMAP, offset=0, size=200 * BLOCK, payload=b"\2")
    victim.say([chunk, Frame(Kind.BITMAP_END)])
    victim.complete_all()
    victim.say([Frame(Kind.SYNC_START)])
    return _expect(victim, "SyncTarget")


def target_of_primary(protocol: str) -> Victim:
    """We copy from a Primary, which goes on writing."""
    return target(protocol, primary=True)


def waiting(protocol: str) -> Victim:
    """The bitmaps are about to be exchanged; we will be target."""
    state = replace(GOOD, current=NEWER, bitmap_id=GENERATION, dirty_count=200)
    return _expect(_connected(_started(Metadata(), protocol), state), "WFBitMapT")


def fresh(protocol: str) -> Victim:
    """Two disks that never held data."""
    found = Metadata(current=JUST_CREATED, consistent=False)
    state = VolumeState(disk=5, size_bytes=SIZE, current=JUST_CREATED)
    return _connected(_started(found, protocol), state)


def _expect(victim: Victim, replication: str) -> Victim:
    assert victim.replica.replication.value == replication, victim.resource.status()
    return victim


STARTS: Final[tuple[Callable[[str], Victim], ...]] = (
    handshake, secondary, replica, primary, alone, source, primary_source, target, target_of_primary, waiting, fresh,
)  # fmt: skip

# -------------------------------------------------------------------------------------------------- the peer


class Peer:
    """Well-formed frames with fields that may mean anything."""

    def __init__(self, victim: Victim, dice: Dice) -> None:
        self.victim = victim
        self.dice = dice
        self._last_write = 0

    def frame(self) -> Frame:
        """Any kind."""
        dice = self.dice
        kind = dice.pick(_KINDS)
        rule = RULES[kind]
        frame = Frame(kind)
        if not rule.link_wide and dice.chance(8):
            frame.volume = dice.number(16)
        frame.flags = rule.flags & dice.byte() if rule.flags else 0
        if rule.sequence:
            frame.sequence = self._sequence(kind)
        if rule.size_max:
            self._range(frame, kind)
        frame.payload = self._payload(frame, kind)
        return frame

    def _sequence(self, kind: Kind) -> int:
        """One that is waited for, or any."""
        dice = self.dice
        if kind in (Kind.WRITE, Kind.TRIM, Kind.ZERO) and not dice.chance(16):
            self._last_write += 1
            return self._last_write
        waited = _WAITED.get(kind)
        if waited is not None and not dice.chance(24):
            frames = self.victim.heard(waited)[-16:]
            if frames:
                return dice.pick(frames).sequence + (dice.below(3) if dice.chance(24) else 0)
        return dice.number(64)

    def _range(self, frame: Frame, kind: Kind) -> None:
        """Inside the volume, across its end, or anywhere."""
        dice, rule = self.dice, RULES[kind]
        waited = _WAITED.get(kind)
        if waited in (Kind.RESYNC_REQUEST, Kind.READ) and not dice.chance(32):
            for asked in self.victim.heard(waited):
                if asked.sequence == frame.sequence:
                    frame.offset, frame.size = asked.offset, asked.size
                    return
        frame.offset = (dice.number(63) if dice.chance(16) else dice.below(SIZE)) // rule.offset_unit * rule.offset_unit
        sizes = (SECTOR, BLOCK, BLOCK, 2 * BLOCK, 16 * BLOCK, 256 * BLOCK, SIZE - frame.offset, dice.number(32))
        size = max(SECTOR, dice.pick(sizes) // SECTOR * SECTOR)
        frame.size = min(size, rule.size_max)
        frame.offset = min(frame.offset, (1 << 63) - (1 << 33))

    def _payload(self, frame: Frame, kind: Kind) -> bytes:
        dice, rule = self.dice, RULES[kind]
        if rule.length_is_size:
            return _ZEROES[: frame.size] if dice.chance(64) else _ONES[: frame.size]
        make = _PAYLOADS.get(kind)
        if make is not None and not dice.chance(8):
            return make(self, frame)
        steps = (rule.length_max - rule.length_min) // rule.unit
        return dice.take(rule.length_min + rule.unit * min(dice.below(4), steps))

    # --- payloads

    def hello(self, _: Frame) -> bytes:
        wire = self._wire()
        ours = Hello.unpack(wire.hello) if wire is not None and wire.hello else _HELLO
        dice = self.dice
        hello = replace(ours, node="beta", node_id=1, peer_node_id=0, nonce=bytes(32))
        changes: tuple[dict[str, Any], ...] = (
            {"node_id": dice.byte()}, {"peer_node_id": dice.byte()}, {"resource_id": dice.take(16)}, {"node": "gamma"},
            {"volumes": (0, 1)}, {"options": ()}, {"version_min": 2, "version_max": 3}, {"resource": "r1"},
            {"features": dice.number(64)},
        )  # fmt: skip
        return replace(hello, **dice.pick(changes)).pack() if dice.chance(96) else hello.pack()

    def agree(self, _: Frame) -> bytes:
        wire = self._wire()
        if wire is None or self.dice.chance(32):
            return self.dice.take(32)
        return agree_hash(self.hello(Frame(Kind.HELLO)), wire.hello)

    def state(self, _: Frame) -> bytes:
        """VOLUME_STATE: related to ours, in every way that the decision table knows and some that it does not."""
        dice = self.dice
        said = self.victim.heard(Kind.VOLUME_STATE)
        ours = VolumeState.unpack(said[-1].payload) if said else GOOD
        ids = (ours.current, ours.bitmap_id, *ours.history[:2], GENERATION, OLDER, NEWER, JUST_CREATED, 0, 0, 0x77)
        disk = dice.pick((9, 9, 9, 9, 5, 5, 6, 8, 0, dice.below(10)))
        flags = dice.byte() & dice.byte()
        size = dice.pick((SIZE, SIZE, SIZE, SIZE, SIZE, MIB, 512, 2 * SIZE, dice.number(62) // 512 * 512))
        return VolumeState(
            disk=disk,
            crashed_primary=bool(flags & 1), survived=bool(flags & 2), full_sync=bool(flags & 4),
            primary=bool(flags & 8), discard=bool(flags & 16), paused=bool(flags & 32),
            size_bytes=max(512, size) if disk else 0,
            current=dice.pick(ids),
            bitmap_id=dice.pick(ids),
            dirty_count=dice.pick((0, 0, 1, 200, dice.number(64))),
            history=tuple(dice.pick(ids) for _ in range(dice.below(4))),
        ).pack()  # fmt: skip

    def sequences(self, frame: Frame) -> bytes:
        """Our writes, some of them, some twice, some that never were."""
        writes = [write.sequence for kind in _WRITES for write in self.victim.heard(kind)][-8:]
        dice = self.dice
        chosen = [s for s in writes if not dice.chance(64)] or [dice.number(64)]
        if dice.chance(24):
            chosen.append(dice.number(64))
        return hw.pack_sequences(chosen)

    def ranges(self, _: Frame) -> bytes:
        """RESYNC_CONFIRM: what was answered, or anything."""
        dice = self.dice
        answered = [f for kind in _COPIES for f in self.victim.heard(kind)][-8:]
        chosen = [(f.offset, f.size) for f in answered if not dice.chance(64)]
        while not chosen or dice.chance(32):
            chosen.append((dice.below(SIZE) // BLOCK * BLOCK, dice.pick((SECTOR, BLOCK, 4 * BLOCK, 1 << 31))))
        return hw.pack_ranges(chosen)

    def disk_state(self, _: Frame) -> bytes:
        dice = self.dice
        ranges = [
            (dice.below(SIZE) // SECTOR * SECTOR, dice.pick((SECTOR, BLOCK, 4 * MIB, 1 << 31)))
            for _ in range(dice.below(3))
        ]
        return hw.pack_disk_state(0 if not dice.chance(32) else dice.below(10), ranges)

    def bitmap(self, frame: Frame) -> bytes:
        dice = self.dice
        count = -(-frame.size // BLOCK)
        if dice.chance(128) or count > 1 << 16:
            return b"\2"
        size = -(-count // 8)
        raw = bytearray(dice.take(min(size, 8)).ljust(size, b"\0"))
        if count % 8:
            raw[-1] &= (1 << count % 8) - 1
        return b"\0" + bytes(raw)

    def generation(self, _: Frame) -> bytes:
        dice = self.dice
        ids = (NEWER, GENERATION, OLDER, JUST_CREATED, 0, dice.number(64))
        return hw.pack_generation(dice.pick(ids), clear_bitmap=dice.chance(128))

    def digest(self, _: Frame) -> bytes:
        return self.dice.take(16) if self.dice.chance(64) else b""

    def _wire(self) -> Wire | None:
        return self.victim.wire


_HELLO: Final = Hello(
    version_min=1, version_max=1, features=1, resource_id=bytes(range(16)), nonce=bytes(32), node_id=1, peer_node_id=0,
    resource="r0", node="beta", options=(("protocol", "C"),), volumes=(0,),
)  # fmt: skip
_ZEROES: Final = bytes(MIB)
_ONES: Final = b"\xff" * MIB
_WRITES: Final = (Kind.WRITE, Kind.TRIM, Kind.ZERO)
_COPIES: Final = (Kind.RESYNC_DATA, Kind.RESYNC_ZERO, Kind.RESYNC_EQUAL)
#: Every kind, and those more often from which something long follows.
_KINDS: Final = (
    *Kind, Kind.VOLUME_STATE, Kind.VOLUME_STATE, Kind.WRITTEN, Kind.WRITTEN, Kind.BARRIER_ACK, Kind.RESYNC_DATA,
    Kind.RESYNC_ZERO, Kind.RESYNC_REQUEST, Kind.RESYNC_CONFIRM, Kind.WRITE, Kind.WRITE, Kind.READ_DATA, Kind.ROLE,
)  # fmt: skip
#: kind -> what of ours it answers
_WAITED: Final = {
    Kind.PONG: Kind.PING, Kind.ROLE_REPLY: Kind.ROLE_REQUEST, Kind.VOLUME_STATE: Kind.VOLUME_STATE,
    Kind.DISK_STATE_ACK: Kind.DISK_STATE, Kind.NEW_GENERATION_ACK: Kind.NEW_GENERATION,
    Kind.BARRIER_ACK: Kind.BARRIER, Kind.READ_DATA: Kind.READ, Kind.READ_FAILED: Kind.READ,
    Kind.RELY_REPLY: Kind.RELY_REQUEST,
    Kind.RESYNC_DATA: Kind.RESYNC_REQUEST, Kind.RESYNC_ZERO: Kind.RESYNC_REQUEST,
    Kind.RESYNC_EQUAL: Kind.RESYNC_REQUEST, Kind.RESYNC_FAILED: Kind.RESYNC_REQUEST,
}  # fmt: skip
_PAYLOADS: Final[dict[Kind, Callable[[Peer, Frame], bytes]]] = {
    Kind.HELLO: Peer.hello,
    Kind.AGREE: Peer.agree,
    Kind.GOODBYE: lambda peer, _: hw.pack_goodbye(peer.dice.below(6), "so long"),
    Kind.ROLE: lambda peer, _: bytes([peer.dice.below(2)]),
    Kind.ROLE_REPLY: lambda peer, _: bytes([peer.dice.below(5)]),
    Kind.SYNC_PAUSE: lambda peer, _: bytes([peer.dice.below(3)]),
    Kind.VOLUME_STATE: Peer.state,
    Kind.RECEIVED: Peer.sequences,
    Kind.WRITTEN: Peer.sequences,
    Kind.FAILED: Peer.sequences,
    Kind.RESYNC_CONFIRM: Peer.ranges,
    Kind.DISK_STATE: Peer.disk_state,
    Kind.BITMAP: Peer.bitmap,
    Kind.NEW_GENERATION: Peer.generation,
    Kind.CURRENT_GENERATION: lambda peer, _: hw.pack_current_generation(GENERATION + peer.dice.below(3)),
    Kind.RELY_REPLY: lambda peer, _: bytes([peer.dice.below(4)]),
    Kind.RESYNC_REQUEST: Peer.digest,
    Kind.READ_FAILED: lambda peer, _: bytes([0, 0, 0, peer.dice.below(7)]),
    Kind.RESYNC_FAILED: lambda peer, _: bytes([0, 0, 0, peer.dice.below(7)]),
}

# -------------------------------------------------------------------------------------------------- the world

VERBS: Final = (
    "attach", "detach", "connect", "disconnect", "primary", "secondary", "invalidate", "invalidate-remote",
    "new-current-uuid", "pause-sync", "resume-sync", "down",
)  # fmt: skip
#: What an argument may be when nobody checked it.
ODD: Final[tuple[object, ...]] = (
    None, True, False, 0, 1, -1, 1 << 64, 0.0, 1.5, float("nan"), "", "beta", "alpha", "0", "\0", b"beta", [], [0], {},
    {"a": 1}, (), (0,),
)  # fmt: skip


class Game:
    """One run."""

    def __init__(self, data: bytes, *, operator: bool) -> None:
        self.dice = dice = Dice(data)
        start = dice.pick(STARTS)
        self.victim = start(dice.pick(("C", "C", "B", "A")))
        self.peer = Peer(self.victim, dice)
        self._moves = (
            (self._frames, self._command, self._command, self._odd_command, self._disk, self._client)
            if operator
            else (self._frames, self._frames, self._frames, self._frames, self._disk, self._disk, self._client)
        ) + (self._rare,)

    def run(self) -> None:
        for _ in range(STEPS_MAX):
            if not self.dice.left:
                break
            self.dice.pick(self._moves)()
        self.victim.finish()

    def _frames(self) -> None:
        wire = self.victim.wire
        if wire is None:
            self._link()
            return
        frames = [self.peer.frame()]
        while self.dice.chance(64) and len(frames) < 8:
            frames.append(self.peer.frame())
        self.victim.deliver(wire, *frames)

    def _disk(self) -> None:
        dice, victim = self.dice, self.victim
        if dice.chance(64):
            victim.complete_all()
        else:
            victim.complete(dice.byte(), 5 if dice.chance(6) else 0)

    def _client(self) -> None:
        dice, victim = self.dice, self.victim
        io = dice.pick((ev.Io.WRITE, ev.Io.WRITE, ev.Io.WRITE, ev.Io.READ, ev.Io.FLUSH, ev.Io.TRIM, ev.Io.ZERO))
        end = victim.volume.size or SIZE
        size = min(dice.pick((SECTOR, BLOCK, 4 * BLOCK, 64 * BLOCK)), end)
        offset = dice.below(end - size + 1) // SECTOR * SECTOR
        if io is ev.Io.FLUSH:
            offset = size = 0
        victim.ask(io, offset, size, fua=dice.chance(32), keep=io is ev.Io.ZERO and dice.chance(64))

    def _command(self) -> None:
        dice = self.dice
        verb = dice.pick(VERBS)
        args: dict[str, object] = {}
        if dice.chance(128):
            args["volume"] = 0
        if dice.chance(64):
            args["force"] = True
        if dice.chance(64):
            args["clear_bitmap"] = True
        self.victim.command(verb, **args)

    def _odd_command(self) -> None:
        dice = self.dice
        verb = dice.pick((*VERBS, "", "no-such-verb", "attach ", dice.take(4).decode("latin-1")))
        names = ("volume", "peer", "force", "clear_bitmap", "none-of-these")
        args = {dice.pick(names): dice.pick(ODD) for _ in range(dice.below(4))}
        self.victim.command(verb, **args)

    def _link(self) -> None:
        victim, dice = self.victim, self.dice
        wire = victim.link_up()
        if not dice.chance(32) and wire.number in victim.wires:
            victim.greet(wire, primary=dice.chance(96))

    def _rare(self) -> None:
        dice, victim = self.dice, self.victim
        match dice.below(10):
            case 0 if victim.ending or victim.wires:
                victim.link_down(dice.pick([*victim.ending, *victim.wires]))
            case 1:
                self._link()
            case 2:
                victim.tick(dice.pick((1, SECOND // 10, SECOND, 3 * SECOND, 11 * SECOND, 60 * SECOND)))
            case 3:
                victim.open_client()
            case 4:
                victim.close_clients()
            case 5 | 6:
                self._command()
            case 7:
                victim.command("primary")
            case 8:
                victim.command("connect")
            case _:
                self._disk()


def peer(data: bytes) -> None:
    """A hostile peer."""
    Game(data, operator=False).run()


def operator(data: bytes) -> None:
    """An operator who tries everything."""
    Game(data, operator=True).run()


HOSTILE: Final[dict[str, Any]] = {"peer": peer, "operator": operator}
