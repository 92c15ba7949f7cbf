# SPDX-License-Identifier: Apache-2.0
"""Which NBD requests are refused with which error, and how a long one is cut."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from replicator.nbd import constants as c
from replicator.nbd.constants import Command, Errno, protocol_errno
from replicator.nbd.negotiation import Export
from replicator.nbd.requests import Abilities, Kind, judge, pieces
from tests.unit.nbd_bytes import EXPORT, MIB, SIZE

RO = Export(name="ro", size_bytes=SIZE, read_only=True)
R, W, F, T, Z, B = 0, 1, 3, 4, 6, 7
RULES: list[tuple[int, int, int, int, int, Export]] = [
    # command, flags, offset, size, errno, export
    (R, 0, 0, 512, 0, EXPORT),
    (R, 0, SIZE - 512, 512, 0, EXPORT),
    (R, 4, 0, 512, 0, EXPORT),
    (R, 1, 0, 512, 0, EXPORT),
    (R, 2, 0, 512, Errno.EINVAL, EXPORT),
    (R, 0, 0, 32 * MIB, 0, EXPORT),
    (R, 0, 0, 32 * MIB + 512, Errno.EINVAL, EXPORT),
    (R, 0, SIZE, 512, Errno.EINVAL, EXPORT),
    (R, 0, 2**64 - 512, 512, Errno.EINVAL, EXPORT),
    (R, 0, 100, 512, Errno.EINVAL, EXPORT),
    (R, 0, 0, 100, Errno.EINVAL, EXPORT),
    (W, 1, 0, 512, 0, EXPORT),
    (W, 2, 0, 512, Errno.EINVAL, EXPORT),
    (W, 0, SIZE - 512, 1024, Errno.ENOSPC, EXPORT),
    (W, 0, 0, 32 * MIB + 512, Errno.EINVAL, EXPORT),
    (W, 0, 1, 512, Errno.EINVAL, EXPORT),
    (W, 0, 0, 512, Errno.EPERM, RO),
    (F, 0, 0, 0, 0, EXPORT),
    (F, 0, 0, 0, 0, RO),
    (F, 0, 0, 512, Errno.EINVAL, EXPORT),
    (F, 0, 512, 0, Errno.EINVAL, EXPORT),
    (F, 2, 0, 0, Errno.EINVAL, EXPORT),
    (T, 1, 0, SIZE, 0, EXPORT),
    (T, 0, SIZE, 512, Errno.EINVAL, EXPORT),
    (T, 0, 0, 512, Errno.EPERM, RO),
    (T, 2, 0, 512, Errno.EINVAL, EXPORT),
    (Z, 3, 0, SIZE, 0, EXPORT),
    (Z, 16, 0, 512, Errno.EINVAL, EXPORT),  # FAST_ZERO is not offered
    (Z, 0, SIZE, 512, Errno.ENOSPC, EXPORT),
    (Z, 0, 0, 512, Errno.EPERM, RO),
    (B, 8, 0, SIZE, 0, EXPORT),
    (B, 0, 0, 0, Errno.EINVAL, EXPORT),
    (B, 0, SIZE, 512, Errno.EINVAL, EXPORT),
    (5, 0, 0, 512, Errno.EINVAL, EXPORT),  # CACHE is not offered
    (8, 0, 0, 512, Errno.EINVAL, EXPORT),
    (999, 0, 0, 0, Errno.EINVAL, EXPORT),
]


@pytest.mark.parametrize(("command", "flags", "offset", "size", "error", "export"), RULES)
def test_a_request_is_judged(command: int, flags: int, offset: int, size: int, error: int, export: Export) -> None:
    fault = judge(Abilities(export, True, True), command, flags, offset, size)
    assert (fault.error if fault else 0) == error


def test_what_was_not_negotiated_is_refused() -> None:
    able = Abilities(EXPORT, False, False)
    assert judge(able, Command.READ, c.CMD_FLAG_DF, 0, 512) is not None
    assert judge(able, Command.BLOCK_STATUS, 0, 0, 512) is not None


@pytest.mark.parametrize(("system", "protocol"), [(0, 0), (5, 5), (30, 1), (13, 1), (27, 28), (121, 5)])
def test_errors_become_numbers_the_protocol_knows(system: int, protocol: int) -> None:
    assert protocol_errno(system) == protocol


@given(st.sampled_from(list(Kind)), st.integers(0, 1 << 40), st.integers(1, 200 * MIB))
def test_pieces_cover_a_range_exactly(kind: Kind, offset: int, size: int) -> None:
    cut = list(pieces(kind, offset, size))
    assert cut[0][0] == offset
    assert all(start + length == following for (start, length), (following, _) in itertools.pairwise(cut))
    assert cut[-1][0] + cut[-1][1] == offset + size
    assert all(length > 0 for _, length in cut)
