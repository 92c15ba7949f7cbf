# SPDX-License-Identifier: Apache-2.0
"""Who may knock, and how often a refusal is worth a line in the log.

Connections that have not yet proved who they are cost memory and time, so they are few: `PENDING_MAX` in all,
one per source address, and a source that failed is not heard for a moment.  A configured peer's address is
never kept out by strangers: when all places are taken, the stranger that waits longest loses its place.

No I/O and no clock here: times are the caller's, in nanoseconds.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Final

PENDING_MAX: Final = 8
PENALTY_NS: Final = 100_000_000
NOTICE_INTERVAL_NS: Final = 10_000_000_000
NOTICES_MAX: Final = 8  #: per interval, over all sources
_SOURCES_MAX: Final = 1024  # remembered; a flood from more addresses forgets the oldest


class Admission:
    """The places of connections that are not authenticated yet."""

    def __init__(self, known: Collection[str]) -> None:
        """`known` are the addresses of configured peers."""
        self._known = frozenset(known)
        self._pending: dict[str, Callable[[], None]] = {}
        self._deaf_until_ns: dict[str, int] = {}

    def __len__(self) -> int:
        return len(self._pending)

    def refusal(self, source: str, now_ns: int) -> str:
        """Why a connection from `source` may not wait here; "" when it may.  May cut a stranger to make
        room.
        """
        if source in self._pending:
            return f"another connection from {source} has not authenticated yet"
        if now_ns < self._deaf_until_ns.get(source, 0):
            return f"a connection from {source} failed a moment ago"
        if len(self._pending) >= PENDING_MAX:
            stranger = next((one for one in self._pending if one not in self._known), None)
            if source not in self._known or stranger is None:
                return f"{PENDING_MAX} connections have not authenticated yet"
            self._pending[stranger]()
            assert stranger not in self._pending, "a connection that was cut has left its place"
        return ""

    def enter(self, source: str, cut: Callable[[], None]) -> None:
        """Take a place; `cut` must end the connection and `leave`."""
        assert source not in self._pending and len(self._pending) < PENDING_MAX
        self._pending[source] = cut

    def leave(self, source: str, now_ns: int, *, failed: bool) -> None:
        """Give the place back; a source that failed is not heard for `PENALTY_NS`."""
        del self._pending[source]
        self._deaf_until_ns.pop(source, None)
        if failed:
            if len(self._deaf_until_ns) >= _SOURCES_MAX:
                del self._deaf_until_ns[next(iter(self._deaf_until_ns))]
            self._deaf_until_ns[source] = now_ns + PENALTY_NS


class Notices:
    """One sentence per source and interval, `NOTICES_MAX` in all; the rest is counted and told with the next
    one.
    """

    def __init__(self, tell: Callable[[str], None]) -> None:
        self._tell = tell
        self._since_ns = -NOTICE_INTERVAL_NS
        self._told: set[str] = set()
        self._unsaid = 0

    def refused(self, source: str, reason: str, now_ns: int) -> None:
        """A connection from `source` was refused."""
        if now_ns - self._since_ns >= NOTICE_INTERVAL_NS:
            self._since_ns = now_ns
            self._told.clear()
        if source in self._told or len(self._told) >= NOTICES_MAX:
            self._unsaid += 1
            return
        self._told.add(source)
        unsaid, self._unsaid = self._unsaid, 0
        more = f"; {unsaid} more refusals were not reported" if unsaid else ""
        self._tell(f"connection from {source} refused: {reason}{more}")
