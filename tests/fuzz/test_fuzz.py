# SPDX-License-Identifier: Apache-2.0
"""Every target over its corpus, over raw bytes, and over mutations of the corpus; with budgets of memory and work.

The same functions run under atheris for as long as one likes: ``tox run -e fuzz -- all --seconds 600``.
"""

from __future__ import annotations

import sys
import tracemalloc
from types import FrameType

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.fuzz.seed_corpus import seeds
from tests.fuzz.targets import CORPUS, TARGETS, corpus

FILES_MAX, BYTES_MAX = 300, 500_000
SEEDS = {name: list(corpus(name).values()) for name in TARGETS}
#: What a length field may be told: 0, sizes that are limits somewhere and one more, and where signs turn.
LENGTHS = (0, 1, 1024, 1025, 4096, 4097, 65536, 65537, 1 << 20, (1 << 20) + 1, 1 << 25, (1 << 25) + 1, (1 << 31) - 1,
           1 << 31, (1 << 32) - 1)  # fmt: skip

by_target = pytest.mark.parametrize("name", TARGETS)
relaxed = settings(suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])


@st.composite
def mutated(draw: st.DrawFn, name: str) -> bytes:
    """A seed with up to four changes: a bit, a cut, a splice of two seeds, a repetition, a length at its limit."""
    data = bytearray(draw(st.sampled_from(SEEDS[name])))
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, max(0, len(data) - 1)))
        match draw(st.sampled_from(["flip", "byte", "cut", "splice", "repeat", "drop", "length", "length"])):
            case "flip" if data:
                data[at] ^= 1 << draw(st.integers(0, 7))
            case "byte" if data:
                data[at] = draw(st.integers(0, 255))
            case "cut":
                del data[at:]
            case "splice":
                other = draw(st.sampled_from(SEEDS[name]))
                data[at:] = other[draw(st.integers(0, len(other))) :]
            case "repeat":
                data[at:at] = data[at : at + draw(st.integers(1, 64))]
            case "drop":
                del data[at : at + draw(st.integers(1, 16))]
            case _:
                width = draw(st.sampled_from((2, 4, 8)))
                value = draw(st.sampled_from(LENGTHS)) & ((1 << 8 * width) - 1)
                data[at : at + width] = value.to_bytes(width, "big")
    return bytes(data[: TARGETS[name].size_max])


@by_target
def test_every_file_of_the_corpus_passes(name: str) -> None:
    for file, data in corpus(name).items():
        try:
            TARGETS[name].run(data)
        except Exception as error:
            error.add_note(f"corpus/{name}/{file}")
            raise


@by_target
def test_raw_bytes(name: str) -> None:
    target = TARGETS[name]

    @relaxed
    @given(st.binary(max_size=min(600, target.size_max)))
    def run(data: bytes) -> None:
        target.run(data)

    run()


@by_target
def test_mutations_of_what_is_valid(name: str) -> None:
    target = TARGETS[name]

    @relaxed
    @given(mutated(name))
    def run(data: bytes) -> None:
        target.run(data)

    run()


class Calls:
    """Counts calls of Python and C functions: work, whatever the machine does meanwhile."""

    def __init__(self) -> None:
        self.count = 0

    def __enter__(self) -> Calls:
        sys.setprofile(self._note)
        return self

    def __exit__(self, *_: object) -> None:
        sys.setprofile(None)

    def _note(self, frame: FrameType, event: str, arg: object) -> None:
        self.count += event in ("call", "c_call")


@by_target
def test_work_and_memory_are_bounded_by_the_input(name: str) -> None:
    target = TARGETS[name]
    for file, data in corpus(name).items():
        target.run(data)  # caches are filled before anything is measured
        with Calls() as calls:
            target.run(data)
        assert calls.count <= target.calls + target.calls_per_byte * len(data), (file, calls.count, len(data))
        tracemalloc.start()
        try:
            target.run(data)
            peak = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
        assert peak <= target.memory_bytes + target.memory_per_byte * len(data), (file, peak, len(data))


def test_the_corpus_has_every_seed_and_stays_small() -> None:
    files = [path for path in CORPUS.rglob("*") if path.is_file()]
    assert len(files) < FILES_MAX and sum(path.stat().st_size for path in files) < BYTES_MAX
    assert {path.parent.name for path in files} == set(TARGETS)
    for name, made in seeds().items():
        there = corpus(name)
        stale = [file for file, content in made.items() if there.get(file) != content]
        assert not stale, f"{name}: {stale}: run python -m tests.fuzz.seed_corpus"
