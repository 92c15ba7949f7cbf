# SPDX-License-Identifier: Apache-2.0
"""Ready-made worlds for tests: two nodes, named 0 and 1, alpha and beta."""

from __future__ import annotations

from replicator.core.options import Options
from tests.sim.disk import Disk
from tests.sim.node import Node
from tests.sim.world import SECOND, World

NAMES = {0: "alpha", 1: "beta"}


def two_nodes(seed: int = 0, *, size: int = 8 << 20, volumes: tuple[int, ...] = (0,), **more: object) -> World:
    """Two machines with blank disks and fresh metadata, switched off."""
    world = World(seed)
    for node_id, name in NAMES.items():
        peer = 1 - node_id
        options = Options(
            resource="r0",
            node_id=node_id,
            node_name=name,
            peers={peer: NAMES[peer]},
            volumes=volumes,
            listens_for=frozenset({1}) if node_id == 0 else frozenset(),
            matching=(("protocol", str(more.get("protocol", "C"))),),
            **{"connect_interval_ns": SECOND // 2, **more},  # type: ignore[arg-type]
        )
        disks = {
            number: Disk(size, node_id=node_id, volume=number, peers=[peer], resource_id=bytes([node_id + 1]) * 16)
            for number in volumes
        }
        world.add_node(node_id, options, disks)
    return world


def disk_states(node: Node) -> set[str]:
    """The states of a node's disks."""
    assert node.resource is not None
    return {volume.disk.word for volume in node.resource.volumes.values()}


def established(world: World) -> bool:
    """Both up, connected, and every volume mirrored and UpToDate on both."""
    return all(
        node.resource is not None
        and disk_states(node) == {"UpToDate"}
        and all(
            replica.replication.value == "Established" and replica.disk.word == "UpToDate"
            for volume in node.resource.volumes.values()
            for replica in volume.replicas.values()
        )
        for node in world.nodes.values()
    )


def boot(world: World) -> None:
    """Switch both on."""
    for node in world.nodes.values():
        node.boot()


def ready(world: World) -> None:
    """Both on, connected, and the first sync skipped."""
    boot(world)
    fresh = lambda: all(  # noqa: E731
        node.resource is not None
        and all(
            replica.decision is not None and replica.decision.rule == "just-created-both"
            for volume in node.resource.volumes.values()
            for replica in volume.replicas.values()
        )
        for node in world.nodes.values()
    )
    assert world.run(fresh), "no connection"
    for number in world.nodes[0].options.volumes:
        skip_first_sync(world, number)
    assert world.run(lambda: established(world)), "\n".join(world.lines[-20:])


def skip_first_sync(world: World, volume: int) -> None:
    """Declare two blank copies equal."""
    done: list[bool] = []
    world.nodes[0].command(
        "new-current-uuid",
        lambda answer: done.append(answer.ok),
        volume=volume,
        clear_bitmap=True,
    )
    assert world.run(lambda: bool(done)) and done == [True], world.lines[-20:]


def promote(world: World, node_id: int, *, force: bool = False) -> bool:
    """Make a node Primary; False if refused."""
    done: list[bool] = []
    world.nodes[node_id].command("primary", lambda answer: done.append(answer.ok), force=force)
    assert world.run(lambda: bool(done)), "promotion never ended"
    return done[0]
