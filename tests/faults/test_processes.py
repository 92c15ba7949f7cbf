# SPDX-License-Identifier: Apache-2.0
"""A daemon is killed, or stopped for a while and continued: the peer has long declared it dead."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.faults.story import NERVOUS, NERVOUS_NET, PATIENT, PATIENT_NET, Story, story
from tests.integration.cluster import NODES, Status, alone


@pytest.fixture
def patient(tmp_path: Path) -> Iterator[Story]:
    with story(tmp_path, timing=PATIENT, net=PATIENT_NET) as found:
        yield found


@pytest.fixture
def nervous(tmp_path: Path) -> Iterator[Story]:
    with story(tmp_path, timing=NERVOUS, net=NERVOUS_NET) as found:
        yield found


def test_the_clients_follow_three_failovers_and_see_one_disk(patient: Story) -> None:
    clients = patient.clients(seed=1)
    for more in (40, 17, 60):
        clients.answered(more)
        patient.kill(patient.primary)
        clients.parked()
        patient.fail_over()
        clients.follow()
        clients.answered(25)
        patient.start(patient.secondary)
        patient.synced()
    patient.finish()


def test_a_killed_secondary_is_not_missed_and_catches_up(patient: Story) -> None:
    clients = patient.clients(seed=2)
    for more in (30, 50):
        clients.answered(more)
        patient.kill(patient.secondary)
        clients.answered(40)
        patient.start(patient.secondary)
        clients.answered(20)
        patient.synced()
    patient.finish()


def test_a_stopped_secondary_is_given_up_and_taken_back(nervous: Story) -> None:
    clients = nervous.clients(seed=3)
    clients.answered(40)
    nervous.stop(nervous.secondary)
    nervous.nodes.wait(nervous.primary, alone)
    clients.answered(40)  # without the peer
    nervous.resume(nervous.secondary)
    nervous.synced()
    clients.answered(20)
    nervous.finish()


def test_a_stopped_primary_goes_on_where_it_was_when_nobody_took_its_place(nervous: Story) -> None:
    clients = nervous.clients(seed=4)
    clients.answered(40)
    nervous.stop(nervous.primary)
    nervous.nodes.wait(nervous.secondary, alone)
    nervous.resume(nervous.primary)
    clients.answered(40)
    nervous.synced()
    nervous.finish()


def test_a_stopped_primary_that_is_fenced_before_it_wakes_is_replaced(nervous: Story) -> None:
    clients = nervous.clients(seed=5)
    clients.answered(40)
    nervous.stop_mirroring_primary()
    nervous.nodes.wait(nervous.secondary, alone)
    nervous.kill(nervous.primary)
    clients.parked()
    nervous.fail_over()
    clients.follow()
    clients.answered(40)
    nervous.start(nervous.secondary)
    nervous.synced()
    nervous.finish()


def test_a_zombie_primary_that_was_replaced_unfenced_is_noticed_by_both_and_nothing_is_merged(nervous: Story) -> None:
    """The manager made a mistake.  Both wrote; neither copy may take a block of the other's."""
    clients = nervous.clients(seed=6)
    clients.answered(40)
    nervous.stop(nervous.primary)
    nervous.nodes.wait(nervous.secondary, alone)
    zombie = nervous.primary
    nervous.swap()
    nervous.promote()
    with nervous.connect() as client:
        client.write(4096 * 100, b"b" * 4096)
        client.flush()
    nervous.resume(zombie)
    with nervous.nodes.nbd(zombie) as client:
        client.write(4096 * 200, b"a" * 4096)
        client.flush()
    clients.stop()
    for node in NODES:
        nervous.nodes.wait(node, split_brain)
    for node, own, other in ((zombie, 200, 100), (nervous.primary, 100, 200)):
        with nervous.nodes.nbd(node) as client:
            assert client.read(4096 * own, 4096) == (b"a" if node == zombie else b"b") * 4096
            assert client.read(4096 * other, 4096) == bytes(4096), f"{node} has a block of the other copy"


def split_brain(status: Status) -> bool:
    return any(reason["code"] == "split-brain" for reason in status["reasons"])
