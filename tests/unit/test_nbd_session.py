# SPDX-License-Identifier: Apache-2.0
"""The NBD session in transmission, as a pure object: literal bytes in, literal bytes out."""

from __future__ import annotations

import itertools
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from replicator.nbd import constants as c
from replicator.nbd.constants import Option
from replicator.nbd.requests import Kind, Request
from tests.unit.nbd_bytes import (
    CLIENT,
    META,
    MIB,
    SIZE,
    ask,
    chunk,
    drain,
    go,
    make,
    option,
    simple,
    transmission,
)


def test_every_command_becomes_a_request() -> None:
    session = transmission()
    data = bytes(range(256)) * 2
    session.receive(
        ask(0, 512, 1024)
        + ask(1, 1024, 512, data, flags=1)
        + ask(3)
        + ask(4, 0, 512)
        + ask(6, 0, 512, flags=3)
        + ask(6, 0, 512)
    )
    assert session.take_requests() == [
        Request(1, Kind.READ, 512, 1024),
        Request(2, Kind.WRITE, 1024, 512, data, fua=True),
        Request(3, Kind.FLUSH, 0, 0),
        Request(4, Kind.TRIM, 0, 512),
        Request(5, Kind.ZERO, 0, 512, fua=True, keep=True),
        Request(6, Kind.ZERO, 0, 512),
    ]
    assert session.take_requests() == []
    assert session.in_flight_count == 6
    assert session.in_flight_bytes == 1024 + 512


def test_simple_replies_in_any_order_with_the_payload_uncopied() -> None:
    session = transmission()
    session.receive(ask(0, 0, 512, cookie=1) + ask(3, cookie=2) + ask(0, 0, 512, cookie=3))
    data = bytes(512)
    session.reply(3, 0, data)
    session.reply(2, 0)
    session.reply(1, 121)
    output = session.take_output()
    assert output[1] is data
    assert b"".join(output) == simple(0, 3) + data + simple(0, 2) + simple(5, 1)
    assert session.in_flight_bytes == session.in_flight_count == 0


def test_structured_replies_carry_data_and_reasons() -> None:
    session = transmission(META)
    session.receive(ask(0, 512, 512) + ask(0, 512, 512) + ask(1, 1, 512, bytes(512)) + ask(3))
    session.reply(1, 0, b"d" * 512)
    session.reply(2, 5)
    session.reply(3, 0)
    reason = b"READ of 512 bytes at offset 512 failed with errno 5"
    unaligned = b"offset 1 length 512 is not a multiple of 512"
    assert drain(session) == (
        chunk(0x8001, struct.pack(">IH", 22, len(unaligned)) + unaligned)
        + chunk(1, struct.pack(">Q", 512) + b"d" * 512)
        + chunk(0x8001, struct.pack(">IH", 5, len(reason)) + reason)
        + simple()
    )


def test_nothing_asked_is_answered_with_success() -> None:
    for before, read in ((b"", simple()), (META, chunk(0))):
        session = transmission(before)
        session.receive(ask(0) + ask(1) + ask(4) + ask(6))
        assert drain(session) == read + simple() * 3
        assert session.take_requests() == []


def test_a_long_read_is_split_and_joined_in_its_order() -> None:
    for before, head in (
        (b"", simple()),
        (META, struct.pack(">IHHQIQ", 0x668E33EF, 1, 1, 0x11, 3 * MIB + 512 + 8, MIB)),
    ):
        session = transmission(before)
        session.receive(ask(0, MIB, 3 * MIB + 512))
        cut = [(request.token, request.offset, request.size) for request in session.take_requests()]
        assert cut == [(1, MIB, MIB), (2, 2 * MIB, MIB), (3, 3 * MIB, MIB), (4, 4 * MIB, 512)]
        for token in (4, 2, 1):
            session.reply(token, 0, bytes([token]) * (512 if token == 4 else MIB))
            assert session.take_output() == []
        session.reply(3, 0, bytes([3]) * MIB)
        data = b"\1" * MIB + b"\2" * MIB + b"\3" * MIB + b"\4" * 512
        assert drain(session) == head + data


def test_the_first_error_of_a_split_request_wins() -> None:
    session = transmission()
    session.receive(ask(6, 0, 96 * MIB))
    assert [request.size for request in session.take_requests()] == [32 * MIB] * 3
    session.reply(2, 28)
    session.reply(1, 5)
    session.reply(3, 0)
    assert drain(session) == simple(28)


def test_a_long_write_arrives_in_pieces_and_is_offered_whole() -> None:
    session = transmission()
    data = bytes(range(256)) * (2 * MIB // 256 + 2)
    stream = ask(1, 512, len(data), data) + ask(3, cookie=2)
    buffer = bytearray(100_000)
    for start in range(0, len(stream), len(buffer)):
        part = stream[start : start + len(buffer)]
        buffer[: len(part)] = part
        if start + len(part) < len(stream) - 28:
            assert session.wants_data
        session.receive(memoryview(buffer)[: len(part)])  # the buffer is reused, as the driver does
    requests = session.take_requests()
    assert [request.kind for request in requests] == [Kind.WRITE] * 3 + [Kind.FLUSH]
    assert b"".join(request.data for request in requests) == data
    assert [request.offset for request in requests] == [512, 512 + MIB, 512 + 2 * MIB, 0]
    assert session.in_flight_bytes == len(data)


def test_a_write_whose_payload_never_ends_is_not_offered() -> None:
    session = transmission()
    session.receive(ask(1, 0, 3 * MIB, bytes(3 * MIB - 1)))
    assert session.take_requests() == []


def test_a_refused_write_is_answered_when_its_payload_was_skipped() -> None:
    session = transmission()
    size = 33 * MIB
    session.receive(ask(1, 0, size))
    for _ in range(33):
        assert drain(session) == b""
        assert session.wants_data
        session.receive(bytes(MIB))
    assert drain(session) == simple(22)
    assert session.in_flight_bytes == 0
    session.receive(ask(3))
    assert len(session.take_requests()) == 1


def test_a_write_too_long_to_skip_ends_the_session() -> None:
    session = transmission()
    session.receive(ask(1, 0, 64 * MIB + 1))
    assert session.finished
    assert session.fault == f"a write of {64 * MIB + 1} bytes is longer than {64 * MIB}, too long to skip"


def test_bad_magic_ends_the_session_but_requests_before_it_count() -> None:
    session = transmission()
    session.receive(ask(3) + b"\0" * 28)
    assert len(session.take_requests()) == 1
    assert session.finished
    session.reply(1, 0)  # the core's late answer is no surprise
    assert "0x0" in session.fault


def test_disconnect_waits_for_what_is_in_flight() -> None:
    session = transmission()
    session.receive(ask(3) + ask(2) + ask(3))
    assert len(session.take_requests()) == 1
    assert session.closing
    assert not session.finished
    session.reply(1, 0)
    assert not session.finished
    assert drain(session) == simple()
    assert session.finished


def test_an_unknown_token_and_a_short_read_are_broken_invariants() -> None:
    session = transmission()
    with pytest.raises(AssertionError):
        session.reply(7, 0)
    session.receive(ask(0, 0, 512))
    with pytest.raises(AssertionError):
        session.reply(1, 0, b"short")


# -- bounds --------------------------------


def test_the_number_of_requests_in_flight_is_bounded() -> None:
    session = transmission()
    session.receive(b"".join(ask(3, cookie=number) for number in range(3000)))
    assert session.in_flight_count == 1024
    assert not session.wants_data
    assert len(session.take_requests()) == 1024
    session.reply(1, 0)
    assert [request.token for request in session.take_requests()] == [1025]
    for token in range(2, 3001):
        session.reply(token, 0)
    assert drain(session) == b"".join(simple(0, number) for number in range(3000))
    assert session.wants_data


def test_the_bytes_in_flight_and_unsent_are_bounded() -> None:
    session = transmission()
    session.receive(ask(0, 0, 32 * MIB) * 5)
    assert session.in_flight_bytes == 64 * MIB
    requests = session.take_requests()
    for request in requests:
        session.reply(request.token, 0, bytes(MIB))
    assert session.take_requests() == []  # answered, but the client has not read the answers
    assert not session.wants_data
    output = session.take_output()
    assert session.take_requests() == []
    session.sent(sum(map(len, output)))
    assert session.in_flight_bytes == 64 * MIB
    assert len(session.take_requests()) == 64


def test_a_write_in_progress_is_read_to_its_end() -> None:
    session = transmission()
    session.receive(ask(0, 0, 32 * MIB) + ask(0, 0, 31 * MIB) + ask(1, 0, 2 * MIB) + bytes(MIB))
    assert session.in_flight_bytes == 65 * MIB
    assert session.wants_data
    session.receive(bytes(MIB))
    assert not session.wants_data


# -- properties --------------------------------

STREAM = (
    CLIENT
    + option(99)
    + META
    + go(infos=(1, 2, 3))
    + ask(1, 0, 1024, b"w" * 1024)
    + ask(0, 512, 512)
    + ask(1, 3, 512, b"u" * 512)
    + ask(7, 0, 4096)
    + ask(6, 0, 512)
    + ask(2)
)


def play(parts: list[bytes]) -> tuple[bytes, list[Request]]:
    session = make()
    seen: list[Request] = []
    for part in parts:
        session.receive(part)
        seen += session.take_requests()
    for request in seen:
        session.reply(request.token, 0, bytes(request.size) if request.kind is Kind.READ else b"")
    output = drain(session)
    assert session.finished
    return output, seen


@given(st.lists(st.integers(0, len(STREAM)), max_size=40))
def test_any_split_of_the_stream_means_the_same(cuts: list[int]) -> None:
    edges = [0, *sorted(cuts), len(STREAM)]
    parts = [STREAM[start:end] for start, end in itertools.pairwise(edges)]
    assert play(parts) == play([STREAM])


def test_byte_by_byte_means_the_same() -> None:
    assert play([STREAM[index : index + 1] for index in range(len(STREAM))]) == play([STREAM])


PIECE = st.one_of(
    st.binary(max_size=64),
    st.builds(option, st.sampled_from([*Option, 99]), st.binary(max_size=40)),
    st.builds(go, st.sampled_from([b"", b"r0/0", b"\xff"])),
    st.just(META),
    st.builds(
        ask,
        st.integers(0, 9),
        st.sampled_from([0, 512, 77, SIZE, 2**64 - 1]),
        st.sampled_from([0, 512, 1, MIB, 2**32 - 1]),
        st.binary(max_size=600),
        st.integers(0, 31),
    ),
)


@given(st.booleans(), st.lists(PIECE, max_size=30))
def test_whatever_a_client_sends_nothing_is_raised_and_memory_is_bounded(start: bool, sent: list[bytes]) -> None:
    session = transmission(META) if start else make()
    for data in sent:
        session.receive(data)
        assert session.in_flight_bytes <= c.IN_FLIGHT_BYTES_MAX + c.PAYLOAD_MAX
        assert session.in_flight_count <= c.IN_FLIGHT_COUNT_MAX + 128
        for request in session.take_requests():
            assert 0 <= request.offset <= request.offset + request.size <= SIZE
            assert (request.offset | request.size) % 512 == 0
            assert request.size <= (c.IO_MAX if request.kind in (Kind.READ, Kind.WRITE) else c.ZERO_MAX)
            assert request.kind is not Kind.WRITE or len(request.data) == request.size
    assert session.closing or session.wants_data or session.in_flight_count
