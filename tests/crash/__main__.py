# SPDX-License-Identifier: Apache-2.0
"""`python -m tests.crash [--limit N] [--nested N] [NAME…]`: every class of every operation, and a table."""

from __future__ import annotations

import argparse
import sys

from tests.crash.explore import HEADER, explore
from tests.crash.operations import OPERATIONS


def main() -> int:
    """Non-zero when a crash is not recovered from."""
    parser = argparse.ArgumentParser(prog="python -m tests.crash", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help="part of the name of an operation")
    parser.add_argument("--limit", type=int, help="recoveries of each sort and operation; none: all")
    parser.add_argument("--nested", type=int, default=2, help="recoveries that are crashed themselves")
    args = parser.parse_args()
    faults: list[str] = []
    sys.stdout.write(HEADER + "\n")
    for operation in OPERATIONS:
        if args.names and not any(name in operation.name for name in args.names):
            continue
        findings = explore(operation, limit=args.limit, nested=args.nested)
        sys.stdout.write(findings.row() + "\n")
        sys.stdout.flush()
        faults += findings.faults
    sys.stdout.write("\n".join(faults[:40]) + f"\n{len(faults)} faults\n")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
