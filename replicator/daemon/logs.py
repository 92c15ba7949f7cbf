# SPDX-License-Identifier: Apache-2.0
"""How this process speaks to the log: structlog, configured here and nowhere else.

One line per notice of the core.  REPLICATOR_LOG_LEVEL (debug, info, warning, error) says what is worth a
line, REPLICATOR_LOG_FORMAT (json or console) how it looks; without it a terminal gets console lines,
anything else JSON. The log is standard error: systemd and `replicator up` know what to do with it.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Mapping
from typing import Protocol

import structlog

from replicator.core.actions import Notice
from replicator.errors import ConfigError

LEVELS = {"debug": logging.DEBUG, "info": logging.INFO, "warning": logging.WARNING, "error": logging.ERROR}
#: A notice whose code has one of these words is something an operator should look at.
_GRAVE = (
    "fail",
    "error",
    "refused",
    "lost",
    "split",
    "unrelated",
    "mismatch",
    "timeout",
    "gave-up",
    "suspended",
)


class Log(Protocol):
    """What the daemon needs of a logger."""

    def debug(self, event: str, **values: object) -> None: ...
    def info(self, event: str, **values: object) -> None: ...
    def warning(self, event: str, **values: object) -> None: ...
    def critical(self, event: str, **values: object) -> None: ...


def configure(environ: Mapping[str, str], resource: str, node: str) -> Log:
    """Set structlog up for this process and return its logger.  Raises ConfigError for an unknown word."""
    level = environ.get("REPLICATOR_LOG_LEVEL") or "info"
    form = environ.get("REPLICATOR_LOG_FORMAT") or ("console" if sys.stderr.isatty() else "json")
    faults = []
    if level not in LEVELS:
        faults.append(f"REPLICATOR_LOG_LEVEL: {level!r} is not one of {', '.join(LEVELS)}")
    if form not in ("json", "console"):
        faults.append(f"REPLICATOR_LOG_FORMAT: {form!r} is not one of json, console")
    if faults:
        raise ConfigError(faults)
    # A traceback as plain text: one with local variables would write the users' data into the log.
    last: list[structlog.typing.Processor]
    if form == "json":
        last = [structlog.processors.format_exc_info, structlog.processors.JSONRenderer(default=str)]
    else:
        last = [structlog.dev.ConsoleRenderer(colors=sys.stderr.isatty())]
    structlog.configure(
        processors=[
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            *last,
        ],
        wrapper_class=structlog.make_filtering_bound_logger(LEVELS[level]),
        logger_factory=structlog.PrintLoggerFactory(file=sys.stderr),
        cache_logger_on_first_use=True,
    )
    log: Log = structlog.get_logger().bind(resource=resource, node=node)
    return log


def tell(log: Log, notice: Notice) -> None:
    """One line for one notice of the core."""
    # `event` and `level` are the line's own words: a field of that name must not displace them.
    fields = {f"{key}_" if key in ("event", "level") else key: value for key, value in notice.fields.items()}
    say = log.warning if any(word in notice.code for word in _GRAVE) else log.info
    say(notice.code, **fields)
