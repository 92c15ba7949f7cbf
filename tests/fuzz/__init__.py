# SPDX-License-Identifier: Apache-2.0
"""Fuzzing: whatever the bytes, they are parsed or refused with the one documented error, and nothing else happens."""
