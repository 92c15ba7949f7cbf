# SPDX-License-Identifier: Apache-2.0
"""The table of verbs: what each is called, takes and does.

The parser, the help text and the dispatch are made from `VERBS`, so they cannot disagree.
"""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from collections.abc import Callable
from importlib import import_module
from typing import Any, Final, NamedTuple, NoReturn

from replicator.errors import UsageError

Function = Callable[[Namespace], int]


class Flag(NamedTuple):
    """An option of a verb; `metavar` names its value, and an option without one is a switch."""

    name: str
    help: str
    metavar: str = ""
    kind: Callable[[str], Any] = str


class Verb(NamedTuple):
    """One verb; `target` is "" (takes none), "RES" or "VOL" (RES or RES/VOL), with "?" when it may be left
    out.
    """

    module: str
    function: str
    help: str
    target: str = "RES"
    flags: tuple[Flag, ...] = ()


_JSON = Flag("--json", "print JSON, for programs")
_FORCE = Flag("--force", "overrule what would be refused (see the hint of the refusal)")


def seconds(text: str) -> float:
    """A time to wait, in seconds."""
    value = float(text)
    if not 0 <= value < 1e9:
        raise ValueError(text)
    return value


_TIMEOUT = Flag("--timeout", "give up after so many seconds (exit code 5); 0 looks once", "SECONDS", seconds)
_PEER = Flag("--peer", "this peer only", "NAME")

VERBS: Final[dict[str, Verb]] = {
    "keygen": Verb(
        "local", "keygen", "make this node's key and certificate", "",
        (Flag("--force", "replace keys that are there"),
         Flag("--rotate", "make the next key beside the one in use"),
         Flag("--activate", "put the next key in place of the one in use"), _JSON),
    ),
    "check": Verb("local", "check", "check configuration and keys, all faults at once", "RES?", (_JSON,)),
    "create-md": Verb(
        "local", "create_md", "write fresh metadata: this copy then holds no data yet", "VOL",
        (Flag("--force", "overwrite what is there"),
         Flag("--size", "make the disk as a file of this size if there is none (like 64MiB)", "SIZE"), _JSON),
    ),
    "dump-md": Verb("local", "dump_md", "print everything the metadata says, as JSON", "VOL", (_JSON,)),
    "show-gi": Verb("local", "show_gi", "print generation ids and flags, explained", "VOL", (_JSON,)),
    "up": Verb("lifecycle", "up", "start: attach the disks, connect to the peers", "RES", (_JSON,)),
    "down": Verb("lifecycle", "down", "demote, disconnect, detach, end the process", "RES", (_FORCE, _JSON)),
    "run": Verb(
        "lifecycle", "run", "serve the resource in the foreground", "RES",
        (Flag("--ready-fd", "write a line to this descriptor when it is served", "FD", int),),
    ),
    "attach": Verb("remote", "volume_verb", "attach the disk", "VOL", (_JSON,)),
    "detach": Verb("remote", "volume_verb", "detach the disk; I/O goes on through the peer", "VOL", (_JSON,)),
    "connect": Verb("remote", "peer_verb", "connect to the peers", "RES", (_PEER, _JSON)),
    "disconnect": Verb("remote", "peer_verb", "disconnect from the peers", "RES", (_PEER, _JSON)),
    "primary": Verb("remote", "role", "promote: serve the data on this node", "RES", (_FORCE, _JSON)),
    "secondary": Verb("remote", "role", "demote; refused while the device is in use", "RES", (_FORCE, _JSON)),
    "pause-sync": Verb("remote", "volume_verb", "hold the resync", "VOL", (_JSON,)),
    "resume-sync": Verb("remote", "volume_verb", "let the resync go on", "VOL", (_JSON,)),
    "invalidate": Verb(
        "remote", "each_volume", "declare the copy here worthless: full sync from the peer", "VOL", (_JSON,)
    ),
    "invalidate-remote": Verb(
        "remote", "each_volume", "declare the peer's copy worthless: full sync to it", "VOL", (_JSON,)
    ),
    "new-current-uuid": Verb(
        "remote", "each_volume", "begin a new generation on connected nodes", "VOL",
        (Flag("--clear-bitmap", "the copies are asserted identical: skip the first sync"), _JSON),
    ),
    "status": Verb(
        "watch", "status", "show the state of resources", "RES?",
        (_JSON, Flag("--verbose", "everything"), Flag("--statistics", "figures as well")),
    ),
    "events": Verb(
        "watch", "events", "print the present state, then every change", "RES?",
        (Flag("--now", "the present state only"), Flag("--statistics", "figures as well"),
         Flag("--diff", "show changes as old->new"), _JSON),
    ),
    "wait-connect": Verb(
        "watch", "wait_connect", "wait until the peers are connected", "RES", (_TIMEOUT, _JSON)
    ),
    "wait-sync": Verb("watch", "wait_sync", "wait until no resync is left to do", "RES", (_TIMEOUT, _JSON)),
    "demo": Verb(
        "demo", "main", "two nodes on this machine, explained step by step", "",
        (Flag("--keep", "keep the directory, with the logs and the disks"),),
    ),
    "version": Verb("local", "version", "print the version", "", (_JSON,)),
}  # fmt: skip


class _Parser(ArgumentParser):
    """Argparse's own exit code for wrong usage is 2; ours is DRBD's."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(message, hint=f"{self.prog} --help")


def make_parser() -> ArgumentParser:
    """The parser of the whole command line; it raises UsageError."""
    parser = _Parser(prog="replicator", description="A network mirror for block devices in user space.")
    parser.add_argument("--config-dir", metavar="DIR", help="where RES.toml is (REPLICATOR_CONFIG_DIR)")
    parser.add_argument("--run-dir", metavar="DIR", help="where the sockets are (REPLICATOR_RUN_DIR)")
    parser.add_argument("--key-dir", metavar="DIR", help="where the keys are (REPLICATOR_KEY_DIR)")
    parser.add_argument("--node", metavar="NAME", help="which node this is (REPLICATOR_NODE)")
    verbs = parser.add_subparsers(dest="verb", metavar="VERB", required=True, parser_class=_Parser)
    for name, verb in VERBS.items():
        _add(verbs.add_parser(name, help=verb.help, description=verb.help), verb)
    return parser


def _add(parser: ArgumentParser, verb: Verb) -> None:
    if verb.target:
        shown = "RES[/VOL]" if verb.target.startswith("VOL") else "RES"
        nargs = "?" if verb.target.endswith("?") else None
        parser.add_argument("target", metavar=shown, nargs=nargs, help=f"{shown} or all")
    for flag in verb.flags:
        if flag.metavar:
            parser.add_argument(flag.name, metavar=flag.metavar, type=flag.kind, help=flag.help)
        else:
            parser.add_argument(flag.name, action="store_true", help=flag.help)


def function_of(verb: str) -> Function:
    """The function that does a verb; its module is imported now and not before."""
    entry = VERBS[verb]
    function: Function = getattr(import_module(f"replicator.cli.{entry.module}"), entry.function)
    return function
