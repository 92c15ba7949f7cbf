# SPDX-License-Identifier: Apache-2.0
"""A sparse backing file on a file system that fills up: ENOSPC is a failed disk, not a lost write."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path

import pytest

from replicator.control.client import call
from tests.faults.disks import FullDisk
from tests.faults.network import need_root
from tests.faults.story import PATIENT, PATIENT_NET, SIZE, story
from tests.integration.cluster import GIVE_UP_S, MIB, NODES, Status

pytestmark = pytest.mark.root


def diskless(status: Status) -> bool:
    return bool(status["devices"][0]["disk-state"] == "Diskless")


@pytest.mark.parametrize("victim", NODES)
def test_a_full_file_system_costs_one_copy_until_there_is_room(tmp_path: Path, victim: str) -> None:
    need_root("a small file system")
    with ExitStack() as stack:
        disk = FullDisk(tmp_path / "small", size_bytes=SIZE, room_bytes=4 * MIB)
        stack.callback(disk.remove)
        pair = stack.enter_context(story(tmp_path, timing=PATIENT, net=PATIENT_NET, disks={victim: disk.path}))
        clients = pair.clients(seed=61)
        clients.answered(40)
        with pair.connect() as client:
            for block in range(2048, 2048 + 8 * MIB // 4096):
                client.submit_write(block * 4096, block.to_bytes(8, "big") * 512)
            while client.in_flight:
                answers = client.poll(GIVE_UP_S)
                assert answers and not any(error for _, error in answers), answers
        pair.nodes.wait(victim, diskless)
        clients.answered(40)
        disk.enlarge()
        call(pair.nodes.control(victim), "attach", timeout_s=GIVE_UP_S)
        pair.synced()
        clients.answered(20)
        assert not clients.lost, clients.lost  # there was a good copy all the time
        pair.finish()


def test_two_full_file_systems_are_an_error_and_the_last_good_copy_goes_on(tmp_path: Path) -> None:
    """Whichever node has to give up last still has everything that was acknowledged."""
    need_root("a small file system")
    with ExitStack() as stack:
        disks = {node: FullDisk(tmp_path / f"small-{node}", size_bytes=SIZE, room_bytes=4 * MIB) for node in NODES}
        for disk in disks.values():
            stack.callback(disk.remove)
        files = {node: disk.path for node, disk in disks.items()}
        pair = stack.enter_context(story(tmp_path, timing=PATIENT, net=PATIENT_NET, disks=files))
        clients = pair.clients(seed=62)
        clients.answered(40)
        with pair.connect() as client:
            for block in range(2048, 2048 + 8 * MIB // 4096):
                client.submit_write(block * 4096, block.to_bytes(8, "big") * 512)
            failed = 0
            while client.in_flight:
                answers = client.poll(GIVE_UP_S)
                assert answers, "no answer"
                failed += sum(bool(error) for _, error in answers)
        assert failed, "more was acknowledged than there is room for"
        clients.parked()
        for disk in disks.values():
            disk.enlarge()
        for node in reversed(NODES):
            if diskless(pair.nodes.status(node)):
                call(pair.nodes.control(node), "attach", timeout_s=GIVE_UP_S)
        pair.synced()
        clients.follow()
        clients.answered(20)
        pair.finish()
