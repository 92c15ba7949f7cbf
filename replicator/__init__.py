# SPDX-License-Identifier: Apache-2.0
"""A network mirror for block devices in user space.

Start reading at docs/architecture.md, or at `replicator.core`, whose modules are chapters in the order that
page gives.  This file imports nothing: the resource agent runs every few seconds and pays for every import.
"""

from __future__ import annotations

__version__ = "0.1.0"
