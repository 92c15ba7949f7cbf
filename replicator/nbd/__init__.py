# SPDX-License-Identifier: Apache-2.0
"""The NBD server side as a pure object: bytes in, requests and bytes out.

Reading order: `constants` (the numbers of the protocol), `negotiation` (what a client may ask before it has
an export), `requests` (the one place where a request is judged, and cut into pieces), `session` (one client,
from its first byte to its last).  Nothing here performs I/O or knows the mirror; `drivers/frontend.py` joins
the two.
"""

from __future__ import annotations
