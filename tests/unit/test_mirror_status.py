# SPDX-License-Identifier: Apache-2.0
"""What `status` and `show-gi` say of a mirror: what is not normal has its reason, and the ids are the disk's."""

from __future__ import annotations

from replicator.core.events import Io
from tests.sim.world import MS
from tests.unit.mirror import Mirror


def volume_gi(m: Mirror) -> dict[str, object]:
    """The only volume of alpha in `gi`."""
    found = m.resource(m.alpha).gi()
    volumes = found["volumes"]
    assert found["name"] == "r0" and isinstance(volumes, list)
    (volume,) = volumes
    assert isinstance(volume, dict)
    return volume


def test_the_generation_ids_shown_are_those_on_the_disk() -> None:
    m = Mirror(primary=0)
    m.write(m.alpha, 3, 7)
    m.partition()
    m.write(m.alpha, 4, 8)
    disk, shown = m.superblock(m.alpha), volume_gi(m)
    assert shown == {
        "volume": 0,
        "resource-id": disk.resource_id.hex(),
        "current": f"{disk.current:016x}",
        "history": [f"{old:016x}" for old in disk.history],
        "consistent": True,
        "was-up-to-date": True,
        "primary-indicator": True,
        "crashed-primary": False,
        "size": 1024,
        "peers": [
            {
                "node-id": 1,
                "bitmap": f"{disk.peers[0].bitmap_id:016x}",
                "full-sync": False,
                "outdated": False,
                "survivor": False,
                "dirty-blocks": len(m.dirty(m.alpha)),
            }
        ],
    }
    assert disk.peers[0].bitmap_id != 0 and m.dirty(m.alpha) >= {4}


def test_a_volume_without_a_disk_has_no_generation_ids() -> None:
    m = Mirror(volumes=(0, 1))
    m.done(m.alpha, "detach", volume=0)
    assert volume_gi(m)["volume"] == 1


def test_an_outdated_copy_says_why_and_how_it_is_mended() -> None:
    m = Mirror(primary=0, fencing="resource-only")
    m.done(m.alpha, "disconnect")
    m.run(lambda: m.disk(m.beta) == "Outdated")
    m.partition()
    assert m.reasons(m.beta)["outdated"] == "the peer went on without this copy"


def test_a_copy_that_may_be_older_than_its_peer_says_so() -> None:
    m = Mirror(fencing="resource-only")
    m.kill(m.alpha)
    m.partition()
    m.restart(m.alpha)
    m.run(lambda: m.disk(m.alpha) == "Consistent")
    assert "whether the peer is newer is not known" in m.reasons(m.alpha)["peer-unknown"]


def test_who_was_told_to_disconnect_says_so_and_how_to_connect() -> None:
    m = Mirror()
    m.done(m.alpha, "disconnect")
    assert m.resource(m.alpha).status()["reasons"] == [
        {
            "scope": "connection beta",
            "code": "standalone",
            "text": "no connection is tried: disconnected by the operator",
            "do": "replicator connect r0",
        }
    ]


def test_requests_that_wait_are_counted() -> None:
    m = Mirror(primary=0)
    m.stall(m.beta)
    m.ask(m.alpha, Io.WRITE, 3, value=7)
    m.pause(10 * MS)
    devices = m.resource(m.alpha).status()["devices"]
    assert isinstance(devices, list) and [device["upper-pending"] for device in devices] == [1]


def test_a_primary_on_the_older_copy_says_what_to_do() -> None:
    m = Mirror(primary=0)
    m.partition()
    m.write(m.alpha, 3, 7)
    m.done(m.beta, "primary")
    m.done(m.alpha, "secondary")
    m.heal()
    m.run(lambda: m.state(m.beta) == "StandAlone")
    assert "older-copy-is-primary" in m.reasons(m.beta)
    m.done(m.beta, "secondary")
    for node in (m.alpha, m.beta):
        m.done(node, "connect")
    m.establish()
    assert m.block(m.beta, 3) == 7
