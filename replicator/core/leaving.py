# SPDX-License-Identifier: Apache-2.0
"""Parting on purpose under a fencing policy: the Secondary is Outdated, and the Primary knows it (decision 0001, V13).

Whichever side says GOODBYE, the Secondary makes its copies durably Outdated and then says so, in a second GOODBYE on
the same link; the Primary keeps the link open for that, one ping timeout at most.  Only that answer counts: a GOODBYE
that was sent on a dead link outdates nobody.  Nothing else is done on such a link, and nothing waits for it but the
answer to the operator's `disconnect`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING

from replicator.core.actions import CloseLink, Send
from replicator.core.connection import GOODBYE_OUTDATED
from replicator.core.context import Context
from replicator.core.handshake_wire import pack_goodbye, unpack_goodbye
from replicator.core.ledger import with_slot
from replicator.core.states import Disk, DiskMove, Role
from replicator.core.wire import Frame, Kind
from replicator.errors import ProtocolError

if TYPE_CHECKING:
    from replicator.core.connection import Connection
    from replicator.core.resource import Resource


@dataclass(slots=True)
class Parting:
    """A link on which a Primary waits for the confirmation."""

    connection: Connection
    reason: str
    deadline: int


class Leaving:
    """Links that carry nothing any more but the confirmation of their end."""

    def __init__(self, resource: Resource, context: Context) -> None:
        self._resource = resource
        self._context = context
        self._awaited: dict[int, Parting] = {}  # by link

    def part(self, connection: Connection, link: int, peer_role: Role | None, reason: str) -> None:
        """A graceful GOODBYE was sent or received on `link`, and everything that depended on it was told."""
        options = self._context.options
        if options.fencing != "dont-care" and self._resource.primary:
            deadline = self._context.now + options.ping_timeout_ns
            self._awaited[link] = Parting(connection, reason, deadline)
        elif options.fencing != "dont-care" and peer_role is Role.PRIMARY:
            self._outdate(link, reason)
        else:
            self._context.out.append(CloseLink(link, reason))

    def awaits(self, connection: Connection) -> bool:
        """The peer may still confirm."""
        return any(parting.connection is connection for parting in self._awaited.values())

    @property
    def deadline(self) -> int | None:
        """When waiting ends without a confirmation."""
        return min((parting.deadline for parting in self._awaited.values()), default=None)

    def settle(self) -> None:
        """Once per turn: who has not confirmed in time is not known to be Outdated."""
        for link, parting in tuple(self._awaited.items()):
            if self._context.now >= parting.deadline:
                self._context.notice("outdate-unconfirmed", peer=parting.connection.name)
                self._end(link)

    def forget(self, connection: Connection) -> None:
        """A new link of this peer: what it would confirm now is old news."""
        for link, parting in tuple(self._awaited.items()):
            if parting.connection is connection:
                self._end(link)

    def link_down(self, link: int) -> None:
        """The link ended by itself."""
        parting = self._awaited.pop(link, None)
        if parting is not None:
            self._context.notice("outdate-unconfirmed", peer=parting.connection.name)

    def on_frames(self, link: int, frames: Sequence[Frame]) -> bool:
        """Frames of a link; False if it is not one of ours.  All but the confirmation crossed our GOODBYE."""
        parting = self._awaited.get(link)
        if parting is None:
            return False
        for frame in frames:
            if frame.kind is Kind.GOODBYE and confirms(frame):
                self.known_outdated(parting.connection.peer)
                self._end(link)
                break
        return True

    def _end(self, link: int) -> None:
        parting = self._awaited.pop(link)
        self._context.out.append(CloseLink(link, parting.reason))

    def known_outdated(self, peer: int) -> None:
        """The peer cannot be promoted without us: record it."""
        for volume in self._resource.attached:
            volume.ledger.save(lambda found: with_slot(found, peer, outdated=True), lambda: None)

    def _outdate(self, link: int, reason: str) -> None:
        """Our copies are old from now on; say so when that is durable.  (One that is attached later is in doubt.)"""
        attached = self._resource.attached
        missing = {volume.number for volume in attached}

        def durable(number: int | None) -> None:
            if number is not None:
                missing.discard(number)
            if not missing and self._resource.closing(link):
                payload = pack_goodbye(GOODBYE_OUTDATED, "this copy is Outdated")
                self._context.out.append(Send(link, Frame(Kind.GOODBYE, payload=payload)))
                self._context.out.append(CloseLink(link, reason))

        for volume in attached:
            if volume.disk in (Disk.UP_TO_DATE, Disk.CONSISTENT):
                volume.become(DiskMove.PEER_IS_NEWER)
            volume.ledger.save(lambda found: replace(found, was_up_to_date=False), partial(durable, volume.number))
        if not attached:
            durable(None)


def confirms(goodbye: Frame) -> bool:
    """The sender's copies are Outdated.  (A malformed one confirms nothing.)"""
    try:
        return unpack_goodbye(goodbye.payload)[0] == GOODBYE_OUTDATED
    except ProtocolError:
        return False
