# SPDX-License-Identifier: Apache-2.0
"""The operations whose every moment is a crash: small workloads, at most three operations each.

`setup` makes the situation, `act` is recorded.  alpha is node 0, beta node 1.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from replicator.core.events import Io
from replicator.core.geometry import EXTENT, EXTENT_BLOCKS
from tests.crash.image import Image, Sectors
from tests.crash.record import Promises, Recorder
from tests.sim.build import established, ready
from tests.sim.world import MS, SECOND
from tests.unit.mirror import MIB, Mirror

LONG = 1000 * SECOND
Pair = tuple[Image, Image]


class Scene:
    """Two machines that are off, and who watches them."""

    def __init__(
        self, options: dict[str, Any], images: Pair | None, *, seed: int, cached: tuple[Sectors, Sectors] = ((), ())
    ) -> None:
        self.m = Mirror(start="off", seed=seed, **options)
        self.m.world.rates.steady = True
        self.m.world.rates.cut_frames = False
        if images is not None:
            for node, image, sectors in zip((self.m.alpha, self.m.beta), images, cached, strict=True):
                image.load(node.disks[0], over=Image.of(node.disks[0]), cached=sectors)
        self.rec = Recorder(self.m, images)

    def primary_with(self, *blocks: int, flush: bool = True) -> None:
        """Mirrored, alpha Primary, these blocks written (and stable)."""
        ready(self.m.world)
        self.m.done(self.m.alpha, "primary")
        for block in blocks:
            self.m.write(self.m.alpha, block, 10 + block % 100)
        if flush:
            self.m.flush(self.m.alpha)
        self.m.pause()

    def apart(self, *blocks: int) -> None:
        """The link is gone; alpha writes alone."""
        self.m.partition()
        for block in blocks:
            self.m.write(self.m.alpha, block, 110 + block % 100)
        self.m.pause()

    def off(self, *nodes: int) -> None:
        """A clean stop."""
        for node in nodes:
            self.m.done(self.m.node(node), "down", force=True)
            self.m.pause()
            self.rec.kill(self.m.node(node))

    def unplug(self) -> None:
        """No new link can be made."""
        self.m.world.network.partitioned = True

    def let_flow(self) -> None:
        """Nothing is held back any more."""
        self.m.hooks.clear()
        if self.m.world.network.links:
            self.m.stall(self.m.alpha, stalled=False)
            self.m.stall(self.m.beta, stalled=False)

    def join(self) -> None:
        """Both come together, or are both fresh and say so."""
        m = self.m

        def fresh() -> bool:
            return all(
                node.up and (decision := m.replica(node).decision) is not None and decision.rule == "just-created-both"
                for node in (m.alpha, m.beta)
            )

        m.heal()
        m.run(lambda: established(m.world) or fresh(), 30 * SECOND)
        m.pause()

    def established(self) -> None:
        """Both mirrored and UpToDate, and all that follows from it."""
        self.m.heal()
        self.m.establish()
        self.m.pause()


@dataclass(frozen=True, slots=True)
class Operation:
    """One row of the table."""

    name: str
    setup: Callable[[Scene], None]
    act: Callable[[Scene], object]
    options: dict[str, Any] = field(default_factory=dict)
    images: Pair | None = None  #: what the disks hold before; None: freshly created
    promises: Promises = ()
    cached: tuple[Sectors, Sectors] = ((), ())  #: on top of `images`, not stable
    seed: int = 1  #: another one for each life: a generation id is never made twice

    @property
    def settings(self) -> dict[str, Any]:
        """Of both nodes."""
        return {"size": MIB, "epoch_time_ns": 20 * MS, **self.options}

    def scene(self) -> Scene:
        """A new world, before `setup`."""
        scene = Scene(self.settings, self.images, seed=self.seed, cached=self.cached)
        scene.rec.adopt(self.promises, self.cached)
        return scene


def _both_off(s: Scene) -> None:
    s.primary_with(3)
    s.off(0, 1)


def _boot_both(s: Scene) -> None:
    s.m.restart(s.m.alpha, s.m.beta)
    s.established()


def _primary_crashed(s: Scene) -> None:
    s.primary_with(3)
    s.m.write(s.m.alpha, 4, 14)
    s.rec.power_cut(s.m.alpha)
    s.m.pause()


def _boot_alpha(s: Scene) -> None:
    s.m.restart(s.m.alpha)
    s.established()


def _lone_primary_killed(s: Scene) -> None:
    s.primary_with(3)
    s.apart(4, 200)
    s.rec.kill(s.m.alpha)
    s.m.pause()


def _boot_alpha_alone(s: Scene) -> None:
    s.m.restart(s.m.alpha)
    s.m.run(lambda: s.m.disk(s.m.alpha) == "UpToDate")
    s.m.pause()


def _two_secondaries(s: Scene) -> None:
    ready(s.m.world)
    s.m.pause()


def _promote_and_write(s: Scene) -> None:
    s.m.done(s.m.alpha, "primary")
    s.m.write(s.m.alpha, 5, 55)
    s.m.pause(50 * MS)


def _crashed_primary_is_back(s: Scene) -> None:
    s.primary_with(3)
    s.m.write(s.m.alpha, 4, 14)
    s.unplug()
    s.rec.kill(s.m.alpha)
    s.m.pause()
    s.m.restart(s.m.alpha)
    s.m.run(lambda: s.m.disk(s.m.alpha) == "UpToDate")
    s.m.pause()


def _write_alone(s: Scene) -> None:
    s.m.write(s.m.alpha, 5, 55)
    s.m.flush(s.m.alpha)
    s.m.pause(50 * MS)


def _written(s: Scene) -> None:
    s.primary_with(3)
    s.m.write(s.m.alpha, 4, 14)


def _lose_the_peer(s: Scene) -> None:
    asked = s.m.ask(s.m.alpha, Io.WRITE, 6, value=66)
    s.m.partition()
    s.m.wait(asked)
    s.m.write(s.m.alpha, 5, 55)
    s.m.flush(s.m.alpha)
    s.m.pause(50 * MS)


def _apart(s: Scene) -> None:
    s.primary_with(3)
    s.apart()


def _diverged(s: Scene) -> None:
    s.primary_with(3)
    s.apart(4, 200)


def _resync_under_write(s: Scene) -> None:
    s.m.heal()
    s.m.run(lambda: s.m.replication(s.m.beta) == "SyncTarget")
    s.m.write(s.m.alpha, 5, 55)
    s.established()


def _resync_that_breaks(s: Scene) -> None:
    s.m.stall_resync(s.m.alpha)
    s.m.heal()
    s.m.run(lambda: s.m.replication(s.m.beta) == "SyncTarget")
    s.m.partition()
    s.let_flow()
    s.m.write(s.m.alpha, 5, 55)
    s.m.pause(50 * MS)


def _invalidate(s: Scene) -> None:
    s.m.done(s.m.beta, "invalidate", volume=0)
    s.established()


def _fresh(s: Scene) -> None:
    s.m.restart(s.m.alpha, s.m.beta)
    s.m.run(lambda: s.m.connection(s.m.alpha).settled and s.m.connection(s.m.alpha).connected)
    s.m.pause()


def _force_primary(s: Scene) -> None:
    s.m.done(s.m.alpha, "primary", force=True)
    s.established()


def _new_generation(s: Scene) -> None:
    s.m.done(s.m.alpha, "new-current-uuid", volume=0)
    s.m.pause()


def _skip_first_sync(s: Scene) -> None:
    s.m.done(s.m.alpha, "new-current-uuid", volume=0, clear_bitmap=True)
    s.established()


def _write_twice_and_flush(s: Scene) -> None:
    first, second = s.m.ask(s.m.alpha, Io.WRITE, 4, value=44), s.m.ask(s.m.alpha, Io.WRITE, 5, value=55)
    s.m.wait(first)
    s.m.wait(second)
    s.m.flush(s.m.alpha)
    s.m.pause(50 * MS)


def _overwrite(s: Scene) -> None:
    s.m.write(s.m.alpha, 3, 44)
    s.m.write(s.m.alpha, 3, 55, fua=True)
    s.m.pause(50 * MS)


#: A disk with one extent more than the smallest activity log.
WIDE: dict[str, Any] = {"size": 11 * EXTENT, "activity_extents": 9}


def _log_full(s: Scene) -> None:
    s.primary_with(*(extent * EXTENT_BLOCKS for extent in range(9)))


def _log_full_alone(s: Scene) -> None:
    s.primary_with(0)
    s.apart(*(extent * EXTENT_BLOCKS for extent in range(9)))


def _next_extent(s: Scene) -> None:
    s.m.write(s.m.alpha, 9 * EXTENT_BLOCKS, 77)
    s.m.pause(50 * MS)


def _primary_vanishes(s: Scene) -> None:
    s.unplug()
    s.rec.power_cut(s.m.alpha)
    s.m.run(lambda: s.m.superblock(s.m.beta).peers[0].survivor)
    s.m.pause(50 * MS)


def _down(node: int) -> Callable[[Scene], None]:
    def act(s: Scene) -> None:
        s.m.done(s.m.node(node), "down", force=True)
        s.m.pause(50 * MS)

    return act


def _detach_beta(s: Scene) -> None:
    s.m.done(s.m.beta, "detach")
    s.m.write(s.m.alpha, 5, 55)
    s.m.pause(50 * MS)


OPERATIONS: tuple[Operation, ...] = (
    Operation("attach, clean", _both_off, _boot_both),
    Operation("attach, crashed Primary", _primary_crashed, _boot_alpha, {"epoch_time_ns": LONG}),
    Operation("attach, killed alone", _lone_primary_killed, _boot_alpha_alone, {"epoch_time_ns": LONG}),
    Operation("attach, killed alone, source", _lone_primary_killed, _boot_alpha, {"epoch_time_ns": LONG}),
    Operation("promotion and a write", _two_secondaries, _promote_and_write),
    Operation("promotion, crashed and alone", _crashed_primary_is_back, _promote_and_write),
    Operation("demotion", _written, lambda s: s.m.done(s.m.alpha, "secondary")),
    Operation("switch over", _written, lambda s: s.m.switch(s.m.alpha)),
    Operation("write, write, flush", lambda s: s.primary_with(3), _write_twice_and_flush),
    Operation("write, write over it (FUA)", lambda s: s.primary_with(3), _overwrite),
    Operation("peer lost, new generation", _written, _lose_the_peer),
    Operation("peer lost before, new generation", _apart, _write_alone),
    Operation("survivor of a Primary", _written, _primary_vanishes, {"epoch_time_ns": LONG}),
    Operation("resync", _diverged, Scene.established),
    Operation("resync under a write", _diverged, _resync_under_write),
    Operation("resync that breaks, write alone", _diverged, _resync_that_breaks),
    Operation("invalidate, full sync", _written, _invalidate),
    Operation("first sync by force", _fresh, _force_primary),
    Operation("new-current-uuid", _two_secondaries, _new_generation),
    Operation("new-current-uuid, skip first sync", _fresh, _skip_first_sync),
    Operation("activity log, mirrored", _log_full, _next_extent, WIDE),
    Operation("activity log and bitmap, alone", _log_full_alone, _next_extent, WIDE),
    Operation("detach, write on", _written, _detach_beta),
    Operation("down, Primary", _written, _down(0)),
    Operation("down, Secondary", _written, _down(1)),
)
