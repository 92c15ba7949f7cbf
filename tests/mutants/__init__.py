# SPDX-License-Identifier: Apache-2.0
"""The mutation check: deliberate breaks of the core, each of which the simulator or a scenario must notice."""
