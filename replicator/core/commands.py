# SPDX-License-Identifier: Apache-2.0
"""What an operator asks for: one small function per verb, checked and then handed to the chapter that does it.

A verb that takes time (draining, promotion) is answered when it is done.  Sequences that only wait are polled once per
turn, like those of `roles`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, Final

from replicator.core.actions import CommandDone
from replicator.core.connection import BY_OPERATOR, GOODBYE_DOWN
from replicator.core.context import Context
from replicator.core.events import Command
from replicator.core.ledger import with_slot
from replicator.core.promotion import Refusal, in_transition, openers_refusal
from replicator.core.states import ConnectionMove, Disk, DiskMove
from replicator.core.superblock import Superblock
from replicator.core.volume import Volume

if TYPE_CHECKING:
    from replicator.core.connection import Connection
    from replicator.core.resource import Resource

_NO_DISK: Final = Refusal("no-disk", 0, "the volume has no disk here", "attach it first")


class Commands:
    """The operator's verbs for one resource."""

    def __init__(self, resource: Resource, context: Context) -> None:
        self._resource = resource
        self._context = context
        self._waiting: list[Callable[[], bool]] = []
        self._saving: list[tuple[Command, Volume]] = []
        self._going_down = 0  # `down` commands under way
        self._verbs: dict[str, Callable[[Command], None]] = {
            "attach": self._attach,
            "detach": self._detach,
            "connect": self._connect,
            "disconnect": self._disconnect,
            "primary": self._primary,
            "secondary": self._secondary,
            "invalidate": self._invalidate,
            "invalidate-remote": self._invalidate_remote,
            "new-current-uuid": self._new_current_uuid,
            "pause-sync": lambda command: self._pause(command, paused=True),
            "resume-sync": lambda command: self._pause(command, paused=False),
            "down": self._down,
        }

    def settle(self) -> None:
        """Once per turn: go on with what waits."""
        if self._waiting:
            waiting, self._waiting = self._waiting, []
            self._waiting = [goes_on for goes_on in waiting if not goes_on()] + self._waiting

    def run(self, command: Command) -> None:
        """Carry a verb out, or refuse it."""
        verb = self._verbs.get(command.verb)
        number, peer = command.args.get("volume"), command.args.get("peer")
        if number is not None and (type(number) is not int or number not in self._resource.volumes):
            self._done(command, Refusal("no-such-volume", 0, f"there is no volume {number}", "see replicator status"))
        elif peer is not None and peer not in self._resource.options.peers.values():
            self._done(command, Refusal("no-such-peer", 0, f"there is no peer {peer}", "see replicator status"))
        elif verb is None:
            self._done(
                command,
                Refusal("unknown-verb", 0, f"there is no verb {command.verb}", "see replicator --help"),
            )
        elif self._going_down and command.verb != "down":
            self._done(command, in_transition())  # what it began would meet closed disks
        else:
            verb(command)

    def _done(self, command: Command, refusal: Refusal | None = None) -> None:
        if refusal is None:
            self._context.out.append(CommandDone(command.token, True))
        else:
            self._context.out.append(
                CommandDone(command.token, False, refusal.code, refusal.number, refusal.message, refusal.hint)
            )

    def _finish(self, command: Command) -> Callable[[Refusal | None], None]:
        return lambda refusal: self._done(command, refusal)

    def _volumes(self, args: Mapping[str, Any]) -> list[Volume]:
        number = args.get("volume")
        if number is None:
            return list(self._resource.volumes.values())
        return [self._resource.volumes[number]] if number in self._resource.volumes else []

    def _connections(self, args: Mapping[str, Any]) -> list[Connection]:
        peer = args.get("peer")
        return [c for c in self._resource.connections.values() if peer is None or c.name == peer]

    # --- disks

    def _attach(self, command: Command) -> None:
        volumes = self._volumes(command.args)
        if any(volume.disk in (Disk.FAILED, Disk.DETACHING) for volume in volumes):
            self._done(command, in_transition())
            return
        for volume in volumes:
            if volume.disk is Disk.DISKLESS:
                volume.attach()
        self._waiting.append(lambda: self._attached(command, volumes))

    def _attached(self, command: Command, volumes: list[Volume]) -> bool:
        if any(volume.disk in (Disk.ATTACHING, Disk.FAILED) for volume in volumes):
            return False
        wrong = [volume for volume in volumes if volume.attached is None]
        self._done(
            command,
            Refusal("attach-failed", 0, "; ".join(f"volume {v.number}: {v.error}" for v in wrong), "")
            if wrong
            else None,
        )
        return True

    def _detach(self, command: Command) -> None:
        volumes = [volume for volume in self._volumes(command.args) if volume.attached is not None]
        roles = self._resource.roles
        if roles.busy or roles.granted_to is not None or not self._resource.settled:
            return self._done(command, in_transition())

        def refusal_now() -> Refusal | None:
            return self._detach_refusal([volume for volume in volumes if volume.attached is not None])

        def drains(refusal: Refusal | None) -> None:
            if refusal is None:
                self._waiting.append(lambda: self._drained(command, volumes))
            else:
                self._stay(command, volumes, refusal)

        self._resource.reliance.drain(volumes, refusal_now, drains)

    def _stay(self, command: Command, volumes: list[Volume], refusal: Refusal) -> None:
        for volume in volumes:
            volume.path.draining = False
            volume.path.wake_all()
        self._done(command, refusal)

    def _detach_refusal(self, volumes: list[Volume]) -> Refusal | None:
        """Somebody lives on this copy: our clients, or a connected Primary without a good disk of its own."""
        for volume in volumes:
            good = any(replica.has_good_data for replica in volume.replicas.values())
            peer_lives_here = volume.disk is Disk.UP_TO_DATE and any(
                self._peer_primary(peer) and replica.disk is not Disk.UP_TO_DATE
                for peer, replica in volume.replicas.items()
            )
            if (self._resource.primary and not good) or peer_lives_here:
                return Refusal(
                    "last-good-copy",
                    -2,
                    "Need access to UpToDate data",
                    f"volume {volume.number} would lose its only good copy while it is in use",
                )
        return None

    def _drained(self, command: Command, volumes: list[Volume]) -> bool:
        if any(volume.path.launched for volume in volumes if volume.attached is not None):
            return False
        numbers = {volume.number for volume in volumes}
        self._resource.log.close_for(numbers)
        if not self._resource.log.idle_for(numbers):
            return False
        refusal = self._detach_refusal([volume for volume in volumes if volume.attached is not None])
        if refusal is not None:
            self._stay(command, volumes, refusal)
            return True
        for volume in volumes:
            if volume.attached is not None:
                volume.empty_log(volume.detach)
        self._waiting.append(lambda: self._detached(command, volumes))
        return True

    def _detached(self, command: Command, volumes: list[Volume]) -> bool:
        if any(volume.disk is not Disk.DISKLESS for volume in volumes):
            return False
        for volume in volumes:
            volume.path.draining = False
            volume.path.wake_all()
        self._done(command)
        return True

    # --- connections

    def _connect(self, command: Command) -> None:
        for connection in self._connections(command.args):
            connection.connect()
        self._done(command)

    def _disconnect(self, command: Command) -> None:
        resource = self._resource
        for volume in resource.volumes.values():
            if resource.primary and volume.disk is not Disk.UP_TO_DATE:
                self._done(
                    command,
                    Refusal(
                        "last-good-copy",
                        -2,
                        "Need access to UpToDate data",
                        f"volume {volume.number} is {volume.disk.word} here and lives on the peer's copy",
                    ),
                )
                return
        connections = self._connections(command.args)
        for connection in connections:
            connection.disconnect(ConnectionMove.DISCONNECT, BY_OPERATOR)
        self._parted(command, connections)

    def _parted(self, command: Command, connections: list[Connection]) -> None:
        """Answer when it is known whether the peer is Outdated (V13): the next command may depend on it."""

        def known() -> bool:
            if any(self._resource.leaving.awaits(connection) for connection in connections):
                return False
            self._done(command)
            return True

        if not known():
            self._waiting.append(known)

    # --- roles

    def _primary(self, command: Command) -> None:
        self._resource.roles.promote(self._finish(command), force=bool(command.args.get("force")))

    def _secondary(self, command: Command) -> None:
        self._resource.roles.demote(self._finish(command), force=bool(command.args.get("force")))

    # --- data

    def _one_volume(self, command: Command) -> Volume | None:
        volumes = self._volumes(command.args)
        if len(volumes) != 1:
            self._done(
                command,
                Refusal("which-volume", 0, "this verb needs one volume", "name it: RES/VOL"),
            )
            return None
        if volumes[0].attached is None:
            self._done(command, _NO_DISK)
            return None
        if self._resource.roles.busy or not self._resource.settled or volumes[0].ledger.busy:
            self._done(command, in_transition())
            return None
        return volumes[0]

    def _invalidate(self, command: Command) -> None:
        volume = self._one_volume(command)
        if volume is None:
            return
        sources = [peer for peer, replica in volume.replicas.items() if replica.has_good_data]
        if not sources:
            self._done(
                command,
                Refusal("no-good-peer", -2, "Need access to UpToDate data", "no connected peer has a good copy"),
            )
            return
        peer = sources[0]
        self._resource.reliance.ask(volume, peer, partial(self._invalidate_granted, command, volume, peer))

    def _invalidate_granted(self, command: Command, volume: Volume, peer: int, refusal: Refusal | None) -> None:
        if refusal is None and (self._resource.roles.busy or not volume.replicas[peer].has_good_data):
            refusal = in_transition()
        if volume.attached is None:
            refusal = _NO_DISK
        if refusal is not None:
            self._done(command, refusal)
            return
        volume.stop_serving()
        volume.become(DiskMove.INVALIDATED)

        def change(found: Superblock) -> Superblock:
            return replace(with_slot(found, peer, full_sync=True), consistent=False, was_up_to_date=False)

        self._full_sync(command, volume, peer, change)

    def _invalidate_remote(self, command: Command) -> None:
        volume = self._one_volume(command)
        if volume is None:
            return
        targets = [
            peer for peer, replica in volume.replicas.items() if replica.replicating and not self._peer_primary(peer)
        ]
        if not targets or volume.disk is not Disk.UP_TO_DATE:
            self._done(
                command,
                Refusal(
                    "no-target",
                    0,
                    "no connected Secondary can be filled from here",
                    "the peer must be connected and Secondary, the copy here UpToDate",
                ),
            )
            return
        peer = targets[0]
        self._full_sync(command, volume, peer, lambda found: with_slot(found, peer, full_sync=True))

    def _peer_primary(self, peer: int) -> bool:
        role = self._resource.connections[peer].role
        return role is not None and role.value == "Primary"

    def _full_sync(
        self, command: Command, volume: Volume, peer: int, change: Callable[[Superblock], Superblock]
    ) -> None:
        """FullSync durable, every bit set, then a round decides the direction from that."""

        def durable() -> None:
            self._saving.remove((command, volume))
            assert volume.attached is not None
            volume.attached.bitmaps[peer].mark_all()
            volume.save_pages(recorded)
            volume.replicas[peer].begin_round()
            self._done(command)

        def recorded() -> None:
            volume.ledger.save(lambda found: with_slot(found, peer, full_sync=False), lambda: None)

        self._saving.append((command, volume))
        volume.ledger.save(change, durable)

    def disk_lost(self, volume: Volume) -> None:
        """A command that waited for this disk's metadata is answered."""
        for command, waits_for in tuple(self._saving):
            if waits_for is volume:
                self._saving.remove((command, waits_for))
                self._done(command, _NO_DISK)

    def _new_current_uuid(self, command: Command) -> None:
        volume = self._one_volume(command)
        if volume is not None:
            self._resource.identity.begin(
                volume,
                clear=bool(command.args.get("clear_bitmap")),
                finish=lambda refusal: self._identity_done(command, refusal),
            )

    def _identity_done(self, command: Command, refusal: Refusal | None) -> None:
        def settled() -> bool:
            if refusal is None and not self._resource.settled:
                return False  # the round that follows is part of it
            self._done(command, refusal)
            return True

        self._waiting.append(settled)

    def _pause(self, command: Command, *, paused: bool) -> None:
        for volume in self._volumes(command.args):
            for replica in volume.replicas.values():
                replica.steps.pause(paused)
        self._done(command)

    # --- the end

    def _down(self, command: Command) -> None:
        refusal = openers_refusal(self._resource.openers())
        if refusal is not None and not command.args.get("force"):
            self._done(command, refusal)
            return
        self._resource.roles.demote(
            lambda why: self._down_secondary(command, why), force=bool(command.args.get("force"))
        )

    def _down_secondary(self, command: Command, refusal: Refusal | None) -> None:
        if refusal is not None:
            self._done(command, refusal)
            return
        for connection in self._resource.connections.values():
            connection.disconnect(ConnectionMove.DISCONNECT, "the resource goes down", goodbye=GOODBYE_DOWN)
        self._going_down += 1
        volumes = list(self._resource.volumes.values())
        self._waiting.append(lambda: self._quiet(command, volumes))

    def _quiet(self, command: Command, volumes: list[Volume]) -> bool:
        self._resource.log.close()
        busy = any(volume.path.in_flight or volume.disk is Disk.ATTACHING for volume in volumes)
        if busy or not self._resource.log.idle:
            return False
        for volume in volumes:
            if volume.attached is not None:  # otherwise it is closed, or being closed
                volume.empty_log(self._shut(volume))
        self._waiting.append(lambda: self._closed(command, volumes))
        return True

    def _shut(self, volume: Volume) -> Callable[[], None]:
        return lambda: volume.ledger.settled(volume.shut)

    def _closed(self, command: Command, volumes: list[Volume]) -> bool:
        if any(volume.disk is not Disk.DISKLESS for volume in volumes):
            return False
        self._going_down -= 1
        self._done(command)
        return True
