# SPDX-License-Identifier: Apache-2.0
"""Tests with real processes, real sockets and real device nodes."""
