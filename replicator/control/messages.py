# SPDX-License-Identifier: Apache-2.0
"""The control socket's language: one JSON object per line, requests one way, replies the other.

A request carries an `id` the client chooses; every reply to it carries the same `id`, and the last one says
`"final": true`.  So several requests may be in flight on one connection, and one request may have many
replies (events, progress).  Lines are bounded in both directions; whatever bytes arrive, decoding gives a
message or raises ProtocolError.  Requests are read strictly (an unknown field is refused: the client
expects something we do not do); unknown fields of replies are ignored, so that a newer process can serve an
older command.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import NamedTuple

from replicator.errors import ProtocolError

REQUEST_BYTES_MAX = 64 * 1024  # a line from a client, with its newline
REPLY_BYTES_MAX = 1024 * 1024  # a line from the server: the status of 255 volumes fits several times
ID_MAX = 2**31 - 1

_VERB = re.compile(r"[a-z][a-z0-9-]{0,31}")
_CODE = re.compile(r"[a-z][a-z0-9-]{0,63}")


class Request(NamedTuple):
    """Do `verb` with `args`."""

    verb: str
    args: Mapping[str, object]
    id: int = 1


class Reply(NamedTuple):
    """An answer; fields as in `core.actions.CommandDone`.

    `number` is DRBD's state-change number or 0.  `final`: nothing more will follow for this request.  A
    reply with `ok` false is always final.  `id` 0 concerns the connection as a whole.
    """

    ok: bool
    code: str = "ok"
    number: int = 0
    message: str = ""
    hint: str = ""
    data: Mapping[str, object] = {}
    final: bool = True
    id: int = 1


def encode(message: Request | Reply) -> bytes:
    """One line, newline included.  Raises ProtocolError when it cannot be said within the bound."""
    limit = REQUEST_BYTES_MAX if isinstance(message, Request) else REPLY_BYTES_MAX
    try:
        text = json.dumps(message._asdict(), separators=(",", ":"), allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise ProtocolError(f"a message cannot be written as JSON: {error}") from error
    if len(text) >= limit:
        raise ProtocolError(f"a message of {len(text)} bytes is longer than {limit - 1}")
    return text.encode("ascii") + b"\n"


def decode_request(line: bytes) -> Request:
    """Read one line from a client; ProtocolError for anything but a well-formed request."""
    fields = _object(line, REQUEST_BYTES_MAX)
    unknown = sorted(fields.keys() - {"verb", "args", "id"})
    if unknown:
        raise ProtocolError(f"unknown field {ascii(unknown[0])[:60]} in a request")
    verb, args = fields.get("verb"), fields.get("args", {})
    if not isinstance(verb, str) or not _VERB.fullmatch(verb):
        raise ProtocolError(f"{ascii(verb)[:60]} is not a verb")
    if not isinstance(args, dict):
        raise ProtocolError("the arguments of a request are not an object")
    return Request(verb, args, _integer(fields, "id", 1, 1, ID_MAX))


def decode_reply(line: bytes) -> Reply:
    """Read one line from a server; ProtocolError for anything but a well-formed reply."""
    fields = _object(line, REPLY_BYTES_MAX)
    ok, final, data, code = (
        fields.get("ok"),
        fields.get("final"),
        fields.get("data", {}),
        fields.get("code", "ok"),
    )
    message, hint = fields.get("message", ""), fields.get("hint", "")
    if not isinstance(ok, bool) or not isinstance(final, bool) or not (ok or final):
        raise ProtocolError("a reply does not say whether it is good and final")
    if not isinstance(code, str) or not _CODE.fullmatch(code):
        raise ProtocolError(f"{ascii(code)[:60]} is not a code")
    if not isinstance(message, str) or not isinstance(hint, str) or not isinstance(data, dict):
        raise ProtocolError("a field of a reply has the wrong type")
    number = _integer(fields, "number", 0, -(2**31), 2**31 - 1)
    return Reply(ok, code, number, message, hint, data, final, _integer(fields, "id", 1, 0, ID_MAX))


class LineSplitter:
    """Cuts a byte stream, fed in any pieces, into lines of at most `limit` bytes (newline included)."""

    __slots__ = ("_limit", "_rest")

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._rest = bytearray()

    def feed(self, data: bytes) -> list[bytes]:
        """The lines completed by `data`, without newlines.  Raises ProtocolError for one too long."""
        # Only new bytes are searched: a slow sender of one long line must not cost quadratic time.
        searched = len(self._rest)
        self._rest += data
        lines: list[bytes] = []
        start = 0
        while (end := self._rest.find(b"\n", max(start, searched))) >= 0:
            if end - start >= self._limit:
                break
            lines.append(bytes(self._rest[start:end]))
            start = end + 1
        del self._rest[:start]
        if len(self._rest) >= self._limit:
            self._rest.clear()
            raise ProtocolError(f"a line is longer than {self._limit} bytes")
        return lines


def _object(line: bytes, limit: int) -> dict[str, object]:
    if len(line) >= limit:
        raise ProtocolError(f"a line is longer than {limit} bytes")
    try:
        text = line.decode("utf-8")
        value = json.loads(text, object_pairs_hook=_unique, parse_constant=_no_constant, parse_float=_finite)
        # An escaped half of a surrogate pair is a string Python can hold but nobody can print.
        if "\\ud" in text or "\\uD" in text:
            json.dumps(value, ensure_ascii=False).encode("utf-8")
    except RecursionError as error:
        raise ProtocolError("a line is nested too deeply") from error
    except ValueError as error:
        raise ProtocolError(f"a line is not JSON: {ascii(str(error))[1:101]}") from error
    if not isinstance(value, dict):
        raise ProtocolError("a line is not a JSON object")
    return value


def _unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
    # Two readers may disagree on which of two equal keys counts; so neither does.
    fields = dict(pairs)
    if len(fields) != len(pairs):
        raise ValueError("a key stands twice in one object")
    return fields


def _no_constant(text: str) -> object:
    raise ValueError(f"{text} is not a JSON number")


def _finite(text: str) -> float:
    number = float(text)
    if number in (float("inf"), float("-inf")):
        raise ValueError("a number is too large")
    return number


def _integer(fields: Mapping[str, object], key: str, default: int, low: int, high: int) -> int:
    value = fields.get(key, default)
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise ProtocolError(f"{key} is not a whole number from {low} to {high}")
    return value
