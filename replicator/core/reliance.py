# SPDX-License-Identifier: Apache-2.0
"""May this node make its own copy bad on purpose and rely on the peer's alone?  (decision 0001, V12)

`invalidate` and `detach` take away one good copy because the other is there.  Each node can only see that it *was*
there: said on both nodes in one moment, each would be right and together they leave nothing.  So the one who wants to
rely on the peer asks first, and the peer grants only while its own copy is good and it is not letting go of it itself.
When both ask, the lower node id wins.

A grant is not remembered.  Whoever has one acts on it in the turn in which it arrives, so every later question finds a
copy that is not good any more, or is being drained, and is refused.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

from replicator.core.context import Context
from replicator.core.handshake_wire import RelyAnswer, pack_rely_reply, unpack_rely_reply
from replicator.core.promotion import Refusal, in_transition
from replicator.core.states import Disk, Role
from replicator.core.volume import Volume
from replicator.core.wire import Frame, Kind

if TYPE_CHECKING:
    from replicator.core.connection import Connection
    from replicator.core.resource import Resource

Then = Callable[[Refusal | None], None]


class Reliance:
    """The questions of this node that are not answered yet: at most one per volume."""

    def __init__(self, resource: Resource, context: Context) -> None:
        self._resource = resource
        self._context = context
        self._asked: dict[int, tuple[Connection, int, Then]] = {}  # volume -> whom, sequence, what then

    @property
    def idle(self) -> bool:
        """No answer is awaited."""
        return not self._asked

    @property
    def letting_go(self) -> bool:
        """A copy of ours is, or may soon be, none that a peer can live on."""
        return not self.idle or any(volume.path.draining for volume in self._resource.volumes.values())

    def drain(self, volumes: list[Volume], refusal_now: Callable[[], Refusal | None], then: Then) -> None:
        """Begin to drain these volumes for a detach: one after the other, as their peers agree.

        `refusal_now` is asked again after each answer.  After a refusal some of them may be draining.
        """
        left = list(volumes)

        def go_on(refusal: Refusal | None) -> None:
            refusal = refusal or refusal_now()
            while left and refusal is None:
                volume = left.pop()
                peer = self._relies_on(volume)
                if peer is not None:
                    self.ask(volume, peer, partial(answered, volume))
                    return
                volume.path.draining = True
            then(refusal)

        def answered(volume: Volume, refusal: Refusal | None) -> None:
            volume.path.draining = refusal is None
            go_on(refusal)

        go_on(None)

    def _relies_on(self, volume: Volume) -> int | None:
        """The peer whose copy a Primary, here or there, is left with when ours goes."""
        for peer, replica in volume.replicas.items():
            primary = self._resource.primary or self._resource.connections[peer].role is Role.PRIMARY
            if primary and replica.has_good_data:
                return peer
        return None

    def ask(self, volume: Volume, peer: int, then: Then) -> None:
        """Ask a connected peer; `then(None)` when it grants, `then(refusal)` when not or when it is lost."""
        assert volume.number not in self._asked  # `Commands` has looked
        connection = self._resource.connections[peer]
        connection.probe()  # it may be lost without anybody having noticed
        sequence = connection.next_sequence()
        self._asked[volume.number] = (connection, sequence, then)
        connection.send(Frame(Kind.RELY_REQUEST, volume.number, sequence=sequence))

    def on_request(self, connection: Connection, volume: Volume, frame: Frame) -> None:
        """RELY_REQUEST: the peer wants to let go of its copy."""
        asking_too = volume.number in self._asked and self._context.options.node_id < connection.peer
        if volume.disk is not Disk.UP_TO_DATE or volume.path.draining or asking_too:
            answer = RelyAnswer.NOT_GOOD
        elif not connection.settled or not self._resource.identity.idle:
            answer = RelyAnswer.NOT_NOW
        else:
            answer = RelyAnswer.GRANTED
        payload = pack_rely_reply(answer)
        connection.send(Frame(Kind.RELY_REPLY, volume.number, sequence=frame.sequence, payload=payload))

    def on_reply(self, connection: Connection, volume: Volume, frame: Frame) -> str | None:
        """RELY_REPLY.  Returns what is wrong with it, or None."""
        answer = unpack_rely_reply(frame.payload)
        asked = self._asked.get(volume.number)
        if asked is None or asked[:2] != (connection, frame.sequence):
            return f"RELY_REPLY {frame.sequence} without a question"
        del self._asked[volume.number]
        if answer is RelyAnswer.GRANTED:
            asked[2](None)
        elif answer is RelyAnswer.NOT_GOOD:
            asked[2](
                Refusal(
                    "peer-lets-go",
                    -2,
                    "Need access to UpToDate data",
                    f"volume {volume.number}: the copy of {connection.name} is not good, or is being detached or "
                    "invalidated at this moment; nothing was changed here: see replicator status",
                )
            )
        else:
            asked[2](in_transition())
        return None

    def peer_lost(self, connection: Connection) -> None:
        """The link is gone: no answer will come, and there is nothing to rely on."""
        for number, (whom, _, then) in tuple(self._asked.items()):
            if whom is connection:
                del self._asked[number]
                then(
                    Refusal(
                        "no-good-peer",
                        -2,
                        "Need access to UpToDate data",
                        f"the connection to {connection.name} was lost before it agreed",
                    )
                )
