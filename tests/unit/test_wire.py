# SPDX-License-Identifier: Apache-2.0
"""Frames: the bytes of the specification, every way to cut them, what a hostile peer sends."""

from __future__ import annotations

import re
import struct
import zlib
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from replicator.core import handshake_wire as payloads
from replicator.core import wire
from replicator.core.wire import HEADER_SIZE, PAYLOAD_MAX, RULES, Flag, Frame, FrameDecoder, Kind, Rule
from replicator.errors import ProtocolError
from tests.unit.frames import HELLO, encoded, opened

SPECIFICATION = Path(__file__).parents[2] / "docs" / "wire-format.md"

SMALL_STREAM = [
    Frame(Kind.WRITE, volume=3, flags=Flag.FUA, sequence=1, offset=4096, size=512, payload=b"w" * 512),
    Frame(Kind.PING, sequence=2),
    Frame(Kind.WRITTEN, payload=payloads.pack_sequences([1, 2, 3])),
    Frame(Kind.ZERO, flags=Flag.FUA | Flag.KEEP, sequence=3, size=wire.RANGE_MAX),
    Frame(Kind.ROLE, payload=payloads.pack_role(True)),
]


def header(kind: int, **fields: int) -> bytes:
    """A header with a right checksum around whatever a hostile peer wants in it."""
    named = {
        "magic": wire.MAGIC, "version": 1, "flags": 0, "volume": 0, "reserved": 0, "size": 0, "sequence": 0,
        "offset": 0, "length": 0, "payload_crc": 0,
    } | fields  # fmt: skip
    covered = struct.pack(
        "!IBBHHHIQQII", named["magic"], named["version"], kind, named["flags"], named["volume"],
        named["reserved"], named["size"], named["sequence"], named["offset"], named["length"],
        named["payload_crc"],
    )  # fmt: skip
    return covered + struct.pack("!I", zlib.crc32(covered))


def refusal(data: bytes) -> str:
    with pytest.raises(ProtocolError) as caught:
        opened().feed(data)
    return caught.value.message


ANY_KIND = st.sampled_from(list(Kind))


@st.composite
def frames(draw: st.DrawFn, kinds: st.SearchStrategy[Kind] = ANY_KIND) -> Frame:
    """Any frame its rule allows (long payloads are left to the examples)."""
    kind = draw(kinds)
    rule = RULES[kind]
    size = offset = 0
    if rule.size_max:
        top = min(rule.size_max, 8192) if rule.length_is_size else rule.size_max
        size = draw(st.integers(1, top // 512)) * 512
        offset = draw(st.integers(0, ((1 << 63) - size) // rule.offset_unit)) * rule.offset_unit
    length = size
    if not rule.length_is_size:
        units = (min(rule.length_max, 4096) - rule.length_min) // rule.unit
        length = rule.length_min + draw(st.integers(0, units)) * rule.unit
    return Frame(
        kind,
        volume=0 if rule.link_wide else draw(st.integers(0, 65535)),
        flags=draw(st.integers(0, 65535)) & rule.flags,
        sequence=draw(st.integers(0, (1 << 64) - 1)) if rule.sequence else 0,
        offset=offset,
        size=size,
        payload=draw(st.binary(min_size=1, max_size=8)).ljust(length, b"\xa5")[:length],
    )


# ------------------------------------------------------------------------------------- the specification


def test_a_write_has_exactly_the_bytes_of_the_specification() -> None:
    data = bytes(range(256)) * 2
    parts = wire.encode(
        Frame(Kind.WRITE, volume=0x0102, flags=Flag.FUA, sequence=0x1122334455667788, offset=0x10000,
              size=512, payload=data)
    )  # fmt: skip
    expected = (  # checksums from a bitwise CRC-32, not from the code under test
        "52504c4b 01 14 0001 0102 0000 00000200 1122334455667788 0000000000010000 00000200 1c613576 48526ea3"
    )
    assert bytes(parts[0]).hex() == expected.replace(" ", "")
    assert parts[1] is data


def specified_kinds() -> dict[str, tuple[int, str]]:
    rows = re.findall(r"^\| (\d+) \| ([A-Z_]+) \|[^|]*\| ([^|]+) \|[^|]*\|$", SPECIFICATION.read_text(), re.M)
    return {name: (int(number), length) for number, name, length in rows}


def test_the_specification_names_every_kind_with_its_number() -> None:
    assert {name: number for name, (number, _) in specified_kinds().items()} == {kind.name: kind.value for kind in Kind}


@pytest.mark.parametrize("kind", Kind)
def test_the_payload_bound_is_the_specified_one(kind: Kind) -> None:
    bound = specified_kinds()[kind.name][1]
    rule = RULES[kind]
    number = int(re.findall(r"\d+", bound)[0]) << (20 if "MiB" in bound else 0)
    assert rule.length_max == number
    assert (rule.length_min == rule.length_max) == ("≤" not in bound)


def test_the_specification_names_every_flag() -> None:
    line = next(line for line in SPECIFICATION.read_text().split("\n\n") if line.startswith("Flags:"))
    named = {name: int(bit) for bit, name in re.findall(r"(\d+) ([A-Z]+)\b", line)}
    assert named == {name: bit for name, bit in vars(Flag).items() if name.isupper()}


def test_the_header_struct_is_the_specified_size() -> None:
    assert wire.HEADER.size == HEADER_SIZE == 44


def test_lists_fill_their_frames() -> None:
    assert wire.SEQUENCES_MAX == 8192
    assert wire.RANGES_MAX == 5461
    assert wire.DISK_STATE_RANGES_MAX == 5460


# --------------------------------------------------------------------------------------------- round trip


@given(st.data())
@settings(max_examples=10, deadline=None)
@pytest.mark.parametrize("kind", Kind)
def test_every_kind_survives_the_wire(kind: Kind, data: st.DataObject) -> None:
    frame = data.draw(frames(st.just(kind)))
    assert opened().feed(encoded(frame)) == [frame]


@given(st.lists(frames(), max_size=6), st.data())
@settings(max_examples=60, deadline=None)
def test_frames_do_not_depend_on_how_the_stream_is_cut(sent: list[Frame], data: st.DataObject) -> None:
    stream = encoded(*sent)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(stream)), max_size=12)))
    decoder = opened()
    got = [
        frame
        for start, end in zip([0, *cuts], [*cuts, len(stream)], strict=True)
        for frame in decoder.feed(memoryview(stream)[start:end])
    ]
    assert got == sent
    assert decoder.buffered_bytes == 0


def test_single_bytes_give_the_same_frames() -> None:
    decoder = opened()
    stream = encoded(*SMALL_STREAM)
    assert [frame for byte in stream for frame in decoder.feed(bytes([byte]))] == SMALL_STREAM


def test_payloads_do_not_change_when_the_receive_buffer_is_reused() -> None:
    buffer = bytearray(encoded(*SMALL_STREAM))
    got = opened().feed(buffer)
    buffer[:] = bytes(len(buffer))
    assert got == SMALL_STREAM


def test_the_largest_frame_passes_and_the_decoder_stores_no_more_than_it() -> None:
    frame = Frame(Kind.WRITE, sequence=1, size=PAYLOAD_MAX, payload=bytes(PAYLOAD_MAX))
    stream = encoded(frame, frame)
    decoder = opened()
    got = []
    for start in range(0, len(stream), 300_000):
        got += decoder.feed(stream[start : start + 300_000])
        assert decoder.buffered_bytes < wire.FRAME_MAX
    assert got == [frame, frame]


@pytest.mark.parametrize(
    "frame",
    [
        Frame(Kind.WRITE, size=1024, payload=bytes(512)),
        Frame(Kind.WRITE, size=0),
        Frame(Kind.PING, payload=b"x"),
        Frame(Kind.PING, flags=Flag.FUA),
        Frame(Kind.TRIM, size=wire.RANGE_MAX + 512),
        Frame(Kind.READ, size=PAYLOAD_MAX + 512),
        Frame(Kind.WRITTEN, payload=b""),
        Frame(Kind.SYNC_START, sequence=1),
    ],
)
def test_encoding_what_the_rules_forbid_is_a_broken_invariant(frame: Frame) -> None:
    with pytest.raises(AssertionError, match=frame.kind.name):
        wire.encode(frame)


# ---------------------------------------------------------------------------------------------- handshake


def test_a_new_decoder_refuses_a_write_by_its_header() -> None:
    with pytest.raises(ProtocolError, match="WRITE before the handshake"):
        FrameDecoder().feed(encoded(SMALL_STREAM[0])[:HEADER_SIZE])


@pytest.mark.parametrize("kind", Kind)
def test_before_agreement_only_the_handshake_is_legal(kind: Kind) -> None:
    rule = RULES[kind]
    size = 512 if rule.size_max else 0
    length = size if rule.length_is_size else rule.length_min
    stream = encoded(Frame(kind, size=size, payload=bytes(length)))
    if kind in (Kind.HELLO, Kind.AGREE, Kind.GOODBYE):
        assert [frame.kind for frame in FrameDecoder().feed(stream)] == [kind]
        assert rule.length_max <= 4096
    else:
        with pytest.raises(ProtocolError, match="before the handshake"):
            FrameDecoder().feed(stream)


@given(st.integers(0, 1 << 30))
@settings(max_examples=60, deadline=None)
def test_what_follows_agree_waits_for_open_all(seed: int) -> None:
    shake = [Frame(Kind.HELLO, payload=HELLO.pack()), Frame(Kind.AGREE, payload=bytes(32))]
    stream = encoded(*shake, *SMALL_STREAM)
    agreed = len(encoded(*shake))
    first, opening = sorted((seed % len(stream), agreed + seed % (len(stream) - agreed + 1)))
    decoder = FrameDecoder()
    assert decoder.feed(stream[:first]) + decoder.feed(stream[first:opening]) == shake
    assert decoder.handshake_only
    assert decoder.open_all() + decoder.feed(stream[opening:]) == SMALL_STREAM
    assert not decoder.handshake_only


def test_what_follows_agree_is_bounded() -> None:
    decoder = FrameDecoder()
    decoder.feed(encoded(Frame(Kind.AGREE, payload=bytes(32))))
    assert decoder.feed(bytes(wire.FRAME_MAX)) == []
    with pytest.raises(ProtocolError, match="behind AGREE"):
        decoder.feed(b"x")
    assert decoder.buffered_bytes == 0


def test_what_follows_agree_is_judged_when_opened() -> None:
    decoder = FrameDecoder()
    decoder.feed(encoded(Frame(Kind.AGREE, payload=bytes(32))) + bytes(HEADER_SIZE))
    with pytest.raises(ProtocolError, match="does not speak this protocol"):
        decoder.open_all()


# ------------------------------------------------------------------------------------------------ hostile


def test_every_flipped_bit_is_noticed() -> None:
    stream = encoded(SMALL_STREAM[0])
    for bit in range(len(stream) * 8):
        damaged = bytearray(stream)
        damaged[bit // 8] ^= 1 << bit % 8
        refusal(bytes(damaged))


@given(st.binary(max_size=200), st.booleans())
@settings(max_examples=100, deadline=None)
def test_noise_is_refused_or_incomplete(noise: bytes, aligned: bool) -> None:
    data = (encoded(SMALL_STREAM[1]) if aligned else b"") + noise
    decoder = opened()
    try:
        decoder.feed(data)
    except ProtocolError:
        assert len(noise) >= HEADER_SIZE
    else:
        assert len(noise) < HEADER_SIZE


@given(
    st.integers(0, 255), st.integers(0, 65535), st.integers(0, (1 << 32) - 1), st.integers(0, (1 << 64) - 1),
    st.integers(0, (1 << 32) - 1), st.integers(0, 65535),
)  # fmt: skip
@settings(max_examples=200, deadline=None)
def test_a_well_checksummed_header_is_refused_or_bounded(
    kind: int, flags: int, size: int, offset: int, length: int, volume: int
) -> None:
    decoder = opened()
    try:
        decoder.feed(header(kind, flags=flags, size=size, offset=offset, length=length, volume=volume))
    except ProtocolError:
        return
    assert length <= RULES[Kind(kind)].length_max


@pytest.mark.parametrize("kind", Kind)
def test_a_length_out_of_bounds_is_refused_before_the_payload_arrives(kind: Kind) -> None:
    rule = RULES[kind]
    size = 512 if rule.size_max else 0
    legal = rule.length_min
    assert opened().feed(header(kind, size=size, length=legal)) == ([] if legal else [Frame(kind, size=size)])
    lengths = {rule.length_min - 1, rule.length_max + 1, (1 << 31) - 1, 1 << 31, (1 << 32) - 1} - {-1}
    for length in lengths:
        assert "payload of" in refusal(header(kind, size=size, length=length))
    if rule.unit > 1 and legal + 1 <= rule.length_max:
        assert "in steps of" in refusal(header(kind, size=size, length=legal + 1))


@pytest.mark.parametrize("kind", [kind for kind in Kind if RULES[kind].size_max])
def test_a_range_out_of_bounds_is_refused_by_the_header(kind: Kind) -> None:
    rule = RULES[kind]

    def attempt(offset: int, size: int) -> str:
        length = min(size, PAYLOAD_MAX) if rule.length_is_size else rule.length_min
        return refusal(header(kind, offset=offset, size=size, length=length))

    for size in (0, 1, 511, 513, rule.size_max + 1, (1 << 32) - 1):
        attempt(0, size)
    assert "multiples" in attempt(rule.offset_unit // 2, 512)
    assert "2**63" in attempt(1 << 63, 512)
    assert "2**63" in attempt((1 << 64) - 4096, 512)
    last = (1 << 63) - 4096
    length = 4096 if rule.length_is_size else rule.length_min
    opened().feed(header(kind, offset=last, size=4096, length=length))


def test_a_data_frame_carries_as_many_bytes_as_its_range() -> None:
    assert "range of 1024" in refusal(header(Kind.WRITE, size=1024, length=512))


@pytest.mark.parametrize("kind", Kind)
def test_fields_a_kind_does_not_use_are_zero(kind: Kind) -> None:
    rule = RULES[kind]
    size = 512 if rule.size_max else 0

    def attempt(**fields: int) -> str:
        return refusal(header(kind, **({"size": size, "length": rule.length_min} | fields)))

    for bit in range(16):
        if not rule.flags & 1 << bit:
            assert "flags" in attempt(flags=1 << bit)
    if not rule.size_max:
        assert "no range" in attempt(size=512)
        assert "no range" in attempt(offset=512)
    if not rule.sequence:
        assert "sequence" in attempt(sequence=1)
    if rule.link_wide:
        assert "volume 1" in attempt(volume=1)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (header(Kind.PING, version=0), "version 0"),
        (header(99, version=2), "version 2"),
        (header(0), "unknown kind 0"),
        (header(9), "unknown kind 9"),
        (header(255), "unknown kind 255"),
        (header(Kind.PING, reserved=1), "reserved"),
        (header(Kind.PING, payload_crc=1), "checksum"),
        (header(Kind.PING)[:-1] + b"\0", "header of a frame fails its checksum"),
        (header(Kind.ROLE, length=1, payload_crc=1) + b"\0", "1 bytes of ROLE fails its checksum"),
        (b"GET / HTTP/1.1\r\nHost: localhost\r\nAccept: */*\r\n\r\n", "does not speak this protocol"),
    ],
)
def test_refusals_say_what_is_wrong(data: bytes, message: str) -> None:
    assert message in refusal(data)


def test_a_failed_decoder_stays_failed() -> None:
    decoder = opened()
    with pytest.raises(ProtocolError) as first:
        decoder.feed(encoded(SMALL_STREAM[1]) + header(99))
    with pytest.raises(ProtocolError, match=re.escape(first.value.message)):
        decoder.feed(encoded(SMALL_STREAM[1]))
    with pytest.raises(ProtocolError, match=re.escape(first.value.message)):
        decoder.open_all()


def test_every_kind_has_a_rule_that_its_own_bounds_satisfy() -> None:
    assert set(RULES) == set(Kind)
    for kind, rule in RULES.items():
        assert isinstance(rule, Rule)
        assert 0 <= rule.length_min <= rule.length_max <= PAYLOAD_MAX, kind
        assert not rule.handshake or rule.length_max <= wire.HANDSHAKE_MAX, kind
