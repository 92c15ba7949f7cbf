# SPDX-License-Identifier: Apache-2.0
"""A disk that is slow makes everything slow; one that does not answer any more costs its node, and no more."""

from __future__ import annotations

import json
from pathlib import Path

from replicator.control.client import call
from tests.faults.disks import need_faulty_disks
from tests.faults.story import PATIENT, PATIENT_NET, story
from tests.integration.cluster import GIVE_UP_S, NODES, alone


def test_a_frozen_secondary_disk_is_given_up_and_taken_back(tmp_path: Path) -> None:
    """The process lives and would answer every ping; what ends the link is ko-count."""
    need_faulty_disks()
    # No ping is sent, so nothing else can end it.
    net = 'ping-interval = "60s"\nko-count = 4\nhandshake-timeout = "1s"'
    with story(tmp_path, timing=PATIENT, net=net, faulty=NODES) as pair:
        clients = pair.clients(seed=51)
        clients.answered(40)
        pair.disks["beta"].freeze()
        pair.nodes.wait(pair.primary, alone)
        clients.answered(60)
        pair.disks["beta"].thaw()
        call(pair.nodes.control(pair.primary), "connect", timeout_s=GIVE_UP_S)  # it was expelled
        pair.synced()
        clients.answered(20)
        reasons = [line.get("reason") for line in log(pair.nodes.base / "alpha.log", "connection-state")]
        assert any("the peer does not acknowledge writes" in str(reason) for reason in reasons), reasons
        assert not clients.lost, clients.lost  # there was a good copy all the time
        pair.finish()


def test_a_primary_with_a_frozen_disk_is_fenced_and_replaced(tmp_path: Path) -> None:
    need_faulty_disks()
    with story(tmp_path, timing=PATIENT, net=PATIENT_NET, faulty=NODES) as pair:
        clients = pair.clients(seed=52)
        clients.answered(40)
        pair.disks["alpha"].freeze()
        pair.disks["alpha"].power_off()  # the manager pulls the plug; with a frozen disk a process cannot be killed
        pair.kill("alpha")
        clients.parked()
        pair.fail_over()
        clients.follow()
        clients.answered(40)
        pair.disks["alpha"].power_on()
        pair.start("alpha")
        pair.synced()
        pair.finish()


def test_slow_disks_are_only_slow(tmp_path: Path) -> None:
    need_faulty_disks()
    with story(tmp_path, timing=PATIENT, net=PATIENT_NET, faulty=NODES, slow_ms=dict.fromkeys(NODES, 20)) as pair:
        clients = pair.clients(seed=53)
        clients.answered(80)
        assert not clients.lost
        for node in NODES:
            lost = [line for line in log(pair.nodes.base / f"{node}.log", "connection-state") if lost_link(line)]
            assert not lost, lost
        pair.finish()


def lost_link(line: dict[str, object]) -> bool:
    return line["connection"] not in ("Connecting", "Connected")


def log(path: Path, event: str) -> list[dict[str, object]]:
    lines = [json.loads(line) for line in path.read_text().splitlines() if line.strip()]
    return [line for line in lines if line["event"] == event]
