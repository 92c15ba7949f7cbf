# SPDX-License-Identifier: Apache-2.0
"""The tests: unit (pure, fast), scenarios, sim (seeded histories), fuzz, agents, integration, lab."""
