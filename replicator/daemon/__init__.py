# SPDX-License-Identifier: Apache-2.0
"""One resource's process: the composition root.

`compose` builds the core and its drivers and carries events in and actions out; `disks`, `exports`,
`commands` and `watchers` each look after one border; `logs` is the only place that knows how a log line
looks; `run` is the life of the process from hardening to exit code.  Decisions about data are the core's
alone.
"""

from __future__ import annotations

from replicator.daemon.run import run

__all__ = ["run"]
