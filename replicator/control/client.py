# SPDX-License-Identifier: Apache-2.0
"""Ask a resource's process something over its control socket.

Used by the commands and by the OCF agent, which starts a Python every few seconds: so nothing here imports
more than it needs.  `call` is for one question and one answer, `stream` for a wait or for events.  A
request whose answer did not arrive may still be carried out: the caller asks for `status` before it
concludes anything.
"""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator, Mapping

from replicator.control.messages import REPLY_BYTES_MAX, LineSplitter, Reply, Request, decode_reply, encode
from replicator.errors import NotRunning, ProtocolError, Refused

_READ_BYTES = 64 * 1024


def call(path: str, verb: str, args: Mapping[str, object] | None = None, timeout_s: float = 5.0) -> dict[str, object]:
    """The data of the final answer to one request; everything together within `timeout_s`.

    Raises Refused (the process says no), NotRunning (nobody listens, the process went away, or no answer in
    time), ProtocolError (what answers does not speak our language).
    """
    deadline_s = time.monotonic() + timeout_s
    *_, final = _replies(path, Request(verb, args or {}), deadline_s, timeout_s)  # they end with it, or raise
    return dict(final.data)


def stream(
    path: str, verb: str, args: Mapping[str, object] | None = None, timeout_s: float | None = None
) -> Iterator[dict[str, object]]:
    """The data of every answer as it arrives, up to the final one (left out when it is empty).

    `timeout_s` bounds the whole stream; None waits for ever.  Raises as `call` does.
    """
    deadline_s = None if timeout_s is None else time.monotonic() + timeout_s
    for reply in _replies(path, Request(verb, args or {}), deadline_s, timeout_s):
        if reply.data or not reply.final:
            yield dict(reply.data)


def _replies(path: str, request: Request, deadline_s: float | None, timeout_s: float | None) -> Iterator[Reply]:
    line = encode(request)
    splitter = LineSplitter(REPLY_BYTES_MAX)
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC) as sock:
        try:
            _arm(sock, deadline_s)
            sock.connect(path)
            try:
                sock.sendall(line)
            except (BrokenPipeError, ConnectionResetError):
                pass  # refused before it was read: the reason is waiting to be received
            while data := sock.recv(_READ_BYTES):
                for text in splitter.feed(data):
                    reply = _checked(decode_reply(text), request)
                    yield reply
                    if reply.final:
                        return
                _arm(sock, deadline_s)
        except (TimeoutError, BlockingIOError) as error:
            hint = f"see what it does with 'replicator status {_resource(path)}'"
            raise NotRunning(f"no answer to {request.verb} within {timeout_s} s", hint=hint) from error
        except PermissionError as error:
            raise Refused("not-permitted", f"no permission to use {path}", hint="run as root") from error
        except OSError as error:
            raise _not_running(path, error.strerror or str(error)) from error
    raise _not_running(path, "it ended before it answered")


def _arm(sock: socket.socket, deadline_s: float | None) -> None:
    if deadline_s is not None:
        left_s = deadline_s - time.monotonic()
        if left_s <= 0:
            raise TimeoutError
        sock.settimeout(left_s)


def _checked(reply: Reply, request: Request) -> Reply:
    if not reply.ok:
        raise Refused(reply.code, reply.message, number=reply.number, hint=reply.hint)
    if reply.id != request.id:
        raise ProtocolError(f"an answer to request {reply.id} came, which was not asked")
    return reply


def _resource(path: str) -> str:
    return path.rpartition("/")[2].removesuffix(".sock")


def _not_running(path: str, why: str) -> NotRunning:
    name = _resource(path)
    return NotRunning(f"{name} is not running here: {path}: {why.lower()}", hint=f"replicator up {name}")
