# SPDX-License-Identifier: Apache-2.0
"""`new-current-uuid`: begin a new generation on both copies, and with `--clear-bitmap` skip the first sync.

The one place where bits are cleared without a copy (V2): an operator asserts that two connected, freshly created copies
are identical.  The order makes an interruption harmless: we record the new id with a fork point towards the peer (so
that we are its source if anything breaks), then the peer takes the id, then the fork point and the bits go.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

from replicator.core.context import Context
from replicator.core.generations import JUST_CREATED, PRIMARY_BIT, UNSET, remember, same
from replicator.core.handshake_wire import pack_generation, unpack_generation
from replicator.core.ledger import with_slot
from replicator.core.promotion import Refusal, in_transition
from replicator.core.states import Disk, DiskMove, Role
from replicator.core.superblock import Superblock
from replicator.core.volume import Volume
from replicator.core.wire import Frame, Kind

if TYPE_CHECKING:
    from replicator.core.connection import Connection
    from replicator.core.resource import Resource

Finish = Callable[[Refusal | None], None]


class Identity:
    """At most one new generation per resource is being made at a time."""

    def __init__(self, resource: Resource, context: Context) -> None:
        self._resource = resource
        self._context = context
        self._volume: Volume | None = None
        self._link: Connection | None = None
        self._sequence = 0
        self._clear = False
        self._finish: Finish = lambda _: None

    def begin(self, volume: Volume, *, clear: bool, finish: Finish) -> None:
        """Begin a new generation on this volume; `finish` says how it ended."""
        assert self.idle and volume.attached is not None  # `Commands` has looked
        refusal = self._refusal(volume, clear=clear)
        if refusal is not None:
            finish(refusal)
            return
        connection = next((c for c in self._resource.connections.values() if c.connected), None)
        if connection is None:
            self._volume, self._finish = volume, finish
            volume.rotate_here(sum(1 << peer for peer in volume.replicas))
            volume.ledger.settled(self._ended)
            return
        self._volume, self._link, self._clear, self._finish = volume, connection, clear, finish
        fresh = self._context.new_id() & ~PRIMARY_BIT
        peer = connection.peer

        def change(found: Superblock) -> Superblock:
            fork = found.current
            found = with_slot(found, peer, bitmap_id=fork)
            return replace(
                found,
                current=fresh,
                size_bytes=volume.size,
                consistent=found.consistent or clear,
                was_up_to_date=found.was_up_to_date or clear,
                resource_id=connection.resource_id,
            )

        def durable() -> None:
            if self._link is not connection:
                return
            if clear:
                volume.become(DiskMove.TRUSTED)
            self._sequence = connection.next_sequence()
            payload = pack_generation(fresh, clear_bitmap=clear)
            connection.send(Frame(Kind.NEW_GENERATION, volume.number, sequence=self._sequence, payload=payload))

        volume.ledger.save(change, durable)

    def _refusal(self, volume: Volume, *, clear: bool) -> Refusal | None:
        connected = [c for c in self._resource.connections.values() if c.connected]
        primary = [c.name for c in connected if c.role is Role.PRIMARY]
        if primary:
            return Refusal(
                "peer-is-primary", 0, f"{primary[0]} is Primary: the generation is its own", f"say it on {primary[0]}"
            )
        fresh = same(volume.ledger.durable.current, JUST_CREATED)
        if clear:
            if not connected:
                return Refusal(
                    "not-connected",
                    0,
                    "Need a connection to start this",
                    "connect both nodes, then say it once, on one node",
                )
            replica = volume.replicas[connected[0].peer]
            if not fresh or replica.decision is None or replica.decision.rule != "just-created-both":
                return Refusal(
                    "not-just-created",
                    0,
                    "only possible on freshly created metadata on both nodes",
                    "these copies have a history; to copy one over the other use invalidate or invalidate-remote",
                )
            return None
        if fresh:
            return Refusal(
                "just-created",
                0,
                "this copy holds no data yet",
                "use --clear-bitmap, or primary --force for a first sync",
            )
        if volume.disk is not Disk.UP_TO_DATE:
            return Refusal(
                "no-up-to-date-data",
                -2,
                "Need access to UpToDate data",
                f"volume {volume.number} is {volume.disk.word} here: say it where the good copy is",
            )
        if connected and not volume.replicas[connected[0].peer].has_good_data:
            return in_transition()
        return None

    def on_frame(self, connection: Connection, volume: Volume, frame: Frame) -> str | None:
        """NEW_GENERATION or its acknowledgement.  Returns what is wrong with it, or None."""
        if frame.kind is Kind.NEW_GENERATION_ACK:
            return self._acknowledged(connection, volume, frame)
        fresh, clear = unpack_generation(frame.payload)
        if volume.attached is None or same(fresh, UNSET) or same(fresh, JUST_CREATED):
            return "NEW_GENERATION that cannot be"
        found_now = volume.ledger.durable
        replica = volume.replicas[connection.peer]
        both_fresh = replica.decision is not None and replica.decision.rule == "just-created-both"
        if clear != both_fresh or (clear and not same(found_now.current, JUST_CREATED)):
            return "NEW_GENERATION that clears the bitmap of data with a history"
        if not clear and not replica.has_good_data:
            return "NEW_GENERATION for copies that are not equal"

        def change(found: Superblock) -> Superblock:
            return replace(
                found,
                current=fresh,
                history=remember(found.history, found.current),
                size_bytes=volume.size,
                consistent=found.consistent or clear,
                was_up_to_date=found.was_up_to_date or clear,
                resource_id=connection.resource_id,
            )

        def durable() -> None:
            if clear:
                volume.become(DiskMove.TRUSTED)
                assert volume.attached is not None
                volume.attached.bitmaps[connection.peer].clear_all_asserted_identical()
            connection.send(Frame(Kind.NEW_GENERATION_ACK, volume.number, sequence=frame.sequence))

        volume.ledger.save(change, durable)
        return None

    def _acknowledged(self, connection: Connection, volume: Volume, frame: Frame) -> str | None:
        if self._link is not connection or self._volume is not volume or frame.sequence != self._sequence:
            return "NEW_GENERATION_ACK without a new generation"
        clear = self._clear
        self._link = None  # the peer has it: losing the link now changes nothing

        def change(found: Superblock) -> Superblock:
            slot = found.peers[found.slot_of(connection.peer) or 0]
            history = remember(found.history, slot.bitmap_id)
            return replace(with_slot(found, connection.peer, bitmap_id=UNSET), history=history)

        def durable() -> None:
            if clear and volume.attached is not None:
                volume.attached.bitmaps[connection.peer].clear_all_asserted_identical()
            volume.replicas[connection.peer].begin_round()
            self._ended()

        volume.ledger.save(change, durable)
        return None

    def _ended(self) -> None:
        finish = self._finish
        self._forget()
        finish(None)

    def peer_lost(self, connection: Connection) -> None:
        """The link is gone in the middle: the fork point makes us the source when it comes back."""
        if self._link is connection:
            finish = self._finish
            self._forget()
            finish(
                Refusal(
                    "connection-lost",
                    0,
                    f"the connection to {connection.name} was lost",
                    "when it is back this node is the source of a full sync",
                )
            )

    def disk_lost(self, volume: Volume) -> None:
        """The local disk is gone in the middle."""
        if self._volume is volume:
            finish = self._finish
            self._forget()
            finish(Refusal("no-disk", 0, f"the disk of volume {volume.number} was lost", "mend it, then attach"))

    def _forget(self) -> None:
        self._volume = self._link = None
        self._finish = lambda _: None

    @property
    def idle(self) -> bool:
        """No new generation is being made."""
        return self._volume is None
