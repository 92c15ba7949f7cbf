# SPDX-License-Identifier: Apache-2.0
"""A deterministic simulator: the real core on nodes, disks and a network that misbehave from one seed."""
