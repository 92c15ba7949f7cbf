# SPDX-License-Identifier: Apache-2.0
"""The hooks of a checker.  A checker looks (white box) and never acts; a violation is `Run.fail`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from replicator.core.actions import CommandDone, Notice
from tests.sim.node import Node
from tests.sim.oracle import Issued

if TYPE_CHECKING:
    from tests.sim.run import Run


class Checker:
    """Hooks; the default is not to look."""

    invariants: tuple[str, ...] = ()

    def __init__(self, run: Run) -> None:
        self.run = run

    def replied(self, node: Node, volume: int, write: Issued, error: int) -> None:
        """A write was answered; 0 is an acknowledgement."""

    def flushed(self, node: Node, volume: int, started: int) -> None:
        """A FLUSH that was sent at `started` is going to be acknowledged."""

    def moment(self) -> None:
        """Now and then, and after each fault."""

    def died(self, node: Node) -> None:
        """A process is gone, its disks are as the crash left them."""

    def answered(self, node: Node, verb: str, answer: CommandDone) -> None:
        """An operator's command was answered."""

    def noticed(self, node: Node, notice: Notice) -> None:
        """The core reported something."""

    def metadata(self, node: Node, volume: int) -> None:
        """A metadata write is stable."""

    def converged(self) -> None:
        """The liveness phase ended and nothing is in flight."""
