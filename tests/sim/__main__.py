# SPDX-License-Identifier: Apache-2.0
"""`python -m tests.sim --seed N [--trace]` or `--seeds COUNT [--from N]`."""

from __future__ import annotations

import argparse
import sys
import traceback

from tests.sim.run import Run


def main() -> int:
    """Run seeds; non-zero when one fails."""
    parser = argparse.ArgumentParser(prog="python -m tests.sim", description=__doc__)
    parser.add_argument("--seed", type=int)
    parser.add_argument("--seeds", type=int, default=100)
    parser.add_argument("--from", type=int, default=0, dest="start")
    parser.add_argument("--trace", action="store_true")
    args = parser.parse_args()
    seeds = [args.seed] if args.seed is not None else range(args.start, args.start + args.seeds)
    reached: dict[str, int] = {}
    failed = []
    for seed in seeds:
        run = Run(seed)
        try:
            run.execute()
        except AssertionError as error:
            failed.append(seed)
            sys.stdout.write(f"seed {seed}: {str(error) or traceback.format_exc()}\n")
            if args.seed is not None:
                traceback.print_exc()
        except Exception:
            failed.append(seed)
            sys.stdout.write(f"seed {seed}: {traceback.format_exc()}\n")
        if args.trace:
            sys.stdout.write("\n".join(run.world.lines) + f"\n{run.swarm}\n")
        for what, count in run.seen.items():
            reached[what] = reached.get(what, 0) + count
    sys.stdout.write(f"{len(seeds)} seeds, {len(failed)} failed: {failed[:20]}\n")
    for what in sorted(reached):
        sys.stdout.write(f"  sometimes {what}: {reached[what]}\n")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
