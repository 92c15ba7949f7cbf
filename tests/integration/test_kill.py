# SPDX-License-Identifier: Apache-2.0
"""kill -9 of either node, or of both, fifty times in a row and always under load.

After every round: each acknowledged write reads back, no other block changed, both disks are equal byte for
byte, and what the resync copied is no more than what may have differed.  Victim, moment and place are drawn
from one seed; the moment is a number of acknowledged writes, never a time.
"""

from __future__ import annotations

import json
import os
import random
import statistics
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import pytest

from replicator.control.client import call
from replicator.drivers.nbd_client import NbdClient
from tests.integration.cluster import GIVE_UP_S, MIB, NODES, Status, TwoNodes, alone, connected, synced

BLOCK: Final = 4096
EXTENT: Final = 4 * MIB
DISK: Final = 48 * MIB
ROUNDS: Final = 50
DEPTH: Final = 16
NET: Final = 'ko-count = 255\nping-interval = "60s"'
SEED: Final = int(os.environ.get("REPLICATOR_KILL_SEED", "20260101"))


def content(block: int, number: int) -> bytes:
    """What write `number` puts into `block`: no two writes have equal content."""
    return struct.pack(">QQ", block, number) * (BLOCK // 16)


@dataclass
class Truth:
    """What every block of the volume must hold."""

    image: bytearray
    doubtful: dict[int, list[bytes]] = field(default_factory=dict)  # block -> what it may hold instead
    in_flight: dict[int, tuple[int, bytes]] = field(default_factory=dict)  # cookie -> block, content
    numbers: int = 0
    acknowledged: int = 0
    touched: set[int] = field(default_factory=set)  # extents that somebody wrote to since they were read

    def answered(self, cookie: int) -> None:
        block, data = self.in_flight.pop(cookie)
        self.image[block * BLOCK : (block + 1) * BLOCK] = data
        self.doubtful.pop(block, None)
        self.acknowledged += 1

    def cut_off(self) -> None:
        """The answers of what is in flight will never come."""
        for block, data in self.in_flight.values():
            self.doubtful.setdefault(block, []).append(data)
        self.in_flight.clear()

    def wrong_blocks(self, extent: int, found: bytes) -> list[int]:
        """Blocks that hold what they must not.  What was in doubt is settled: a Primary has said it now."""
        wrong = []
        first = extent * EXTENT // BLOCK
        for block in range(first, first + len(found) // BLOCK):
            at = slice(block * BLOCK, (block + 1) * BLOCK)
            data = found[at.start - extent * EXTENT : at.stop - extent * EXTENT]
            if data != self.image[at]:
                if data in self.doubtful.get(block, []):
                    self.image[at] = data
                else:
                    wrong.append(block)
            self.doubtful.pop(block, None)
        self.touched.discard(extent)
        return wrong


@dataclass
class Account:
    """What may differ since both copies were equal, all of it stable."""

    writes: int = 0
    hot: set[int] = field(default_factory=set)  # extents written in this tenure of a Primary
    primary_died: set[int] = field(default_factory=set)  # extents hot when a Primary died

    @property
    def limit_bytes(self) -> int:
        return self.writes * BLOCK + len(self.primary_died) * EXTENT


class Story:
    """The fifty rounds."""

    def __init__(self, nodes: TwoNodes) -> None:
        self.nodes = nodes
        self.drawn = random.Random(SEED)
        self.primary, self.secondary = NODES
        self.account = Account()
        self.travelled: list[int] = []
        self.victims: list[str] = []
        self.counted = (0, 0)  # process, and what it had received when we last looked
        self.log_read = dict.fromkeys(NODES, 0)
        with nodes.nbd(self.primary) as client:
            self.truth = Truth(bytearray(client.size_bytes))

    # -- writing --------------------------------

    def write(self, client: NbdClient, extents: list[int], count: int) -> None:
        """Keep DEPTH random writes in flight until `count` more are acknowledged.  Leaves some in flight."""
        truth, drawn = self.truth, self.drawn
        goal = truth.acknowledged + count
        while truth.acknowledged < goal:
            while len(truth.in_flight) < DEPTH:
                self.submit(client, drawn.choice(extents))
            answers = client.poll(GIVE_UP_S)
            assert answers, f"no write was answered for {GIVE_UP_S:.0f} s{self.where()}"
            for cookie, error in answers:
                assert not error, f"a write failed: {os.strerror(error)}{self.where()}"
                truth.answered(cookie)

    def submit(self, client: NbdClient, extent: int) -> None:
        truth, account = self.truth, self.account
        last = min((extent + 1) * EXTENT, len(truth.image)) // BLOCK
        block = self.drawn.randrange(extent * EXTENT // BLOCK, last)
        if any(block == other for other, _ in truth.in_flight.values()):
            return  # two writes of one block at once may be applied in either order
        truth.numbers += 1
        account.writes += 1
        account.hot.add(extent)
        truth.touched.add(extent)
        data = content(block, truth.numbers)
        truth.in_flight[-1] = block, data  # a write that is cut off in the middle is in doubt as well
        cookie = client.submit_write(block * BLOCK, data)
        truth.in_flight[cookie] = truth.in_flight.pop(-1)

    def finish(self, client: NbdClient) -> None:
        """Have everything in flight answered, and stable on both."""
        while self.truth.in_flight:
            answers = client.poll(GIVE_UP_S)
            assert answers, f"no write was answered for {GIVE_UP_S:.0f} s{self.where()}"
            for cookie, error in answers:
                assert not error, f"a write failed: {os.strerror(error)}{self.where()}"
                self.truth.answered(cookie)
        client.flush()

    # -- the round --------------------------------

    def round(self) -> None:
        drawn = self.drawn
        victim = drawn.choice(("Primary", "Secondary", "both"))
        self.victims.append(victim)
        extents = drawn.sample(range(DISK // EXTENT), 2)
        with self.nodes.nbd(self.primary) as client:
            self.write(client, extents, drawn.randrange(1, 120))
            if victim == "Secondary":
                self.nodes.kill(self.secondary)
                self.write(client, extents, drawn.randrange(1, 40))
                self.finish(client)
            elif victim == "Primary":
                self.nodes.kill(self.primary)
            else:
                for node in drawn.sample(NODES, 2):
                    self.nodes.kill(node)
        if victim != "Secondary":
            self.truth.cut_off()
            self.account.primary_died |= self.account.hot
        self.revive(victim, extents)
        if drawn.random() < 0.25:
            self.nodes.wait(self.primary, self.connected)
            return  # the next victim falls in the middle of this resync
        self.check()

    def revive(self, victim: str, extents: list[int]) -> None:
        """Bring back what died, and see to it that there is a Primary."""
        if victim == "Primary":
            survivor = self.nodes.wait(self.secondary, alone)
            if survivor["devices"][0]["disk-state"] == "UpToDate":
                self.primary, self.secondary = self.secondary, self.primary
                self.promote()
                self.read_back()
                self.write_alone(extents)
                self.start(self.secondary)
            else:  # it died in the middle of a resync: nobody else has all the data
                self.start(self.primary)
                self.promote()
        elif victim == "Secondary":
            self.start(self.secondary)
        elif self.drawn.random() < 0.5:
            self.start(self.primary)
            self.promote()
            self.read_back()
            self.write_alone(extents)
            self.start(self.secondary)
        else:
            for node in self.drawn.sample(NODES, 2):
                self.start(node)
            self.nodes.wait(self.primary, self.synced)
            self.promote()

    def write_alone(self, extents: list[int]) -> None:
        with self.nodes.nbd(self.primary) as client:
            self.write(client, extents, self.drawn.randrange(1, 40))
            self.finish(client)

    def start(self, node: str) -> None:
        said = self.nodes.start(node)
        assert said["ready"] and said["attach"]["ok"], f"{node}: {said}{self.where()}"

    def promote(self) -> None:
        call(self.nodes.control(self.primary), "primary", timeout_s=GIVE_UP_S)
        self.account.hot = set()

    # -- looking --------------------------------

    def read_back(self) -> None:
        """Every block of every extent written to since it was last read, from the Primary."""
        wrong = []
        with self.nodes.nbd(self.primary) as client:
            for extent in sorted(self.truth.touched):
                start = extent * EXTENT
                found = client.read(start, min(EXTENT, len(self.truth.image) - start))
                wrong += self.truth.wrong_blocks(extent, found)
            client.flush()  # also on a survivor that has not written yet
        assert not wrong, f"{len(wrong)} blocks are wrong on {self.primary}: {wrong[:8]}{self.where()}"

    def check(self) -> None:
        for node in NODES:
            self.nodes.wait(node, self.synced)
        self.read_back()
        self.compare()
        self.check_what_travelled()
        self.account = Account(hot=self.account.hot)

    def compare(self) -> None:
        """The disks, whole: nothing is under way, so the files hold all that was acknowledged."""
        size = len(self.truth.image)
        copies = [self.nodes.data(node, size) for node in NODES]
        assert copies[0] == copies[1], f"the copies differ{self.where()}"
        assert copies[0] == self.truth.image, f"the disks hold what the Primary does not say{self.where()}"

    def check_what_travelled(self) -> None:
        """Neither what arrived at the last target nor what any resync set out to copy may be more."""
        status: Status = call(self.nodes.control(self.secondary), "status", timeout_s=GIVE_UP_S)
        received = status["connections"][0]["peer_devices"][0]["received"] * 1024
        pid, before = self.counted
        travelled = received - before if status["pid"] == pid else received
        self.counted = status["pid"], received
        limit, asked_bytes = self.account.limit_bytes, 0
        for node in NODES:
            for line in self.new_log_lines(node):
                assert line["event"] != "refused-data", f"split brain: {line}{self.where()}"
                if line["event"] == "resync-started":
                    asked = int(line["dirty_blocks"]) * BLOCK
                    assert asked <= limit, f"a resync of {asked} bytes, allowed {limit}{self.where()}"
                    asked_bytes += asked
        # Resyncs that were interrupted count each; and a target gets the writes of the meantime as well.
        most = asked_bytes + self.account.writes * BLOCK
        assert travelled <= most, f"{travelled} bytes travelled, {most} were needed{self.where()}"
        self.travelled.append(travelled)

    def new_log_lines(self, node: str) -> Iterator[dict[str, Any]]:
        with (self.nodes.base / f"{node}.log").open("rb") as log:
            log.seek(self.log_read[node])
            whole = log.read().rpartition(b"\n")[0]
        self.log_read[node] += len(whole)
        for line in whole.splitlines():
            if line.strip():
                yield json.loads(line)

    def connected(self, status: Status) -> bool:
        self.no_parting(status)
        return connected(status)

    def synced(self, status: Status) -> bool:
        self.no_parting(status)
        return synced(status)

    def no_parting(self, status: Status) -> None:
        state = status["connections"][0]["connection-state"]
        assert state != "StandAlone", f"{status['reasons']}{self.where()}"

    def where(self) -> str:
        return f"\nround {len(self.victims)}, seed {SEED}, victims {self.victims[-3:]}\n{self.nodes.logs()}"


@pytest.fixture
def nodes(tmp_path: Path) -> Iterator[TwoNodes]:
    # A killed process closes its sockets at once.  A peer that is only slow must not be given up: the Primary
    # would go on alone, and rightly so, and what the other one then lacks is no loss.
    with TwoNodes(tmp_path, size_bytes=DISK, net=NET, disk="al-extents = 67") as pair:
        for node in NODES:
            path = pair.config_dir(node) / "r0.toml"
            text = path.read_text()
            for was, becomes in (("500ms", "150ms"), ("400ms", "140ms"), ("300ms", "140ms")):
                assert was in text
                text = text.replace(was, becomes)
            path.write_text(text)
        pair.create_md()
        pair.start_both()
        pair.cli("alpha", "new-current-uuid", "--clear-bitmap", "r0", check=True)
        for node in NODES:
            pair.wait(node, synced)
        pair.cli("alpha", "primary", "r0", check=True)
        yield pair


def test_fifty_kills_lose_no_acknowledged_write(nodes: TwoNodes) -> None:
    story = Story(nodes)
    for number in range(1, ROUNDS + 1):
        story.round()
        if number % 10 == 0:
            end_in_order_and_come_back(story)
    assert story.truth.acknowledged > ROUNDS * 10
    assert {"Primary", "Secondary", "both"} == set(story.victims)
    # Full syncs would satisfy every check above once all extents are hot.
    assert statistics.median(story.travelled) < DISK / 3, story.travelled


def end_in_order_and_come_back(story: Story) -> None:
    """Down on both, so that nothing but the disks remains; then look at them."""
    nodes = story.nodes
    story.check()
    for node in (story.primary, story.secondary):
        call(nodes.control(node), "down", timeout_s=GIVE_UP_S)
        assert nodes.ended(node) == 0
    story.compare()
    for node in NODES:
        story.start(node)
    nodes.wait(story.primary, story.synced)
    story.promote()
    story.check()
