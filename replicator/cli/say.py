# SPDX-License-Identifier: Apache-2.0
"""How errors and answers look: in drbdadm's words and shape, with what to do on the next line.

r0: State change failed: (-2) Need access to UpToDate data
hint: volume 0 is Outdated here; connect beta with UpToDate data
"""

from __future__ import annotations

import json
import sys

from replicator.errors import ConfigError, Refused, ReplicatorError


def error_text(name: str, error: ReplicatorError) -> str:
    """The lines for one error about `name`, each with its newline."""
    if isinstance(error, ConfigError):
        text = "".join(f"{fault}\n" for fault in error.faults)
    elif isinstance(error, Refused) and error.number:
        text = f"{name}: State change failed: ({error.number}) {error.message}\n"
    elif error.message.startswith(name):
        text = f"{error.message}\n"
    else:
        text = f"{name}: {error.message}\n"
    return text + (f"hint: {error.hint}\n" if error.hint else "")


def complain(name: str, error: ReplicatorError) -> None:
    """Print an error about `name` to standard error."""
    sys.stdout.flush()  # what was said before comes before
    sys.stderr.write(error_text(name, error))
    sys.stderr.flush()


def outcome(name: str, error: ReplicatorError | None) -> dict[str, object]:
    """An answer about `name` for --json."""
    found: dict[str, object] = {"name": name, "ok": error is None, "exit-code": 0}
    if error is not None:
        found |= {"exit-code": error.exit_code, "message": error.message, "hint": error.hint}
        if isinstance(error, Refused):
            found |= {"code": error.code, "number": error.number}
        if isinstance(error, ConfigError):
            found["faults"] = error.faults
    return found


def print_json(value: object) -> None:
    """Print a value for programs."""
    print(json.dumps(value, indent=2, allow_nan=False))
