# SPDX-License-Identifier: Apache-2.0
"""Named situations of two nodes: what is done, and the trace that comes out, as text files (README.md)."""
