# SPDX-License-Identifier: Apache-2.0
"""``python -m replicator.config --reference`` prints the reference page."""

from __future__ import annotations

import sys

from replicator.config.reference import main

sys.exit(main(sys.argv[1:]))
