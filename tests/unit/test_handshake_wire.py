# SPDX-License-Identifier: Apache-2.0
"""Payloads: the bytes of the specification, every place to cut them, what a hostile peer puts in."""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from replicator.core import handshake_wire as payloads
from replicator.core import wire
from replicator.core.handshake_wire import Hello, RoleAnswer, VolumeState
from replicator.core.wire import RULES, Frame, Kind
from replicator.errors import ProtocolError
from tests.unit.frames import HELLO, STATE, encoded, opened

printable = st.text(st.characters(categories=["L", "N", "P"]), max_size=16)
hellos = st.builds(
    Hello,
    version_min=st.integers(0, 3),
    version_max=st.integers(3, 65535),
    features=st.integers(0, (1 << 64) - 1),
    resource_id=st.binary(min_size=16, max_size=16),
    nonce=st.binary(min_size=32, max_size=32),
    node_id=st.integers(0, 255),
    peer_node_id=st.integers(0, 255),
    resource=printable,
    node=printable,
    options=st.lists(st.tuples(printable, printable), max_size=8, unique_by=lambda pair: pair[0]).map(tuple),
    volumes=st.lists(st.integers(0, 65535), max_size=40, unique=True).map(tuple),
)
u64 = st.integers(0, (1 << 64) - 1)
volume_states = st.builds(
    VolumeState,
    disk=st.integers(1, 9),
    crashed_primary=st.booleans(),
    survived=st.booleans(),
    full_sync=st.booleans(),
    primary=st.booleans(),
    discard=st.booleans(),
    paused=st.booleans(),
    size_bytes=st.integers(1, 1 << 54).map(lambda sectors: sectors * 512),
    current=u64,
    bitmap_id=u64,
    dirty_count=u64,
    exposed=u64,
    history=st.lists(u64, max_size=32).map(tuple),
)
UNPACKERS: dict[str, tuple[bytes, Callable[[bytes], object]]] = {
    "HELLO": (HELLO.pack(), Hello.unpack),
    "VOLUME_STATE": (STATE.pack(), VolumeState.unpack),
    "GOODBYE": (payloads.pack_goodbye(1, ""), payloads.unpack_goodbye),
    "ROLE": (payloads.pack_role(True), payloads.unpack_role),
    "ROLE_REPLY": (payloads.pack_role_reply(RoleAnswer.I_AM_ASKING), payloads.unpack_role_reply),
    "SYNC_PAUSE": (payloads.pack_sync_pause(True), payloads.unpack_sync_pause),
    "NEW_GENERATION": (payloads.pack_generation(1 << 60, clear_bitmap=True), payloads.unpack_generation),
    "CURRENT_GENERATION": (payloads.pack_current_generation(1 << 60), payloads.unpack_current_generation),
    "failure": (payloads.pack_errno(5), payloads.unpack_errno),
    "WRITTEN": (payloads.pack_sequences([1]), payloads.unpack_sequences),
    "RESYNC_CONFIRM": (payloads.pack_ranges([(4096, 512)]), payloads.unpack_ranges),
    "DISK_STATE": (payloads.pack_disk_state(0, [(512, 512), (8192, 4096)]), payloads.unpack_disk_state),
}


@given(hellos)
@settings(max_examples=60, deadline=None)
def test_hello_survives_the_wire(hello: Hello) -> None:
    assert Hello.unpack(hello.pack()) == hello


def test_hello_has_exactly_the_bytes_of_the_specification() -> None:
    assert HELLO.pack().hex() == (
        "0001" "0002" "0000000000000003" + bytes(range(16)).hex() + bytes(range(32)).hex() + "0100"
        "027230" "0562c3bc726f" "02" "0870726f746f636f6c" "0143" "0766656e63696e67" "00" "02" "0000" "012c"
    )  # fmt: skip


@given(volume_states)
@settings(max_examples=60, deadline=None)
def test_volume_state_survives_the_wire(state: VolumeState) -> None:
    assert VolumeState.unpack(state.pack()) == state


def test_volume_state_has_exactly_the_bytes_of_the_specification() -> None:
    assert STATE.pack().hex() == (
        "09" "22" "0000000040000000" "0000000000000007" "0000000000000005" "0000000000000003"
        "0000000000000006"
        "02" "0000000000000004" "0000000000000002"
    )  # fmt: skip


@pytest.mark.parametrize(
    ("state", "bit"),
    [
        (VolumeState(disk=0, crashed_primary=True), 1),
        (VolumeState(disk=0, survived=True), 2),
        (VolumeState(disk=0, full_sync=True), 4),
        (VolumeState(disk=0, primary=True), 8),
        (VolumeState(disk=0, discard=True), 16),
        (VolumeState(disk=0, paused=True), 32),
    ],
)
def test_each_volume_state_flag_has_its_bit(state: VolumeState, bit: int) -> None:
    packed = bytes([0, bit]) + bytes(41)
    assert state.pack() == packed
    assert VolumeState.unpack(packed) == state


@pytest.mark.parametrize("name", UNPACKERS)
def test_a_payload_cut_anywhere_or_with_a_tail_is_refused(name: str) -> None:
    packed, unpack = UNPACKERS[name]
    for size in range(len(packed)):
        with pytest.raises(ProtocolError):
            unpack(packed[:size])
    if name != "GOODBYE":
        with pytest.raises(ProtocolError):
            unpack(packed + b"\0")


@pytest.mark.parametrize("name", UNPACKERS)
def test_a_flipped_payload_is_another_value_or_refused(name: str) -> None:
    packed, unpack = UNPACKERS[name]
    original = unpack(packed)
    for bit in range(len(packed) * 8):
        damaged = bytearray(packed)
        damaged[bit // 8] ^= 1 << bit % 8
        try:
            assert unpack(bytes(damaged)) != original
        except ProtocolError:
            continue


@given(st.sampled_from(sorted(UNPACKERS)), st.binary(max_size=120))
@settings(max_examples=200, deadline=None)
def test_a_noise_payload_never_raises_anything_else(name: str, noise: bytes) -> None:
    packed, unpack = UNPACKERS[name]
    for payload in (noise, packed[: len(packed) // 2] + noise):
        try:
            unpack(payload)
        except ProtocolError as refused:
            assert refused.message


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        (b"\x02r0", b"\x02\xff0", "not UTF-8"),
        (b"\x02r0", b"\x02r\x1b", "unprintable"),
        (b"\x02r0", b"\x41" + b"r" * 65, "65 bytes"),
        (b"\x00\x01\x00\x02", b"\x00\x03\x00\x02", "above its highest"),
        (b"\x00\x00\x01\x2c", b"\x01\x2c\x01\x2c", "volume twice"),
        (b"\x07fencing", b"\x08protocol", "option twice"),
    ],
)
def test_a_malformed_hello_is_refused(before: bytes, after: bytes, message: str) -> None:
    packed = HELLO.pack()
    assert packed.count(before) == 1
    with pytest.raises(ProtocolError, match=message):
        Hello.unpack(packed.replace(before, after))


def test_a_hello_too_large_for_its_frame_is_refused_on_both_sides() -> None:
    options = tuple((f"{number:064}", "v" * 64) for number in range(40))
    with pytest.raises(AssertionError, match="HELLO of"):
        replace(HELLO, options=options).pack()
    with pytest.raises(ProtocolError, match="4096"):
        Hello.unpack(bytes(4097))


def test_agreement_depends_on_both_hellos_and_their_order() -> None:
    hashes = {payloads.agree_hash(*pair) for pair in [(b"a", b"b"), (b"b", b"a"), (b"a", b"c")]}
    assert len(hashes) == 3
    assert payloads.agree_hash(b"a", b"b").hex().startswith("fb8e20fc2e4c3f24")
    assert {len(digest) for digest in hashes} == {RULES[Kind.AGREE].length_max}


@given(st.text(max_size=2000))
@settings(max_examples=60, deadline=None)
def test_any_goodbye_can_be_said_and_understood(text: str) -> None:
    packed = payloads.pack_goodbye(7, text)
    assert opened().feed(encoded(Frame(Kind.GOODBYE, payload=packed)))
    reason, said = payloads.unpack_goodbye(packed)
    assert reason == 7
    assert len(said) == len(text) or len(packed) > 1020


def test_full_lists_fit_their_frames_and_longer_ones_are_our_bug() -> None:
    sequences = list(range(wire.SEQUENCES_MAX))
    ranges = [(number * 4096, 4096) for number in range(wire.RANGES_MAX)]
    marked = ranges[: wire.DISK_STATE_RANGES_MAX]
    lists: list[tuple[Kind, Callable[[], bytes]]] = [
        (Kind.WRITTEN, lambda: payloads.pack_sequences(sequences)),
        (Kind.RESYNC_CONFIRM, lambda: payloads.pack_ranges(ranges)),
        (Kind.DISK_STATE, lambda: payloads.pack_disk_state(0, marked)),
    ]
    for kind, pack in lists:
        assert opened().feed(encoded(Frame(kind, payload=pack())))
    assert payloads.unpack_sequences(payloads.pack_sequences(sequences)) == sequences
    assert payloads.unpack_ranges(payloads.pack_ranges(ranges)) == ranges
    assert payloads.unpack_disk_state(payloads.pack_disk_state(0, marked)) == (0, marked)
    sequences.append(0)
    ranges.append((0, 4096))
    marked.append((0, 4096))
    for _, pack in lists:
        with pytest.raises(AssertionError):
            pack()


@pytest.mark.parametrize("pair", [(0, 0), (512, 512), (4096, 100), ((1 << 63) - 4096, 8192), ((1 << 64) - 4096, 4096)])
def test_a_confirmed_range_is_block_aligned_and_not_beyond_the_end(pair: tuple[int, int]) -> None:
    with pytest.raises(ProtocolError, match="RESYNC_CONFIRM"):
        payloads.unpack_ranges(struct.pack("!QI", *pair))
    with pytest.raises(AssertionError):
        payloads.pack_ranges([pair])


@pytest.mark.parametrize(
    ("unpack", "payload"),
    [
        (payloads.unpack_role, b"\x02"),
        (payloads.unpack_role_reply, b"\x04"),
        (payloads.unpack_sync_pause, b"\x02"),
        (payloads.unpack_errno, bytes(4)),
        (payloads.unpack_generation, bytes(8) + b"\x02"),
        (payloads.unpack_current_generation, bytes(7) + b"\x07"),
        (payloads.unpack_disk_state, b"\x0a" + bytes(4)),
        (payloads.unpack_disk_state, b"\x00" + b"\xff" * 4),
        (VolumeState.unpack, b"\x0a" + bytes(42)),
        (VolumeState.unpack, b"\x09\x40" + bytes(41)),
        (VolumeState.unpack, b"\x09" + bytes(8) + b"\x01" + bytes(33)),
        (VolumeState.unpack, b"\x00" + bytes(7) + b"\x10\x00" + bytes(33)),
        (VolumeState.unpack, b"\x09" + bytes(41) + b"\x21" + bytes(33 * 8)),
    ],
)
def test_values_outside_the_specification_are_refused(unpack: Callable[[bytes], object], payload: bytes) -> None:
    with pytest.raises(ProtocolError):
        unpack(payload)


def test_a_goodbye_too_large_for_its_frame_is_refused() -> None:
    assert payloads.unpack_goodbye(b"\x01" + b"x" * 1023) == (1, "x" * 1023)
    with pytest.raises(ProtocolError, match="1024 are allowed"):
        payloads.unpack_goodbye(b"\x01" + b"x" * 1024)
