# SPDX-License-Identifier: Apache-2.0
"""What the cluster manager needs from us: constraints in its CIB, rendered configuration, commands on other
nodes."""

from __future__ import annotations
