# SPDX-License-Identifier: Apache-2.0
"""The network between two nodes is cut: both ways, one way, again and again; and a node loses its power behind it.

Packets are dropped, nobody is told.  TCP and the daemon have to find out, and to find each other again afterwards.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from replicator.control.client import call
from replicator.errors import Refused
from tests.faults.network import Network, network
from tests.faults.story import NERVOUS, NERVOUS_NET, Story, story
from tests.integration.cluster import GIVE_UP_S, NODES, Status, alone

pytestmark = pytest.mark.root


@pytest.fixture
def cable() -> Iterator[Network]:
    with network() as made:
        yield made


@pytest.fixture(params=["clear"])
def pair(cable: Network, tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Story]:
    with story(tmp_path, timing=NERVOUS, net=NERVOUS_NET, network=cable, security=request.param) as found:
        yield found


@pytest.mark.parametrize(
    ("deaf", "pair"),
    [(NODES, "clear"), (("alpha",), "clear"), (("beta",), "clear"), (("alpha",), "tls")],
    indirect=["pair"],
    ids=["both", "primary", "secondary", "primary-tls"],
)
def test_a_cut_stops_nobody_and_the_copies_meet_again(pair: Story, cable: Network, deaf: tuple[str, ...]) -> None:
    clients = pair.clients(seed=11)
    clients.answered(40)
    cable.deafen(*deaf)
    for node in NODES:  # also the one that still hears
        pair.nodes.wait(node, alone)
    clients.answered(60)  # alone
    cable.heal()
    pair.synced()
    clients.answered(20)
    pair.finish()


def test_a_flapping_cable_costs_nothing_but_time(pair: Story, cable: Network) -> None:
    """Each flap falls on whatever the nodes are doing: connecting, comparing, copying."""
    drawn = random.Random(12)
    clients = pair.clients(seed=12)
    for number in range(8):
        clients.answered(drawn.randrange(1, 60))
        cable.deafen(*drawn.choice([("alpha",), ("beta",), NODES]))
        if number % 2:
            pair.nodes.wait(drawn.choice(NODES), alone)
        clients.answered(drawn.randrange(1, 40))
        cable.heal()
        if number % 3 == 0:
            pair.wait_connected()  # the next flap falls into the resync
    pair.synced()
    pair.finish()


def test_a_primary_that_loses_its_power_says_no_goodbye(pair: Story, cable: Network) -> None:
    """Half open: the peer's socket lives on.  The survivor finds out by itself and takes over."""
    clients = pair.clients(seed=13)
    clients.answered(60)
    pair.stop_mirroring_primary()
    cable.deafen(*NODES)  # nobody hears the kernel close the sockets
    pair.kill(pair.primary)
    clients.parked()
    pair.fail_over()
    cable.heal()
    clients.follow()
    clients.answered(40)
    pair.start(pair.secondary)
    pair.synced()
    pair.finish()


def test_a_node_that_was_promoted_behind_a_cut_is_split_brain_on_both(pair: Story, cable: Network) -> None:
    """Unfenced: both are Primary and both write.  At the next handshake both notice and neither gives in."""
    clients = pair.clients(seed=14)
    clients.answered(30)
    cable.deafen(*NODES)
    for node in NODES:
        pair.nodes.wait(node, alone)
    clients.answered(10)
    clients.stop()
    pair.read_all()
    pair.check_history()
    call(pair.nodes.control(pair.secondary), "primary", timeout_s=GIVE_UP_S)
    marks = {"alpha": (300, b"a"), "beta": (400, b"b")}
    for node, (block, letter) in marks.items():
        with pair.nodes.nbd(node) as client:
            client.write(block * 4096, letter * 4096)
            client.flush()
    cable.heal()
    for node in NODES:
        pair.nodes.wait(node, split_brain)
    for node in NODES:
        with pair.nodes.nbd(node) as client:
            for other, (block, letter) in marks.items():
                expected = letter * 4096 if other == node else bytes(4096)
                assert client.read(block * 4096, 4096) == expected, f"{node} has what {other} wrote, or lost its own"


def test_with_fencing_the_survivor_waits_for_the_word_that_the_peer_is_dead(cable: Network, tmp_path: Path) -> None:
    net = f'{NERVOUS_NET}\nfencing = "resource-only"'
    with story(tmp_path, timing=NERVOUS, net=net, network=cable) as pair:
        clients = pair.clients(seed=15)
        clients.answered(40)
        pair.stop_mirroring_primary()
        cable.deafen(*NODES)
        survivor = pair.nodes.wait(pair.secondary, alone)
        assert not survivor["may-promote"], survivor
        with pytest.raises(Refused) as refused:
            call(pair.nodes.control(pair.secondary), "primary", timeout_s=GIVE_UP_S)
        assert refused.value.code == "peer-not-outdated"
        pair.kill(pair.primary)
        clients.parked()
        pair.swap()
        pair.promote(force=True)
        cable.heal()
        clients.follow()
        clients.answered(40)
        pair.start(pair.secondary)
        pair.synced()
        pair.finish()


def split_brain(status: Status) -> bool:
    return any(reason["code"] == "split-brain" for reason in status["reasons"])
