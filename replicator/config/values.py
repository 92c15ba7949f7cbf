# SPDX-License-Identifier: Apache-2.0
"""The kinds of value a configuration file may hold: durations, sizes, paths, addresses, words, flags.

Each kind reads one TOML value into a typed one or raises `Fault` with what to write instead, describes its
bounds for the reference page, and writes a value back as an operator would.  Nothing here knows which
settings exist.
"""

from __future__ import annotations

import ipaddress
import posixpath
import re
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Protocol

SECOND_NS = 1_000_000_000
MILLISECOND_NS = 1_000_000
KIB = 1024
MIB = 1024 * KIB
GIB = 1024 * MIB
TIB = 1024 * GIB

_DURATION_UNITS = MappingProxyType(
    {"us": 1000, "ms": MILLISECOND_NS, "s": SECOND_NS, "min": 60 * SECOND_NS, "h": 3600 * SECOND_NS}
)
_SIZE_UNITS = MappingProxyType({"": 1, "B": 1, "KiB": KIB, "MiB": MIB, "GiB": GIB, "TiB": TIB})
# Digits are bounded before they are converted: a megabyte of them must not cost a second of arithmetic.
_QUANTITY = re.compile(r"([0-9]{1,18})(?:\.([0-9]{1,9}))? ?([A-Za-z]{0,4})")


class Fault(ValueError):
    """A value that cannot be taken; `hint` says what to write instead."""

    def __init__(self, problem: str, hint: str = "") -> None:
        super().__init__(problem)
        self.problem = problem
        self.hint = hint


def shown(value: object) -> str:
    """A value as it may stand in a message: quoted, printable, short."""
    text = ascii(value)
    return text if len(text) <= 60 else text[:57] + "..."


class Kind(Protocol):
    """How one sort of value is read from TOML, described in the reference and written back."""

    def parse(self, value: object) -> object:
        """The typed value, or raise `Fault`."""

    def describe(self) -> str:
        """Type and bounds, for the reference page and hints."""

    def show(self, value: object) -> str:
        """A parsed value as one would write it in the file."""


@dataclass(frozen=True, slots=True)
class Choice:
    """One of a few words; `unsupported` are words DRBD knows and we refuse by name."""

    words: tuple[str, ...]
    unsupported: tuple[str, ...] = ()

    def parse(self, value: object) -> str:
        if isinstance(value, str) and value in self.words:
            return value
        hint = self.describe()
        if isinstance(value, str) and value in self.unsupported:
            raise Fault(f"{shown(value)} is not supported yet", hint)
        raise Fault(f"{shown(value)} is not a possible value", hint)

    def describe(self) -> str:
        return " or ".join(f'"{word}"' for word in self.words)

    def show(self, value: object) -> str:
        return f'"{value}"'


@dataclass(frozen=True, slots=True)
class Flag:
    """true or false."""

    def parse(self, value: object) -> bool:
        if not isinstance(value, bool):
            raise Fault(f"{shown(value)} is not a truth value", "write true or false, without quotes")
        return value

    def describe(self) -> str:
        return "true or false"

    def show(self, value: object) -> str:
        return "true" if value else "false"


@dataclass(frozen=True, slots=True)
class Count:
    """A whole number within bounds."""

    low: int
    high: int

    def parse(self, value: object) -> int:
        if isinstance(value, bool) or not isinstance(value, int):
            raise Fault(f"{shown(value)} is not a whole number", self.describe())
        if not self.low <= value <= self.high:
            raise Fault(f"{shown(value)} is out of bounds", self.describe())
        return value

    def describe(self) -> str:
        return f"a whole number from {self.low} to {self.high}"

    def show(self, value: object) -> str:
        return str(value)


@dataclass(frozen=True, slots=True)
class Duration:
    """A time with its unit, kept in nanoseconds."""

    low_ns: int
    high_ns: int

    def parse(self, value: object) -> int:
        match = _QUANTITY.fullmatch(value) if isinstance(value, str) else None
        if match is None or match[3] not in _DURATION_UNITS:
            raise Fault(f"{shown(value)} is not a duration", 'write a number and its unit, like "500ms" or "6s"')
        nanoseconds = _scaled(match, _DURATION_UNITS[match[3]])
        if not self.low_ns <= nanoseconds <= self.high_ns:
            raise Fault(f"{shown(value)} is out of bounds", self.describe())
        return nanoseconds

    def describe(self) -> str:
        return f"a duration from {self.show(self.low_ns)} to {self.show(self.high_ns)}"

    def show(self, value: object) -> str:
        return f'"{_with_unit(value, _DURATION_UNITS)}"'


@dataclass(frozen=True, slots=True)
class Size:
    """An amount of bytes; `per_second` makes it a rate, `zero` is what 0 means where 0 is allowed."""

    low_bytes: int
    high_bytes: int
    multiple_bytes: int = 1
    per_second: bool = False
    zero: str = ""

    def parse(self, value: object) -> int:
        size = self._read(value)
        if size == 0 and self.zero:
            return 0
        if not self.low_bytes <= size <= self.high_bytes:
            raise Fault(f"{shown(value)} is out of bounds", self.describe())
        if size % self.multiple_bytes:
            raise Fault(f"{shown(value)} is not a multiple of {self.multiple_bytes} bytes", self.describe())
        return size

    def _read(self, value: object) -> int:
        if isinstance(value, int) and not isinstance(value, bool):
            return value
        text = value.removesuffix("/s") if isinstance(value, str) and self.per_second else value
        match = _QUANTITY.fullmatch(text) if isinstance(text, str) else None
        if match is None or match[3] not in _SIZE_UNITS:
            what = "rate" if self.per_second else "size"
            raise Fault(f"{shown(value)} is not a {what}", 'write bytes or a number and its unit, like "64KiB"')
        return _scaled(match, _SIZE_UNITS[match[3]])

    def describe(self) -> str:
        text = f"{'a rate per second' if self.per_second else 'a size'} from {self.show(self.low_bytes)} to "
        text += self.show(self.high_bytes)
        if self.multiple_bytes > 1:
            text += f", a multiple of {self.multiple_bytes} bytes"
        return text + (f', or "0" ({self.zero})' if self.zero else "")

    def show(self, value: object) -> str:
        return f'"{_with_unit(value, _SIZE_UNITS)}"'


@dataclass(frozen=True, slots=True)
class FilePath:
    """An absolute canonical path; `word` is an accepted word that is no path."""

    word: str = ""

    def parse(self, value: object) -> str:
        if not isinstance(value, str):
            raise Fault(f"{shown(value)} is not a path", self.describe())
        if self.word and value == self.word:
            return value
        if not value.startswith("/"):
            raise Fault(f"{shown(value)} is not an absolute path", self.describe())
        if not value.isprintable() or len(value) > 1024:
            raise Fault(f"{shown(value)} is too long or holds an unprintable character", self.describe())
        if value.startswith("//") or posixpath.normpath(value) != value or value == "/":
            hint = "leave out '..', '.', doubled and trailing slashes"
            raise Fault(f"{shown(value)} is not a canonical path", hint)
        return value

    def describe(self) -> str:
        return (f'"{self.word}" or ' if self.word else "") + "an absolute path"

    def show(self, value: object) -> str:
        return f'"{value}"'


@dataclass(frozen=True, slots=True)
class Address:
    """Where a node listens: a numeric IP address and a TCP port."""

    host: str
    port: int

    @property
    def is_loopback(self) -> bool:
        """Whether nothing sent there can leave this machine."""
        return ipaddress.ip_address(self.host).is_loopback

    @property
    def version(self) -> int:
        """4 or 6."""
        return ipaddress.ip_address(self.host).version

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if self.version == 6 else f"{self.host}:{self.port}"


@dataclass(frozen=True, slots=True)
class Endpoint:
    """An `Address` as text."""

    def parse(self, value: object) -> Address:
        if not isinstance(value, str):
            raise Fault(f"{shown(value)} is not an address", self.describe())
        host, colon, port_text = value.rpartition(":")
        if not colon or not re.fullmatch(r"[0-9]{1,5}", port_text) or not 1 <= int(port_text) <= 65535:
            raise Fault(f"{shown(value)} has no port from 1 to 65535", self.describe())
        bracketed = host.startswith("[") and host.endswith("]")
        try:
            ip = ipaddress.ip_address(host[1:-1] if bracketed else host)
        except ValueError:
            hint = "write the IP address: a host name could mean another machine tomorrow"
            raise Fault(f"{shown(value)} is not a numeric IP address", hint) from None
        if bracketed != (ip.version == 6):
            raise Fault(f"{shown(value)} has its brackets wrong", "IPv6 stands in brackets, IPv4 does not")
        if ip.is_unspecified or ip.is_multicast or str(ip) == "255.255.255.255":
            raise Fault(f"{shown(value)} is not the address of one node", self.describe())
        return Address(str(ip), int(port_text))

    def describe(self) -> str:
        return '"192.0.2.1:7788" or "[2001:db8::1]:7788"'

    def show(self, value: object) -> str:
        return f'"{value}"'


def _scaled(match: re.Match[str], unit: int) -> int:
    fraction = match[2] or ""
    return int(match[1] + fraction) * unit // int("1" + "0" * len(fraction))


def _with_unit(value: object, units: Mapping[str, int]) -> str:
    assert isinstance(value, int)
    for name, factor in reversed(list(units.items())):
        if name and value and value % factor == 0:
            return f"{value // factor}{name}"
    return str(value)
