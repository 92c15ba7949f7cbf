# SPDX-License-Identifier: Apache-2.0
"""The control socket's verbs: what the process answers itself, and what goes to the core.

Arguments are checked here, at the border: behind it a verb has the arguments that `CORE_VERBS` declares, of
the right type, naming volumes and peers that exist.  `primary`, `secondary` and `down` also concern the /dev
nodes: they are answered when the nodes are there or gone, so that a script may use the device in its next
line.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import count
from typing import Final

from replicator import __version__
from replicator.control.messages import Reply, Request
from replicator.core.actions import CommandDone
from replicator.core.events import Command
from replicator.core.promotion import Refusal
from replicator.daemon.exports import Exports
from replicator.daemon.watchers import Status, Watchers, Wish
from replicator.drivers.loop import Loop
from replicator.errors import Refused

Answer = Callable[[Reply], object]

#: Verbs of the core and their arguments: name -> (kind, may it be missing).
CORE_VERBS: Final[Mapping[str, Mapping[str, tuple[str, bool]]]] = {
    "attach": {"volume": ("volume", True)},
    "detach": {"volume": ("volume", True)},
    "connect": {"peer": ("peer", True)},
    "disconnect": {"peer": ("peer", True)},
    "primary": {"force": ("flag", True)},
    "secondary": {"force": ("flag", True)},
    "invalidate": {"volume": ("volume", False)},
    "invalidate-remote": {"volume": ("volume", False)},
    "new-current-uuid": {"volume": ("volume", False), "clear_bitmap": ("flag", True)},
    "pause-sync": {"volume": ("volume", True)},
    "resume-sync": {"volume": ("volume", True)},
    "down": {"force": ("flag", True)},
}
OWN_VERBS: Final[Mapping[str, Mapping[str, tuple[str, bool]]]] = {
    "status": {},
    "gi": {},
    "ping": {},
    "events": {"statistics": ("flag", True), "diff": ("flag", True), "status": ("flag", True)},
}
_LEAVING = ("secondary", "down")


@dataclass(frozen=True, slots=True)
class Facts:
    """What does not change while the process runs, and how to look at what does."""

    resource: str
    node: str
    volumes: tuple[int, ...]
    peers: tuple[str, ...]
    status: Callable[[], Status]
    gi: Callable[[], Mapping[str, object]]
    primary: Callable[[], bool]


@dataclass(frozen=True, slots=True)
class _Asked:
    verb: str
    answer: Answer


class Commands:
    """Everything is called in the loop's thread.  `ended` is called when a `down` succeeded, with its answer
    to give at the very end."""

    def __init__(
        self,
        loop: Loop,
        facts: Facts,
        exports: Exports,
        watchers: Watchers,
        refresh: Callable[[], None],
        ended: Callable[[Callable[[], object]], None],
    ) -> None:
        self._loop = loop
        self._facts = facts
        self._exports = exports
        self._watchers = watchers
        self._refresh = refresh
        self._ended = ended
        self._tokens = count(1)
        self._asked: dict[int, _Asked] = {}

    def request(self, token: int, request: Request, answer: Answer) -> None:
        """A request from the control socket; `token` is the controller's."""
        try:
            args = self._checked(request)
        except Refused as refused:
            answer(Reply(False, refused.code, 0, refused.message, refused.hint))
            return
        match request.verb:
            case "status":
                answer(Reply(True, data=self._facts.status()))
            case "gi":
                answer(Reply(True, data=self._facts.gi()))
            case "ping":
                answer(Reply(True, data=self._identity()))
            case "events":
                wish = {key: bool(value) for key, value in args.items()}
                self._watchers.add(token, Wish(**wish))
            case verb:
                self.ask(verb, args, answer)

    def ask(self, verb: str, args: Mapping[str, object], answer: Answer) -> None:
        """Give a verb to the core; `answer` follows, after what else belongs to it is done."""
        if verb in _LEAVING:
            go_on = partial(self._nodes_left, verb, args, answer)
            self._exports.leave(force=bool(args.get("force")), then=go_on)
        else:
            self._command(verb, args, answer)

    def done(self, action: CommandDone) -> None:
        """The core answers."""
        asked = self._asked.pop(action.token)
        reply = Reply(action.ok, action.code, action.number, action.message, action.hint, dict(action.data))
        self._refresh()
        if asked.verb == "down" and action.ok:
            self._ended(partial(asked.answer, reply))
        elif asked.verb in _LEAVING:
            self._exports.left()
            self._exports.follow(
                primary=self._facts.primary(), then=partial(self._nodes_follow, asked.answer, reply, "")
            )
        elif asked.verb == "primary" and action.ok:
            said = f"{self._facts.resource} is Primary, but its device node could not be made"
            self._exports.follow(primary=True, then=partial(self._nodes_follow, asked.answer, reply, said))
        else:
            asked.answer(reply)

    # -- inside --------------------------------

    def _command(self, verb: str, args: Mapping[str, object], answer: Answer) -> None:
        token = next(self._tokens)
        self._asked[token] = _Asked(verb, answer)
        self._loop.post(Command(token, verb, args))

    def _nodes_left(self, verb: str, args: Mapping[str, object], answer: Answer, refusal: Refusal | None) -> None:
        if refusal is None:
            self._command(verb, args, answer)
            return
        self._exports.left()
        reply = Reply(False, refusal.code, refusal.number, refusal.message, refusal.hint)
        # What was detached before the refusal comes back.
        self._exports.follow(primary=self._facts.primary(), then=partial(self._nodes_follow, answer, reply, ""))

    def _nodes_follow(self, answer: Answer, reply: Reply, said: str, errors: list[str]) -> None:
        if said and errors:
            reply = Reply(False, "device-failed", 0, said, "; ".join(errors))
        answer(reply)

    def _identity(self) -> dict[str, object]:
        return {
            "resource": self._facts.resource,
            "node": self._facts.node,
            "pid": os.getpid(),
            "version": __version__,
        }

    def _checked(self, request: Request) -> dict[str, object]:
        """The arguments, complete; raises Refused."""
        declared = CORE_VERBS.get(request.verb) or OWN_VERBS.get(request.verb)
        if declared is None and request.verb not in OWN_VERBS:
            known = ", ".join(sorted((*CORE_VERBS, *OWN_VERBS)))
            raise Refused("unknown-verb", f"there is no verb {request.verb}", hint=f"verbs are {known}")
        declared = declared or {}
        for key in request.args:
            if key not in declared:
                known = ", ".join(declared) or "none"
                raise Refused(
                    "bad-argument",
                    f"{request.verb} has no argument {ascii(key)[:40]}",
                    hint=f"it has {known}",
                )
        args: dict[str, object] = {}
        for key, (kind, optional) in declared.items():
            value = request.args.get(key)
            if value is None and not optional and len(self._facts.volumes) > 1:
                raise Refused(
                    "bad-argument",
                    f"{request.verb} needs a {key}: {self._facts.resource} has several",
                    hint=f"{self._facts.resource}/{self._facts.volumes[0]} names one",
                )
            args[key] = self._argument(kind, value, optional)
        return args

    def _argument(self, kind: str, value: object, optional: bool) -> object:
        match kind:
            case "flag":
                if value is None or isinstance(value, bool):
                    return bool(value)
                raise Refused("bad-argument", f"{ascii(value)[:40]} is neither true nor false")
            case "volume":
                if value is None:
                    return None if optional else self._facts.volumes[0]
                if isinstance(value, int) and not isinstance(value, bool) and value in self._facts.volumes:
                    return value
                known = ", ".join(str(volume) for volume in self._facts.volumes)
                raise Refused(
                    "no-such-volume",
                    f"{self._facts.resource} has no volume {ascii(value)[:40]}",
                    hint=f"it has {known}",
                )
            case _:
                if value is None or value in self._facts.peers:
                    return value
                known = ", ".join(self._facts.peers)
                raise Refused(
                    "no-such-peer",
                    f"{self._facts.resource} has no peer {ascii(value)[:40]}",
                    hint=f"its peers are {known}",
                )
