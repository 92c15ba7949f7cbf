# SPDX-License-Identifier: Apache-2.0
"""The table of everything that is fuzzed.

A target is one pure function of bytes with its invariants inside, so that hypothesis, atheris and a debugger run the
same code: it returns, or the AssertionError (or whatever came out) is a bug.  `CORPUS` has a directory of seeds for
each: what `seed_corpus` makes, and with a name that tells a story what once broke something.

The budgets are for `test_fuzz`: bytes allocated at the peak and calls made, each a constant and a part per byte of
input.  They are generous (three times what the corpus needs); they are there to find what grows without bound.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from tests.fuzz import clients, formats, hostile

HERE: Final = Path(__file__).resolve().parent
CORPUS: Final = HERE / "corpus"
CRASHERS: Final = HERE / "crashers"
KIB: Final = 1024


@dataclass(frozen=True)
class Target:
    """`size_max`: longer inputs find nothing that shorter ones do not."""

    run: Callable[[bytes], None]
    size_max: int
    memory_bytes: int
    memory_per_byte: int
    calls: int
    calls_per_byte: int


TARGETS: Final[dict[str, Target]] = {
    "frames": Target(formats.frame_stream, 800, 64 * KIB, 40, 2000, 200),
    "payloads": Target(formats.payloads, 4096, 16 * KIB, 40, 200, 20),
    "sealed": Target(formats.sealed_blocks, 8 * 4096, 256 * KIB, 10, 4000, 2),
    "superblock": Target(formats.superblocks, 2 * 4096, 256 * KIB, 10, 8000, 2),
    "activity": Target(formats.activity_log, 4096, 512 * KIB, 40, 20000, 200),
    "bitmap-pages": Target(formats.bitmap_pages, 4096, 512 * KIB, 20, 4000, 4),
    "bitmap-chunks": Target(formats.bitmap_chunks, 2048, 2048 * KIB, 64, 4000, 200),
    "nbd-stream": Target(clients.nbd_stream, 1200, 2048 * KIB, 4000, 30000, 20000),
    "nbd-requests": Target(clients.nbd_requests, 1024, 160 * 1024 * KIB, 4000, 200000, 4000),
    "control": Target(clients.control_lines, 4096, 64 * KIB, 100, 4000, 40),
    "config": Target(clients.configuration, 4096, 512 * KIB, 200, 60000, 200),
    "certificates": Target(clients.certificates, 4096, 512 * KIB, 40, 2000, 8),
    "peer": Target(hostile.peer, 1024, 4096 * KIB, 16 * KIB, 400000, 4000),
    "operator": Target(hostile.operator, 1024, 4096 * KIB, 16 * KIB, 400000, 4000),
}


def corpus(name: str) -> dict[str, bytes]:
    """File name -> content of a target's seeds and regressions."""
    return {path.name: path.read_bytes() for path in sorted((CORPUS / name).iterdir()) if path.is_file()}
