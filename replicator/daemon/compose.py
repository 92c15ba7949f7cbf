# SPDX-License-Identifier: Apache-2.0
"""The core and its drivers, put together: events in, actions out.

`turn` is all the process does: step the core with what happened, drain it once, give every action to the
driver that carries it out.  Nothing is decided here.

What others see of the core (exports, watchers) is brought up to date at once after anything rare, and every
100 ms while requests and frames flow: making a status costs more than handling a write.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from replicator.config import Node, ResourceConfig
from replicator.control.messages import Reply as Answer
from replicator.control.messages import Request
from replicator.core import actions, events
from replicator.core.actions import Action
from replicator.core.events import Event
from replicator.core.options import Options
from replicator.daemon import logs
from replicator.daemon.commands import Commands, Facts
from replicator.daemon.disks import Disks, places
from replicator.daemon.exports import KIB, Exports
from replicator.daemon.logs import Log
from replicator.daemon.watchers import Watchers
from replicator.drivers.controller import Controller
from replicator.drivers.device import Choice
from replicator.drivers.loop import Loop, Timer
from replicator.drivers.peer import Clear, PeerAddress, PeerLinks, Tls

REFRESH_NS = 100_000_000
#: After `down` the farewell to the peers gets this long to leave.
FAREWELL_NS = 1_500_000_000

#: What happens thousands of times a second: after it a late look at the status is soon enough.
_FREQUENT = (events.ClientRequest, events.DiskDone, events.LinkFrames, events.Tick)


class Core(Protocol):
    """What is used of `core.resource.Resource`."""

    def step(self, event: Event, now: int, /) -> None: ...
    def drain(self) -> list[Action]: ...
    @property
    def deadline(self) -> int | None: ...
    def status(self) -> Mapping[str, object]: ...
    def gi(self) -> Mapping[str, object]: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """Everything the process was told."""

    config: ResourceConfig
    node: Node
    run_dir: Path
    key_dir: Path
    choice: Choice
    complaints: tuple[str, ...] = ()  # what hardening could not have

    @property
    def control_path(self) -> str:
        """The control socket."""
        return str(self.run_dir / f"{self.config.name}.sock")


def core_options(config: ResourceConfig, node: Node) -> Options:
    """The configuration as the core needs it.  Of two nodes the higher id dials, the lower listens."""
    net, disk = config.net, config.disk
    return Options(
        resource=config.name,
        node_id=node.node_id,
        node_name=node.name,
        peers={other.node_id: other.name for other in config.nodes if other.node_id != node.node_id},
        volumes=tuple(config.volumes),
        protocol=config.protocol,
        matching=config.options_to_match(),
        fencing=net.fencing,
        connect_interval_ns=net.connect_interval_ns,
        handshake_timeout_ns=net.handshake_timeout_ns,
        ping_interval_ns=net.ping_interval_ns,
        ping_timeout_ns=net.ping_timeout_ns,
        timeout_ns=net.timeout_ns,
        ko_count=net.ko_count,
        epoch_writes_max=net.max_epoch_size,
        epoch_time_ns=net.epoch_time_ns,
        activity_extents=disk.al_extents,
        send_window_bytes=net.max_in_flight_bytes,
        resync_max_rate=disk.resync_max_rate_bytes_s,
        resync_latency_target_ns=disk.resync_latency_target_ns,
        checksum_sync=disk.checksum_sync,
        listens_for=frozenset(peer for peer in config.peer_ids(node) if peer > node.node_id),
    )


def new_id() -> int:
    """A random 64-bit generation id."""
    return int.from_bytes(os.urandom(8), "big")


class Daemon:
    """One resource's process.  Made, it holds its sockets but does nothing before `loop.run(daemon.turn, …)`.

    Raises ReplicatorError when a key or the control socket cannot be had.
    """

    def __init__(self, loop: Loop, setting: Setting, core: Core, log: Log, stop: Callable[[], None]) -> None:
        config, node = setting.config, setting.node
        self._loop = loop
        self._setting = setting
        self._core = core
        self._log = log
        self._stop = stop
        self._links_up = 0
        self._farewell: Callable[[], object] | None = None
        self._refresh_timer: Timer | None = None
        self._refreshed_ns = 0
        self.disks = Disks(loop, places(config, node), node.node_id)
        self.exports = Exports(
            loop, log, config.name, node.name, tuple(config.volumes), setting.run_dir, setting.choice
        )
        self.links = self._peer_links()
        self.controller = Controller(loop, setting.control_path, self._on_request, self._on_client_gone)
        self.watchers = Watchers(loop, self.status, self.controller.reply)
        self.commands = Commands(loop, self._facts(), self.exports, self.watchers, self.refresh, self._on_down)
        self._dispatch: dict[type, Callable[[Any], object]] = {
            actions.ReadData: self.disks.submit,
            actions.WriteData: self.disks.submit,
            actions.ZeroData: self.disks.submit,
            actions.FlushData: self.disks.submit,
            actions.WriteMeta: self.disks.submit,
            actions.OpenDisk: self.disks.open,
            actions.CloseDisk: self.disks.close,
            actions.Reply: self.exports.reply,
            actions.CutClients: self.exports.cut,
            actions.Send: self.links.send,
            actions.Dial: self.links.dial,
            actions.CloseLink: self.links.close_link,
            actions.CommandDone: self.commands.done,
            actions.Notice: lambda notice: logs.tell(log, notice),
        }

    def _facts(self) -> Facts:
        config, node = self._setting.config, self._setting.node
        return Facts(
            resource=config.name,
            node=node.name,
            volumes=tuple(config.volumes),
            peers=tuple(other.name for other in config.nodes if other is not node),
            status=self.status,
            gi=self._core.gi,
            primary=self.primary,
        )

    def _peer_links(self) -> PeerLinks:
        config, node = self._setting.config, self._setting.node
        clear = config.net.security == "clear"
        return PeerLinks(
            self._loop,
            listen=(node.address.host, node.address.port),
            peers={
                other.node_id: PeerAddress(other.name, other.address.host, other.address.port)
                for other in config.nodes
                if other is not node
            },
            security=Clear(config.net.clear_off_loopback) if clear else Tls(self._setting.key_dir),
            node_id=node.node_id,
            on_refused=lambda sentence: self._log.warning("connection-refused", text=sentence),
        )

    def start(self, attached: Callable[[Answer], None]) -> None:
        """Open the sockets, then attach and connect; `attached` gets the answer to the attach.

        Raises ReplicatorError when a socket cannot be had; then `close` gives back what could.
        """
        self.exports.listen()
        if any(peer > self._setting.node.node_id for peer in self._setting.config.peer_ids(self._setting.node)):
            self.links.listen()
        self.commands.ask("attach", {}, attached)
        self.commands.ask("connect", {}, lambda _answer: None)

    # -- the turn --------------------------------

    def turn(self, happened: list[Event], now_ns: int) -> None:
        """Step the core with all of it, then act once."""
        core, dispatch = self._core, self._dispatch
        for event in happened:
            core.step(event, now_ns)
        for action in core.drain():
            dispatch[type(action)](action)
        if not happened:
            return
        rare = [event for event in happened if not isinstance(event, _FREQUENT)]
        for event in rare:
            self._on_rare(event)
        self._refresh_soon(at_once=bool(rare))
        self.watchers.turned()

    @property
    def deadline(self) -> int | None:
        """When the core wants a Tick."""
        return self._core.deadline

    def _on_rare(self, event: Event) -> None:
        match event:
            case events.LinkUp():
                self._links_up += 1
            case events.LinkDown():
                self._links_up -= 1
                if self._farewell is not None and not self._links_up:
                    self._stop()
            case events.ClientClosed():
                self.exports.client_closed()
            case _:
                pass

    # -- what others see --------------------------------

    def status(self) -> Mapping[str, object]:
        """The core's status, with what only the process knows."""
        status = dict(self._core.status())
        found = status.get("devices")
        if isinstance(found, list):
            status["devices"] = [{**device, **self.exports.describe(device["volume"])} for device in found]
        links = status.get("connections")
        if isinstance(links, list):
            tls = self._setting.config.net.security == "tls"
            status["connections"] = [{**link, "tls": tls} for link in links]
        status["pid"] = os.getpid()
        status["complaints"] = list(self._setting.complaints)
        return status

    def primary(self) -> bool:
        """Whether this node is Primary."""
        return self._core.status()["role"] == "Primary"

    def refresh(self) -> None:
        """Bring the exports, and the nodes behind them, up to date with the core."""
        self._refreshed_ns = self._loop.now_ns()
        status = self._core.status()
        primary, found = status["role"] == "Primary", status["devices"]
        assert isinstance(found, list)
        sizes = {device["volume"]: (device["size"] or 0) * KIB for device in found}
        if self.exports.publish(primary=primary, sizes=sizes) and primary:
            self.exports.follow(primary=True, then=lambda _errors: None)

    def _refresh_soon(self, *, at_once: bool) -> None:
        if self._refresh_timer is None:
            when_ns = self._loop.now_ns() if at_once else self._refreshed_ns + REFRESH_NS
            self._refresh_timer = self._loop.call_at(when_ns, self._on_refresh)

    def _on_refresh(self) -> None:
        self._refresh_timer = None
        self.refresh()

    # -- the control socket, the end --------------------------------

    def _on_request(self, token: int, request: Request) -> None:
        self.commands.request(token, request, lambda answer: self.controller.reply(token, answer))

    def _on_client_gone(self, token: int) -> None:
        self.watchers.remove(token)

    def _on_down(self, answer: Callable[[], object]) -> None:
        """A `down` succeeded: let the farewell leave, then stop."""
        self._farewell = answer
        if self._links_up:
            self._loop.call_at(self._loop.now_ns() + FAREWELL_NS, self._stop)
        else:
            self._stop()

    def close(self) -> None:
        """Give everything back, and only then answer the `down` that asked for it."""
        self.links.close()
        self.exports.close()
        self.disks.finish()
        self.watchers.finish()
        if self._farewell is not None:
            self._farewell()
        self.controller.close()
