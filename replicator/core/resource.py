# SPDX-License-Identifier: Apache-2.0
"""A resource: the whole mirror on one node, as one object without I/O.

It dispatches: every event goes to the chapter that owns it, and once per turn (`drain`) each chapter may do what is
worth doing together.  What is decided here concerns all volumes at once: fork points (a write that a peer misses
because its link is gone forks *every* volume, or two volumes could fork in opposite directions unseen), barriers and
flushes.
"""

from __future__ import annotations

import errno
from collections.abc import Callable
from typing import Any, Final

from replicator.core.actions import Action, CloseLink, FlushData, ReadData, Reply, Send
from replicator.core.commands import Commands
from replicator.core.connection import GOODBYE_NOT_NOW, GOODBYE_REFUSED, Connection, PeerRead
from replicator.core.context import Context
from replicator.core.events import (
    ClientClosed,
    ClientOpened,
    ClientRequest,
    Command,
    DialFailed,
    DiskClosed,
    DiskDone,
    DiskOpened,
    DiskOpenFailed,
    Event,
    Io,
    LinkDown,
    LinkFrames,
    LinkUp,
    Tick,
)
from replicator.core.generations import JUST_CREATED, same
from replicator.core.handshake import Candidate, Fault, hello
from replicator.core.handshake_wire import pack_goodbye
from replicator.core.identity import Identity
from replicator.core.leaving import Leaving
from replicator.core.locks import LockKind
from replicator.core.options import Options
from replicator.core.reliance import Reliance
from replicator.core.roles import Roles
from replicator.core.states import Connection as ConnectionState
from replicator.core.states import Disk, Role
from replicator.core.status import gi, status
from replicator.core.transferlog import Epoch, TransferLog
from replicator.core.volume import Volume
from replicator.core.wire import Frame, Kind
from replicator.core.write import Write
from replicator.errors import ProtocolError

#: Links that have not agreed yet; more are closed at once (requirement S-6).
CANDIDATES_MAX: Final = 8


class Resource:
    """One resource on one node.  `new_id()` gives random 64-bit ids."""

    def __init__(self, options: Options, new_id: Callable[[], int]) -> None:
        self.options = options
        self.context = Context(options, new_id)
        self.log = TransferLog(
            writes_max=options.epoch_writes_max,
            wait_for_peers=self._flush_waits_for_peers,
            barrier=self._barrier,
            flush=self._flush,
            mark=lambda peer, number, offset, size: self.volumes[number].mark(peer, offset, size),
            flush_done=lambda number, token: self.volumes[number].path.flush_done(token),
        )
        self.volumes = {number: Volume(number, self.context, self.log, self) for number in options.volumes}
        self.connections = {peer: Connection(self, self.context, peer, name) for peer, name in options.peers.items()}
        self.leaving = Leaving(self, self.context)
        self.roles = Roles(self, self.context)
        self.identity = Identity(self, self.context)
        self.reliance = Reliance(self, self.context)
        self.commands = Commands(self, self.context)
        self._candidates: dict[int, Candidate] = {}
        self._links: dict[int, Connection] = {}  # agreed
        self._closing: set[int] = set()  # links we asked to close: what still comes is not looked at
        self._openers: dict[tuple[int, int], str] = {}
        self._parked_reads: list[PeerRead] = []
        self._handlers: dict[type, Callable[[Any], None]] = {
            ClientRequest: self._on_request,
            DiskDone: self.context.complete,
            LinkFrames: self._on_frames,
            ClientOpened: self._on_opened,
            ClientClosed: self._on_client_closed,
            DiskOpened: lambda event: self.volumes[event.volume].opened(event),
            DiskOpenFailed: lambda event: self.volumes[event.volume].open_failed(event.error),
            DiskClosed: lambda event: self.volumes[event.volume].closed(),
            LinkUp: self._on_link_up,
            LinkDown: self._on_link_down,
            DialFailed: lambda event: self.connections[event.peer].dial_failed(event.reason),
            Command: self.commands.run,
            Tick: lambda _: None,
        }

    # --- the interface

    def step(self, event: Event, now: int) -> None:
        """Something happened; `now` is monotonic nanoseconds and never goes back."""
        assert now >= self.context.now, f"time went back from {self.context.now} to {now}"
        self.context.now = now
        self._handlers[type(event)](event)

    def drain(self) -> list[Action]:
        """Everything asked for since the last call; once per turn."""
        self._settle()
        out, self.context.out = self.context.out, []
        closing = {action.link for action in out if type(action) is CloseLink}
        if closing:
            self._closing |= closing
            for link in closing:
                self._links.pop(link, None)
                self._candidates.pop(link, None)
        return out

    @property
    def deadline(self) -> int | None:
        """When `step(Tick(), now)` is due, or None."""
        limits = [connection.deadline for connection in self.connections.values()]
        limits += [candidate.since + self.options.handshake_timeout_ns for candidate in self._candidates.values()]
        limits += [replica.deadline for volume in self.volumes.values() for replica in volume.replicas.values()]
        limits += [self.roles.deadline, self.leaving.deadline]
        if self.log.open.ranges:
            limits.append(self.log.open.since + self.options.epoch_time_ns)
        return min((limit for limit in limits if limit is not None), default=None)

    def status(self) -> dict[str, object]:
        """What operators see (DRBD's JSON names); plain data."""
        return status(self)

    def gi(self) -> dict[str, object]:
        """The generation ids and flags of every volume; plain data."""
        return gi(self)

    def _settle(self) -> None:
        now = self.context.now
        for candidate in list(self._candidates.values()):
            if now >= candidate.since + self.options.handshake_timeout_ns:
                self._reject(candidate, Fault("the handshake took too long"))
        for connection in self.connections.values():
            connection.tick()
        if self.log.open.ranges and now >= self.log.open.since + self.options.epoch_time_ns:
            self.log.close()
        if self._parked_reads:
            parked, self._parked_reads = self._parked_reads, []
            for read in parked:
                self._read(self.volumes[read.volume], read.offset, read.size, read.done)
        self.roles.settle()
        self.leaving.settle()
        self.commands.settle()
        for volume in self.volumes.values():
            volume.settle()
            if not self.crowded and volume.path.parked:
                volume.path.wake()
        for connection in self.connections.values():
            connection.settle()

    # --- facts

    @property
    def attached(self) -> list[Volume]:
        """The volumes with a disk."""
        return [volume for volume in self.volumes.values() if volume.attached is not None]

    @property
    def primary(self) -> bool:
        """This node is Primary."""
        return self.roles.role is Role.PRIMARY

    @property
    def settled(self) -> bool:
        """Nothing is under way that decides who has good data."""
        return (
            all(connection.settled for connection in self.connections.values())
            and all(
                volume.disk not in (Disk.ATTACHING, Disk.DETACHING, Disk.FAILED) for volume in self.volumes.values()
            )
            and self.identity.idle
            and self.reliance.idle
        )

    @property
    def crowded(self) -> bool:
        """Group.crowded: epochs that wait for confirmation, or bytes a peer has not written, are at their bound."""
        return self.log.full or any(
            c.unwritten_bytes >= self.options.unwritten_bytes_max for c in self.connections.values()
        )

    def openers(self, number: int | None = None) -> list[str]:
        """Who holds a volume (or any) open."""
        return [who for (volume, _), who in self._openers.items() if number is None or volume == number]

    # --- clients

    def _on_opened(self, event: ClientOpened) -> None:
        self._openers[event.volume, event.client] = event.who

    def _on_client_closed(self, event: ClientClosed) -> None:
        self._openers.pop((event.volume, event.client), None)

    def _on_request(self, request: ClientRequest) -> None:
        volume = self.volumes[request.volume]
        if not self.primary or self.roles.busy == "demotion":
            self.context.out.append(Reply(request.token, errno.EPERM))
        elif request.io is Io.READ:
            volume.read_bytes += request.size
            self._read(volume, request.offset, request.size, self._reply_read(request.token))
        elif request.io is Io.FLUSH:
            self.log.flush(volume.number, request.token)
        else:
            volume.written_bytes += request.size
            write = Write(
                request.io,
                request.offset,
                request.size,
                request.data,
                fua=request.fua,
                keep=request.keep,
                origin=self.options.node_id,
                kind=LockKind.LOCAL,
            )
            write.token = request.token
            volume.path.submit(write)

    def _reply_read(self, token: int) -> Callable[[int, bytes], None]:
        return lambda error, data: self.context.out.append(Reply(token, error, data))

    def _read(self, volume: Volume, offset: int, size: int, done: Callable[[int, bytes], None]) -> None:
        """From the local disk where it holds the newest data, else from a peer, else EIO (I-7)."""
        if volume.disk is Disk.UP_TO_DATE or (
            volume.disk is Disk.INCONSISTENT
            and any(r.has_good_data and r.covered(offset, size) for r in volume.replicas.values())
        ):
            subject = PeerRead(volume.number, offset, size, done)
            token = self.context.ask(self._read_done, subject)
            self.context.out.append(ReadData(volume.number, token, offset, size))
        else:
            self.read_again(PeerRead(volume.number, offset, size, done))

    def read_again(self, read: PeerRead) -> None:
        """Ask a peer with good data; EIO if there is none."""
        volume = self.volumes[read.volume]
        for peer, replica in volume.replicas.items():
            if replica.has_good_data:
                self.connections[peer].read(read)
                return
        if volume.disk is Disk.UP_TO_DATE:
            token = self.context.ask(self._read_done, read)
            self.context.out.append(ReadData(volume.number, token, read.offset, read.size))
        elif volume.path.held:
            self._parked_reads.append(read)  # a round decides soon who has good data
        else:
            read.done(errno.EIO, b"")

    def _read_done(self, read: PeerRead, event: DiskDone) -> None:
        if not event.error:
            read.done(0, bytes(event.data))
            return
        self.context.notice("read-error", volume=read.volume, offset=read.offset, size=read.size, errno=event.error)
        if any(replica.has_good_data for replica in self.volumes[read.volume].replicas.values()):
            self.read_again(read)
        else:
            read.done(event.error, b"")

    # --- what concerns all volumes

    def forked(self, volume: Volume, peers: int) -> bool:
        """Group.forked: on this volume, and on all of them towards a peer whose link is gone."""
        if not volume.forked_here(peers):
            return False
        gone = self._gone(peers)
        return not gone or all(other.forked_here(gone) for other in self.volumes.values())

    def rotate(self, volume: Volume, peers: int) -> None:
        """Group.rotate."""
        volume.rotate_here(peers)
        gone = self._gone(peers)
        if gone:
            for other in self.volumes.values():
                other.rotate_here(gone)

    def _gone(self, peers: int) -> int:
        return sum(
            1 << peer
            for peer, connection in self.connections.items()
            if peers >> peer & 1 and (not connection.connected or connection.waits_for_state)
        )

    def rotated(self) -> None:
        """Group.rotated: whoever waited for a fork point looks again."""
        for volume in self.volumes.values():
            volume.path.wake_unforked()

    def replicated_done(self, volume: Volume, write: Write, error: int) -> None:
        """Group.replicated_done."""
        write.arrival[0].done(write, error)

    def disk_changed(self, volume: Volume) -> None:
        """Group.disk_changed: the copies have to be compared again."""
        volume.refresh()
        for replica in volume.replicas.values():
            if replica.link is not None and (volume.attached is not None or replica.deciding):
                replica.disk_settled()
        volume.path.wake_all()

    def disk_lost(self, volume: Volume) -> None:
        """Group.disk_lost: whoever waited for its metadata waits in vain."""
        for other in self.volumes.values():
            if other is not volume:
                other.path.wake_unforked()  # it may have waited for a fork point that this volume makes no more
        self.roles.disk_lost(volume)
        self.identity.disk_lost(volume)
        self.commands.disk_lost(volume)

    def identity_changed(self, *, forced: bool) -> None:
        """A forced promotion may have changed what a copy is: compare again."""
        if forced:
            for volume in self.volumes.values():
                for replica in volume.replicas.values():
                    if replica.link is not None:
                        replica.begin_round()

    def peer_lost(self, connection: Connection) -> None:
        """A link ended, and all that depended on it has been told."""
        self.roles.peer_lost(connection)
        self.identity.peer_lost(connection)
        self.reliance.peer_lost(connection)
        ended = [link for link, owner in self._links.items() if owner is connection]
        for link in ended:
            del self._links[link]
            self._closing.add(link)  # what still comes on it is not looked at

    def closing(self, link: int) -> bool:
        """The link carries nothing any more, but has not ended."""
        return link in self._closing

    def when_quiet(self, then: Callable[[], None]) -> None:
        """Call `then` when no replicated write is under way on any volume."""
        volumes = list(self.volumes.values())

        def next_volume() -> None:
            if volumes:
                volumes.pop().path.when_peers_quiet(next_volume)
            else:
                then()

        next_volume()

    def _flush_waits_for_peers(self) -> bool:
        """Under protocol A a FLUSH is about the local disk, as long as that is good data."""
        return self.options.protocol != "A" or any(not volume.trusts_itself() for volume in self.volumes.values())

    def _barrier(self, peers: int, number: int) -> None:
        for peer, connection in self.connections.items():
            if peers >> peer & 1:
                connection.send(Frame(Kind.BARRIER, sequence=number))

    def _flush(self, epoch: Epoch) -> None:
        for number in sorted(epoch.volumes):
            if self.volumes[number].has_disk():
                epoch.flushing += 1
                token = self.context.ask(self._flushed, (epoch, self.volumes[number]))
                self.context.out.append(FlushData(number, token))

    def _flushed(self, subject: tuple[Epoch, Volume], event: DiskDone) -> None:
        epoch, volume = subject
        if event.error:
            volume.disk_error("flush", event.error)
        self.log.flushed(epoch)

    # --- links

    def provisional(self) -> bool:
        """No volume here holds data yet: the resource id is not binding."""
        return all(same(volume.ledger.durable.current, JUST_CREATED) for volume in self.attached)

    def resource_id(self) -> bytes:
        """The id of the resource as our metadata knows it; zero without a disk."""
        for volume in self.volumes.values():
            if volume.attached is not None:
                return volume.ledger.durable.resource_id
        return bytes(16)

    def _on_link_up(self, event: LinkUp) -> None:
        peer = event.peer
        if peer is None and len(self.connections) == 1:
            peer = next(iter(self.connections))  # whom we expect; HELLO must say the same
        assert peer is not None, "a clear link needs a single peer"
        candidate = Candidate(
            event.link,
            peer,
            hello(
                resource=self.options.resource,
                resource_id=self.resource_id(),
                provisional=self.provisional(),
                node_id=self.options.node_id,
                node=self.options.node_name,
                peer=peer,
                nonce=event.nonce,
                options=self.options.matching,
                volumes=self.options.volumes,
            ),
            self.context.now,
            dialed=event.dialed,
        )
        connection = self.connections[peer]
        if connection.state is ConnectionState.STANDALONE:
            self._reject(candidate, Fault(f"{self.options.node_name} is StandAlone"))
            return
        if len(self._candidates) >= CANDIDATES_MAX:
            self._reject(
                candidate, Fault(f"{self.options.node_name} has {CANDIDATES_MAX} handshakes under way already")
            )
            return
        self._candidates[event.link] = candidate
        self.context.out.append(Send(event.link, candidate.first()))

    def _on_frames(self, event: LinkFrames) -> None:
        owner = self._links.get(event.link)
        if owner is not None:
            owner.on_frames(list(event.frames))
            return
        if self.leaving.on_frames(event.link, event.frames):
            return
        candidate = self._candidates.get(event.link)
        if candidate is None:
            assert event.link in self._closing, f"frames of unknown link {event.link}"
            return
        for index, frame in enumerate(event.frames):
            fault = self._candidate_frame(candidate, frame)
            if fault is not None:
                self._reject(candidate, fault)
                return
            if candidate.agreed:
                self._agreed(candidate)
                if event.link in self._links:
                    self._links[event.link].on_frames(list(event.frames[index + 1 :]))
                return

    def _candidate_frame(self, candidate: Candidate, frame: Frame) -> Fault | None:
        try:
            answer = candidate.on_frame(frame, self.options.peers)
        except ProtocolError as error:
            return Fault(error.message)
        if isinstance(answer, Frame):
            self.context.out.append(Send(candidate.link, answer))
            return None
        return answer

    def _agreed(self, candidate: Candidate) -> None:
        self._candidates.pop(candidate.link)
        assert candidate.peer is not None
        connection = self.connections[candidate.peer]
        if connection.state is ConnectionState.STANDALONE:
            self._reject(candidate, Fault(f"{self.options.node_name} is StandAlone"))
            return
        connection.agreed(candidate)
        self._links[candidate.link] = connection

    def _reject(self, candidate: Candidate, fault: Fault) -> None:
        self._candidates.pop(candidate.link, None)
        self._closing.add(candidate.link)
        self.context.notice("link-refused", reason=fault.text)
        code = GOODBYE_REFUSED if fault.fatal else GOODBYE_NOT_NOW
        payload = pack_goodbye(code, fault.text)
        self.context.out.append(Send(candidate.link, Frame(Kind.GOODBYE, payload=payload)))
        self.context.out.append(CloseLink(candidate.link, fault.text))
        self._candidate_over(candidate, fault)

    def _candidate_over(self, candidate: Candidate, fault: Fault) -> None:
        assert candidate.peer is not None
        connection = self.connections.get(candidate.peer)
        if connection is None or connection.connected:
            return
        if fault.fatal:
            connection.refuse(fault.text)
        elif candidate.dialed:
            connection.dial_failed(fault.text)
        elif connection.state is not ConnectionState.STANDALONE:
            connection.reason = fault.text

    def _on_link_down(self, event: LinkDown) -> None:
        owner = self._links.pop(event.link, None)
        candidate = self._candidates.pop(event.link, None)
        self._closing.discard(event.link)
        self.leaving.link_down(event.link)
        if owner is not None:
            owner.link_lost(event.reason)
        elif candidate is not None:
            self._candidate_over(candidate, Fault(event.reason))
