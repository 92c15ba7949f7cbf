# SPDX-License-Identifier: Apache-2.0
"""The command `replicator`: drbdadm's verbs, DRBD's exit codes, one function per verb.

`parser` has the table of verbs; `local` works on files and disks, `lifecycle` starts and ends the process of
a resource, `remote` sends verbs to it, `watch` shows what it does.  A command that is called by an agent
every few seconds must start fast: everything heavy is imported inside the verb's function.

Exit codes: 0 done; 5 a wait that timed out; 10 not configured, not running or not possible as configured; 11
refused in the present state; 17 refused for want of UpToDate data; 20 wrong usage; 130 interrupted.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from replicator.errors import ReplicatorError

EXIT_INTERRUPTED = 130
_DIRECTORIES = {
    "config_dir": "REPLICATOR_CONFIG_DIR",
    "run_dir": "REPLICATOR_RUN_DIR",
    "key_dir": "REPLICATOR_KEY_DIR",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; the exit code.  All output is done when it returns."""
    from replicator.cli.parser import function_of, make_parser
    from replicator.cli.say import complain

    try:
        args = make_parser().parse_args(argv)
        for option, variable in _DIRECTORIES.items():
            if getattr(args, option):
                os.environ[variable] = os.path.abspath(getattr(args, option))
        if args.node:
            os.environ["REPLICATOR_NODE"] = args.node
        code = function_of(args.verb)(args)
        sys.stdout.flush()
        return code
    except ReplicatorError as error:
        complain("replicator", error)
        return error.exit_code
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        # Whoever read our output has seen enough; the interpreter must not try to flush the rest.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
