# SPDX-License-Identifier: Apache-2.0
"""Damaged, foreign and missing metadata, met by a real process: one sentence, one hint, nothing overwritten.

What can be told from what is left is used, and then it means more resync and never less.  The metadata is that
of a Primary that was killed: eight blocks dirty towards its absent peer, one extent hot.
"""

from __future__ import annotations

import hashlib
import os
import random
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final

import pytest

from replicator.core.geometry import (
    ACTIVITY_BLOCKS,
    ACTIVITY_OFFSET,
    FIXED_BYTES,
    PAGE,
    SUPERBLOCK_OFFSETS,
    area_bytes,
)
from replicator.drivers.metadata import Place, create_metadata
from tests.integration.cluster import MIB, NODES, TwoNodes, alone, synced

DISK: Final = 16 * MIB
BLOCK: Final = 4096
DIRTY: Final = 8
HOT_BLOCKS: Final = 1024  # one extent
SLOTS_MIN: Final = 1


class Case:
    """alpha, running without its disk, and the metadata as the crash left it."""

    def __init__(self, nodes: TwoNodes) -> None:
        self.nodes = nodes
        self.pid = nodes.processes["alpha"].pid
        self.disk = nodes.disk("alpha")
        self.path = self.disk.with_suffix(".md")
        self.intact = b""

    @property
    def base(self) -> int:
        """Where the fixed part begins."""
        return len(self.intact) // PAGE * PAGE - FIXED_BYTES

    def put(self, content: bytes) -> None:
        self.path.write_bytes(content)

    def with_bytes(self, offset: int, content: bytes) -> bytes:
        changed = bytearray(self.intact)
        changed[offset : offset + len(content)] = content
        assert len(changed) == len(self.intact)
        return bytes(changed)

    def flipped(self, offset: int) -> bytes:
        return self.with_bytes(offset, bytes([self.intact[offset] ^ 0xFF]))

    def digests(self) -> list[str]:
        return [
            hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "-" for path in (self.path, self.disk)
        ]

    def refused(self, *patterns: str) -> None:
        """`attach` says why not in one sentence, gives a hint, and touches nothing; the process lives."""
        before = self.digests()
        done = self.nodes.cli("alpha", "attach", "r0")
        assert done.returncode == 11, f"{done.returncode}\n{done.stdout}{done.stderr}"
        assert len(done.stderr.splitlines()) <= 2 and "Traceback" not in done.stderr, done.stderr
        assert re.search(r"\bhint: \S", done.stderr), done.stderr
        for pattern in patterns:
            assert re.search(pattern, done.stderr), done.stderr
        assert self.digests() == before, "something was overwritten"
        status = self.nodes.status("alpha")
        assert status["pid"] == self.pid and status["devices"][0]["disk-state"] == "Diskless"
        (reason,) = [entry for entry in status["reasons"] if entry["scope"] == "volume 0"]
        assert reason["code"] == "diskless" and re.search(patterns[0], reason["text"]), reason

    def dirty_after_attach(self) -> int:
        """Attach, which must succeed; how many blocks the peer lacks."""
        self.nodes.cli("alpha", "attach", "r0", check=True)
        status = self.nodes.status("alpha")
        assert status["pid"] == self.pid and status["devices"][0]["disk-state"] == "UpToDate"
        dirty: int = status["connections"][0]["peer_devices"][0]["out-of-sync"] * 1024 // BLOCK
        return dirty


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Case]:
    with TwoNodes(tmp_path_factory.mktemp("metadata"), size_bytes=DISK, metadata="external") as nodes:
        nodes.create_md()
        nodes.start_both()
        nodes.cli("alpha", "new-current-uuid", "--clear-bitmap", "r0", check=True)
        for node in NODES:
            nodes.wait(node, synced)
        nodes.cli("alpha", "primary", "r0", check=True)
        nodes.kill("beta")
        nodes.wait("alpha", alone)
        with nodes.nbd("alpha") as client:
            client.write(0, b"\x5a" * (DIRTY * BLOCK))
            client.flush()
            nodes.kill("alpha")
        intact = nodes.disk("alpha").with_suffix(".md").read_bytes()
        nodes.start("alpha")
        nodes.cli("alpha", "detach", "r0", check=True)
        case = Case(nodes)
        case.intact = intact
        yield case


@pytest.fixture
def case(prepared: Case) -> Iterator[Case]:
    prepared.put(prepared.intact)
    data = prepared.disk.read_bytes()
    yield prepared
    prepared.nodes.cli("alpha", "detach", "r0")
    assert prepared.nodes.processes["alpha"].poll() is None, prepared.nodes.logs()
    if not prepared.disk.is_file() or prepared.disk.stat().st_size != len(data):
        prepared.disk.write_bytes(data)


# ------------------------------------------------------------------------------------------------- refused

LENGTHS: Final[dict[str, Callable[[int], int]]] = {
    "nothing": lambda size: 0,
    "one-byte": lambda size: 1,
    "half-the-fixed-part": lambda size: FIXED_BYTES // 2,
    "one-byte-less-than-the-fixed-part": lambda size: FIXED_BYTES - 1,
    "the-fixed-part": lambda size: FIXED_BYTES,
    "half": lambda size: size // 2,
    "a-page-less": lambda size: size - PAGE,
    "a-sector-less": lambda size: size - 512,
    "a-byte-less": lambda size: size - 1,
    "a-page-more": lambda size: size + PAGE,
}


@pytest.mark.parametrize("name", LENGTHS)
def test_a_metadata_file_of_another_length_is_refused(case: Case, name: str) -> None:
    length = LENGTHS[name](len(case.intact))
    case.put(case.intact[:length].ljust(length, b"\0"))
    case.refused("0.md")


def test_zeroes_are_no_metadata(case: Case) -> None:
    case.put(bytes(len(case.intact)))
    case.refused("there is no metadata", "create-md")


def test_random_bytes_are_no_metadata(case: Case) -> None:
    case.put(random.Random(1).randbytes(len(case.intact)))
    case.refused("holds something else", "copy 0 is not ours, copy 1 is not ours", "create-md --force")


@pytest.mark.parametrize("at", [20, 100, 1000, 2000])
def test_two_damaged_superblocks_are_refused(case: Case, at: int) -> None:
    changed = bytearray(case.intact)
    for offset in SUPERBLOCK_OFFSETS:
        changed[case.base + offset + at] ^= 0xFF
    case.put(bytes(changed))
    case.refused("no superblock can be used", "create-md --force")


@pytest.mark.parametrize("copy", [0, 1])
def test_one_superblock_of_rubbish_is_refused_because_it_may_be_the_newer(case: Case, copy: int) -> None:
    case.put(case.with_bytes(case.base + SUPERBLOCK_OFFSETS[copy], random.Random(2).randbytes(PAGE)))
    case.refused("may be lost|holds something else", "create-md --force")


@pytest.mark.parametrize("copy", [0, 1])
def test_one_superblock_that_is_damaged_is_never_worth_less_dirty_blocks(case: Case, copy: int) -> None:
    """Refused, or used for a reason: then what is left of it says at least as much."""
    case.put(case.flipped(case.base + SUPERBLOCK_OFFSETS[copy] + 100))
    done = case.nodes.cli("alpha", "attach", "r0")
    if done.returncode:
        assert case.path.read_bytes() == case.flipped(case.base + SUPERBLOCK_OFFSETS[copy] + 100)
        case.refused("superblock newer than sequence .* may be lost", "create-md --force")
    else:
        case.nodes.cli("alpha", "detach", "r0", check=True)
        case.put(case.flipped(case.base + SUPERBLOCK_OFFSETS[copy] + 100))
        assert case.dirty_after_attach() >= HOT_BLOCKS


def test_metadata_of_another_node_is_refused(case: Case) -> None:
    case.put(case.nodes.disk("beta").with_suffix(".md").read_bytes())
    case.refused("belongs to volume 0 of node 1, not to volume 0 of node 0")


def test_metadata_of_another_volume_is_refused(case: Case) -> None:
    case.path.unlink()
    place = Place(disk=str(case.disk), metadata=str(case.path), io="buffered")
    create_metadata(place, volume=5, node_id=0, peer_ids=[1], slots=1)
    case.refused("belongs to volume 5 of node 0, not to volume 0 of node 0")


def test_metadata_that_knows_no_peer_of_ours_is_refused(case: Case) -> None:
    case.path.unlink()
    place = Place(disk=str(case.disk), metadata=str(case.path), io="buffered")
    create_metadata(place, volume=0, node_id=0, peer_ids=[9], slots=1)
    case.refused("no slot for beta", "create-md --force")


@pytest.mark.parametrize("size", [0, 512, MIB, DISK - BLOCK, DISK - 512])
def test_a_disk_that_has_shrunk_is_refused(case: Case, size: int) -> None:
    os.truncate(case.disk, size)
    case.refused("0.img")


def test_a_missing_disk_and_missing_metadata_are_named(case: Case) -> None:
    away = case.disk.with_suffix(".away")
    case.disk.rename(away)
    try:
        case.refused("0.img")
    finally:
        away.rename(case.disk)
    case.path.unlink()
    case.refused("0.md")
    assert not case.path.exists(), "it was made, empty"
    case.path.mkdir()
    try:
        case.refused("0.md")
    finally:
        case.path.rmdir()


def test_up_says_the_same_as_attach_and_its_process_lives(tmp_path: Path) -> None:
    with TwoNodes(tmp_path, size_bytes=DISK, metadata="external") as nodes:
        nodes.create_md()
        path = nodes.disk("alpha").with_suffix(".md")
        good = path.read_bytes()
        assert len(good) >= area_bytes(DISK, SLOTS_MIN)
        path.write_bytes(bytes(len(good)))
        failed = nodes.cli("alpha", "up", "r0")
        assert failed.returncode == 11
        assert "there is no metadata" in failed.stderr and "hint: run `replicator create-md`" in failed.stderr
        assert path.read_bytes() == bytes(len(good))
        path.write_bytes(good)
        nodes.cli("alpha", "up", "r0", check=True)
        assert nodes.status("alpha")["devices"][0]["disk-state"] == "Inconsistent"


# ------------------------------------------------------------------------------ used, and more is copied


def test_what_the_crash_left_makes_the_hot_extent_dirty(case: Case) -> None:
    assert case.dirty_after_attach() == HOT_BLOCKS


@pytest.mark.parametrize("block", range(ACTIVITY_BLOCKS))
def test_a_damaged_block_of_the_activity_log_never_means_less(case: Case, block: int) -> None:
    case.put(case.flipped(case.base + ACTIVITY_OFFSET + block * PAGE + 64))
    assert case.dirty_after_attach() >= HOT_BLOCKS


def test_an_activity_log_of_rubbish_makes_everything_dirty(case: Case) -> None:
    rubbish = random.Random(3).randbytes(ACTIVITY_BLOCKS * PAGE)
    case.put(case.with_bytes(case.base + ACTIVITY_OFFSET, rubbish))
    assert case.dirty_after_attach() == DISK // BLOCK


def test_an_activity_log_of_zeroes_makes_everything_dirty(case: Case) -> None:
    case.put(case.with_bytes(case.base + ACTIVITY_OFFSET, bytes(ACTIVITY_BLOCKS * PAGE)))
    assert case.dirty_after_attach() == DISK // BLOCK


def slot_of_beta(case: Case) -> int:
    """Where the first (and only used) bitmap slot lies."""
    return case.base - PAGE


@pytest.mark.parametrize("sector", [0, 1])
def test_a_damaged_sector_of_the_bitmap_is_all_dirty(case: Case, sector: int) -> None:
    case.put(case.flipped(slot_of_beta(case) + sector * 512 + 17))
    dirty = case.dirty_after_attach()
    assert dirty >= HOT_BLOCKS and dirty >= (4064 if sector == 0 else HOT_BLOCKS + 32)


def test_a_bitmap_of_zeroes_is_not_a_clean_one(case: Case) -> None:
    case.put(case.with_bytes(slot_of_beta(case), bytes(PAGE)))
    assert case.dirty_after_attach() == DISK // BLOCK


def test_after_a_resync_from_a_damaged_bitmap_the_copies_are_equal(case: Case) -> None:
    case.put(case.flipped(slot_of_beta(case) + 3))
    assert case.dirty_after_attach() >= 4064
    assert case.nodes.start("beta")["attach"]["ok"]
    for node in NODES:
        case.nodes.wait(node, synced)
    alpha, beta = (case.nodes.data(node, DISK) for node in NODES)
    assert alpha == beta and alpha[: DIRTY * BLOCK] == b"\x5a" * (DIRTY * BLOCK)
    case.nodes.terminate("beta")
