# SPDX-License-Identifier: Apache-2.0
"""What a command is about: RES, RES/VOL or all, and doing it for each with one exit code.

A verb's function raises ReplicatorError for the one target it was given; `each` goes on with the next target,
so that `down all` takes down what it can, and returns the first exit code that is not 0.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable
from typing import NamedTuple

from replicator import config
from replicator.cli.say import complain, outcome, print_json
from replicator.errors import ReplicatorError, UsageError


class Target(NamedTuple):
    """A resource, or one volume of it."""

    resource: str
    volume: int | None = None

    def __str__(self) -> str:
        return self.resource if self.volume is None else f"{self.resource}/{self.volume}"

    @property
    def socket(self) -> str:
        """Its process's control socket."""
        return str(config.run_dir() / f"{self.resource}.sock")


def parse(text: str, *, volumes: bool) -> list[Target]:
    """The targets that `text` means; `volumes`: RES/VOL makes sense here.  Raises UsageError, ConfigError."""
    if text == "all":
        names = config.resource_names()
        if not names:
            raise UsageError(
                "no resource is configured",
                hint=f"write {config.config_dir()}/RES.toml, see replicator check",
            )
        return [Target(name) for name in names]
    name, slash, number = text.partition("/")
    config.resource_path(name)  # refuses what cannot be a name
    if not slash:
        return [Target(name)]
    if not volumes:
        raise UsageError(f"this verb is about whole resources, not about {text!a}", hint=f"name {name}")
    if not (number.isascii() and number.isdigit() and len(number) <= 5):
        raise UsageError(f"{text!a} names no volume", hint=f"write {name}/0")
    return [Target(name, int(number))]


def load(target: Target) -> config.ResourceConfig:
    """The configuration of a target; raises ConfigError, also when it has no such volume."""
    loaded = config.load(config.resource_path(target.resource))
    if target.volume is not None and target.volume not in loaded.volumes:
        known = ", ".join(str(volume) for volume in loaded.volumes)
        raise UsageError(f"{target.resource} has no volume {target.volume}", hint=f"it has {known}")
    return loaded


def numbers(target: Target) -> list[int]:
    """The volumes a target means, as configured."""
    loaded = load(target)
    return list(loaded.volumes) if target.volume is None else [target.volume]


def each(args: Namespace, targets: list[Target], do: Callable[[Target], None]) -> int:
    """Do it for every target; say what went wrong, or with --json what came of each."""
    code = 0
    outcomes = []
    for target in targets:
        error: ReplicatorError | None = None
        try:
            do(target)
        except ReplicatorError as caught:
            error = caught
            code = code or caught.exit_code
        outcomes.append(outcome(str(target), error))
        if error is not None and not args.json:
            complain(str(target), error)
    if args.json:
        print_json(outcomes)
    return code
