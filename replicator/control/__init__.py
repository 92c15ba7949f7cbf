# SPDX-License-Identifier: Apache-2.0
"""What an operator may ask and what the answers look like.

`messages` is the format of the control socket (pure), `client` the small caller that commands and the OCF
agent use, `render` turns status into text, `progress` draws a long wait.  All of it is standard library
only.
"""

from __future__ import annotations
