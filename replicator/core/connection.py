# SPDX-License-Identifier: Apache-2.0
"""The connection to one peer: its state, its liveness, what was sent and not acknowledged.

Owns at most one agreed link.  A new agreed link takes over from an old one that only we still believe in.  Everything
that depends on the peer ends in one place, `_lose`: the order there (replicas first, then the transfer log, then
the writes that waited) is what keeps decision 0001, V1 and V3.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Final

from replicator.core.actions import CloseLink, Dial, Send
from replicator.core.context import Context
from replicator.core.events import Io
from replicator.core.handshake import Candidate
from replicator.core.handshake_wire import (
    pack_goodbye,
    pack_role,
    unpack_disk_state,
    unpack_errno,
    unpack_goodbye,
    unpack_role,
    unpack_sequences,
)
from replicator.core.receiver import Receiver
from replicator.core.states import CONNECTION_MOVES, ConnectionMove, Disk, Role, move
from replicator.core.states import Connection as State
from replicator.core.volume import Volume
from replicator.core.wire import Flag, Frame, Kind
from replicator.core.write import Write
from replicator.errors import ProtocolError

if TYPE_CHECKING:
    from replicator.core.replica import Replica
    from replicator.core.resource import Resource

_KIND: Final = {Io.WRITE: Kind.WRITE, Io.TRIM: Kind.TRIM, Io.ZERO: Kind.ZERO}
BY_OPERATOR: Final = "disconnected by the operator"
GOODBYE_DISCONNECT: Final = 1
GOODBYE_REFUSED: Final = 2
GOODBYE_DOWN: Final = 3
GOODBYE_NOT_NOW: Final = 4  # nothing is wrong that an administrator must mend: try again later
GOODBYE_OUTDATED: Final = 5  # behind a GOODBYE of either side: the sender's copies are durably Outdated


class PeerRead:
    """A read of one of our clients that the peer answers."""

    __slots__ = ("done", "offset", "size", "volume")

    def __init__(self, volume: int, offset: int, size: int, done: Callable[[int, bytes], None]) -> None:
        self.volume = volume
        self.offset = offset
        self.size = size
        self.done = done


class Connection:
    """The connection to node `peer`."""

    def __init__(self, resource: Resource, context: Context, peer: int, name: str) -> None:
        self._resource = resource
        self._context = context
        self.peer = peer
        self.name = name
        self.state = State.STANDALONE
        self.reason = ""  # why it is not Connected, for the operator
        self.link: int | None = None
        self.role: Role | None = None  # the peer's
        self.resource_id = bytes(16)
        self.receiver: Receiver | None = None
        self.unwritten_bytes = 0
        self._dials = peer not in context.options.listens_for
        self._dialing = False
        self._next_dial = 0
        self._sequence = 0
        self._unacked: dict[int, tuple[Volume, Write]] = {}
        self._reads: dict[int, PeerRead] = {}
        self._heard = 0
        self._pinged: int | None = None
        self._progress = 0  # when an acknowledgement last came, or the first unacknowledged write was sent
        self._round_since: int | None = None
        self._goodbye = False  # the peer said so
        self._initial = False  # the first round of this link, of all volumes together
        self.waits_for_state = False  # it begins when the peer has spoken for all of them

    # --- states

    def _move(self, happened: ConnectionMove, reason: str) -> None:
        self.state = move(CONNECTION_MOVES, self.state, happened)
        self.reason = reason
        self._context.notice(
            "connection-state", peer=self.name, connection=self.state.value, reason=reason or happened.value
        )

    @property
    def connected(self) -> bool:
        """Both agreed."""
        return self.link is not None

    @property
    def settled(self) -> bool:
        """No round is under way."""
        return self.link is None or not any(replica.deciding for replica in self._replicas())

    def _replicas(self) -> list[Replica]:
        return [volume.replicas[self.peer] for volume in self._resource.volumes.values()]

    def connect(self) -> None:
        """The operator wants a connection."""
        if self.state is State.STANDALONE:
            self._move(ConnectionMove.CONNECT, "")
            self._next_dial = self._context.now

    def disconnect(self, happened: ConnectionMove, reason: str, *, goodbye: int = GOODBYE_DISCONNECT) -> None:
        """End it on purpose; the peer is told why."""
        if self.state is State.STANDALONE:
            return
        link = self.link
        if link is not None:
            self._send_goodbye(link, goodbye, reason)
            role = self.role
            self._lose(graceful=True)
            if goodbye == GOODBYE_REFUSED:
                self._context.out.append(CloseLink(link, reason))
            else:
                self._resource.leaving.part(self, link, role, reason)
        self._move(happened, reason)

    def _send_goodbye(self, link: int, code: int, reason: str) -> None:
        flags = Flag.GRACEFUL if code != GOODBYE_REFUSED else 0
        self._context.out.append(Send(link, Frame(Kind.GOODBYE, flags=flags, payload=pack_goodbye(code, reason))))

    def refuse(self, reason: str) -> None:
        """The peer or its data do not fit: StandAlone until an administrator acts."""
        self.disconnect(ConnectionMove.REFUSED, reason, goodbye=GOODBYE_REFUSED)

    # --- links

    def agreed(self, candidate: Candidate) -> None:
        """A link finished its handshake."""
        if self.link is not None:
            old = self.link
            self._lose(graceful=False)
            self._context.out.append(CloseLink(old, "a newer connection of the same peer took over"))
            self._move(ConnectionMove.LOST, "the peer connected anew")
        self._resource.leaving.forget(self)
        self.link = candidate.link
        self.resource_id = candidate.resource_id
        self.role = None
        self._goodbye = False
        self._initial = True
        self._dialing = False
        self._heard = self._progress = self._context.now
        self._pinged = None
        self._move(ConnectionMove.AGREED, "")
        self.receiver = Receiver(self._context, self.peer, self._resource.volumes, self.send)
        self.send(Frame(Kind.ROLE, payload=pack_role(self._resource.primary)))
        # Nothing here needs the peer, so nothing waits for it.  (Two Primaries do not wait for each other: `_on_role`.)
        self.waits_for_state = self._resource.primary and all(
            volume.trusts_itself() for volume in self._resource.volumes.values()
        )
        for replica in self._replicas():
            replica.link_up(self)
        if not self.waits_for_state:
            self._begin_rounds()
        self._round_since = self._context.now

    def link_lost(self, reason: str) -> None:
        """The agreed link ended by itself."""
        self._lose(graceful=self._goodbye)
        self._move(ConnectionMove.LOST, reason)
        self._dial_later()

    def dial_failed(self, reason: str) -> None:
        """An attempt led nowhere."""
        self._dialing = False
        if self.state is State.STANDALONE or self.link is not None:
            return
        self.reason = reason
        self._dial_later()

    def _dial_later(self) -> None:
        self._next_dial = self._context.now + self._context.options.connect_interval_ns

    def _lose(self, *, graceful: bool) -> None:
        resource = self._resource
        lost_primary = self.role is Role.PRIMARY and not graceful
        receiver, self.receiver = self.receiver, None
        assert receiver is not None, "an agreed link has one"
        receiver.link_down()
        if self._context.options.fencing != "dont-care" and any(replica.leaves_mixture for replica in self._replicas()):
            resource.leaving.known_outdated(self.peer)
        for volume in resource.volumes.values():
            volume.replicas[self.peer].leave_round()
        for volume in resource.volumes.values():
            volume.path.drop_unlaunched(self.peer)
        for volume in resource.volumes.values():
            volume.replicas[self.peer].link_down(lost_primary=lost_primary)
        self.link = None
        self.role = None
        for number in resource.log.lose(self.peer):
            # What the peer may lack was partly acknowledged: with a fork point it can never win unnoticed (V3).
            resource.volumes[number].rotate()
        unacked, self._unacked = self._unacked, {}
        self.unwritten_bytes = 0
        for volume, write in unacked.values():
            volume.path.lost(write, self.peer)
        reads, self._reads = self._reads, {}
        for read in reads.values():
            resource.read_again(read)
        for volume in resource.volumes.values():
            volume.farewell_refused(self.peer)
            volume.path.wake_all()
        self._round_since = None
        self.waits_for_state = False
        resource.peer_lost(self)

    # --- sending

    def send(self, frame: Frame) -> None:
        """Queue a frame; dropped when the link is gone (whoever sends learns of that otherwise)."""
        if self.link is not None:
            self._context.out.append(Send(self.link, frame))

    def next_sequence(self) -> int:
        """A sequence number of this link and direction."""
        self._sequence += 1
        return self._sequence

    def send_write(self, volume: Volume, write: Write) -> None:
        """Mirror a client's write; says in `write.waiting` whether its reply needs the peer's answer."""
        self._sequence = sequence = self._sequence + 1
        bit = 1 << self.peer
        options = self._context.options
        if not self._unacked:
            self._progress = self._context.now
        self._unacked[sequence] = (volume, write)
        self.unwritten_bytes += write.size
        write.unwritten |= bit
        if options.protocol != "A" or not volume.trusts_itself() or self.unwritten_bytes > options.send_window_bytes:
            write.waiting |= bit
        flags = (Flag.FUA if write.fua else 0) | (Flag.KEEP if write.keep and write.io is Io.ZERO else 0)
        payload = write.data if write.io is Io.WRITE else b""
        assert self.link is not None
        frame = Frame(_KIND[write.io], volume.number, flags, sequence, write.offset, write.size, payload)
        self._context.out.append(Send(self.link, frame))

    def read(self, read: PeerRead) -> None:
        """Ask the peer for data."""
        sequence = self.next_sequence()
        if not self._reads and not self._unacked:
            self._progress = self._context.now
        self._reads[sequence] = read
        self.send(Frame(Kind.READ, read.volume, sequence=sequence, offset=read.offset, size=read.size))

    # --- receiving

    def on_frames(self, frames: list[Frame]) -> None:
        """Frames of the agreed link; the first fault drops it."""
        self._heard = self._context.now
        self._pinged = None
        for frame in frames:
            if self.link is None:
                return
            try:
                handler = _HANDLERS.get(frame.kind)
                fault = self._on_volume_frame(frame) if handler is None else handler(self, frame)
            except ProtocolError as error:
                fault = error.message
            if fault is not None:
                self._protocol_error(fault)
                return

    def _protocol_error(self, fault: str) -> None:
        self._context.notice("protocol-error", peer=self.name, reason=fault)
        self._give_up(f"protocol error: {fault}")

    def _on_volume_frame(self, frame: Frame) -> str | None:
        volume = self._resource.volumes.get(frame.volume)
        if volume is None:
            return f"{frame.kind.name} for volume {frame.volume}, which does not exist"
        if frame.kind in (Kind.WRITE, Kind.TRIM, Kind.ZERO):
            if self.role is not Role.PRIMARY or self._resource.primary:
                return f"{frame.kind.name} from a peer that may not write"
            if not volume.replicas[self.peer].state_sent:
                return f"{frame.kind.name} before the copies were compared"
            assert self.receiver is not None
            volume.replicas[self.peer].received_bytes += len(frame.payload)
            return self.receiver.on_write(frame)
        if frame.kind is Kind.READ:
            assert self.receiver is not None
            return self.receiver.on_read(volume, frame)
        if frame.kind is Kind.DISK_STATE:
            return self._on_disk_state(volume, frame)
        if frame.kind is Kind.DISK_STATE_ACK:
            volume.farewell_heard(self.peer)
            return None
        if frame.kind in (Kind.NEW_GENERATION, Kind.NEW_GENERATION_ACK):
            return self._resource.identity.on_frame(self, volume, frame)
        if frame.kind is Kind.RELY_REQUEST:
            self._resource.reliance.on_request(self, volume, frame)
            return None
        if frame.kind is Kind.RELY_REPLY:
            return self._resource.reliance.on_reply(self, volume, frame)
        return volume.replicas[self.peer].on_frame(frame)

    def _on_ping(self, frame: Frame) -> str | None:
        self.send(Frame(Kind.PONG, sequence=frame.sequence))
        return None

    def _on_pong(self, _: Frame) -> str | None:
        return None

    def _on_role(self, frame: Frame) -> str | None:
        self.role = Role.PRIMARY if unpack_role(frame.payload) else Role.SECONDARY
        self._context.notice("peer-role", peer=self.name, role=self.role.value)
        self._resource.roles.peer_role(self)
        if self.waits_for_state and self.role is Role.PRIMARY:
            self._begin_rounds()
        return None

    def _on_role_request(self, frame: Frame) -> str | None:
        self._resource.roles.asked(self, frame)
        return None

    def _on_role_reply(self, frame: Frame) -> str | None:
        return self._resource.roles.answered(self, frame)

    def _on_goodbye(self, frame: Frame) -> str | None:
        code, text = unpack_goodbye(frame.payload)
        self._goodbye = bool(frame.flags & Flag.GRACEFUL)
        link = self.link
        assert link is not None
        role = self.role
        self._lose(graceful=self._goodbye)
        if self._goodbye:
            self._resource.leaving.part(self, link, role, "the peer said goodbye")
        else:
            self._context.out.append(CloseLink(link, "the peer said goodbye"))
        if code == GOODBYE_REFUSED:
            self._move(ConnectionMove.REFUSED, f"{self.name} refused: {text}")
        else:
            self._move(ConnectionMove.LOST, f"{self.name} disconnected: {text}")
            self._dial_later()
        return None

    def _on_received(self, frame: Frame) -> str | None:
        if self._context.options.protocol != "B":
            return "RECEIVED, which belongs to protocol B"
        for sequence in unpack_sequences(frame.payload):
            entry = self._unacked.get(sequence)
            if entry is None:
                return f"RECEIVED for write {sequence}, which is not under way"
            volume, write = entry
            if volume.trusts_itself() and not write.disk_failed and not write.fua:
                volume.path.acknowledged(write, self.peer)
        self._progress = self._context.now
        return None

    def _on_written(self, frame: Frame) -> str | None:
        bit = ~(1 << self.peer)
        unacked = self._unacked
        for sequence in unpack_sequences(frame.payload):
            entry = unacked.pop(sequence, None)
            if entry is None:
                return f"WRITTEN for write {sequence}, which is not under way"
            volume, write = entry
            self.unwritten_bytes -= write.size
            write.unwritten &= bit
            volume.path.acknowledged(write, self.peer)
        self._progress = self._context.now
        return None

    def _on_failed(self, frame: Frame) -> str | None:
        for sequence in unpack_sequences(frame.payload):
            entry = self._unacked.pop(sequence, None)
            if entry is None:
                return f"FAILED for write {sequence}, which is not under way"
            volume, write = entry
            self.unwritten_bytes -= write.size
            volume.mark(self.peer, write.offset, write.size)
            volume.path.lost(write, self.peer)
        self._progress = self._context.now
        return None

    def _on_barrier(self, frame: Frame) -> str | None:
        assert self.receiver is not None
        return self.receiver.on_barrier(frame)

    def _on_barrier_ack(self, frame: Frame) -> str | None:
        if not self._resource.log.confirm(self.peer, frame.sequence):
            return f"BARRIER_ACK {frame.sequence} for no barrier of ours"
        return None

    def _on_read_answer(self, frame: Frame) -> str | None:
        read = self._reads.get(frame.sequence)
        if read is None or read.volume != frame.volume:
            return f"{frame.kind.name} {frame.sequence} for no read of ours"
        error = unpack_errno(frame.payload) if frame.kind is Kind.READ_FAILED else 0
        if not error and (frame.offset, frame.size) != (read.offset, read.size):
            return f"READ_DATA of {frame.offset}+{frame.size} for a read of {read.offset}+{read.size}"
        del self._reads[frame.sequence]  # only now: a fault leaves it to `_lose`, which asks elsewhere
        self._progress = self._context.now
        read.done(error, b"" if error else bytes(frame.payload))
        return None

    def _on_disk_state(self, volume: Volume, frame: Frame) -> str | None:
        disk, ranges = unpack_disk_state(frame.payload)
        if disk != Disk.DISKLESS:
            return f"DISK_STATE {Disk(disk).word}: only the loss of a disk is told this way"
        if any(offset + size > volume.size for offset, size in ranges) and volume.attached is not None:
            return "DISK_STATE with a range beyond the end"
        for offset, size in ranges:
            volume.mark(self.peer, offset, size)
        marked = self._resource.log.lose(self.peer, volume.number)
        volume.replicas[self.peer].peer_disk_gone()
        volume.farewell_refused(self.peer)
        volume.replicas[self.peer].release()
        if volume.attached is None:
            return None
        if self.role is Role.PRIMARY or (self._resource.primary and (ranges or marked)):
            volume.rotate_here(1 << self.peer)
        volume.path.wake_all()
        link = self.link

        def durable() -> None:
            # Only good data can vouch; without an answer the peer learns our state from DISK_STATE or a round.
            if self.link is link and volume.disk is Disk.UP_TO_DATE:
                self.send(Frame(Kind.DISK_STATE_ACK, volume.number, sequence=frame.sequence))

        volume.ledger.settled(lambda: volume.save_pages(durable))
        return None

    # --- rounds of all volumes

    def decided(self) -> None:
        """A volume has a decision.

        On a new link all volumes are carried out together when all have one, or the peers part: a split brain of
        one volume forbids to touch the others.  Later rounds concern one volume at a time, and are carried out at once:
        the peer did the same when it saw our state, and what it sends next relies on it.
        """
        replicas = [volume.replicas[self.peer] for volume in self._resource.volumes.values()]
        if self._initial and any(replica.decision is None for replica in replicas):
            return
        self._initial = False
        if all(replica.decision is not None for replica in replicas):
            self._round_since = None
        ready = [replica for replica in replicas if replica.decision is not None and not replica.carried_out]
        wrong = [replica for replica in ready if not replica.acceptable]
        if wrong:
            rules = ", ".join(replica.refusal for replica in wrong)
            self._context.notice("refused-data", peer=self.name, decisions=rules)
            self.refuse(rules)
            return
        if self._resource.primary and self.role is Role.PRIMARY:
            self.refuse("both nodes are Primary and two Primaries are not allowed")
            return
        for replica in ready:
            replica.carry_out()

    # --- time

    @property
    def deadline(self) -> int | None:
        """When `tick` has something to do."""
        options = self._context.options
        if self.link is None:
            if self.state is State.STANDALONE or not self._dials or self._dialing:
                return None
            return self._next_dial
        limits = [
            self._heard + options.ping_interval_ns if self._pinged is None else self._pinged + options.ping_timeout_ns
        ]
        stuck_at = self._stuck_at
        if stuck_at is not None:
            limits.append(stuck_at)
        if self._round_since is not None:
            limits.append(self._round_since + options.handshake_timeout_ns)
        return min(limits)

    def tick(self) -> None:
        """Dial, ping, or give up a peer that does not answer."""
        now, options, stuck_at = self._context.now, self._context.options, self._stuck_at
        if self.link is None:
            if self.state is State.UNCONNECTED and (not self._dials or self._next_dial <= now):
                self._move(ConnectionMove.RETRY, self.reason)
            if self.state is State.CONNECTING and self._dials and not self._dialing and self._next_dial <= now:
                self._dialing = True
                self._context.out.append(Dial(self.peer))
            return
        if self._pinged is not None and now >= self._pinged + options.ping_timeout_ns:
            self._give_up("the peer does not answer pings")
        elif stuck_at is not None and now >= stuck_at:
            limit = f"{options.ko_count} x {options.timeout_ns / 1e9:g} s"
            self._give_up(f"the peer does not acknowledge writes within ko-count x timeout, {limit}", for_good=True)
        elif self._round_since is not None and now >= self._round_since + options.handshake_timeout_ns:
            self._give_up("the peer does not finish the handshake")
        elif self._pinged is None and now >= self._heard + options.ping_interval_ns:
            self._pinged = now
            self.send(Frame(Kind.PING, sequence=self.next_sequence()))

    @property
    def _stuck_at(self) -> int | None:
        """When the peer will have owed an answer for too long, whatever else it says; never with `ko_count` 0."""
        options = self._context.options
        if not options.ko_count or not (self._unacked or self._reads):
            return None
        return self._progress + options.timeout_ns * options.ko_count

    def _give_up(self, reason: str, *, for_good: bool = False) -> None:
        link = self.link
        assert link is not None
        self._lose(graceful=False)
        self._context.out.append(CloseLink(link, reason))
        self._move(ConnectionMove.REFUSED if for_good else ConnectionMove.LOST, reason)
        self._dial_later()

    def probe(self) -> None:
        """Find out soon whether the peer is still there (a promotion waits for its answer)."""
        if self.link is not None and self._pinged is None:
            self._pinged = self._context.now
            self.send(Frame(Kind.PING, sequence=self.next_sequence()))

    def round_begins(self) -> None:
        """A round was begun on the living link: it has to end within the handshake timeout."""
        if self._round_since is None:
            self._round_since = self._context.now

    def round_wanted(self, replica: Replica) -> None:
        """The peer said what state this copy is in, in a round that we have not begun."""
        if not self.waits_for_state or replica.state_sent:
            replica.begin_round()

    def _begin_rounds(self) -> None:
        self.waits_for_state = False
        for replica in self._replicas():
            if not replica.state_sent:
                replica.begin_round()

    def settle(self) -> None:
        """Once per turn."""
        # (A volume that lost its disk while we waited has begun its round already.)
        if self.waits_for_state and all(replica.spoken for replica in self._replicas()):
            self._begin_rounds()
        if self.receiver is not None:
            self.receiver.settle()


_HANDLERS: Final[dict[Kind, Callable[[Connection, Frame], str | None]]] = {
    Kind.PING: Connection._on_ping,
    Kind.PONG: Connection._on_pong,
    Kind.ROLE: Connection._on_role,
    Kind.ROLE_REQUEST: Connection._on_role_request,
    Kind.ROLE_REPLY: Connection._on_role_reply,
    Kind.GOODBYE: Connection._on_goodbye,
    Kind.RECEIVED: Connection._on_received,
    Kind.WRITTEN: Connection._on_written,
    Kind.FAILED: Connection._on_failed,
    Kind.BARRIER: Connection._on_barrier,
    Kind.BARRIER_ACK: Connection._on_barrier_ack,
    Kind.READ_DATA: Connection._on_read_answer,
    Kind.READ_FAILED: Connection._on_read_answer,
}
