# SPDX-License-Identifier: Apache-2.0
"""The connection between the nodes ends behind byte N: in a handshake, in an exchange of bitmaps, in data.

N is drawn, so it falls into headers, between frames, behind a write and before its acknowledgement.  The proxy counts
bytes and knows nothing of frames or of TLS.  Under protocol C no cut may cost an acknowledged write or let the copies
differ afterwards; under protocol A a failover may cost the newest writes, and no others.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from itertools import islice
from pathlib import Path
from typing import Final

import pytest

from replicator.control.client import call
from tests.faults.history import write_block
from tests.faults.linearizable import prefixes
from tests.faults.proxy import Cut, How, Proxy, Way
from tests.faults.story import BLOCKS, NERVOUS, NERVOUS_NET, PATIENT, PATIENT_NET, Story, story
from tests.integration.cluster import GIVE_UP_S, TwoNodes, alone, free_ports

CUTS: Final = 7
FRAME: Final = 44 + 4096  #: a block on a clear link


@contextmanager
def proxied(tmp_path: Path, *, calm: bool = False, security: str = "clear", protocol: str = "C") -> Iterator[
    tuple[Story, Proxy]
]:  # fmt: skip
    """beta dials alpha, through the proxy."""
    timing, net = (PATIENT, PATIENT_NET) if calm else (NERVOUS, NERVOUS_NET)
    with ExitStack() as stack:
        proxies: list[Proxy] = []

        def between(nodes: TwoNodes) -> None:
            path = nodes.config_dir("beta") / "r0.toml"
            text = path.read_text()
            found = re.search(r'\[node\.alpha\]\nid = 0\naddress = "127\.0\.0\.1:(\d+)"', text)
            assert found, text
            (port,) = free_ports(1)
            proxies.append(stack.enter_context(Proxy(("127.0.0.1", port), ("127.0.0.1", int(found[1])))))
            path.write_text(text.replace(f"127.0.0.1:{found[1]}", f"127.0.0.1:{port}"))

        made = story(tmp_path, timing=timing, net=net, security=security, protocol=protocol, before=between)
        pair = stack.enter_context(made)
        yield pair, proxies[0]


def places(drawn: random.Random, handshake_bytes: int, data_bytes: int) -> Iterator[int]:
    """Bytes of a connection behind which it ends, from each of its phases in turn."""
    phases: list[Callable[[], int]] = [
        lambda: drawn.randrange(1, handshake_bytes),
        lambda: handshake_bytes + drawn.randrange(0, 700),  # the bitmaps, and how a resync begins
        lambda: handshake_bytes + drawn.randrange(0, data_bytes),
    ]
    while True:
        yield from (phase() for phase in phases)


@pytest.mark.parametrize("security", ["clear", "tls"])
@pytest.mark.parametrize("way", list(Way), ids=lambda way: way.value)
def test_a_connection_may_end_behind_any_byte(tmp_path: Path, way: Way, security: str) -> None:
    drawn = random.Random(f"{way.value}/{security}")
    with proxied(tmp_path, security=security) as (pair, proxy):
        handshake_bytes = proxy.passed(way)
        assert handshake_bytes > 200, "the nodes do not speak through the proxy"
        data_bytes = 40 * FRAME if way is Way.TO_CLIENT else 3000  # alpha is Primary; beta acknowledges
        clients = pair.clients(seed=21)
        for after_bytes in islice(places(drawn, handshake_bytes, data_bytes), CUTS):
            ticket = proxy.arm(Cut(way, after_bytes, drawn.choice(list(How))))
            clients.answered(drawn.randrange(1, 20))
            proxy.happened(ticket)
        clients.answered(10)
        pair.synced()
        pair.finish()


@pytest.mark.parametrize("seed", range(2))
def test_an_asynchronous_failover_loses_the_newest_writes_and_never_one_in_between(tmp_path: Path, seed: int) -> None:
    """Protocol A.  The bytes behind N never arrive while the Primary goes on; then it dies (I-4)."""
    drawn = random.Random(seed)
    with proxied(tmp_path, calm=True, protocol="A") as (pair, proxy):
        after_bytes = proxy.passed(Way.TO_CLIENT) + drawn.randrange(10 * FRAME, 40 * FRAME)
        ticket = proxy.arm(Cut(Way.TO_CLIENT, after_bytes, How.SWALLOW))
        pair.nodes.wait(pair.primary, alone)
        pair.synced()
        order: list[tuple[int, int]] = []
        with pair.connect() as client:
            for value in islice(pair.values, 60):
                block = drawn.choice(BLOCKS)
                order.append((block, value))
                write_block(pair.history, client, 0, block, value)
        proxy.happened(ticket)
        pair.kill(pair.primary)
        pair.fail_over()
        held = pair.read_all()
        lengths = prefixes(order, held)
        assert lengths, f"a hole: {held} is no prefix of {order}"
        assert max(lengths) < len(order), "nothing was lost: the cut did not cut"
        assert min(lengths) >= 5, "what had arrived was lost"


@pytest.mark.parametrize("protocol", ["B", "C"])
def test_what_the_peer_never_got_is_never_acknowledged(tmp_path: Path, protocol: str) -> None:
    """The bytes behind N vanish and the Primary does not notice.  It may wait; it may not say that it is done."""
    with proxied(tmp_path, calm=True, protocol=protocol) as (pair, proxy):
        ticket = proxy.arm(Cut(Way.TO_CLIENT, proxy.passed(Way.TO_CLIENT) + 20 * FRAME + 1000, How.SWALLOW))
        pair.nodes.wait(pair.primary, alone)
        pair.synced()
        clients = pair.clients(seed=22)
        proxy.happened(ticket)
        for _ in range(50):  # a Primary that acknowledged would have had the time
            call(pair.nodes.control(pair.primary), "ping", timeout_s=GIVE_UP_S)
        pair.kill(pair.primary)
        clients.parked()
        pair.fail_over()
        clients.follow()
        clients.answered(20)
        clients.stop()
        pair.read_all()
        pair.check_history()


@pytest.mark.parametrize("protocol", ["A", "B"])
def test_a_failover_without_a_cut_leaves_a_prefix_under_a_and_everything_under_b(tmp_path: Path, protocol: str) -> None:
    with proxied(tmp_path, calm=True, protocol=protocol) as (pair, _):
        drawn = random.Random(protocol)
        order: list[tuple[int, int]] = []
        with pair.connect() as client:
            for value in islice(pair.values, 80):
                order.append((drawn.choice(BLOCKS), value))
                write_block(pair.history, client, 0, *order[-1])
            pair.kill(pair.primary)
        pair.fail_over()
        held = pair.read_all()
        assert prefixes(order, held), f"a hole: {held} is no prefix of {order}"
        if protocol == "B":
            pair.check_history()
