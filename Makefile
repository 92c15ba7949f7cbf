# SPDX-License-Identifier: Apache-2.0
# Thin: the commands are in tox.ini, the making of .venv in tests/bootstrap.

.PHONY: test demo clean

# lint, types, layers, unit, seeds, coverage, integration, faults; on a fresh Debian 12: python3-venv, make, git are enough
test:
	@tests/bootstrap test
	@.venv/bin/tox run -e lint,types,layers,unit,seeds,coverage,integration,faults

# two nodes of a mirror on this machine, no root needed
demo:
	@tests/bootstrap demo
	@.venv/bin/replicator demo

clean:
	rm -rf .venv .tox dist .mypy_cache .pytest_cache .ruff_cache .hypothesis .coverage*
