# SPDX-License-Identifier: Apache-2.0
"""What breaks, and what an operator does: one small function per kind of `tape.KINDS`.

`a` of a fault chooses who, `b` for how long, `c` which.  A fault that has no object at its moment (a node that is off)
does nothing.  Traps (`traps.py`) wait for a moment and crash or cut exactly there.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from replicator.core.geometry import PAGE, SECTOR
from tests.sim.network import Link
from tests.sim.node import Node
from tests.sim.tape import KINDS, Fault
from tests.sim.world import SECOND

if TYPE_CHECKING:
    from tests.sim.run import Run

FAULTS: dict[str, Callable[[Run, Fault], object]] = {}


def _kind(function: Callable[[Run, Fault], object]) -> Callable[[Run, Fault], object]:
    name = function.__name__
    assert name in KINDS, name
    FAULTS[name] = function
    return function


def _who(run: Run, share: float) -> Node | None:
    """A node that is up."""
    up = [node for node in run.world.nodes.values() if node.up]
    return up[int(share * len(up))] if up else None


def _primary(run: Run) -> Node | None:
    found = run.primaries()
    return found[0] if found else None


def _link(run: Run) -> Link | None:
    alive = run.world.network.alive
    return alive[-1] if alive else None


def _later(run: Run, share: float, call: Callable[[], object]) -> None:
    run.world.after(int(share * SECOND / 2) + 1, lambda: None if run.healing else call())


# --- processes and machines


@_kind
def kill(run: Run, fault: Fault) -> None:
    """kill -9."""
    _one(run, fault, power=False)


@_kind
def kill_both(run: Run, fault: Fault) -> None:
    """kill -9 of both at one moment."""
    _both(run, fault, power=False)


@_kind
def power(run: Run, fault: Fault) -> None:
    """Power cut of one machine."""
    _one(run, fault, power=True)


@_kind
def power_both(run: Run, fault: Fault) -> None:
    """Power cut of both at one moment."""
    _both(run, fault, power=True)


def _one(run: Run, fault: Fault, *, power: bool) -> None:
    node = _who(run, fault.a)
    if node is not None:
        run.manager.die(node, power=power)
        run.manager.boot_later(node, fault.b)


def _both(run: Run, fault: Fault, *, power: bool) -> None:
    nodes = list(run.world.nodes.values())
    run.manager.die(*nodes, power=power)
    for node, share in zip(nodes, (fault.a, fault.b), strict=True):
        run.manager.boot_later(node, share)


@_kind
def fence(run: Run, fault: Fault) -> None:
    """The manager power-cuts the Primary and promotes the other one at once."""
    node = _primary(run)
    if node is not None:
        run.sometimes("fenced")
        run.manager.prefer = run.other(node).id
        run.manager.die(node, power=True)
        run.manager.boot_later(node, max(fault.b, 0.5))


@_kind
def away(run: Run, fault: Fault) -> None:
    """A machine goes for days (until the liveness phase)."""
    node = _who(run, fault.a)
    if node is not None and not run.manager.away:
        run.manager.away.add(node.id)
        run.manager.die(node, power=fault.b < 0.5)


@_kind
def stop(run: Run, fault: Fault) -> None:
    """SIGSTOP, and SIGCONT later."""
    node = _who(run, fault.a)
    if node is None or node.stopped:
        return
    node.stop()
    life = node.life

    def go_on() -> None:
        if node.life == life and node.stopped:
            if node in run.primaries() and not _connected(run.other(node)):
                run.sometimes("zombie Primary")
            node.go_on()

    run.world.after(int(fault.b * SECOND) + 1, go_on)


def _connected(node: Node) -> bool:
    return node.resource is not None and any(c.connected for c in node.resource.connections.values())


@_kind
def clock(run: Run, fault: Fault) -> None:
    """A clock jumps ahead, by milliseconds or by days."""
    node = _who(run, fault.a)
    if node is None or node.stopped or node.resource is None:
        return
    ahead = int(10 ** (fault.b * 14)) + 1
    deadline = node.resource.deadline
    if deadline is not None and deadline < node.now + ahead:
        run.sometimes("clock jumped over a timeout")
    node.jump(ahead)


# --- the network


@_kind
def cut(run: Run, fault: Fault) -> None:
    """Reset the connection."""
    run.world.network.cut_all()


@_kind
def cut_at_byte(run: Run, fault: Fault) -> None:
    """Reset it after some more bytes of one direction."""
    link = _link(run)
    if link is not None:
        link.left[int(fault.a * 2)] = int(fault.b * fault.b * 20_000)


@_kind
def damage(run: Run, fault: Fault) -> None:
    """A byte of what is sent next is wrong."""
    link = _link(run)
    if link is not None:
        link.damage[int(fault.a * 2)] = True


@_kind
def half_open(run: Run, fault: Fault) -> None:
    """One side believes that the connection is dead, the other does not."""
    link = _link(run)
    if link is not None:
        run.world.network.half_open(link, int(fault.a * 2), silent=fault.b < 0.5)


@_kind
def stall(run: Run, fault: Fault) -> None:
    """One direction hangs."""
    link, side, network = _link(run), int(fault.a * 2), run.world.network
    if link is not None:
        network.stall(link, side, stalled=True)
        _later(run, fault.b * 2, lambda: network.stall(link, side, stalled=False))


@_kind
def slow(run: Run, fault: Fault) -> None:
    """One direction drains slowly."""
    link, side = _link(run), int(fault.a * 2)
    if link is not None:
        link.slow_ns[side] = int(fault.c * 20_000)
        _later(run, fault.b, lambda: link.slow_ns.__setitem__(side, 0))


@_kind
def partition(run: Run, fault: Fault) -> None:
    """No connection for a while; living ones end."""
    network = run.world.network
    run.sometimes("partition")
    network.partitioned = True
    network.cut_all()
    _later(run, fault.b * 2, lambda: setattr(network, "partitioned", False))


@_kind
def one_way(run: Run, fault: Fault) -> None:
    """One direction is lost without an error, and nobody can connect anew."""
    network, link, side = run.world.network, _link(run), int(fault.a * 2)
    network.partitioned = True
    if link is not None:
        network.stall(link, side, stalled=True)

    def heal() -> None:
        network.partitioned = False
        if link is not None:
            network.stall(link, side, stalled=False)

    _later(run, fault.b * 2, heal)


# --- the operator


@_kind
def switch(run: Run, fault: Fault) -> None:
    """Demote here; the manager promotes there."""
    node = _primary(run)
    if node is not None and not run.manager.promoting:
        run.sometimes("switch over")
        if node.replies:
            run.sometimes("demotion with writes in flight")
        run.manager.prefer = run.other(node).id
        run.manager.ask(node, "secondary", force=True)


@_kind
def race(run: Run, fault: Fault) -> None:
    """Both are asked to be Primary at once, while they are connected."""
    if run.primaries() or not run.established() or run.manager.promoting:
        node = _primary(run)
        if node is not None and run.established():
            run.manager.ask(node, "secondary", force=True)
            _later(run, 0.02, lambda: race(run, fault) if fault.c < 0.99 and not run.primaries() else None)
        return
    if all(run.branch_of[node.id].authority >= {node.id} for node in run.world.nodes.values()):
        run.sometimes("two promotions raced")
        for node in run.world.nodes.values():
            run.manager.promote(node, unwise=True)  # (the link may be lost in the middle of it)


@_kind
def unwise(run: Run, fault: Fault) -> None:
    """An operator promotes a copy that cannot ask the other one, or is not even good (with --force)."""
    for node in run.world.nodes.values():
        resource = node.resource
        if resource is None or node.stopped or node in run.primaries() or run.manager.promoting:
            continue
        if any(connection.connected for connection in resource.connections.values()) or not run.still_one():
            continue
        if any(volume.attached is None for volume in resource.volumes.values()) or not run.whole(node):
            continue
        run.manager.promote(node, force=fault.c < 0.6, unwise=True)
        return


@_kind
def disconnect(run: Run, fault: Fault) -> None:
    """`disconnect`, and `connect` later."""
    node = _who(run, fault.a)
    if node is not None:
        run.manager.ask(node, "disconnect")
        _later(run, fault.b, lambda: run.manager.ask(node, "connect"))


@_kind
def pause(run: Run, fault: Fault) -> None:
    """`pause-sync`, and `resume-sync` later."""
    node = _who(run, fault.a)
    if node is not None:
        run.manager.ask(node, "pause-sync")
        _later(run, fault.b, lambda: run.manager.ask(node, "resume-sync"))


@_kind
def invalidate(run: Run, fault: Fault) -> None:
    """A Secondary's good copy is thrown away, by itself or by its peer."""
    if not run.established():
        return
    secondary = [node for node in run.world.nodes.values() if node not in run.primaries()]
    if not secondary:
        return
    volume = run.swarm.volumes[int(fault.b * len(run.swarm.volumes))]
    run.sometimes("invalidated")
    verb, who = ("invalidate", secondary[0]) if fault.c < 0.5 else ("invalidate-remote", run.other(secondary[0]))
    run.manager.ask(who, verb, volume=volume)


@_kind
def detach(run: Run, fault: Fault) -> None:
    """`detach`, and `attach` later."""
    node = _who(run, fault.a)
    if node is None:
        return
    run.manager.ask(node, "detach", volume=run.swarm.volumes[int(fault.c * len(run.swarm.volumes))])
    _later(run, fault.b, lambda: run.manager.ask(node, "attach"))


@_kind
def blank(run: Run, fault: Fault) -> None:
    """A machine dies, and comes back with a new disk and fresh metadata; only while the other one has everything."""
    node = _who(run, fault.a)
    if node is None or not run.established() or run.branch_of[node.id].authority != {0, 1}:
        return
    run.manager.die(node, power=True)
    run.loses(node)
    run.manager.replace_disk(node)
    run.manager.boot_later(node, fault.b)


# --- disks


@_kind
def rot(run: Run, fault: Fault) -> None:
    """A machine is off, and a sector of its metadata is not what it was; only while the other one has everything."""
    node = _who(run, fault.a)
    if node is None or not run.established() or run.branch_of[node.id].authority != {0, 1}:
        return
    run.manager.die(node, power=False)
    run.rotten.add(node.id)  # its data is what it was: it may be refused, or copied, but not be believed wrongly
    disk = node.disks[run.swarm.volumes[0]]
    part = int(fault.c * 4)
    if part == 0:  # the superblock, one copy
        at = disk.fixed_base + run.rng.randrange(2) * PAGE + run.rng.randrange(4) * SECTOR
    elif part == 1:  # the activity log
        at = disk.fixed_base + 2 * PAGE + run.rng.randrange(8) * PAGE + run.rng.randrange(2) * SECTOR
    else:  # the bitmap
        at = disk.fixed_base - disk.slot_bytes * disk.slots + run.rng.randrange(disk.slot_bytes // SECTOR) * SECTOR
    area = disk.meta
    if part == 3:  # misdirected: a neighbour's content
        other = at + SECTOR if at + 2 * SECTOR <= disk.fixed_base else at - SECTOR
        content = bytes(area.stable[other : other + SECTOR]) if other >= 0 else bytes(SECTOR)
    else:
        content = bytes(byte ^ 0x20 for byte in area.stable[at : at + SECTOR])
    area.damage(at, content)
    run.manager.boot_later(node, fault.b)


def _breakable(run: Run, fault: Fault) -> Node | None:
    """A node whose disk may be lost without losing what was promised: the other one has everything."""
    node = _who(run, fault.a)
    if node is None or not run.established() or run.branch_of[node.id].authority != {0, 1}:
        return None
    return node


def _break(run: Run, fault: Fault, breaks: Callable[[Node, int], object]) -> None:
    node = _breakable(run, fault)
    if node is None:
        return
    volume = run.swarm.volumes[int(fault.c * len(run.swarm.volumes))]
    breaks(node, volume)

    def mend() -> None:
        node.disks[volume].mend()
        if node.up:
            run.manager.ask(node, "attach")

    _later(run, fault.b, mend)


@_kind
def disk_broken(run: Run, fault: Fault) -> None:
    """Every operation fails for a while."""
    _break(run, fault, lambda node, volume: setattr(node.disks[volume], "broken", True))


@_kind
def disk_flush(run: Run, fault: Fault) -> None:
    """FLUSH fails for a while."""
    _break(run, fault, lambda node, volume: setattr(node.disks[volume], "fail_flush", True))


@_kind
def disk_meta(run: Run, fault: Fault) -> None:
    """Metadata cannot be written for a while."""
    _break(run, fault, lambda node, volume: setattr(node.disks[volume], "fail_meta", True))


@_kind
def disk_write(run: Run, fault: Fault) -> None:
    """The next write fails."""
    _break(run, fault, lambda node, volume: setattr(node.disks[volume], "fail_writes", 1))


@_kind
def disk_read(run: Run, fault: Fault) -> None:
    """Some sectors cannot be read until they are written."""

    def breaks(node: Node, volume: int) -> None:
        first = int(fault.c * 200)
        node.disks[volume].bad.update(range(first, first + 64))

    _break(run, fault, breaks)


@_kind
def freeze(run: Run, fault: Fault) -> None:
    """A disk completes nothing for a while."""
    node = _who(run, fault.a)
    if node is None:
        return
    disk = node.disks[run.swarm.volumes[0]]
    disk.frozen = True

    def thaw() -> None:
        if disk.thaw_calls:
            run.sometimes("frozen disk")
        disk.thaw()

    _later(run, fault.b * 2, thaw)


# --- traps


@_kind
def trap(run: Run, fault: Fault) -> None:
    """Crash or cut exactly when something ends or is sent."""
    run.traps.arm(fault)
