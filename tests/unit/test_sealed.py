# SPDX-License-Identifier: Apache-2.0
"""Sealed blocks: every interrupted write, rot, and which block counts."""

from __future__ import annotations

import hashlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from replicator.core import sealed
from replicator.core.geometry import PAGE, SECTOR
from replicator.core.sealed import Blank, Damaged, Foreign, Sealed, Torn, newest, seal, unseal

MAGIC = b"RPLTESTS"
BLANK = bytes(PAGE)
OLD = bytes(range(250)) * 16
NEW = bytes(range(249, -1, -1)) * 16


def mixture(old: bytes, new: bytes, subset: int) -> bytes:
    """The sectors of `new` whose bit is set in `subset`, else those of `old`."""
    return b"".join((new if subset >> n & 1 else old)[n * SECTOR : (n + 1) * SECTOR] for n in range(PAGE // SECTOR))


def flip(block: bytes, bit: int) -> bytes:
    changed = bytearray(block)
    changed[bit // 8] ^= 1 << bit % 8
    return bytes(changed)


@given(st.integers(1, sealed.SEQUENCE_MAX), st.binary(max_size=sealed.BODY_MAX))
def test_what_is_sealed_is_unsealed(sequence: int, body: bytes) -> None:
    assert unseal(MAGIC, seal(MAGIC, sequence, body)) == Sealed(sequence, body)


def test_golden_bytes() -> None:
    block = seal(b"RPLSUPER", 0x0102030405060708, b"body")
    assert block[:28].hex() == "52504c535550455201020304050607080000000430a83f34626f6479"
    assert {block[at + 508 : at + 512].hex() for at in range(0, PAGE, SECTOR)} == {"06080a0c"}
    assert not any(block[28:508])


@pytest.mark.parametrize("old_sequence, new_sequence", [(5, 7), (3, 11), ((1 << 32) - 2, (1 << 32) + 6)])
def test_every_interrupted_write_is_torn_and_never_accepted(old_sequence: int, new_sequence: int) -> None:
    old, new = seal(MAGIC, old_sequence, OLD), seal(MAGIC, new_sequence, NEW)
    for subset in range(1, 255):
        assert unseal(MAGIC, mixture(old, new, subset)) == Torn(sealed.tag_of(new_sequence))
    assert unseal(MAGIC, mixture(old, new, 0)) == Sealed(old_sequence, OLD)
    assert unseal(MAGIC, mixture(old, new, 255)) == Sealed(new_sequence, NEW)


def test_every_interrupted_first_write_is_torn() -> None:
    new = seal(MAGIC, 2, NEW)
    assert unseal(MAGIC, mixture(BLANK, new, 0)) == Blank()
    for subset in range(1, 255):
        assert unseal(MAGIC, mixture(BLANK, new, subset)) == Torn(2)


def test_an_interrupted_write_of_a_short_body_is_whole_or_torn() -> None:
    old, new = seal(MAGIC, 5, b"old"), seal(MAGIC, 7, b"new")
    for subset in range(256):
        expected = Sealed(7, b"new") if subset & 1 else Sealed(5, b"old")
        assert unseal(MAGIC, mixture(old, new, subset)) == expected


@given(st.integers(0, PAGE * 8 - 1))
def test_a_flipped_bit_is_never_accepted_as_other_content_and_never_torn_in_the_content(bit: int) -> None:
    verdict = unseal(MAGIC, flip(seal(MAGIC, 9, NEW), bit))
    if bit // 8 % SECTOR >= sealed.PIECE:
        assert verdict == Sealed(9, NEW)  # only a tag suffered
    elif bit < 64:
        assert verdict == Foreign()  # the magic
    else:
        assert verdict == Damaged(9)


def test_a_sector_of_garbage_in_a_completed_write_is_damage_and_not_an_interrupted_write() -> None:
    block = bytearray(seal(MAGIC, 9, NEW))
    block[SECTOR : 2 * SECTOR] = b"\xa5" * SECTOR
    assert unseal(MAGIC, bytes(block)) == Damaged(9)
    block = bytearray(seal(MAGIC, 5000, NEW))
    block[SECTOR : 2 * SECTOR] = bytes(SECTOR)
    assert unseal(MAGIC, bytes(block)) == Damaged(5000)


@pytest.mark.parametrize(
    "block", [b"\xff" * PAGE, b"EFI PART" * 512, seal(b"RPLOTHER", 3, b"x"), b"\x01" + bytes(PAGE - 1)]
)
def test_what_is_not_ours_is_foreign(block: bytes) -> None:
    assert unseal(MAGIC, block) == Foreign()


@given(st.integers(0))
def test_garbage_is_never_accepted(seed: int) -> None:
    garbage = hashlib.shake_128(repr(seed).encode()).digest(PAGE)
    assert unseal(MAGIC, garbage) == Foreign()
    length = bytes(2) + garbage[:1]  # a length that could be
    assert isinstance(unseal(MAGIC, MAGIC + garbage[8:16] + b"\0" + length + garbage[20:]), Damaged)


def test_the_newest_valid_block_wins_and_the_next_sequence_follows() -> None:
    result = newest(MAGIC, [seal(MAGIC, 6, b"six"), seal(MAGIC, 5, b"five")])
    assert (result.index, result.sealed, result.damaged_newer) == (0, Sealed(6, b"six"), False)
    assert result.next_sequence == 7


@pytest.mark.parametrize("places", [2, 8])
def test_writes_interrupted_again_and_again_never_look_like_damage_and_spare_the_newest(places: int) -> None:
    blocks = [BLANK] * places
    for sequence in range(1, places + 1):
        blocks[sequence % places] = seal(MAGIC, sequence, bytes([sequence]) * 4000)
    keep = Sealed(places, bytes([places]) * 4000)
    for attempt in range(60):
        result = newest(MAGIC, blocks)
        assert (result.sealed, result.damaged_newer) == (keep, False)
        place = result.next_sequence % places
        assert place != result.index
        new = seal(MAGIC, result.next_sequence, bytes([100 + attempt]) * 4000)
        blocks[place] = mixture(blocks[place], new, 0x55 if attempt % 2 else 0xAA)
    result = newest(MAGIC, blocks)
    blocks[result.next_sequence % places] = seal(MAGIC, result.next_sequence, b"at last")
    final = newest(MAGIC, blocks)
    assert (final.sealed, final.damaged_newer) == (Sealed(result.next_sequence, b"at last"), False)


def test_a_newer_block_that_rotted_is_reported_and_an_older_one_is_not() -> None:
    five, six = seal(MAGIC, 5, NEW), seal(MAGIC, 6, NEW)
    rotten_six, rotten_five = flip(six, 9000), flip(five, 9000)
    assert newest(MAGIC, [rotten_six, five]).damaged_newer
    assert newest(MAGIC, [rotten_six, five]).next_sequence == 8
    assert not newest(MAGIC, [six, rotten_five]).damaged_newer
    assert newest(MAGIC, [rotten_six, rotten_five]).damaged_newer


def test_newer_and_older_hold_when_the_tags_come_round() -> None:
    last = (1 << 32) - 1  # tag ffffffff, the next one has tag 1
    blocks = [flip(seal(MAGIC, last + 1, NEW), 9000), seal(MAGIC, last, NEW)]
    result = newest(MAGIC, blocks)
    assert result.damaged_newer and result.next_sequence == last + 3
    blocks = [seal(MAGIC, last + 1, NEW), flip(seal(MAGIC, last, NEW), 9000)]
    assert not newest(MAGIC, blocks).damaged_newer


@pytest.mark.parametrize("other", [BLANK, b"\xff" * PAGE, seal(MAGIC, 8, b"x")], ids=["wiped", "foreign", "misplaced"])
def test_a_place_that_was_written_and_is_not_ours_any_more_may_have_been_the_newest(other: bytes) -> None:
    result = newest(MAGIC, [seal(MAGIC, 6, b"six"), other])
    assert result.sealed == Sealed(6, b"six") and result.damaged_newer


def test_a_place_that_the_first_writes_have_not_reached_may_be_blank() -> None:
    assert not newest(MAGIC, [BLANK, seal(MAGIC, 1, b"")]).damaged_newer
    ring = [BLANK, seal(MAGIC, 1, b""), seal(MAGIC, 2, b""), *[BLANK] * 5]
    assert not newest(MAGIC, ring).damaged_newer
    ring[1] = BLANK
    assert newest(MAGIC, ring).damaged_newer


def test_an_interrupted_write_too_far_ahead_means_that_completed_ones_are_missing() -> None:
    torn = mixture(seal(MAGIC, 3000, OLD), seal(MAGIC, 3002, NEW), 0x0F)
    assert newest(MAGIC, [torn, seal(MAGIC, 3001, b"")]).damaged_newer is False
    assert newest(MAGIC, [torn, seal(MAGIC, 7, b"")]).damaged_newer is True


def test_blank_places_have_no_newest() -> None:
    result = newest(MAGIC, [BLANK, BLANK])
    assert (result.index, result.sealed, result.damaged_newer, result.next_sequence) == (None, None, False, 1)
