# SPDX-License-Identifier: Apache-2.0
"""The mirror as a pure object: no I/O, no clock, no randomness, no logging.

Events go in (`events`), actions come out (`actions`), status is a frozen value.  What must always hold is
numbered in docs/decisions/0001; the modules quote those numbers.
"""

from __future__ import annotations
