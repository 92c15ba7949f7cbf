# SPDX-License-Identifier: Apache-2.0
"""Verbs that the resource's process carries out: ask, wait for the answer, say what came of it."""

from __future__ import annotations

from argparse import Namespace

from replicator.cli import target as targets
from replicator.cli.target import Target

#: Draining writes through a slow disk takes its time; a process that hangs longer is worth an error.
ANSWER_S = 120.0


def ask(target: Target, verb: str, args: dict[str, object], timeout_s: float = ANSWER_S) -> dict[str, object]:
    """One verb to the process of a resource; raises what `control.client.call` raises, and ConfigError when
    the resource is not even configured.
    """
    from replicator.control.client import call
    from replicator.errors import NotRunning

    try:
        return call(target.socket, verb, args, timeout_s)
    except NotRunning:
        targets.load(target)  # a resource that does not exist is the better reason
        raise


def role(args: Namespace) -> int:
    """primary, secondary."""
    found = targets.parse(args.target, volumes=False)
    return targets.each(args, found, lambda one: _ask(one, args.verb, {"force": args.force}))


def peer_verb(args: Namespace) -> int:
    """connect, disconnect."""
    found = targets.parse(args.target, volumes=False)
    return targets.each(args, found, lambda one: _ask(one, args.verb, {"peer": args.peer}))


def volume_verb(args: Namespace) -> int:
    """attach, detach, pause-sync, resume-sync: one volume, or all of them at once."""
    found = targets.parse(args.target, volumes=True)
    return targets.each(args, found, lambda one: _ask(one, args.verb, {"volume": one.volume}))


def each_volume(args: Namespace) -> int:
    """invalidate, invalidate-remote, new-current-uuid: one volume after another."""
    extra: dict[str, object] = {}
    if args.verb == "new-current-uuid":
        extra["clear_bitmap"] = args.clear_bitmap

    def do(one: Target) -> None:
        for number in targets.numbers(one):
            _ask(one, args.verb, {"volume": number} | extra)

    return targets.each(args, targets.parse(args.target, volumes=True), do)


def _ask(target: Target, verb: str, args: dict[str, object]) -> None:
    ask(target, verb, args)
