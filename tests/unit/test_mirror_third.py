# SPDX-License-Identifier: Apache-2.0
"""Two nodes that know of a third one, gamma, which is not there: what it lacks or may have is not forgotten."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

from replicator.core import superblock
from replicator.core.actions import Action, Send
from replicator.core.generations import EXPOSED_RULE, same
from replicator.core.resource import Resource
from replicator.core.states import Replication
from replicator.core.superblock import Superblock
from replicator.core.wire import Kind
from tests.sim.disk import Disk
from tests.sim.node import Node
from tests.sim.world import MS, SECOND
from tests.unit.mirror import MIB, Mirror

GAMMA = 2
LONG = 1000 * SECOND


def trio(**options: Any) -> Mirror:
    """alpha and beta, off, with fresh disks that have a slot for gamma; gamma would dial."""
    m = Mirror(start="off", **options)
    for node in (m.alpha, m.beta):
        other = 1 - node.id
        peers = {**node.options.peers, GAMMA: "gamma"}
        listens = node.options.listens_for | {GAMMA}
        m.change_options(node, peers=peers, listens_for=listens)
        node.disks[0] = Disk(MIB, node_id=node.id, volume=0, peers=[other, GAMMA], resource_id=bytes([1]) * 16)
    return m


def rewrite(m: Mirror, node: Node, **changes: object) -> None:
    """Change the superblock of a node that is off."""
    disk = node.disks[0]
    changed = replace(m.superblock(node), **changes)  # type: ignore[arg-type]
    disk.meta.write(disk.fixed_base, superblock.encode(changed, 1000) + superblock.encode(changed, 1001))
    disk.meta.flush()


def good(m: Mirror) -> Mirror:
    """Both hold the same data, and run."""
    for node in (m.alpha, m.beta):
        rewrite(m, node, current=77 << 8, consistent=True, was_up_to_date=True)
    m.restart(m.alpha, m.beta)
    m.run(lambda: all(m.replication(node) == "Established" for node in (m.alpha, m.beta)))
    return m


def fork_points(found: Superblock) -> dict[int, int]:
    return {slot.node_id: slot.bitmap_id for slot in found.peers}


def dirty(m: Mirror, peer: int) -> set[int]:
    attached = m.volume(m.alpha).attached
    assert attached is not None
    bitmap = attached.bitmaps[peer]
    return {block for block in range(bitmap.block_count) if bitmap.any_dirty(block, 1)}


def test_a_write_that_the_third_misses_is_marked_for_it_alone_and_forks_from_it_alone() -> None:
    m = good(trio(epoch_time_ns=LONG))
    m.done(m.alpha, "primary")
    m.write(m.alpha, 3, 7)
    found = m.superblock(m.alpha)
    assert m.block(m.beta, 3) == 7
    assert (dirty(m, 1), dirty(m, GAMMA)) == (set(), {3})
    assert fork_points(found)[1] == 0 and same(fork_points(found)[GAMMA], 77 << 8)


def test_a_second_peer_that_is_lost_gets_a_fork_point_of_its_own_and_the_first_keeps_its() -> None:
    m = good(trio(epoch_time_ns=LONG))
    m.done(m.alpha, "primary")
    m.write(m.alpha, 3, 7)
    shared = m.superblock(m.alpha).current
    m.partition()
    m.write(m.alpha, 4, 8)
    points = fork_points(m.superblock(m.alpha))
    assert same(points[GAMMA], 77 << 8) and same(points[1], shared) and not same(shared, 77 << 8)
    assert not same(m.superblock(m.alpha).current, shared)
    assert {3, 4} <= dirty(m, GAMMA) and 4 in dirty(m, 1)


def test_a_barrier_goes_to_those_who_got_a_write_of_the_epoch() -> None:
    m = good(trio(epoch_time_ns=LONG))
    join_without_a_disk(m)
    m.done(m.alpha, "primary")
    m.write(m.alpha, 3, 7)
    barriers: list[int] = []
    beta, gamma = (m.resource(m.alpha).connections[peer].link for peer in (1, GAMMA))

    def look(_: Node, action: Action) -> None:
        if isinstance(action, Send) and action.frame.kind is Kind.BARRIER:
            barriers.append(action.link)

    m.watch(look)
    m.flush(m.alpha)
    assert beta != gamma and barriers == [beta] and m.stable(m.beta, 3) == 7


def join_without_a_disk(m: Mirror) -> None:
    """gamma is there after all, and connected to alpha."""
    options = replace(
        m.alpha.options, node_id=GAMMA, node_name="gamma", peers={0: "alpha", 1: "beta"}, listens_for=frozenset({1})
    )
    gamma = m.world.add_node(GAMMA, options, {})
    gamma.resource = Resource(options, m.world.new_id)
    gamma.command("connect")
    m.run(lambda: m.volume(m.alpha).replicas[GAMMA].replication is Replication.ESTABLISHED)


def test_doubt_is_not_lifted_while_a_third_copy_may_be_newer() -> None:
    m = trio()
    for node in (m.alpha, m.beta):
        rewrite(m, node, current=77 << 8, consistent=True, was_up_to_date=False)
    m.restart(m.alpha, m.beta)
    m.run(lambda: all(m.replication(node) == "Established" for node in (m.alpha, m.beta)))
    m.pause(10 * MS)
    assert m.rule(m.alpha) == "equal"
    for node in (m.alpha, m.beta):
        assert (m.disk(node), m.superblock(node).was_up_to_date) == ("Outdated", False)
    assert m.command(m.alpha, "primary").number == -2


def test_with_two_nodes_equal_copies_lift_each_others_doubt() -> None:
    m = Mirror()
    m.kill(m.alpha)
    m.kill(m.beta)
    for node in (m.alpha, m.beta):
        rewrite(m, node, was_up_to_date=False)
    m.restart(m.alpha, m.beta)
    m.establish()


def test_two_mixtures_of_one_generation_wait_for_somebody_who_is_whole() -> None:
    m = Mirror()
    m.kill(m.alpha)
    m.kill(m.beta)
    for node in (m.alpha, m.beta):
        rewrite(m, node, consistent=False, was_up_to_date=False)
    before = [m.superblock(node).current for node in (m.alpha, m.beta)]
    m.restart(m.alpha, m.beta)
    m.run(lambda: m.connection(m.alpha).settled and m.connection(m.alpha).connected)
    m.pause(5 * SECOND)
    assert m.rule(m.alpha) == "inconsistent-both" and m.state(m.alpha) == "Connected"
    assert m.disk(m.alpha) == m.disk(m.beta) == "Inconsistent" and m.sent(Kind.RESYNC_REQUEST) == 0
    assert [m.superblock(node).current for node in (m.alpha, m.beta)] == before, "no id is touched"
    assert m.command(m.alpha, "primary").number == -2


def test_a_diskless_primary_refuses_a_copy_without_what_its_clients_have_seen_and_says_what_to_do() -> None:
    m = Mirror(primary=0)
    m.done(m.alpha, "detach")
    m.write(m.alpha, 3, 7)
    seen = m.superblock(m.beta).current
    m.kill(m.beta)
    rewrite(m, m.beta, current=77 << 8)
    m.restart(m.beta)
    m.run(lambda: m.state(m.alpha) == m.state(m.beta) == "StandAlone" and bool(m.reasons(m.alpha)))
    for node in (m.alpha, m.beta):
        text = m.reasons(node)[EXPOSED_RULE]
        assert f"clients of alpha have seen generation {seen:016x}" in text
        assert f"the data of beta (generation {77 << 8:016x})" in text
    assert m.role(m.alpha) == "Primary"


def stall_beta(m: Mirror) -> Callable[[], None]:
    """What beta sends to alpha hangs, until the returned function is called."""
    for link in m.world.network.alive:
        nodes = [end.node for end in link.ends]
        if set(nodes) == {0, 1}:
            m.world.network.stall(link, nodes.index(1), stalled=True)
            return partial(m.world.network.stall, link, nodes.index(1), stalled=False)
    raise AssertionError("alpha and beta are not connected")


def test_a_new_link_of_another_peer_does_not_end_the_wait_for_a_confirmation() -> None:
    m = good(trio(epoch_time_ns=LONG, fencing="resource-only", ping_timeout_ns=30 * SECOND))
    m.done(m.alpha, "primary", force=True)
    go_on = stall_beta(m)
    asked = m.begin(m.alpha, "disconnect", peer="beta")
    m.pause(MS)
    join_without_a_disk(m)
    assert not asked.answers
    go_on()
    m.run(lambda: bool(asked.answers))
    m.pause()
    outdated = {slot.node_id: slot.outdated for slot in m.superblock(m.alpha).peers}
    assert outdated == {1: True, GAMMA: False} and not m.notices(m.alpha, "outdate-unconfirmed")


def test_the_loss_of_another_peer_is_no_answer_to_what_one_was_asked() -> None:
    m = good(trio(epoch_time_ns=LONG))
    join_without_a_disk(m)
    m.done(m.alpha, "primary")
    go_on = stall_beta(m)
    asked = m.begin(m.alpha, "invalidate")
    m.pause(MS)
    m.kill(m.world.nodes[GAMMA])
    m.pause(10 * MS)
    assert not m.resource(m.alpha).connections[GAMMA].connected and not asked.answers
    go_on()
    m.run(lambda: bool(asked.answers))
    assert asked.answer.ok
