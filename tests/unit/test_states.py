# SPDX-License-Identifier: Apache-2.0
"""The tables of states: what is named can happen, what is absent ends the process, the words are DRBD's."""

from __future__ import annotations

from collections.abc import Mapping
from enum import Enum
from typing import Any

import pytest

from replicator.core.states import (
    CONNECTION_MOVES,
    DISK_MOVES,
    MACHINES,
    REPLICATION_MOVES,
    ROLE_MOVES,
    Connection,
    ConnectionMove,
    Disk,
    DiskMove,
    Replication,
    ReplicationMove,
    Role,
    RoleMove,
    is_source,
    is_target,
    move,
    word,
)

Table = Mapping[tuple[Any, Any], Any]

#: (table, where it begins, states that no move of this node leads to, all moves)
TABLES: list[tuple[Table, Enum, set[Enum], type[Enum]]] = [
    (ROLE_MOVES, Role.SECONDARY, set(), RoleMove),
    (DISK_MOVES, Disk.DISKLESS, {Disk.NEGOTIATING, Disk.DUNKNOWN}, DiskMove),
    (CONNECTION_MOVES, Connection.STANDALONE, set(), ConnectionMove),
    (REPLICATION_MOVES, Replication.OFF, set(), ReplicationMove),
]
tables = pytest.mark.parametrize(
    ("table", "start", "foreign", "moves"), TABLES, ids=["role", "disk", "connection", "replication"]
)


def reachable(table: Table, start: Enum) -> set[Enum]:
    found, grown = {start}, True
    while grown:
        more = {after for (before, _), after in table.items() if before in found}
        grown = not more <= found
        found |= more
    return found


@tables
def test_every_state_can_be_reached_and_left_again(
    table: Table, start: Enum, foreign: set[Enum], moves: type[Enum]
) -> None:
    everything = set(type(start)) - foreign
    assert reachable(table, start) == everything
    for state in everything:
        assert start in reachable(table, state), f"no way back from {state}"


@tables
def test_every_move_is_legal_somewhere_and_no_move_touches_a_state_only_others_have(
    table: Table, start: Enum, foreign: set[Enum], moves: type[Enum]
) -> None:
    assert {happened for _, happened in table} == set(moves)
    assert not foreign & ({state for state, _ in table} | set(table.values()))


@tables
def test_a_move_leads_where_the_table_says_and_any_other_is_a_broken_invariant(
    table: Table, start: Enum, foreign: set[Enum], moves: type[Enum]
) -> None:
    for state in type(start):
        for happened in moves:
            if (state, happened) in table:
                assert move(dict(table), state, happened) is table[state, happened]
            else:
                with pytest.raises(AssertionError, match="illegal move"):
                    move(dict(table), state, happened)


def test_an_inconsistent_disk_becomes_good_only_by_a_finished_resync_or_by_order_of_an_operator() -> None:
    good = {Disk.OUTDATED, Disk.CONSISTENT, Disk.UP_TO_DATE}
    ways = {happened for (state, happened), after in DISK_MOVES.items() if state is Disk.INCONSISTENT and after in good}
    assert ways == {DiskMove.SYNC_DONE, DiskMove.TRUSTED}
    assert (Disk.INCONSISTENT, DiskMove.PEER_NOT_NEWER) not in DISK_MOVES


def test_a_failed_disk_can_only_be_closed() -> None:
    assert {happened for state, happened in DISK_MOVES if state is Disk.FAILED} == {DiskMove.CLOSED}


def test_a_lost_link_or_a_new_round_ends_any_replication() -> None:
    for state in Replication:
        assert move(REPLICATION_MOVES, state, ReplicationMove.LOST) is Replication.OFF
        assert move(REPLICATION_MOVES, state, ReplicationMove.ROUND) is Replication.OFF


def test_standalone_is_left_only_when_an_operator_says_connect() -> None:
    assert {happened for state, happened in CONNECTION_MOVES if state is Connection.STANDALONE} == {
        ConnectionMove.CONNECT
    }


def test_the_numbers_of_the_disk_states_order_trust_and_are_the_ones_of_the_wire() -> None:
    assert [int(disk) for disk in Disk] == list(range(10))
    assert Disk.INCONSISTENT < Disk.OUTDATED < Disk.CONSISTENT < Disk.UP_TO_DATE


def test_source_and_target_states_are_disjoint_and_paused_ones_count() -> None:
    sources = {state for state in Replication if is_source(state)}
    targets = {state for state in Replication if is_target(state)}
    assert sources == {Replication.WF_BITMAP_S, Replication.SYNC_SOURCE, Replication.PAUSED_SYNC_S}
    assert targets == {Replication.WF_BITMAP_T, Replication.SYNC_TARGET, Replication.PAUSED_SYNC_T}


def test_each_state_has_one_word_without_a_blank() -> None:
    for _, states, table in MACHINES:
        words = [word(state) for state in states]
        assert len(set(words)) == len(words) and all(text.isalpha() for text in words)
        assert all(isinstance(after, states) for after in table.values())
    assert word(Disk.UP_TO_DATE) == "UpToDate" and word(Replication.PAUSED_SYNC_T) == "PausedSyncT"
