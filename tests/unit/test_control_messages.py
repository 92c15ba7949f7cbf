# SPDX-License-Identifier: Apache-2.0
"""The control socket's lines: what is said is read back, and any bytes give a message or ProtocolError."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from replicator.control.messages import (
    REPLY_BYTES_MAX,
    REQUEST_BYTES_MAX,
    LineSplitter,
    Reply,
    Request,
    decode_reply,
    decode_request,
    encode,
)
from replicator.errors import ProtocolError

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**63) | st.floats(allow_nan=False, allow_infinity=False) | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=8,
)
OBJECT = st.dictionaries(TEXT, JSON, max_size=4)
LINES = st.binary(max_size=200) | st.text('{}[]",:0ndeft\\uD8 verbagsidokfl', max_size=60).map(str.encode)


@given(OBJECT, st.integers(1, 2**31 - 1))
def test_a_request_is_read_back(args: dict[str, object], number: int) -> None:
    request = Request("wait-sync", args, number)
    assert decode_request(encode(request).rstrip(b"\n")) == request


@given(st.booleans(), TEXT, TEXT, OBJECT, st.booleans())
def test_a_reply_is_read_back(ok: bool, message: str, hint: str, data: dict[str, object], final: bool) -> None:
    reply = Reply(ok, "no-up-to-date-disk", -2, message, hint, data, final or not ok, 7)
    line = encode(reply)
    assert line.count(b"\n") == 1
    assert decode_reply(line[:-1]) == reply


@given(LINES)
def test_any_line_gives_a_message_or_a_protocol_error(line: bytes) -> None:
    for decode in (decode_request, decode_reply):
        try:
            message = decode(line)
        except ProtocolError:
            continue
        assert encode(message)


@pytest.mark.parametrize(
    "line",
    [
        b"",
        b"[]",
        b"1",
        b"{",
        b'{"verb":"x"',
        b'{"verb":"X"}',
        b'{"verb":"a b"}',
        b'{"verb":1}',
        b'{"args":{}}',
        b'{"verb":"x","args":[]}',
        b'{"verb":"x","extra":1}',
        b'{"verb":"x","id":0}',
        b'{"verb":"x","id":true}',
        b'{"verb":"x","id":1.0}',
        b'{"verb":"x","verb":"y"}',
        b'{"verb":"x","args":{"a":1,"a":2}}',
        b'{"verb":"x","args":{"a":NaN}}',
        b'{"verb":"x","args":{"a":-Infinity}}',
        b'{"verb":"x","args":{"a":1e999}}',
        b'{"verb":"x","args":{"a":"\\ud800"}}',
        b'{"verb":"x","args":{"a":"\xff"}}',
        b'{"verb":"x","args":{"a":' + b"9" * 5000 + b"}}",
        b'{"verb":"x","args":' + b'{"a":' * 10_000,
        b"[" * 60_000,
        b" " * REQUEST_BYTES_MAX,
    ],
)
def test_a_malformed_request_is_refused(line: bytes) -> None:
    with pytest.raises(ProtocolError):
        decode_request(line)


@pytest.mark.parametrize(
    "line",
    [
        b"{}",
        b'{"ok":1,"final":true}',
        b'{"ok":false,"final":false}',
        b'{"ok":true,"final":true,"code":"A b"}',
        b'{"ok":true,"final":true,"data":[]}',
        b'{"ok":true,"final":true,"number":"1"}',
        b" " * REPLY_BYTES_MAX,
    ],
)
def test_a_malformed_reply_is_refused(line: bytes) -> None:
    with pytest.raises(ProtocolError):
        decode_reply(line)


def test_an_unknown_field_of_a_reply_is_ignored() -> None:
    assert decode_reply(b'{"ok":true,"final":true,"since":9}') == Reply(True)


@pytest.mark.parametrize(
    "message",
    [
        Request("x", {"a": "b" * REQUEST_BYTES_MAX}),
        Reply(True, data={"a": "b" * REPLY_BYTES_MAX}),
        Reply(True, data={"a": object()}),
        Reply(True, data={"a": float("nan")}),
    ],
)
def test_what_cannot_be_said_is_a_protocol_error(message: Request | Reply) -> None:
    with pytest.raises(ProtocolError):
        encode(message)


@given(st.lists(st.binary(max_size=20).map(lambda line: line.replace(b"\n", b"")), max_size=6), st.data())
def test_lines_do_not_depend_on_how_they_are_cut(lines: list[bytes], data: st.DataObject) -> None:
    stream = b"".join(line + b"\n" for line in lines)
    splitter, found, start = LineSplitter(21), [], 0
    while start < len(stream):
        end = data.draw(st.integers(start + 1, len(stream)))
        found += splitter.feed(stream[start:end])
        start = end
    assert found == lines


@pytest.mark.parametrize("pieces", [[b"x" * 10], [b"x" * 9, b"x"], [b"x" * 10 + b"\n"], [b"ok\n" + b"x" * 10 + b"\n"]])
def test_a_line_too_long_is_refused_however_it_comes(pieces: list[bytes]) -> None:
    splitter = LineSplitter(10)
    with pytest.raises(ProtocolError, match="longer than 10 bytes"):
        for piece in pieces:
            splitter.feed(piece)


def test_the_longest_line_is_taken() -> None:
    assert LineSplitter(10).feed(b"x" * 9 + b"\n") == [b"x" * 9]
