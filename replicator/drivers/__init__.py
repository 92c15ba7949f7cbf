# SPDX-License-Identifier: Apache-2.0
"""Drivers move bytes between the core and the world; they decide nothing."""
