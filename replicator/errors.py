# SPDX-License-Identifier: Apache-2.0
"""Who must act when something is wrong.

Errors are sorted by the person who can mend them: the administrator (configuration), the operator (a
request that is refused), the peer (it broke the protocol), the disk (its bytes are not ours or are
damaged).  A broken invariant of our own is an `AssertionError`: nobody catches it, the process ends,
and the cluster manager acts.

Every message is one sentence in lower case, without a period, with the values in it; `hint` is a
second sentence that says what to do.
"""

from __future__ import annotations


class ReplicatorError(Exception):
    """Base of all errors a user may see; `exit_code` is what the command returns (DRBD's numbers)."""

    exit_code = 1

    def __init__(self, message: str, *, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message} (hint: {self.hint})" if self.hint else self.message


class UsageError(ReplicatorError):
    """The command line makes no sense (exit code 20)."""

    exit_code = 20


class ConfigError(ReplicatorError):
    """The administrator must change a file; `faults` lists every problem found (exit code 10)."""

    exit_code = 10

    def __init__(self, faults: list[str], *, hint: str = "") -> None:
        super().__init__("\n".join(faults), hint=hint)
        self.faults = faults


class Refused(ReplicatorError):
    """The operator asked for something unsafe or impossible now.

    `code` names the reason (stable, documented), `number` is DRBD's negative state-change number
    or 0, and `exit_code` follows from it: 17 for -2, 5 for outdating an Inconsistent disk, else 11.
    """

    exit_code = 11

    def __init__(self, code: str, message: str, *, number: int = 0, hint: str = "") -> None:
        super().__init__(message, hint=hint)
        self.code = code
        self.number = number
        self.exit_code = {-2: 17, -16: 5}.get(number, 11)


class NotRunning(ReplicatorError):
    """The resource's process does not answer (exit code 10)."""

    exit_code = 10


class FormatError(ReplicatorError):
    """Bytes on a disk are not ours, are damaged, or belong to something else (exit code 10)."""

    exit_code = 10


class ProtocolError(ReplicatorError):
    """A remote party (peer, NBD client, control client) broke the protocol; its connection is dropped."""


class DiskError(ReplicatorError):
    """A backing device or metadata device cannot be opened or used (exit code 10)."""

    exit_code = 10
