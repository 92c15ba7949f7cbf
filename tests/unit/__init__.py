# SPDX-License-Identifier: Apache-2.0
"""Tests without sleeping, without a network and without root."""
