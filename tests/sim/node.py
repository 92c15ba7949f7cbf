# SPDX-License-Identifier: Apache-2.0
"""A machine: its disks survive, its process may be killed, stopped, or started anew.

The process is the real core.  Its clock is its own: it counts from a different number in every life and may jump ahead.
Each completion of a disk operation is a moment at which the run may kill it (`World.moment`).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

from replicator.core import actions as act
from replicator.core import events as ev
from replicator.core.geometry import SECTOR
from replicator.core.options import Options
from replicator.core.resource import Resource
from tests.sim.disk import Cut, Disk

if TYPE_CHECKING:
    from tests.sim.world import World


class Node:
    """One machine with one resource."""

    def __init__(self, world: World, node_id: int, options: Options, disks: dict[int, Disk]) -> None:
        self.world = world
        self.id = node_id
        self.options = options
        self.disks = disks
        self.resource: Resource | None = None
        self.life = 0  # which process this is; completions of an earlier one are dropped
        self.answers: dict[int, act.CommandDone] = {}
        self.handlers: dict[int, Callable[[act.CommandDone], object]] = {}
        self.replies: dict[int, Callable[[act.Reply], None]] = {}
        self.writes: set[int] = set()  # tokens of `replies` that change something
        self.cuts = 0  # how often its clients were cut off
        self.notices: list[act.Notice] = []
        self.in_flight: dict[int, tuple[Disk, Callable[[], object]]] = {}
        self.closing: dict[int, int] = {}
        self.stopped = False  # SIGSTOP
        self.inbox: list[ev.Event] = []  # what waits for a stopped process
        self.opened = 0
        self.ahead_ns = 0  # this process's clock minus the world's
        self._turn_due = False
        self._tick_at: int | None = None

    @property
    def up(self) -> bool:
        """The process runs."""
        return self.resource is not None

    @property
    def now(self) -> int:
        """This process's monotonic clock."""
        return self.world.now + self.ahead_ns

    # --- the process

    def boot(self, *, ahead_ns: int = 0) -> None:
        """Start the process: attach and connect.  Its clock counts from wherever it likes."""
        assert self.resource is None
        self.life += 1
        self.ahead_ns = ahead_ns
        self.resource = Resource(self.options, self.world.new_id)
        self.world.trace(self.id, "boot")
        self.command("attach", lambda _: self.command("connect"))

    def command(self, verb: str, then: Callable[[act.CommandDone], object] | None = None, **args: object) -> int:
        """An operator's command; `then` gets the answer."""
        token = next(self.world.serial)
        if then is not None:
            self.handlers[token] = then
        self.step(ev.Command(token, verb, args))
        return token

    def request(self, then: Callable[[act.Reply], None], io: ev.Io, offset: int, size: int, **more: object) -> None:
        """A client's request on volume 0 unless `volume` is given."""
        token = next(self.world.serial)
        self.replies[token] = then
        if io not in (ev.Io.READ, ev.Io.FLUSH):
            self.writes.add(token)
        volume = more.pop("volume", 0)
        self.step(ev.ClientRequest(volume, token, io, offset, size, **more))  # type: ignore[arg-type]

    def step(self, event: ev.Event) -> None:
        """Hand an event to the core; actions are taken at the end of the turn."""
        if self.resource is None:
            return
        if self.stopped:
            self.inbox.append(event)
            return
        self.resource.step(event, self.now)
        if not self._turn_due:
            self._turn_due = True
            self.world.after(0, partial(self._turn, self.life))

    def _turn(self, life: int) -> None:
        if life != self.life or self.resource is None:
            return
        self._turn_due = False
        for action in self.resource.drain():
            self.world.perform(self, action)
            if life != self.life:
                return  # it was killed in the middle of it
        deadline = self.resource.deadline
        now = self.now
        if deadline is not None and (self._tick_at is None or deadline < self._tick_at or self._tick_at <= now):
            due = max(deadline, now + 1)
            self._tick_at = due
            self.world.after(due - now, partial(self._tick, life, due))

    def _tick(self, life: int, due: int) -> None:
        if life == self.life and self._tick_at == due:
            self._tick_at = None
            self.step(ev.Tick())

    def cut_clients(self, a: act.CutClients) -> None:
        """Their requests go on, but nobody hears the answers."""
        self.cuts += 1
        for token in self.replies:
            self.replies[token] = lambda _: None
        for client in range(self.opened):
            self.world.after(1, partial(self.step, ev.ClientClosed(a.volume, client)))
        self.opened = 0

    def stop(self) -> None:
        """SIGSTOP: nothing that happens is seen until `go_on`."""
        self.stopped = True
        self.world.trace(self.id, "stopped")

    def go_on(self) -> None:
        """SIGCONT."""
        self.stopped = False
        self.world.trace(self.id, "goes on")
        inbox, self.inbox = self.inbox, []
        for event in inbox:
            self.step(event)

    def jump(self, ahead_ns: int) -> None:
        """Its clock jumps ahead."""
        self.ahead_ns += ahead_ns
        self.world.trace(self.id, f"clock jumps {ahead_ns // 1_000_000} ms ahead")
        self._tick_at = None
        self.step(ev.Tick())

    def die(self, *, power: bool) -> list[Cut]:
        """Kill the process (operations handed over may or may not happen), or cut the power."""
        assert self.resource is not None
        self.world.trace(self.id, "power cut" if power else "kill")
        self.resource = None
        self.life += 1
        self._turn_due = self.stopped = False
        self._tick_at = None
        self.opened = 0
        self.inbox.clear()
        rng = self.world.rng
        for _, apply in self.in_flight.values():
            if rng.random() < 0.5:
                apply()
        self.in_flight.clear()
        self.replies.clear()
        self.writes.clear()
        self.handlers.clear()
        self.closing.clear()
        for disk in self.disks.values():
            disk.thaw_calls.clear()
        cuts = [disk.power_cut(rng) for disk in self.disks.values()] if power else []
        self.world.network.node_died(self)
        return cuts

    # --- its disks

    def _operation(
        self,
        volume: int,
        token: int,
        what: str,
        effect: Callable[[], bytes | None],
        error: Callable[[], int],
        *,
        crash: Callable[[], object] | None = None,
        delay_factor: int = 1,
    ) -> None:
        """One operation: at its completion `error` is asked, then `effect` applied; `crash` is what it may leave."""
        disk, life, serial = self.disks[volume], self.life, next(self.world.serial)
        self.in_flight[serial] = (disk, lambda: None if disk.broken else (crash or effect)())

        def complete() -> None:
            if self.life != life:
                return
            if disk.frozen:
                disk.thaw_calls.append(complete)
                return
            if self.world.moment(self.id, f"before {what}"):
                return
            del self.in_flight[serial]
            fault = error()
            data = b"" if fault else effect() or b""
            if self.world.moment(self.id, what):
                return
            self.step(ev.DiskDone(token, fault, data))
            self.maybe_closed(volume)

        self.world.after(self.world.disk_delay() * delay_factor, complete)

    def read_data(self, a: act.ReadData) -> None:
        """A read."""
        disk = self.disks[a.volume]
        self._operation(
            a.volume, a.token, "read",
            lambda: bytes(disk.data.seen[a.offset : a.offset + a.size]),
            lambda: disk.read_error(a.offset, a.size),
            crash=lambda: None,
        )  # fmt: skip

    def write_data(self, a: act.WriteData) -> None:
        """A write; a killed process may leave a part of it."""
        self._put(a.volume, a.token, a.offset, bytes(a.data), fua=a.fua)

    def zero_data(self, a: act.ZeroData) -> None:
        """Zeroes."""
        self._put(a.volume, a.token, a.offset, bytes(a.size), fua=a.fua)

    def _put(self, volume: int, token: int, offset: int, data: bytes, *, fua: bool) -> None:
        disk, rng = self.disks[volume], self.world.rng

        def effect() -> None:
            disk.data.write(offset, data)
            if disk.bad:
                disk.bad.difference_update(range(offset // SECTOR, (offset + len(data)) // SECTOR))
            if fua:
                disk.data.flush_last()

        def torn() -> None:
            part = data[: rng.randrange(len(data) // SECTOR + 1) * SECTOR]
            disk.data.write(offset, part if rng.random() < 0.3 and part else data)

        def error() -> int:
            return disk.write_error() or (5 if fua and disk.fail_flush else 0)

        self._operation(volume, token, "write", effect, error, crash=torn)

    def flush_data(self, a: act.FlushData) -> None:
        """Covers what was complete when it was asked for: writes applied later stay in the cache."""
        disk = self.disks[a.volume]
        covered = list(disk.data.cache)
        drops = lambda: self.world.rates.steady or self.world.rng.random() < 0.5  # noqa: E731
        self._operation(
            a.volume, a.token, "flush",
            lambda: disk.data.flush_these(covered),
            lambda: disk.error or (disk.data.fail_flush(covered, drops) if disk.fail_flush else 0),
            delay_factor=3,
        )  # fmt: skip

    def write_meta(self, a: act.WriteMeta) -> None:
        """Pieces that are stable together at completion; a crash before may leave any of them, torn."""
        disk, rng = self.disks[a.volume], self.world.rng
        pieces = [(disk.fixed_base + offset, bytes(data)) for offset, data in a.pieces]

        def effect() -> None:
            for offset, data in pieces:
                disk.meta.write(offset, data)
            disk.meta.flush()
            self.world.metadata_written(self, a.volume)

        def crash() -> None:
            for offset, data in pieces:
                if rng.random() < 0.7:
                    disk.meta.write(offset, data)

        self._operation(
            a.volume, a.token, "meta", effect, lambda: disk.error or (5 if disk.fail_meta else 0), crash=crash
        )

    def open_disk(self, a: act.OpenDisk) -> None:
        """Read the metadata."""
        disk, life = self.disks[a.volume], self.life

        def opened() -> None:
            if self.life != life:
                return
            if disk.broken:
                self.step(ev.DiskOpenFailed(a.volume, "input/output error"))
            else:
                self.step(ev.DiskOpened(a.volume, disk.size, disk.fixed(), disk.bitmaps()))

        self.world.after(self.world.disk_delay(), opened)

    def close_disk(self, a: act.CloseDisk) -> None:
        """When nothing of it is in flight."""
        self.closing[a.volume] = self.life
        self.maybe_closed(a.volume)

    def maybe_closed(self, volume: int) -> None:
        """Tell the core if a disk that is to be closed is idle."""
        if self.closing.get(volume) != self.life:
            return
        if any(disk is self.disks[volume] for disk, _ in self.in_flight.values()):
            return
        del self.closing[volume]
        life = self.life
        self.world.after(1, lambda: self.step(ev.DiskClosed(volume)) if self.life == life else None)
