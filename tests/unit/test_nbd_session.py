# SPDX-License-Identifier: Apache-2.0
"""The NBD session as a pure object: literal bytes in, literal bytes out."""

from __future__ import annotations

import itertools
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from replicator.nbd import constants as c
from replicator.nbd.constants import Command, Errno, Option, protocol_errno
from replicator.nbd.negotiation import Export
from replicator.nbd.requests import Abilities, Kind, Request, judge, pieces
from replicator.nbd.session import NbdSession, State

MIB = 1 << 20
SIZE = 256 * MIB
EXPORT = Export(name="r0/0", size_bytes=SIZE)
GREETING = b"NBDMAGICIHAVEOPT\x00\x03"
BASIC_FLAGS = 0x16D  # HAS_FLAGS FLUSH FUA TRIM WRITE_ZEROES MULTI_CONN
CLIENT = b"\0\0\0\x03"


def make(export: Export = EXPORT) -> NbdSession:
    return NbdSession({"": export, export.name: export}, itertools.count(1))


def drain(session: NbdSession) -> bytes:
    data = b"".join(session.take_output())
    session.sent(len(data))
    return data


def option(code: int, body: bytes = b"") -> bytes:
    return b"IHAVEOPT" + struct.pack(">II", code, len(body)) + body


def counted(text: bytes) -> bytes:
    return struct.pack(">I", len(text)) + text


def answer(code: int, kind: int, body: bytes = b"") -> bytes:
    return bytes.fromhex("0003e889045565a9") + struct.pack(">III", code, kind, len(body)) + body


def go(name: bytes = b"", code: int = 7, infos: tuple[int, ...] = ()) -> bytes:
    return option(code, counted(name) + struct.pack(f">H{len(infos)}H", len(infos), *infos))


META = option(8) + option(10, counted(b"") + struct.pack(">I", 1) + counted(b"base:allocation"))


def transmission(before: bytes = b"", export: Export = EXPORT) -> NbdSession:
    session = make(export)
    session.receive(CLIENT + before + go())
    assert session.state is State.TRANSMISSION
    drain(session)
    return session


def ask(
    command: int, offset: int = 0, size: int = 0, data: bytes = b"", flags: int = 0, cookie: int = 0x11
) -> bytes:
    return struct.pack(">IHHQQI", 0x25609513, flags, command, cookie, offset, size) + data


def simple(error: int = 0, cookie: int = 0x11) -> bytes:
    return struct.pack(">IIQ", 0x67446698, error, cookie)


def chunk(kind: int, body: bytes = b"", cookie: int = 0x11) -> bytes:
    return struct.pack(">IHHQI", 0x668E33EF, 1, kind, cookie, len(body)) + body


# -- handshake --------------------------------


def test_go_is_answered_byte_for_byte() -> None:
    session = make()
    assert drain(session) == GREETING
    session.receive(CLIENT + go(b"r0/0", infos=(1, 3)))
    assert drain(session) == (
        answer(7, 3, struct.pack(">HQH", 0, SIZE, BASIC_FLAGS))
        + answer(7, 3, b"\0\x01r0/0")
        + answer(7, 3, struct.pack(">HIII", 3, 512, 4096, 32 * MIB))
        + answer(7, 1)
    )
    assert session.export is EXPORT
    assert session.state is State.TRANSMISSION


def test_info_tells_the_description_and_stays_in_negotiation() -> None:
    session = make(Export(name="r0/0", size_bytes=SIZE, description="mirror", read_only=True))
    session.receive(CLIENT + go(code=6, infos=(2,)))
    told = drain(session)
    assert answer(6, 3, b"\0\x02mirror") in told
    assert answer(6, 3, struct.pack(">HQH", 0, SIZE, BASIC_FLAGS | 2)) in told
    assert session.state is State.OPTIONS


@pytest.mark.parametrize(("flags", "padding"), [(3, 0), (1, 124), (0, 124)])
def test_export_name_is_answered_with_and_without_padding(flags: int, padding: int) -> None:
    session = make()
    session.receive(struct.pack(">I", flags) + option(1, b"r0/0"))
    assert drain(session) == GREETING + struct.pack(">QH", SIZE, BASIC_FLAGS) + bytes(padding)
    assert session.state is State.TRANSMISSION


@pytest.mark.parametrize("name", [b"nothing", b"\xff", b"x" * 5000])
def test_export_name_of_an_unknown_export_ends_the_session(name: bytes) -> None:
    session = make()
    session.receive(CLIENT + option(1, name))
    assert drain(session) == GREETING
    assert session.finished
    assert session.fault


def test_a_refused_export_says_why() -> None:
    reason = "r0/0 is Secondary on alpha; promote it first"
    refused = Export(name="r0/0", size_bytes=SIZE, refused=reason)
    session = make(refused)
    drain(session)
    session.receive(CLIENT + go())
    assert drain(session) == answer(7, 0x80000002, reason.encode())
    assert session.state is State.OPTIONS
    session.receive(option(1, b"r0/0"))
    assert session.finished
    assert session.fault == reason


def test_an_export_published_during_negotiation_is_seen() -> None:
    exports: dict[str, Export] = {}
    session = NbdSession(exports, itertools.count())
    drain(session)
    session.receive(CLIENT + go())
    assert drain(session) == answer(7, 0x80000006, b"no export is named ''")
    exports[""] = EXPORT
    session.receive(go())
    assert session.state is State.TRANSMISSION


def test_list_names_each_export_once_and_abort_ends() -> None:
    session = make()
    drain(session)
    session.receive(CLIENT + option(3) + option(2))
    assert drain(session) == answer(3, 2, counted(b"r0/0")) + answer(3, 1) + answer(2, 1)
    assert session.finished
    assert session.fault == ""


@pytest.mark.parametrize(
    ("sent", "code", "kind"),
    [
        (option(99), 99, 0x80000001),
        (option(5), 5, 0x80000002),
        (option(3, b"x"), 3, 0x80000003),
        (option(8, b"x"), 8, 0x80000003),
        (go(b"other"), 7, 0x80000006),
        (go(b"r0/0 "), 7, 0x80000006),
        (go(b"\xff\xfe"), 7, 0x80000003),
        (option(7, b"\0\0"), 7, 0x80000003),
        (option(7, counted(b"")), 7, 0x80000003),
        (option(7, counted(b"") + b"\0\x02\0\0"), 7, 0x80000003),
        (option(7, b"\xff\xff\xff\xff"), 7, 0x80000003),
        (option(9, counted(b"") + bytes(4)), 9, 0x80000003),  # no structured replies yet
        (option(10, counted(b"") + bytes(4)), 10, 0x80000003),
    ],
)
def test_a_bad_option_is_refused_and_the_client_may_go_on(sent: bytes, code: int, kind: int) -> None:
    session = make()
    drain(session)
    session.receive(CLIENT + sent)
    magic, told, reply, _length = struct.unpack_from(">QIII", drain(session))
    assert (magic, told, reply) == (0x3E889045565A9, code, kind)
    session.receive(go())
    assert session.state is State.TRANSMISSION


@pytest.mark.parametrize(
    "sent",
    [
        b"\0\0\0\x07",  # unknown client flags
        b"\0\0\0\0" + option(3),  # a client that cannot read the answer
        CLIENT + b"X" * 16,
        CLIENT + option(3)[:8] + struct.pack(">II", 3, 1 << 30),
        CLIENT + option(3) * 1001,
    ],
)
def test_a_hopeless_client_is_dropped(sent: bytes) -> None:
    session = make()
    session.receive(sent)
    assert session.closing
    assert session.fault
    drain(session)
    assert session.finished
    session.receive(b"more")
    assert drain(session) == b""


def test_a_client_that_does_not_read_answers_to_options_is_dropped() -> None:
    exports = {str(number): Export(name=str(number) * 2000, size_bytes=0) for number in range(100, 900)}
    session = NbdSession(exports, itertools.count())
    session.receive(CLIENT + option(3) * 900)
    assert session.closing
    assert session.unsent_bytes < 2 * c.IN_FLIGHT_BYTES_MAX


@pytest.mark.parametrize(
    ("code", "queries", "context"),
    [
        (9, [], 0),
        (9, [b"base:"], 0),
        (9, [b"base:allocation"], 0),
        (9, [b"qemu:dirty"], None),
        (10, [b"base:allocation", b"x:y"], 1),
        (10, [b"base:"], None),
        (10, [], None),
    ],
)
def test_metadata_contexts(code: int, queries: list[bytes], context: int | None) -> None:
    session = make()
    drain(session)
    body = counted(b"") + struct.pack(">I", len(queries)) + b"".join(map(counted, queries))
    session.receive(CLIENT + option(8) + option(code, body))
    told = b"" if context is None else answer(code, 4, struct.pack(">I", context) + b"base:allocation")
    assert drain(session) == answer(8, 1) + told + answer(code, 1)


@pytest.mark.parametrize(
    ("after", "works"),
    [
        (go(), True),
        (go(b"r0/0"), False),  # the context was set for another name
        (option(10, counted(b"") + bytes(4)) + go(), False),  # each SET replaces the last one
        (option(10, b"") + go(), False),
        (option(1, b""), True),
        (option(1, b"r0/0"), False),
    ],
)
def test_a_metadata_context_belongs_to_the_name_it_was_set_for(after: bytes, works: bool) -> None:
    session = make()
    session.receive(CLIENT + META + after)
    drain(session)
    session.receive(ask(7, 4096, 8192, flags=8))
    told = drain(session)
    assert (told == chunk(5, struct.pack(">III", 1, 8192, 0))) is works
    assert session.take_requests() == []


# -- validation --------------------------------

RO = Export(name="ro", size_bytes=SIZE, read_only=True)
R, W, F, T, Z, B = 0, 1, 3, 4, 6, 7
RULES: list[tuple[int, int, int, int, int, Export]] = [
    # command, flags, offset, size, errno, export
    (R, 0, 0, 512, 0, EXPORT),
    (R, 0, SIZE - 512, 512, 0, EXPORT),
    (R, 4, 0, 512, 0, EXPORT),
    (R, 1, 0, 512, 0, EXPORT),
    (R, 2, 0, 512, Errno.EINVAL, EXPORT),
    (R, 0, 0, 32 * MIB, 0, EXPORT),
    (R, 0, 0, 32 * MIB + 512, Errno.EINVAL, EXPORT),
    (R, 0, SIZE, 512, Errno.EINVAL, EXPORT),
    (R, 0, 2**64 - 512, 512, Errno.EINVAL, EXPORT),
    (R, 0, 100, 512, Errno.EINVAL, EXPORT),
    (R, 0, 0, 100, Errno.EINVAL, EXPORT),
    (W, 1, 0, 512, 0, EXPORT),
    (W, 2, 0, 512, Errno.EINVAL, EXPORT),
    (W, 0, SIZE - 512, 1024, Errno.ENOSPC, EXPORT),
    (W, 0, 0, 32 * MIB + 512, Errno.EINVAL, EXPORT),
    (W, 0, 1, 512, Errno.EINVAL, EXPORT),
    (W, 0, 0, 512, Errno.EPERM, RO),
    (F, 0, 0, 0, 0, EXPORT),
    (F, 0, 0, 0, 0, RO),
    (F, 0, 0, 512, Errno.EINVAL, EXPORT),
    (F, 0, 512, 0, Errno.EINVAL, EXPORT),
    (F, 2, 0, 0, Errno.EINVAL, EXPORT),
    (T, 1, 0, SIZE, 0, EXPORT),
    (T, 0, SIZE, 512, Errno.EINVAL, EXPORT),
    (T, 0, 0, 512, Errno.EPERM, RO),
    (T, 2, 0, 512, Errno.EINVAL, EXPORT),
    (Z, 3, 0, SIZE, 0, EXPORT),
    (Z, 16, 0, 512, Errno.EINVAL, EXPORT),  # FAST_ZERO is not offered
    (Z, 0, SIZE, 512, Errno.ENOSPC, EXPORT),
    (Z, 0, 0, 512, Errno.EPERM, RO),
    (B, 8, 0, SIZE, 0, EXPORT),
    (B, 0, 0, 0, Errno.EINVAL, EXPORT),
    (B, 0, SIZE, 512, Errno.EINVAL, EXPORT),
    (5, 0, 0, 512, Errno.EINVAL, EXPORT),  # CACHE is not offered
    (8, 0, 0, 512, Errno.EINVAL, EXPORT),
    (999, 0, 0, 0, Errno.EINVAL, EXPORT),
]


@pytest.mark.parametrize(("command", "flags", "offset", "size", "error", "export"), RULES)
def test_a_request_is_judged(
    command: int, flags: int, offset: int, size: int, error: int, export: Export
) -> None:
    fault = judge(Abilities(export, True, True), command, flags, offset, size)
    assert (fault.error if fault else 0) == error


def test_what_was_not_negotiated_is_refused() -> None:
    able = Abilities(EXPORT, False, False)
    assert judge(able, Command.READ, c.CMD_FLAG_DF, 0, 512) is not None
    assert judge(able, Command.BLOCK_STATUS, 0, 0, 512) is not None


@pytest.mark.parametrize(("system", "protocol"), [(0, 0), (5, 5), (30, 1), (13, 1), (27, 28), (121, 5)])
def test_errors_become_numbers_the_protocol_knows(system: int, protocol: int) -> None:
    assert protocol_errno(system) == protocol


# -- transmission --------------------------------


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
def test_whatever_a_client_sends_nothing_is_raised_and_memory_is_bounded(
    start: bool, sent: list[bytes]
) -> None:
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


@given(st.sampled_from(list(Kind)), st.integers(0, 1 << 40), st.integers(1, 200 * MIB))
def test_pieces_cover_a_range_exactly(kind: Kind, offset: int, size: int) -> None:
    cut = list(pieces(kind, offset, size))
    assert cut[0][0] == offset
    assert all(start + length == following for (start, length), (following, _) in itertools.pairwise(cut))
    assert cut[-1][0] + cut[-1][1] == offset + size
    assert all(length > 0 for _, length in cut)
