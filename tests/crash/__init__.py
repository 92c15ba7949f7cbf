# SPDX-License-Identifier: Apache-2.0
"""Crash enumeration: small workloads, every moment, every subset of what was not stable (ALICE, CrashMonkey)."""
