# SPDX-License-Identifier: Apache-2.0
"""A disk answers with errors: reads, writes, flushes; data and metadata; on the Primary and on the Secondary.

A node whose disk failed lets go of it and goes on without (V8): the Primary works through its peer, and clients
notice nothing as long as there is one good copy.  After the repair `attach` makes the copies equal again.
"""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from replicator.control.client import call
from replicator.errors import Refused
from tests.faults.disks import need_faulty_disks
from tests.faults.network import need
from tests.faults.story import PATIENT, PATIENT_NET, Story, story
from tests.integration.cluster import GIVE_UP_S, NODES, Status, TwoNodes


def diskless(status: Status) -> bool:
    return bool(status["devices"][0]["disk-state"] == "Diskless")


@pytest.fixture
def pair(tmp_path: Path) -> Iterator[Story]:
    need_faulty_disks()
    with story(tmp_path, timing=PATIENT, net=PATIENT_NET, faulty=NODES) as found:
        yield found


def attach(pair: Story, node: str) -> None:
    call(pair.nodes.control(node), "attach", timeout_s=GIVE_UP_S)


@pytest.mark.parametrize("victim", NODES)
def test_a_failed_write_costs_the_disk_and_nothing_else(pair: Story, victim: str) -> None:
    clients = pair.clients(seed=41)
    for _ in range(2):
        clients.answered(40)
        pair.disks[victim].fail("pwrite")
        pair.nodes.wait(victim, diskless)
        clients.answered(60)
        pair.disks[victim].mend()
        attach(pair, victim)
        pair.synced()
    clients.answered(20)
    assert not clients.lost, clients.lost  # there was a good copy all the time
    pair.finish()


@pytest.mark.parametrize("victim", NODES)
def test_a_failed_flush_costs_the_disk_and_nothing_else(tmp_path: Path, victim: str) -> None:
    """What the cache took since the last good flush is unknown now (I-5)."""
    need_faulty_disks()
    with story(tmp_path, timing=PATIENT, net=PATIENT_NET, volatile=NODES) as pair:
        clients = pair.clients(seed=42)
        clients.answered(40)
        pair.disks[victim].fail("flush")
        pair.nodes.wait(victim, diskless)
        clients.answered(40)
        pair.disks[victim].mend()
        pair.disks[victim].power_off()  # a broken disk: what its cache held is gone
        pair.disks[victim].power_on()
        attach(pair, victim)
        pair.synced()
        assert not clients.lost, clients.lost  # there was a good copy all the time
        pair.finish()


def test_a_failed_read_is_answered_by_the_peer(pair: Story) -> None:
    clients = pair.clients(seed=43)
    clients.answered(40)
    pair.disks[pair.primary].fail("pread")
    clients.answered(80)
    assert not clients.lost, clients.lost  # there was a good copy all the time
    pair.disks[pair.primary].mend()
    if diskless(pair.nodes.status(pair.primary)):
        attach(pair, pair.primary)
    pair.finish()


def test_failing_metadata_of_the_primary_is_a_failed_disk(tmp_path: Path) -> None:
    """The data could still be written; what must survive a crash can not."""
    need_faulty_disks()
    with story(tmp_path, timing=PATIENT, net=PATIENT_NET, faulty_metadata=["alpha"]) as pair:
        clients = pair.clients(seed=44)
        clients.answered(15)
        pair.metadata["alpha"].fail("pwrite")
        with pair.connect() as client:
            client.write(16 << 20, b"x" * 4096)  # into an extent that is not in the activity log yet
        pair.nodes.wait("alpha", diskless)
        clients.answered(40)
        pair.metadata["alpha"].mend()
        attach(pair, "alpha")
        pair.synced()
        assert not clients.lost, clients.lost  # there was a good copy all the time
        pair.finish()


def test_failing_metadata_of_the_secondary_is_a_failed_disk(tmp_path: Path) -> None:
    """It would have to record that it becomes a mixture (V5) before the resync copies the first block."""
    need_faulty_disks()
    with story(tmp_path, timing=PATIENT, net=PATIENT_NET, faulty_metadata=["beta"]) as pair:
        clients = pair.clients(seed=44)
        clients.answered(20)
        call(pair.nodes.control("alpha"), "disconnect", timeout_s=GIVE_UP_S)
        clients.answered(40)
        pair.metadata["beta"].fail("pwrite")
        call(pair.nodes.control("alpha"), "connect", timeout_s=GIVE_UP_S)
        pair.nodes.wait("beta", diskless)
        clients.answered(20)
        pair.metadata["beta"].mend()
        attach(pair, "beta")
        pair.synced()
        assert not clients.lost, clients.lost  # there was a good copy all the time
        pair.finish()


@pytest.mark.parametrize("victim", NODES)
def test_a_disk_that_cannot_be_read_is_not_attached_and_may_be_mended(pair: Story, victim: str) -> None:
    clients = pair.clients(seed=48)
    clients.answered(20)
    call(pair.nodes.control(victim), "detach", timeout_s=GIVE_UP_S)
    pair.disks[victim].fail("pread")
    with pytest.raises(Refused, match="cannot be read"):
        attach(pair, victim)
    clients.answered(40)
    pair.disks[victim].mend()
    attach(pair, victim)
    pair.synced()
    assert not clients.lost, clients.lost  # there was a good copy all the time
    pair.finish()


def test_without_any_good_copy_clients_get_errors_and_nothing_acknowledged_is_lost(pair: Story) -> None:
    """The Primary's disk, then its peer's.  The copy that was good last is where it goes on."""
    clients = pair.clients(seed=45)
    clients.answered(40)
    pair.disks["alpha"].fail("pwrite")
    pair.nodes.wait("alpha", diskless)
    clients.answered(40)
    pair.disks["beta"].fail("pwrite")
    pair.nodes.wait("beta", diskless)
    clients.parked()
    for node in ("beta", "alpha"):
        pair.disks[node].mend()
        attach(pair, node)
    pair.synced()
    clients.follow()
    clients.answered(40)
    pair.finish()


def test_a_diskless_primary_dies_and_its_peer_takes_over(pair: Story) -> None:
    clients = pair.clients(seed=46)
    clients.answered(40)
    pair.disks[pair.primary].fail("pwrite")
    pair.nodes.wait(pair.primary, diskless)
    clients.answered(40)
    pair.kill(pair.primary)
    clients.parked()
    pair.fail_over()
    clients.follow()
    clients.answered(20)
    pair.disks[pair.secondary].mend()
    pair.start(pair.secondary)
    pair.synced()
    pair.finish()


def test_a_failing_fdatasync_of_the_c_library_is_a_failed_disk(tmp_path: Path) -> None:
    """A second injector: libfiu, inside the daemon.

    It intercepts fdatasync.  It does not know pwritev2 and preadv2, with which Python's os.pwritev and os.preadv
    read and write, so those errors come from nbdkit above.
    """
    need("fiu-run", "fiu-ctrl")
    fifo, victim = tmp_path / "fiu", "alpha"
    with story(tmp_path, timing=PATIENT, net=PATIENT_NET, prefix={victim: ["fiu-run", "-x", "-f", str(fifo)]}) as pair:
        clients = pair.clients(seed=47, flush_share=0.2)
        clients.answered(40)
        control(fifo, pair.nodes, victim, "enable name=posix/io/sync/fdatasync,failinfo=5")
        pair.nodes.wait(victim, diskless)
        clients.answered(40)
        control(fifo, pair.nodes, victim, "disable name=posix/io/sync/fdatasync")
        attach(pair, victim)
        pair.synced()
        assert not clients.lost, clients.lost  # there was a good copy all the time
        pair.finish()


def control(fifo: Path, nodes: TwoNodes, node: str, order: str) -> None:
    pid = nodes.processes[node].pid
    subprocess.run(
        ["fiu-ctrl", "-f", str(fifo), "-c", order, str(pid)], check=True, capture_output=True, timeout=GIVE_UP_S
    )
