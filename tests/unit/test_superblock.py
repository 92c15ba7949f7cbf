# SPDX-License-Identifier: Apache-2.0
"""The superblock: golden bytes, what is refused, which copy counts after every interrupted write."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from replicator.core import activity, sealed, superblock
from replicator.core.geometry import ACTIVITY_OFFSET, FIXED_BYTES, PAGE, SECTOR, slot_bytes_for
from replicator.core.superblock import PeerSlot, Superblock, choose, copy_offset, encode, unpack
from replicator.errors import FormatError

GIB = 1 << 30
BLANK = bytes(PAGE)
EXAMPLE = Superblock(
    resource_id=bytes(range(16)),
    volume=7,
    node_id=1,
    size_bytes=GIB,
    device_bytes=2 * GIB,
    slot_bytes=slot_bytes_for(2 * GIB),
    current=0x1122334455667788,
    history=(0xAAAA, 0xBBBB),
    peers=(PeerSlot(node_id=0, bitmap_id=0xCCCC, full_sync=True, survivor=True), PeerSlot()),
    consistent=True,
    was_up_to_date=True,
    crashed_primary=True,
    al_extents=500,
)


def flip(block: bytes, at: int) -> bytes:
    return block[:at] + bytes((block[at] ^ 1,)) + block[at + 1 :]


IDS = st.integers(1, (1 << 64) - 1)
PEERS = st.lists(
    st.builds(
        PeerSlot,
        node_id=st.integers(10, 254),
        bitmap_id=st.integers(0, (1 << 64) - 1),
        full_sync=st.booleans(),
        outdated=st.booleans(),
        survivor=st.booleans(),
    )
    | st.just(PeerSlot()),
    min_size=1,
    max_size=32,
    unique_by=lambda peer: peer.node_id,
).map(tuple)


@given(
    st.builds(
        Superblock,
        resource_id=st.binary(min_size=16, max_size=16),
        volume=st.integers(0, 65535),
        node_id=st.integers(0, 9),
        size_bytes=st.integers(0, 1 << 20).map(lambda n: n * 512),
        device_bytes=st.integers(1 << 20, 1 << 21).map(lambda n: n * 512),
        slot_bytes=st.just(slot_bytes_for(1 << 30)),
        current=IDS,
        history=st.lists(IDS, max_size=32).map(tuple),
        peers=PEERS,
        consistent=st.booleans(),
        was_up_to_date=st.booleans(),
        primary_indicator=st.booleans(),
        crashed_primary=st.booleans(),
        al_extents=st.integers(9, 1008),
    )
)
def test_what_is_packed_is_unpacked(example: Superblock) -> None:
    body = example.pack()
    assert len(body) == 360 + 16 * example.slot_count <= sealed.BODY_MAX
    assert unpack(body) == example


def test_golden_bytes() -> None:
    # fmt: off
    expected = (
        "0001" "0c" "16" "000102030405060708090a0b0c0d0e0f" "0007" "01" "02" "0000000b" "000001f4"
        "0000000040000000" "0000000080000000" "0000000000011000" "1122334455667788"
        + "00" * 32
        + "02" "00000000000000" "000000000000aaaa" "000000000000bbbb"
        + "00" * 240
        + "00" "05" "000000000000" "000000000000cccc"
        + "ff" "00" "000000000000" "0000000000000000"
    )
    # fmt: on
    assert EXAMPLE.pack().hex() == expected


@pytest.mark.parametrize(
    "at, value, message",
    [
        (0, b"\0\x02", "format version 2, this program knows version 1"),
        (2, b"\x0d", "block shift 13"),
        (3, b"\x15", "extent shift 21"),
        (22, b"\0", r"peers \[0\] of node 0"),
        (22, b"\xff", "node id 255"),
        (24, b"\x80", "unknown flags 0x8000000b"),
        (28, b"\0\0\0\x08", "al_extents 8"),
        (28, b"\0\0\x03\xf1", "al_extents 1009"),
        (32, b"\0\0\0\0\x40\0\0\x01", "whole sectors"),
        (32, b"\0\0\0\x01", "size 5368709120 on 2147483648 bytes"),
        (48, b"\0\0\0\0\0\0\x10\0", "slots of 4096 for 1073741824"),
        (48, b"\0\0\0\0\0\x01\x10\x01", "bitmap slots of 69633 bytes"),
        (56, bytes(8), "current id 0"),
        (64, b"\1", "an area that version 1 does not know"),
        (95, b"\1", "an area that version 1 does not know"),
        (96, b"\x21", "must be zero"),
        (96, b"\x01", "must be zero"),
        (96, b"\x03", "history id out of range"),
        (97, b"\1", "must be zero"),
        (361, b"\x08", "unknown flags 0x8 of peer 0"),
        (362, b"\x01", "unknown flags 0x5 of peer 0"),
        (376, b"\x00", r"peers \[0, 0\]"),
        (377, b"\x01", "a free slot in use"),
        (384, b"\x01", "a free slot in use"),
    ],
)
def test_impossible_values_are_refused(at: int, value: bytes, message: str) -> None:
    body = EXAMPLE.pack()
    with pytest.raises(FormatError, match=message):
        unpack(body[:at] + value + body[at + len(value) :])


@pytest.mark.parametrize("length", [0, 1, 2, 103, 359, 360, 376, 391])
def test_a_body_too_short_is_refused(length: int) -> None:
    with pytest.raises(FormatError):
        unpack(EXAMPLE.pack()[:length])


def test_trailing_bytes_and_a_superblock_without_peers_are_refused() -> None:
    with pytest.raises(FormatError, match="do not hold 2 peers"):
        unpack(EXAMPLE.pack() + b"\0")
    body = EXAMPLE.pack()[:360]
    with pytest.raises(FormatError, match="0 peers"):
        unpack(body[:23] + b"\0" + body[24:])


def test_an_impossible_superblock_of_our_own_is_a_broken_invariant() -> None:
    with pytest.raises(AssertionError, match="current id 0"):
        replace(EXAMPLE, current=0).pack()
    with pytest.raises(AssertionError, match="33 history ids"):
        replace(EXAMPLE, history=tuple(range(1, 34))).pack()


def test_outdated_is_consistent_without_up_to_date() -> None:
    assert not EXAMPLE.outdated
    assert replace(EXAMPLE, was_up_to_date=False).outdated
    assert not replace(EXAMPLE, was_up_to_date=False, consistent=False).outdated


def test_the_slot_of_a_peer() -> None:
    assert (EXAMPLE.slot_of(0), EXAMPLE.slot_of(9)) == (0, None)


def test_every_interrupted_update_gives_the_old_or_the_new_superblock() -> None:
    new = replace(EXAMPLE, current=99, history=tuple(range(1, 33)), peers=(PeerSlot(node_id=0),))
    older = replace(EXAMPLE, current=1)
    copies = {0: encode(older, 4), 1: encode(EXAMPLE, 5)}
    target = encode(new, 6)
    for subset in range(256):
        torn = b"".join((target if subset >> n & 1 else copies[0])[n * SECTOR : (n + 1) * SECTOR] for n in range(8))
        chosen = choose(torn, copies[1])
        # The body lies in the first sector: with it the new one is whole, without it the old one is.
        assert chosen.superblock == (new if subset & 1 else EXAMPLE)
        assert (chosen.sequence, chosen.notes) == (6 if subset & 1 else 5, ())


def test_a_torn_copy_is_noted_and_its_sequence_not_used_again() -> None:
    many = tuple(PeerSlot(node_id=node) for node in range(10, 42))
    large = replace(EXAMPLE, peers=many)  # reaches into the second sector
    old, new = encode(large, 4), encode(replace(large, current=9), 6)
    torn = new[:SECTOR] + old[SECTOR : 2 * SECTOR] + new[2 * SECTOR :]
    assert choose(torn, encode(large, 5)).superblock.current == 9  # the second sectors are equal
    new = encode(replace(large, peers=(*many[:-1], PeerSlot(node_id=99))), 6)
    torn = new[:SECTOR] + old[SECTOR:]
    chosen = choose(torn, encode(large, 5))
    assert chosen.superblock == large
    assert chosen.next_sequence == 8 and copy_offset(chosen.next_sequence) == 0
    assert len(chosen.notes) == 1 and "copy 0 is torn" in chosen.notes[0]


def test_copies_take_turns() -> None:
    assert [copy_offset(sequence) for sequence in (1, 2, 3)] == [4096, 0, 4096]
    assert choose(encode(EXAMPLE, 2), encode(replace(EXAMPLE, volume=8), 3)).superblock.volume == 8


GOOD, ROT_AT = encode(EXAMPLE, 5), 300


@pytest.mark.parametrize(
    "copy0, copy1, message, hint",
    [
        (BLANK, BLANK, "there is no metadata", "run `replicator create-md`"),
        (flip(encode(EXAMPLE, 4), ROT_AT), flip(GOOD, ROT_AT), "no superblock can be used", "full sync"),
        (b"\xeb<\x90mkfs" * 585 + b"x", BLANK, "holds something else", "check the configured device"),
        (flip(encode(EXAMPLE, 6), ROT_AT), GOOD, "newer than sequence 5 may be lost", "create-md --force"),
        (BLANK, GOOD, "newer than sequence 5 may be lost", "create-md --force"),
        (b"\xff" * PAGE, GOOD, "newer than sequence 5 may be lost", "create-md --force"),
    ],
    ids=["none", "both damaged", "foreign", "newer damaged", "wiped", "overwritten"],
)
def test_metadata_that_cannot_be_trusted_is_refused_with_advice(
    copy0: bytes, copy1: bytes, message: str, hint: str
) -> None:
    with pytest.raises(FormatError, match=message) as caught:
        choose(copy0, copy1)
    assert hint in caught.value.hint


def test_an_older_copy_that_rotted_is_only_noted() -> None:
    chosen = choose(flip(encode(EXAMPLE, 4), ROT_AT), GOOD)
    assert (chosen.superblock, chosen.sequence) == (EXAMPLE, 5)
    assert "copy 0 is damaged" in chosen.notes[0]


def test_a_newer_copy_of_an_unknown_version_is_not_passed_over() -> None:
    future = sealed.seal(superblock.MAGIC, 6, b"\0\x02" + EXAMPLE.pack()[2:])
    with pytest.raises(FormatError, match="format version 2"):
        choose(future, GOOD)


def test_a_fresh_fixed_part_has_both_copies_and_an_empty_log() -> None:
    fixed = superblock.fresh_fixed_part(EXAMPLE)
    assert len(fixed) == FIXED_BYTES
    chosen = choose(fixed[:PAGE], fixed[PAGE : 2 * PAGE])
    assert (chosen.superblock, chosen.sequence, chosen.notes) == (EXAMPLE, 2, ())
    recovered = activity.recover(fixed[ACTIVITY_OFFSET : ACTIVITY_OFFSET + 8 * PAGE])
    assert (recovered.extents, recovered.sequence, recovered.unknown) == ((), 8, False)
    assert not any(fixed[ACTIVITY_OFFSET + 8 * PAGE :])
