# SPDX-License-Identifier: Apache-2.0
"""Make a failing tape small: leave entries out while it still fails in the same way.

Delta debugging over the faults first (few, and each leaves many lines of trace out), then over what the clients ask.
"The same way" is the name of the checker; the rest of the sentence may change.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import TypeVar

from tests.sim.batch import run_tape
from tests.sim.tape import Tape

K = TypeVar("K", bound=Hashable)
RUNS_MAX = 600


def shrink(tape: Tape, failure: str, tell: Callable[[str], object] = lambda _: None) -> Tape:
    """A smaller tape that fails in the same way."""
    wanted = _way(failure)
    left = RUNS_MAX

    def fails(candidate: Tape) -> bool:
        nonlocal left
        left -= 1
        return _way(run_tape(candidate).failure) == wanted

    for _ in range(3):
        before = tape.size
        tape = _less(tape, range(len(tape.faults)), lambda t, gone: t.without(faults=gone), fails, lambda: left > 0)
        keys = [(who, number) for who, client in enumerate(tape.clients) for number in range(len(client))]
        tape = _less(tape, keys, lambda t, gone: t.without(ops=gone), fails, lambda: left > 0)
        tell(f"{before} entries, then {tape.size}\n")
        if tape.size == before:
            break
    return tape


def _way(failure: str) -> str:
    return failure.partition(":")[0]


def _less(
    tape: Tape,
    keys: Sequence[K],
    without: Callable[[Tape, set[K]], Tape],
    fails: Callable[[Tape], bool],
    go_on: Callable[[], bool],
) -> Tape:
    """Leave out halves, quarters, ... of what `keys` name."""
    gone: set[K] = set()
    share = 2
    while go_on():
        kept = [key for key in keys if key not in gone]
        if not kept:
            break
        step = max(1, len(kept) // share)
        progress = False
        for at in range(0, len(kept), step):
            candidate = gone | set(kept[at : at + step])
            if go_on() and fails(without(tape, candidate)):
                gone, progress = candidate, True
        if not progress and step == 1:
            break
        share = 2 if progress else share * 2
    return without(tape, gone)
