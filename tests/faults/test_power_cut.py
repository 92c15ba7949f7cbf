# SPDX-License-Identifier: Apache-2.0
"""The power fails: a daemon and its disk stop at once, and what the disk had only in its cache is lost.

Protocol C promises (I-2): what was acknowledged survives the loss of either node, what was flushed survives the loss of
both.  Every disk here has a volatile write-back cache that keeps nothing it was not told to keep.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any, Final

import pytest

from replicator.control.client import call
from tests.faults.disks import need_faulty_disks
from tests.faults.history import write_block
from tests.faults.linearizable import epoch_prefixes, unflushed
from tests.faults.story import BLOCKS, PATIENT, PATIENT_NET, Story, story
from tests.integration.cluster import GIVE_UP_S, NODES, alone

#: Questions, not seconds.
TRIES_MAX: Final = 5000


@pytest.fixture
def pair(tmp_path: Path) -> Iterator[Story]:
    need_faulty_disks()
    with story(tmp_path, timing=PATIENT, net=PATIENT_NET, volatile=NODES) as found:
        yield found


def test_the_survivor_of_a_power_cut_of_the_primary_has_everything(pair: Story) -> None:
    clients = pair.clients(seed=31)
    for _ in range(2):
        clients.answered(50)
        pair.power_cut(pair.primary)
        clients.parked()
        pair.fail_over()
        clients.follow()
        clients.answered(30)
        pair.start(pair.secondary)
        pair.synced()
    pair.finish()


def test_a_primary_that_comes_back_learns_from_the_survivor_what_its_cache_lost(pair: Story) -> None:
    """Nobody was promoted meanwhile; its own disk is older than what it had acknowledged."""
    clients = pair.clients(seed=32, flush_share=0.01)
    for _ in range(2):
        clients.answered(60)
        pair.power_cut(pair.primary)
        clients.parked()
        pair.nodes.wait(pair.secondary, alone)
        pair.start(pair.primary)
        pair.synced()
        pair.promote()
        clients.follow()
    clients.answered(20)
    pair.finish()


def test_the_survivor_may_restart_before_the_primary_is_back(pair: Story) -> None:
    clients = pair.clients(seed=33, flush_share=0.01)
    clients.answered(60)
    pair.power_cut(pair.primary)
    clients.parked()
    pair.nodes.wait(pair.secondary, alone)
    for _ in range(TRIES_MAX):
        if knows_that_it_survived(pair, pair.secondary):
            break
    else:
        raise AssertionError(f"not recorded\n{pair.nodes.logs()}")
    pair.power_cut(pair.secondary)
    for node in NODES:
        pair.start(node)
    pair.synced()
    pair.promote()
    clients.follow()
    clients.answered(20)
    pair.finish()


def test_a_secondary_that_lost_its_power_gets_what_its_cache_lost(pair: Story) -> None:
    clients = pair.clients(seed=34, flush_share=0.01)
    for more in (1, 30):
        clients.answered(50)
        pair.power_cut(pair.secondary)
        clients.answered(more)
        pair.start(pair.secondary)
        pair.synced()
    pair.finish()


def test_a_target_that_loses_its_power_in_the_middle_of_the_resync_begins_where_it_must(pair: Story) -> None:
    clients = pair.clients(seed=35)
    pair.kill(pair.secondary)
    with pair.connect() as client:
        for block in range(2048, 4096):
            client.submit_write(block * 4096, block.to_bytes(8, "big") * 512)
        while client.in_flight:
            assert client.poll(30), "no answer"
    pair.start(pair.secondary)
    for _ in range(3):
        pair.wait_connected()
        pair.power_cut(pair.secondary)
        clients.answered(20)
        pair.start(pair.secondary)
    pair.synced()
    pair.finish()


@pytest.mark.parametrize("back", [NODES, ("alpha",), ("beta",)], ids=["both", "primary", "secondary"])
def test_what_was_flushed_survives_a_power_cut_of_both_on_each_of_them(pair: Story, back: tuple[str, ...]) -> None:
    clients = pair.clients(seed=36)
    clients.answered(120)
    pair.power_cut(*NODES)
    clients.parked()
    clients.stop()
    pair.check_history()
    for node in back:
        pair.start(node)
    if len(back) == 2:
        pair.synced()
    elif back[0] != pair.primary:
        pair.swap()
    pair.promote()
    history = pair.history
    assert history.flushes, "nothing was flushed"
    allowed = unflushed(history.operations, history.flushes, history.stable)
    held = pair.read_all()
    wrong = {block: value for block, value in held.items() if value not in allowed.get(block, {0})}
    assert not wrong, f"{wrong} is older than a flush; allowed {allowed}\n{pair.nodes.logs()}"
    pair.new_era(held)
    clients = pair.clients(seed=37)
    clients.answered(40)
    for node in NODES:
        if node not in back:
            pair.start(node)
    clients.answered(20)
    pair.synced()
    pair.finish()


def test_a_flush_is_answered_only_when_the_peer_is_done_with_it(tmp_path: Path) -> None:
    """A flush of the peer's disk takes its time, and the power fails right behind the answer (I-3)."""
    need_faulty_disks()
    with story(tmp_path, timing=PATIENT, net=PATIENT_NET, volatile=NODES, slow_ms={"beta": 30}) as pair:
        with pair.connect() as client:
            for value in islice(pair.values, 12):
                write_block(pair.history, client, 0, value, value)
            client.flush()
            pair.power_cut(*NODES)
        pair.swap()
        pair.start(pair.primary)
        pair.promote()
        held = pair.read_all()
        assert all(held[value] == value for value in range(1, 13)), held


@pytest.mark.parametrize("seed", range(2))
def test_under_protocol_a_the_last_copy_keeps_whole_epochs_through_a_power_cut(tmp_path: Path, seed: int) -> None:
    need_faulty_disks()
    drawn = random.Random(seed)
    with story(tmp_path, timing=PATIENT, net=PATIENT_NET, volatile=NODES, protocol="A") as pair:
        epochs: list[list[tuple[int, int]]] = [[]]
        with pair.connect() as client:
            for value in islice(pair.values, drawn.randrange(40, 80)):
                block = drawn.choice(BLOCKS)
                epochs[-1].append((block, value))
                write_block(pair.history, client, 0, block, value)
                if drawn.random() < 0.15:
                    client.flush()
                    epochs.append([])
            pair.power_cut(*NODES)
        pair.swap()
        pair.start(pair.primary)
        pair.promote()
        held = pair.read_all()
        assert epoch_prefixes(epochs, held), f"a hole: {held} of {epochs}"


def knows_that_it_survived(pair: Story, node: str) -> bool:
    """Durably: on its disk stands that it holds all that the lost Primary had acknowledged."""
    found: Any = call(pair.nodes.control(node), "gi", timeout_s=GIVE_UP_S)
    return bool(found["volumes"][0]["peers"][0]["survivor"])
