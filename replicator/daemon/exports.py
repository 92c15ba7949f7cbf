# SPDX-License-Identifier: Apache-2.0
"""What a Primary offers: the NBD socket of each volume, and its /dev node.

An export is served while the node is Primary and withheld otherwise, with a sentence that names the node and
its role.  The /dev node follows the role: made after a promotion, removed before a demotion, because the node
itself is a client that the core would count as an opener.

Invariants: a node is detached only when nobody holds it, or by force; whatever a refused demotion took away
comes back (`follow` compares what is with what should be after every command).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from itertools import count
from pathlib import Path

from replicator.core.actions import CutClients, Reply
from replicator.core.promotion import Refusal
from replicator.daemon.logs import Log
from replicator.drivers import device as devices
from replicator.drivers.device import Choice, DeviceManager, Outcome
from replicator.drivers.frontend import ClientStatus, Frontend
from replicator.drivers.kernel_nbd import Tuning
from replicator.drivers.loop import Loop, Timer
from replicator.nbd.negotiation import Export

#: How long the clients behind a node that was removed may take to hang up.
HANG_UP_NS = 2_000_000_000

KIB = 1024


@dataclass(slots=True)
class _Job:
    """Nodes that are being attached or detached; `then(errors)` runs when the last one is done."""

    waiting: set[int]
    then: Callable[[list[str]], None]
    errors: list[str] = field(default_factory=list)


class Exports:
    """All volumes of one resource.  Everything is called in the loop's thread."""

    def __init__(
        self,
        loop: Loop,
        log: Log,
        resource: str,
        node: str,
        volumes: tuple[int, ...],
        run_dir: Path,
        choice: Choice,
    ) -> None:
        self._loop = loop
        self._log = log
        self._resource = resource
        self._node = node
        self._choice = choice
        self._volumes = volumes
        # A token's remainder says whose it is, so a reply finds its frontend without a table.
        self.frontends = [
            Frontend(
                loop,
                volume,
                str(run_dir / f"{resource}.{volume}.nbd"),
                f"{resource}/{volume}",
                count(index + len(volumes), len(volumes)),
            )
            for index, volume in enumerate(volumes)
        ]
        self._published: dict[int, tuple[bool, int]] = {}
        self._job: _Job | None = None
        self._later: list[Callable[[], None]] = []
        self._leaving = False  # a demotion is under way: nodes are not to come back
        self._troubles: dict[int, str] = {}
        self._hang_up: tuple[Timer, Callable[[], None]] | None = None
        self._manager = self._make_manager(run_dir)

    def _make_manager(self, run_dir: Path) -> DeviceManager | None:
        made = {}
        for frontend in self.frontends:
            export = devices.Export(
                self._resource, frontend.volume, Path(frontend.path), frontend.name, run_dir=run_dir
            )
            device = devices.make_device(self._choice, export, Tuning())
            if device is not None:
                made[frontend.volume] = device
        return DeviceManager(made, self._loop.call_from_thread, self._on_trouble) if made else None

    def listen(self) -> None:
        """Open all sockets, withheld for now.  Raises DiskError."""
        for frontend in self.frontends:
            frontend.listen()
        self.publish(primary=False, sizes={})

    def publish(self, *, primary: bool, sizes: Mapping[int, int]) -> bool:
        """Serve or withhold the exports; sizes in bytes.  True when something changed."""
        changed = False
        for frontend in self.frontends:
            size = sizes.get(frontend.volume, 0)
            if self._published.get(frontend.volume) == (primary, size):
                continue
            changed = True
            grown = self._published.get(frontend.volume, (False, 0))[1] != size
            self._published[frontend.volume] = (primary, size)
            refused = None
            if not primary:
                refused = f"{frontend.name} is Secondary on {self._node}, only a Primary serves it"
            elif not size:
                refused = f"{frontend.name} has no size yet on {self._node}: neither disk nor peer is there"
            frontend.export(Export(name=frontend.name, size_bytes=size, refused=refused))
            if grown and size and self._manager is not None and self._manager.node(frontend.volume) is not None:
                self._manager.resize(frontend.volume, size, self._resized)
        return changed

    def reply(self, action: Reply) -> None:
        """Hand a reply to the client that asked."""
        known = self.frontends[action.token % len(self.frontends)].reply(action)
        assert known, f"a reply for the client token {action.token}, which is unknown"

    def cut(self, action: CutClients) -> None:
        """End every client of a volume."""
        for frontend in self.frontends:
            if frontend.volume == action.volume:
                frontend.cut_all(f"{frontend.name} was demoted by force")

    def clients(self, volume: int) -> list[ClientStatus]:
        """Who is connected to a volume's socket."""
        return next(frontend.clients() for frontend in self.frontends if frontend.volume == volume)

    def describe(self, volume: int) -> dict[str, object]:
        """What status says about a volume's node."""
        node = None if self._manager is None else self._manager.node(volume)
        shown: dict[str, object] = {"device-kind": self._choice.kind, "device": str(node) if node else None}
        if self._choice.reason:
            shown["device-reason"] = self._choice.reason
        if self._troubles.get(volume):
            shown["device-trouble"] = self._troubles[volume]
        return shown

    # -- nodes --------------------------------

    def follow(self, *, primary: bool, then: Callable[[list[str]], None]) -> None:
        """Make the nodes that a Primary should have, remove those that a Secondary should not;
        `then(errors)`.
        """
        if self._job is not None or self._leaving:
            # One thing after another: look again when that is done.
            self._later.append(partial(self.follow, primary=primary, then=then))
            return
        manager = self._manager
        if manager is None:
            then([])
        elif primary:
            served = [volume for volume in self._volumes if self._published.get(volume, (False, 0)) > (True, 0)]
            missing = {volume for volume in served if manager.node(volume) is None}
            self._begin("attach", missing, then)
        else:
            self._begin("detach", {volume for volume in self._volumes if manager.node(volume) is not None}, then)

    def leave(self, *, force: bool, then: Callable[[Refusal | None], None]) -> None:
        """Remove the nodes before a demotion; `then(None)` when no node is in the way any more, else why not.

        A node that is held, or a socket with clients of its own, keeps every node where it is.  The caller
        says `left` when the demotion ended.
        """
        if self._job is not None or self._leaving:
            self._later.append(partial(self.leave, force=force, then=then))
            return
        self._leaving = True
        manager = self._manager
        attached = set() if manager is None else {v for v in self._volumes if manager.node(v) is not None}
        if manager is None or not attached or (not force and self._strangers()):
            then(None)  # no node is in the way; the core knows the clients, and refuses with their names
            return
        holders = [] if force else [str(holder) for volume in attached for holder in manager.holders(volume)]
        if holders:
            message = f"Device is held open by someone: {', '.join(holders)}"
            hint = "stop what uses it (umount, stop the guest), or cut it off with secondary --force"
            then(Refusal("held-open", -12, message, hint))
            return
        self._begin("detach", attached, partial(self._nodes_gone, then, force))

    def left(self) -> None:
        """The demotion ended, well or not: go on with what waited."""
        self._leaving = False
        self._next()

    def client_closed(self) -> None:
        """A client hung up (the core has been told)."""
        if self._hang_up is not None and not self._any_clients():
            timer, go_on = self._hang_up
            self._hang_up = None
            self._loop.cancel(timer)
            go_on()

    def close(self) -> None:
        """The process ends: close sockets; nodes that are still there are left for the next run to adopt."""
        for frontend in self.frontends:
            frontend.close()
        if self._manager is not None and not self._manager.close(timeout_s=5.0):
            self._log.warning("device-hangs", hint="a device node does not answer; it is left as it is")

    def _nodes_gone(self, then: Callable[[Refusal | None], None], force: bool, errors: list[str]) -> None:
        if errors and not force:
            then(Refusal("held-open", -12, "Device is held open by someone", "; ".join(errors)))
        elif self._any_clients() and not force:
            # The kernel hangs up a moment after the node is gone; clients of another kind stay, and the core
            # refuses with their names.
            go_on = partial(then, None)
            timer = self._loop.call_at(self._loop.now_ns() + HANG_UP_NS, self._waited_enough)
            self._hang_up = (timer, go_on)
        else:
            then(None)

    def _waited_enough(self) -> None:
        assert self._hang_up is not None
        _, go_on = self._hang_up
        self._hang_up = None
        go_on()

    def _any_clients(self) -> bool:
        return any(frontend.clients() for frontend in self.frontends)

    def _strangers(self) -> bool:
        """Somebody uses a socket directly: the clients behind our nodes are this process and nbdfuse."""
        return any(
            client["pid"] != os.getpid() and os.path.basename(client["process"]) != "nbdfuse"
            for frontend in self.frontends
            for client in frontend.clients()
        )

    def _begin(self, what: str, volumes: set[int], then: Callable[[list[str]], None]) -> None:
        if not volumes:
            then([])
            return
        assert self._manager is not None and self._job is None
        self._job = _Job(set(volumes), then)
        start = self._manager.attach if what == "attach" else self._manager.detach
        for volume in sorted(volumes):
            start(volume, self._on_outcome)

    def _on_outcome(self, outcome: Outcome) -> None:
        job = self._job
        assert job is not None
        job.waiting.discard(outcome.volume)
        self._troubles[outcome.volume] = outcome.error
        if outcome.error:
            job.errors.append(f"volume {outcome.volume}: {outcome.error}")
            self._log.warning("device-failed", volume=outcome.volume, error=outcome.error)
        else:
            self._log.info("device", volume=outcome.volume, node=str(outcome.node or "none"))
        if not job.waiting:
            self._job = None
            job.then(job.errors)
            self._next()

    def _next(self) -> None:
        while self._later and self._job is None and not self._leaving:
            self._later.pop(0)()

    def _resized(self, outcome: Outcome) -> None:
        if outcome.error:
            self._log.warning("device-failed", volume=outcome.volume, error=outcome.error)

    def _on_trouble(self, volume: int, sentence: str) -> None:
        self._troubles[volume] = sentence
        self._log.warning("device-trouble", volume=volume, text=sentence or "all is well again")
