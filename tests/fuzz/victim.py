# SPDX-License-Identifier: Apache-2.0
"""One real core, everything around it in the hands of whoever tests it, and what must hold whatever they do.

`Victim` is node 0.  Its disk, its clients, its operator and its peer (node 1) are methods.  Nothing happens by itself:
an operation of the disk stays pending until `complete`.  After every turn it is checked (requirement S-7) that

- nothing is read or written outside of the volume, the metadata area or the rules of the wire;
- a Primary with good data writes what its own clients said and nothing else, and a Secondary only what a Primary or
  the source of its resync said; nobody becomes Primary who was not told to by the operator;
- a dirty bit goes only for a block that was copied and confirmed (V2), or on the operator's word;
- every client request and every command is answered exactly once.

And at the end (`finish`): everything is answered, and every block that a client wrote and the peer did not confirm
behind a barrier is dirty (V1).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Final

from replicator.core import actions as act
from replicator.core import events as ev
from replicator.core import superblock
from replicator.core.bitmap import Bitmap
from replicator.core.geometry import (
    BLOCK,
    FIXED_BYTES,
    block_count,
    blocks_of,
    slot_bytes_for,
    slot_offset,
    whole_blocks_of,
)
from replicator.core.handshake_wire import Hello, VolumeState, agree_hash, unpack_ranges, unpack_role
from replicator.core.options import Options
from replicator.core.resource import Resource
from replicator.core.states import Disk, Role
from replicator.core.superblock import PeerSlot, Superblock
from replicator.core.wire import Frame, Kind, encode
from replicator.errors import ProtocolError

MIB: Final = 1 << 20
SECOND: Final = 1_000_000_000
SIZE: Final = 9 * MIB + 512  # three extents, the last block is a part of one
PEER: Final = 1
NONCE: Final = bytes(32)
_CONTENT: Final = memoryview(b"\x5a" * (32 * MIB))
_WRITES: Final = (Kind.WRITE, Kind.TRIM, Kind.ZERO)
_COPIES: Final = (Kind.RESYNC_DATA, Kind.RESYNC_ZERO, Kind.RESYNC_EQUAL)


def mask(first: int, count: int) -> int:
    """These blocks, as bits of one number."""
    return ((1 << count) - 1) << first


@dataclass(frozen=True)
class Metadata:
    """What is on the victim's disk when it starts."""

    current: int = 0x1000
    bitmap_id: int = 0
    dirty: int = 0  # blocks from the front
    consistent: bool = True


@lru_cache
def _area(found: Metadata) -> tuple[bytes, bytes]:
    """(fixed part, bitmap slot)"""
    block = Superblock(
        resource_id=bytes(range(16)), volume=0, node_id=0, size_bytes=SIZE, device_bytes=SIZE,
        slot_bytes=slot_bytes_for(SIZE), current=found.current, consistent=found.consistent,
        was_up_to_date=found.consistent, peers=(PeerSlot(node_id=PEER, bitmap_id=found.bitmap_id),),
    )  # fmt: skip
    bitmap = Bitmap(block_count(SIZE))
    bitmap.mark(0, found.dirty)
    pages = b"".join(bitmap.encode_page(page) for page in range(bitmap.page_count))
    return superblock.fresh_fixed_part(block), pages


@dataclass
class Wire:
    """One connection, as the peer sees it."""

    number: int
    hello: bytes = b""  # the victim's
    agreed: bool = False  # the victim said AGREE
    said_agree: bool = False  # and so did we
    heard: list[Frame] = field(default_factory=list)  # since `agreed`


class Victim:
    """Node 0 and its world.  `protocol` is A, B or C."""

    def __init__(self, metadata: Metadata = Metadata(), protocol: str = "C", fencing: str = "dont-care") -> None:
        options = Options(
            resource="r0", node_id=0, node_name="alpha", peers={PEER: "beta"}, volumes=(0,), protocol=protocol,
            matching=(("protocol", protocol),), fencing=fencing, listens_for=frozenset({PEER}),
            checksum_sync="auto", epoch_writes_max=4,
        )  # fmt: skip
        ids = itertools.count(0x100000, 16)
        self.resource = Resource(options, lambda: next(ids))
        self.volume = self.resource.volumes[0]
        self.connection = self.resource.connections[PEER]
        self.replica = self.volume.replicas[PEER]
        self.now = 1
        self.fresh = metadata.current == 4
        fixed, slot = _area(metadata)
        self._slot_base = -slot_offset(0, len(slot))
        self._area = bytearray(slot + fixed)
        self.serial = itertools.count(1)
        self.pending: list[act.Action] = []  # of the disk
        self.opening = self.closing = False
        self.clients: set[int] = set()
        self.requests: dict[int, ev.ClientRequest] = {}  # not answered
        self.replies: dict[int, act.Reply] = {}
        self.commands: set[int] = set()  # not answered
        self.answers: dict[int, act.CommandDone] = {}
        self.wire: Wire | None = None  # the newest open one
        self.wires: dict[int, Wire] = {}
        self.ending: list[int] = []  # links whose LinkDown is due
        self.notices = 0
        self._ended = 0
        # what the checks remember
        self._promoted = self._peer_primary = self._cleared = False
        self._bits_of: tuple[Bitmap | None, int] = (None, 0)
        self._allowed = 0  # blocks whose bit may go in this turn
        self._sent_copies = self._got_copies = 0
        self._asked: dict[int, tuple[int, int]] = {}  # our resync requests
        self._owed = 0
        self._sent: dict[int, int] = {}  # write -> blocks that it was the last one to write
        self._barriers: dict[int, list[int]] = {}

    # --- turns

    def step(self, *events: ev.Event) -> None:
        """Events of one turn, and what follows."""
        for event in events:
            self.now += 1000
            self.resource.step(event, self.now)
        for action in self.resource.drain():
            self._do(action)
        self._check()

    def tick(self, ns: int) -> None:
        """Time passes."""
        self.now += ns
        self.step(ev.Tick())

    def _do(self, action: act.Action) -> None:
        match action:
            case act.ReadData() | act.WriteData() | act.ZeroData():
                self._data(action)
            case act.FlushData() | act.WriteMeta():
                self._metadata(action)
            case act.Reply():
                self._reply(action)
            case act.Send():
                self._on_send(action)
            case act.CommandDone():
                self.commands.remove(action.token)
                self.answers[action.token] = action
            case act.OpenDisk():
                assert not self.opening and not self.pending
                self.opening = True
            case act.CloseDisk():
                assert not self.closing
                self.closing = True
            case act.CutClients():
                pass  # `close_clients` is the fuzzer's to call
            case act.CloseLink():
                self.wires.pop(action.link, None)
                if self.wire is not None and self.wire.number == action.link:
                    self.wire = None
                self.ending.append(action.link)
            case act.Notice():
                self.notices += 1
                assert all(isinstance(key, str) for key in action.fields)
            case _:
                raise AssertionError(f"nobody asked for {action}")

    # --- the disk

    def _data(self, action: act.ReadData | act.WriteData | act.ZeroData) -> None:
        size = len(action.data) if isinstance(action, act.WriteData) else action.size
        assert action.volume == 0 and size > 0 and size % 512 == 0 and action.offset % 512 == 0, action
        assert action.offset >= 0 and action.offset + size <= SIZE, f"{action.offset}+{size} is outside of the device"
        self.pending.append(action)
        if isinstance(action, act.ReadData):
            return
        first, count = blocks_of(action.offset, size)
        ours = any(
            request.io in (ev.Io.WRITE, ev.Io.TRIM, ev.Io.ZERO)
            and (request.offset, request.size) == (action.offset, size)
            for request in self.requests.values()
        )
        if self.resource.primary and self.volume.disk is Disk.UP_TO_DATE:
            assert ours, f"a Primary writes {action.offset}+{size}, which none of its clients asked for"
        elif not ours:
            assert self._peer_primary or self._got_copies, "a write that nobody may make"
        if ours:
            self._owed |= mask(first, count)
            for sequence in self._sent:
                if sequence != max(self._sent):
                    self._sent[sequence] &= ~mask(first, count)

    def _metadata(self, action: act.FlushData | act.WriteMeta) -> None:
        self.pending.append(action)
        if isinstance(action, act.WriteMeta):
            for offset, data in action.pieces:
                assert offset % BLOCK == 0 and len(data) % BLOCK == 0
                assert -self._slot_base <= offset and offset + len(data) <= FIXED_BYTES, (offset, len(data))

    def complete(self, index: int = 0, error: int = 0) -> None:
        """One pending operation of the disk ends; opening and closing come when nothing else is pending."""
        if self.pending:
            action = self.pending.pop(index % len(self.pending))
            data: bytes | memoryview = b""
            if isinstance(action, act.ReadData) and not error:
                data = _CONTENT[: action.size]
            elif isinstance(action, act.WriteMeta) and not error:
                for offset, piece in action.pieces:
                    at = self._slot_base + offset
                    self._area[at : at + len(piece)] = piece
            elif isinstance(action, act.FlushData) and not error:
                self._allowed |= self._got_copies
            self.step(ev.DiskDone(action.token, error, data))  # type: ignore[union-attr]
        elif self.opening:
            self.opening = False
            if error:
                self.step(ev.DiskOpenFailed(0, "input/output error"))
            else:
                raw = bytes(self._area)
                self.step(ev.DiskOpened(0, SIZE, raw[self._slot_base :], {0: raw[: self._slot_base]}))
        elif self.closing:
            self.closing = False
            self.step(ev.DiskClosed(0))

    def complete_all(self) -> None:
        """Until the disk has nothing to do."""
        for _ in range(10_000):
            if not (self.pending or self.opening or self.closing):
                return
            self.complete()
        raise AssertionError("the disk is never done")

    # --- clients and operator

    def ask(self, io: ev.Io, offset: int, size: int, *, fua: bool = False, keep: bool = False) -> int:
        """A client asks; the driver has judged it."""
        token = next(self.serial)
        data = _CONTENT[:size] if io is ev.Io.WRITE else b""
        self.requests[token] = request = ev.ClientRequest(0, token, io, offset, size, data, fua, keep)
        self.step(request)
        return token

    def _reply(self, action: act.Reply) -> None:
        request = self.requests.pop(action.token)
        self.replies[action.token] = action
        if request.io is ev.Io.READ and not action.error:
            assert len(action.data) == request.size, "a read of another length than asked for"

    def open_client(self) -> None:
        """A client comes."""
        client = next(self.serial)
        self.clients.add(client)
        self.step(ev.ClientOpened(0, client, True, f"client {client}"))

    def close_clients(self) -> None:
        """All clients go."""
        for client in sorted(self.clients):
            self.clients.discard(client)
            self.step(ev.ClientClosed(0, client))

    def command(self, verb: str, **args: object) -> int:
        """The operator says something."""
        token = next(self.serial)
        self.commands.add(token)
        self._promoted |= verb == "primary"
        self._cleared |= verb == "new-current-uuid" and self.fresh
        self.step(ev.Command(token, verb, args))
        return token

    # --- the peer

    def link_up(self) -> Wire:
        """A connection of the peer is authenticated."""
        self.wire = wire = Wire(next(self.serial))
        self.wires[wire.number] = wire
        self.step(ev.LinkUp(wire.number, PEER, False, NONCE))
        return wire

    def link_down(self, number: int) -> None:
        """A connection ends."""
        self.wires.pop(number, None)
        if self.wire is not None and self.wire.number == number:
            self.wire = None
        if number in self.ending:
            self.ending.remove(number)
        self._ended = number  # what is still said to it in this turn goes nowhere
        self.step(ev.LinkDown(number, "connection reset"))
        self._ended = 0

    def deliver(self, wire: Wire, *frames: Frame) -> None:
        """Frames of the peer; before both agreed only those that the decoder lets through."""
        passed = []
        for frame in frames:
            encode(frame)  # well-formed, or the generator is wrong
            if not (wire.agreed and wire.said_agree) and frame.kind not in (Kind.HELLO, Kind.AGREE, Kind.GOODBYE):
                continue
            wire.said_agree |= frame.kind is Kind.AGREE
            self._note(frame)
            passed.append(frame)
        if passed and wire.number in self.wires:
            self.step(ev.LinkFrames(wire.number, passed))

    def _note(self, frame: Frame) -> None:
        """What a frame of the peer entitles us to."""
        try:
            if frame.kind is Kind.ROLE:
                self._peer_primary |= unpack_role(frame.payload)
            elif frame.kind is Kind.RESYNC_CONFIRM:
                for offset, size in unpack_ranges(frame.payload):
                    self._allowed |= self._whole(offset, size) & self._sent_copies
            elif frame.kind in _COPIES:
                if self._asked.get(frame.sequence) == (frame.offset, frame.size):
                    self._got_copies |= self._whole(frame.offset, frame.size)
            elif frame.kind is Kind.BARRIER_ACK:
                for number in [n for n in self._barriers if n <= frame.sequence]:
                    for sequence in self._barriers.pop(number):
                        self._owed &= ~self._sent.pop(sequence, 0)
            elif frame.kind is Kind.NEW_GENERATION:
                self._cleared |= self.fresh
        except ProtocolError:
            pass

    def _whole(self, offset: int, size: int) -> int:
        if offset + size > self.volume.size:
            return 0
        return mask(*whole_blocks_of(offset, size, self.volume.size))

    def _on_send(self, action: act.Send) -> None:
        frame = action.frame
        encode(frame)  # what we say keeps to the rules
        wire = self.wires.get(action.link)
        if wire is None:
            assert action.link in (*self.ending, self._ended), f"a frame for unknown link {action.link}"
            return
        if frame.kind is Kind.HELLO:
            wire.hello = bytes(frame.payload)
        elif frame.kind is Kind.AGREE:
            wire.agreed = True
            self._sent_copies = self._got_copies = 0
            self._asked.clear()
            self._sent.clear()
            self._barriers.clear()
        wire.heard.append(frame)
        if frame.kind in _WRITES:
            for sequence in self._sent:
                self._sent[sequence] &= ~mask(*blocks_of(frame.offset, frame.size))
            self._sent[frame.sequence] = mask(*blocks_of(frame.offset, frame.size))
        elif frame.kind is Kind.BARRIER:
            self._barriers[frame.sequence] = list(self._sent)
        elif frame.kind is Kind.RESYNC_REQUEST:
            self._asked[frame.sequence] = (frame.offset, frame.size)
        elif frame.kind in _COPIES:
            self._sent_copies |= self._whole(frame.offset, frame.size)

    # --- being a good peer

    def greet(self, wire: Wire, *, primary: bool = False) -> None:
        """The whole handshake."""
        ours = replace(
            Hello.unpack(wire.hello), node="beta", node_id=PEER, peer_node_id=0, nonce=bytes([7]) * 32
        ).pack()
        self.deliver(wire, Frame(Kind.HELLO, payload=ours))
        if wire.agreed:
            self.deliver(wire, Frame(Kind.AGREE, payload=agree_hash(ours, wire.hello)))
            self.deliver(wire, Frame(Kind.ROLE, payload=bytes([primary])))

    def heard(self, kind: Kind) -> list[Frame]:
        """What the victim said on the newest connection."""
        return [frame for frame in self.wire.heard if frame.kind is kind] if self.wire is not None else []

    def compare(self, state: VolumeState) -> None:
        """Our side of the round that the victim began; as a Primary it waits until we begin one."""
        assert self.wire is not None
        said = self.heard(Kind.VOLUME_STATE)
        sequence = said[-1].sequence if said else 1
        self.deliver(self.wire, Frame(Kind.VOLUME_STATE, sequence=sequence, payload=state.pack()))

    # --- what must hold

    def _check(self) -> None:
        role = self.resource.roles.role
        assert role is Role.SECONDARY or self._promoted, "Primary without an order"
        attached = self.volume.attached
        bitmap = attached.bitmaps[PEER] if attached is not None else None
        bits = int.from_bytes(bytes(bitmap._bits), "little") if bitmap is not None else 0
        before, old = self._bits_of
        if bitmap is not before:
            self._owed = 0  # another disk, or another size: a new story
        elif old & ~bits:
            gone = old & ~bits
            assert self._cleared or not gone & ~self._allowed, f"bits of blocks {gone & ~self._allowed:#x} are cleared"
            under_way = 0
            for blocks in self._sent.values():
                under_way |= blocks
            self._owed &= ~(gone & ~under_way)
        self._bits_of = (bitmap, bits)
        self._allowed = 0

    def settle(self, until: Callable[[], bool]) -> None:
        """The disk works and time passes until it holds; it must."""
        for _ in range(40):
            self.complete_all()
            for number in list(self.ending):
                self.link_down(number)
            if until() and not (self.pending or self.opening or self.closing):
                return
            self.tick(SECOND)
        raise AssertionError(f"never: {self.requests} {self.commands} {self.resource.status()}")

    def finish(self) -> None:
        """The peer goes, the clients go, the disk works: everything ends."""
        for number in [*self.wires]:
            self.link_down(number)
        self.close_clients()
        self.settle(lambda: not self.requests and not self.commands)
        attached = self.volume.attached
        if attached is not None and self._bits_of[0] is attached.bitmaps[PEER]:
            lost = self._owed & ~self._bits_of[1]
            assert not lost or self._cleared, f"blocks {lost:#x} were written, not confirmed, and are not dirty"
        assert not self.volume.locks.count, "a lock is never given back"

    def say(self, frames: Iterable[Frame]) -> None:
        """To the newest connection, if there is one."""
        if self.wire is not None:
            self.deliver(self.wire, *frames)
