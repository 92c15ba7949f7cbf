# SPDX-License-Identifier: Apache-2.0
"""NBD negotiation: every option a client may send, and what it may not send."""

from __future__ import annotations

import itertools
import struct

import pytest

from replicator.nbd import constants as c
from replicator.nbd.negotiation import Export
from replicator.nbd.session import NbdSession, State
from tests.unit.nbd_bytes import (
    BASIC_FLAGS,
    CLIENT,
    EXPORT,
    GREETING,
    META,
    MIB,
    SIZE,
    answer,
    ask,
    chunk,
    counted,
    drain,
    go,
    make,
    option,
)


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


@pytest.mark.parametrize("code", [9, 10])
@pytest.mark.parametrize(
    ("body", "kind", "reason"),
    [
        (counted(b"r0/0") + bytes(4) + b"x", 0x80000003, b"1 bytes follow the last query"),
        (counted(b"nobody") + bytes(4), 0x80000006, b""),
    ],
)
def test_a_metadata_context_that_cannot_be_is_refused(code: int, body: bytes, kind: int, reason: bytes) -> None:
    session = make()
    drain(session)
    session.receive(CLIENT + option(8) + option(code, body))
    said = drain(session).removeprefix(answer(8, 1))
    assert said.startswith(answer(code, kind)[:16]) and reason in said
    session.receive(go(b"r0/0"))
    assert session.state is State.TRANSMISSION, "the client may go on"


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
