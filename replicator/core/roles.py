# SPDX-License-Identifier: Apache-2.0
"""Becoming Primary and ceasing to be (decision 0001, "Promotion"; V6).

Both are sequences of waits and durable steps.  `settle`, once per turn, looks whether the current wait is over and
takes the next step; every step leaves a state that a crash may keep.  One such sequence runs at a time.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Final

from replicator.core.actions import CutClients, FlushData
from replicator.core.context import Context
from replicator.core.events import DiskDone
from replicator.core.generations import JUST_CREATED, PRIMARY_BIT, UNSET, same
from replicator.core.handshake_wire import RoleAnswer, pack_role, pack_role_reply, unpack_role_reply
from replicator.core.ledger import slot_index, with_slot
from replicator.core.options import SECOND_NS
from replicator.core.promotion import (
    PeerFacts,
    Refusal,
    VolumeFacts,
    in_transition,
    openers_refusal,
    promotion_refusal,
)
from replicator.core.states import ROLE_MOVES, Disk, DiskMove, Role, RoleMove, move
from replicator.core.superblock import Superblock
from replicator.core.volume import Volume
from replicator.core.wire import Frame, Kind

if TYPE_CHECKING:
    from replicator.core.connection import Connection
    from replicator.core.resource import Resource

PEER_IS_PRIMARY: Final = -1
#: How long a promotion waits for a round or for a peer that has just been lost to be noticed (DRBD:
#: auto-promote-timeout and one ping timeout).
TRANSITION_NS: Final = 10 * SECOND_NS


class Roles:
    """The role of this node and the sequences that change it."""

    def __init__(self, resource: Resource, context: Context) -> None:
        self._resource = resource
        self._context = context
        self.role = Role.SECONDARY
        self.busy = ""  # "promotion" or "demotion" while one runs
        self.granted_to: Connection | None = None  # a peer that asked, and has not said how it ended
        self._step: Callable[[], None] | None = None
        self._finish: Callable[[Refusal | None], None] = lambda _: None
        self._force = False
        self._deadline = 0
        self._probed = False
        self._patience = 0  # until then "the peer is Primary" may be old news: it may just have been demoted or lost
        self._asking: dict[int, int] = {}  # peer -> sequence of the request whose answer is awaited
        self._grants: dict[int, int] = {}  # peer -> link that granted
        self._waiting: set[int] = set()  # volumes whose durable step is awaited
        self._after: Callable[[], None] = lambda: None
        self._survived_before: dict[int, set[int]] = {}  # per volume, peers whose Survivor flag was set already

    @property
    def deadline(self) -> int | None:
        """When waiting becomes refusing."""
        if self._step is None or self.busy != "promotion":
            return None  # a demotion waits for its clients, not for a clock
        return self._patience if self._context.now < self._patience else self._deadline

    def settle(self) -> None:
        """Once per turn: go on if the wait is over."""
        if self._step is not None:
            self._step()

    def _begin(self, what: str, step: Callable[[], None], finish: Callable[[Refusal | None], None]) -> None:
        self.busy = what
        self._step = step
        self._finish = finish
        self._deadline = self._context.now + TRANSITION_NS
        self._probed = False
        self._patience = self._context.now + self._context.options.ping_timeout_ns
        step()

    def _end(self, refusal: Refusal | None) -> None:
        finish, self._finish = self._finish, lambda _: None
        self.busy, self._step = "", None
        self._asking.clear()
        self._grants.clear()
        finish(refusal)

    # --- promotion

    def promote(self, finish: Callable[[Refusal | None], None], *, force: bool) -> None:
        """Become Primary; `finish(None)` when done, `finish(refusal)` when not."""
        if self.busy:
            finish(in_transition())
        elif self.role is Role.PRIMARY:
            finish(None)
        else:
            self._force = force
            self._begin("promotion", self._promotion_step, finish)

    def facts(self) -> tuple[list[VolumeFacts], list[PeerFacts]]:
        """What promotion is decided from."""
        resource = self._resource
        volumes = [
            VolumeFacts(
                number=volume.number,
                disk=volume.disk,
                peer_has_good_data=any(replica.has_good_data for replica in volume.replicas.values()),
            )
            for volume in resource.volumes.values()
        ]
        peers = [
            PeerFacts(
                name=connection.name,
                connected=connection.connected,
                primary=connection.role is Role.PRIMARY,
                known_outdated=self.known_outdated(peer),
            )
            for peer, connection in resource.connections.items()
        ]
        return volumes, peers

    def known_outdated(self, peer: int) -> bool:
        """The peer confirmed, or a fence device did, that its copy is old."""
        attached = self._resource.attached
        return bool(attached) and all(volume.ledger.slot(peer).outdated for volume in attached)

    def _promotion_step(self) -> None:
        resource = self._resource
        late = self._context.now >= self._deadline
        unsettled = self.granted_to is not None or not resource.settled
        if unsettled and not late:
            return
        refusal = (
            in_transition()
            if unsettled
            else promotion_refusal(*self.facts(), fencing=self._context.options.fencing, force=self._force)
        )
        if refusal is not None:
            if refusal.number == PEER_IS_PRIMARY and self._context.now < self._patience:
                self._probe_peers()
                return
            self._abort(refusal)
            return
        if self._ask_peers():
            if late:
                self._abort(in_transition())
            return
        self._step = None  # from here on completions drive it
        resource.when_quiet(self._flush)

    def _probe_peers(self) -> None:
        if self._probed:
            return
        self._probed = True
        for connection in self._resource.connections.values():
            connection.probe()

    def _ask_peers(self) -> bool:
        """Ask every connected peer that has not granted on its present link; True while an answer is missing."""
        for peer, connection in self._resource.connections.items():
            if connection.link is None:
                self._asking.pop(peer, None)
            elif self._grants.get(peer) != connection.link and peer not in self._asking:
                connection.probe()
                self._asking[peer] = sequence = connection.next_sequence()
                connection.send(Frame(Kind.ROLE_REQUEST, sequence=sequence))
        return bool(self._asking)

    def _abort(self, refusal: Refusal) -> None:
        for volume in self._resource.volumes.values():
            if volume.attached is not None and volume.ledger.wanted.primary_indicator:
                volume.ledger.save(partial(_not_promoted, before=self._survived_before[volume.number]), lambda: None)
        self._tell_peers(primary=False)
        self._end(refusal)

    def _tell_peers(self, *, primary: bool) -> None:
        for connection in self._resource.connections.values():
            connection.send(Frame(Kind.ROLE, payload=pack_role(primary)))

    def _flush(self) -> None:
        """What an earlier Primary had acknowledged is stable before we answer a FLUSH with nothing of ours (I-3)."""
        attached = self._resource.attached
        self._wait_for({volume.number for volume in attached}, self._write_indicator)
        for volume in attached:
            token = self._context.ask(self._flushed, volume)
            self._context.out.append(FlushData(volume.number, token))

    def _flushed(self, volume: Volume, event: DiskDone) -> None:
        if event.error:
            volume.disk_error("flush", event.error)  # (it says `disk_lost`)
        else:
            self._volume_done(volume)

    def _write_indicator(self) -> None:
        """Durable step: PrimaryIndicator, with whatever the promotion changes in the lineage."""
        attached = self._resource.attached
        # A link may have come and gone meanwhile: what its Primary wrote has to be over.
        self._wait_for({volume.number for volume in attached}, lambda: self._resource.when_quiet(self._become_primary))
        self._survived_before = {
            volume.number: {peer.node_id for peer in volume.ledger.wanted.peers if peer.survivor} for volume in attached
        }
        for volume in attached:
            trusted = (
                self._force
                and volume.disk is not Disk.UP_TO_DATE
                and not any(replica.has_good_data for replica in volume.replicas.values())
            )
            self._save_promoted(volume, trusted=trusted)

    def _wait_for(self, volumes: set[int], then: Callable[[], None]) -> None:
        self._waiting, self._after = volumes, then
        if not volumes:
            then()

    def _volume_done(self, volume: Volume) -> None:
        if volume.number in self._waiting:
            self._waiting.discard(volume.number)
            if not self._waiting:
                self._after()

    def disk_lost(self, volume: Volume) -> None:
        """Its durable step will not come; what is left decides (a promotion looks again whether it has good data)."""
        self._volume_done(volume)

    def _save_promoted(self, volume: Volume, *, trusted: bool) -> None:
        before = volume.ledger.durable.current

        def durable() -> None:
            if trusted:
                volume.become(DiskMove.TRUSTED)
            current = volume.ledger.durable.current
            if current != before:
                self._context.notice(
                    "new-generation", volume=volume.number, current=f"{current:016x}", reason="promotion"
                )
                volume.tell_generation()
            self._volume_done(volume)

        if trusted and volume.disk is Disk.INCONSISTENT:
            assert volume.attached is not None
            for bitmap in volume.attached.bitmaps.values():
                bitmap.mark_all()  # what the peer has of this mixture is not known
        fresh = self._context.new_id() | PRIMARY_BIT
        volume.ledger.save(lambda found: promoted(found, volume, fresh, trusted=trusted), durable)

    def _become_primary(self) -> None:
        if self._lost_disk_meanwhile():
            self._abort(in_transition())
            return
        if self._ask_peers():
            # A link came up while the superblock was written: that peer has to be asked too.
            self._step = self._promotion_step
            return
        if not self._indicated(self._become_primary, primary=True):
            return
        self.role = move(ROLE_MOVES, self.role, RoleMove.PROMOTED)
        for volume in self._resource.volumes.values():
            volume.start_serving()
            volume.serve_from_peer()
        self._context.notice("role", role=self.role.value)
        self._tell_peers(primary=True)
        self._end(None)
        self._resource.identity_changed(forced=self._force)

    def _indicated(self, then: Callable[[], None], *, primary: bool) -> bool:
        """PrimaryIndicator is right; if a resync ended meanwhile and it is not, it is written, and `then` follows."""
        wrong = []
        for volume in self._resource.volumes.values():
            found = volume.ledger.wanted if volume.attached is not None else None
            if found is not None and found.primary_indicator != (primary and found.consistent):
                wrong.append(volume)
        if wrong:
            self._wait_for({volume.number for volume in wrong}, then)
        for volume in wrong:
            volume.ledger.save(
                lambda found: replace(found, primary_indicator=primary and found.consistent),
                partial(self._volume_done, volume),
            )
        return not wrong

    def _lost_disk_meanwhile(self) -> bool:
        volumes, peers = self.facts()
        return promotion_refusal(volumes, peers, fencing="dont-care", force=self._force) is not None

    # --- demotion

    def demote(self, finish: Callable[[Refusal | None], None], *, force: bool) -> None:
        """Become Secondary; refused while clients hold the device, unless `force` cuts them off."""
        if self.busy:
            finish(in_transition())
            return
        if self.role is Role.SECONDARY:
            finish(None)
            return
        refusal = openers_refusal(self._resource.openers())
        if refusal is not None and not force:
            finish(refusal)
            return
        for volume in self._resource.volumes.values():
            if self._resource.openers(volume.number):
                self._context.out.append(CutClients(volume.number))
        self._begin("demotion", self._demotion_step, finish)

    def _demotion_step(self) -> None:
        resource = self._resource
        if resource.openers() or not all(volume.path.quiet for volume in resource.volumes.values()):
            return
        resource.log.close()
        if not resource.log.idle:
            return
        self._step = None
        self._wait_for(set(resource.volumes), self._become_secondary)
        for volume in resource.volumes.values():
            volume.empty_log(self._log_emptied(volume))

    def _log_emptied(self, volume: Volume) -> Callable[[], None]:
        def emptied() -> None:
            if volume.attached is None:
                self._volume_done(volume)
            else:
                volume.ledger.save(
                    lambda found: replace(found, primary_indicator=False), lambda: self._volume_done(volume)
                )

        return emptied

    def _become_secondary(self) -> None:
        if not self._indicated(self._become_secondary, primary=False):
            return
        self.role = move(ROLE_MOVES, self.role, RoleMove.DEMOTED)
        for volume in self._resource.volumes.values():
            volume.serving, volume.exposed = False, UNSET
        self._context.notice("role", role=self.role.value)
        self._tell_peers(primary=False)
        self._end(None)

    # --- the peer's side

    def asked(self, connection: Connection, frame: Frame) -> None:
        """ROLE_REQUEST: may the peer become Primary?  A grant is recorded before it is answered."""
        if self.role is Role.PRIMARY or self.busy == "demotion":
            answer = RoleAnswer.I_AM_PRIMARY
        elif self.busy == "promotion" and (self._step is None or self._context.options.node_id < connection.peer):
            answer = RoleAnswer.I_AM_ASKING
        elif not connection.settled or self._resource.reliance.letting_go:
            answer = RoleAnswer.ROUND_GOING_ON
        else:
            answer = RoleAnswer.GRANTED
            self.granted_to = connection
        connection.send(Frame(Kind.ROLE_REPLY, sequence=frame.sequence, payload=pack_role_reply(answer)))

    def answered(self, connection: Connection, frame: Frame) -> str | None:
        """ROLE_REPLY."""
        answer = unpack_role_reply(frame.payload)
        if self._asking.get(connection.peer) != frame.sequence:
            return None  # the promotion that asked is over
        del self._asking[connection.peer]
        if answer is RoleAnswer.GRANTED:
            assert connection.link is not None
            self._grants[connection.peer] = connection.link
        elif answer is RoleAnswer.I_AM_PRIMARY:
            self._abort(
                Refusal(
                    "peer-is-primary",
                    -1,
                    "Multiple primaries not allowed by config",
                    f"{connection.name} is Primary",
                )
            )
        else:
            self._abort(in_transition())
        return None

    def peer_role(self, connection: Connection) -> None:
        """ROLE: the peer's promotion ended, one way or the other."""
        if self.granted_to is connection:
            self.granted_to = None
        if connection.role is Role.PRIMARY and self.role is Role.PRIMARY and connection.settled:
            connection.refuse("both nodes are Primary and two Primaries are not allowed")

    def peer_lost(self, connection: Connection) -> None:
        """The link is gone: a grant ends, an answer will not come."""
        if self.granted_to is connection:
            self.granted_to = None
        self._asking.pop(connection.peer, None)
        self._grants.pop(connection.peer, None)


def _not_promoted(found: Superblock, *, before: set[int]) -> Superblock:
    """The superblock of a node that led nobody: what `promoted` marked is taken back, but for a fork."""
    for peer in found.peers:
        if peer.survivor and peer.node_id not in before:
            found = with_slot(found, peer.node_id, survivor=False)
    return replace(found, primary_indicator=False)


def promoted(found: Superblock, volume: Volume, fresh: int, *, trusted: bool) -> Superblock:
    """The superblock of a new Primary.

    A copy declared good by force begins a generation of its own.  If it was Inconsistent, the id it was being made into
    is dropped from its lineage: the copy that really has that generation must meet it as a stranger or as split brain,
    never as an ancestor.  A crashed Primary that goes on while bits towards an absent peer are dirty forks at once.

    Whoever leads without its peer is a survivor of it (decision 0007): what its clients read is not taken back by a
    peer that has something older after a crash of both (I-31).  A fork would say so too, but it would make a split
    brain of a promotion that a Primary who comes back forbids at the last moment.
    """
    if trusted and not found.consistent:
        unknown = found.current
        history = tuple(old for old in found.history if not same(old, unknown))
        for peer in volume.replicas:
            found = with_slot(found, peer, bitmap_id=UNSET, survivor=False)
        found = replace(found, current=fresh, history=history, size_bytes=volume.size)
    else:
        lone = [
            peer
            for peer, replica in volume.replicas.items()
            if not replica.replicating and found.peers[slot_index(found, peer)].bitmap_id == UNSET
        ]
        changed = [peer for peer in lone if trusted or volume.dirty_count(peer)]
        for peer in lone:
            found = with_slot(found, peer, survivor=True)
        if changed and not same(found.current, JUST_CREATED):
            for peer in changed:
                found = with_slot(found, peer, bitmap_id=found.current)
            found = replace(found, current=fresh)
    if trusted:
        found = replace(found, consistent=True, was_up_to_date=True)
    return replace(found, primary_indicator=found.consistent)
