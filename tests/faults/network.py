# SPDX-License-Identifier: Apache-2.0
"""Two network namespaces with one cable between them, and a knife for each direction.

Each node lives in a namespace of its own.  A cut is a rule that drops what arrives: neither side is told, as when
a switch dies.  Names carry the process id and a number, so that runs do not meet; `close` removes everything, and
what is in a namespace (the cable, the rules) goes with it.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count
from types import MappingProxyType
from typing import Final

import pytest

from tests.integration.cluster import NODES

#: Nobody else sees these addresses: the namespaces have no other cable.
HOSTS: Final = MappingProxyType({"alpha": "10.213.7.1", "beta": "10.213.7.2"})
_TABLE: Final = "cut"
_numbers = count(1)


def need_root(what: str) -> None:
    """Skip unless we are root."""
    if os.geteuid() != 0:
        pytest.skip(f"needs root: {what}")


def need(*programs: str) -> None:
    """Skip unless these programs are there."""
    for program in programs:
        if shutil.which(program, path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin") is None:
            pytest.skip(f"needs {program}")


def _run(*command: str, feed: str = "") -> None:
    done = subprocess.run(command, input=feed, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{' '.join(command)}: {done.stderr.strip()}\n{feed}"


class Network:
    """The namespaces, the cable and what cuts it."""

    def __init__(self) -> None:
        number = next(_numbers)
        self._names = {node: f"rfault-{os.getpid()}-{number}-{node}" for node in NODES}
        self._made: list[str] = []

    def _make(self) -> None:
        for name in self._names.values():
            added = subprocess.run(["ip", "netns", "add", name], capture_output=True, text=True, check=False)
            if added.returncode:  # root of a container may not either
                pytest.skip(f"needs root: {added.stderr.strip()}")
            self._made.append(name)
        one, other = self._names.values()
        _run("ip", "link", "add", "cable", "netns", one, "type", "veth", "peer", "name", "cable", "netns", other)
        for node, name in self._names.items():
            _run("ip", "-n", name, "address", "add", f"{HOSTS[node]}/30", "dev", "cable")
            _run("ip", "-n", name, "link", "set", "cable", "up")
            _run("ip", "-n", name, "link", "set", "lo", "up")
            self._nft(
                node,
                f"""
                table ip {_TABLE} {{
                    set deaf {{ type ipv4_addr; }}
                    chain input {{
                        type filter hook input priority 0;
                        ip saddr @deaf drop
                    }}
                }}
                """,
            )

    def _nft(self, node: str, rules: str) -> None:
        _run(*self.prefix(node), "nft", "-f", "-", feed=rules)

    def prefix(self, node: str) -> list[str]:
        """What starts a command in the node's namespace; it becomes that command (no process between)."""
        return ["nsenter", f"--net=/run/netns/{self._names[node]}", "--"]

    def deafen(self, *nodes: str) -> None:
        """These nodes do not hear the other one from now on; an answered call means it is so."""
        for node in nodes:
            self._nft(node, f"add element ip {_TABLE} deaf {{ {self._other(node)} }}")

    def heal(self, *nodes: str) -> None:
        """These nodes hear again (without names: all)."""
        for node in nodes or NODES:
            self._nft(node, f"flush set ip {_TABLE} deaf")

    def _other(self, node: str) -> str:
        (other,) = (HOSTS[name] for name in NODES if name != node)
        return other

    def close(self) -> None:
        """Remove the namespaces; processes in them keep theirs alive, but without a name."""
        for name in self._made:
            _run("ip", "netns", "delete", name)
        self._made.clear()


@contextmanager
def network() -> Iterator[Network]:
    """A network that is removed whatever happens."""
    need_root("network namespaces")
    need("ip", "nft", "nsenter")
    made = Network()
    try:
        made._make()
        yield made
    finally:
        made.close()
