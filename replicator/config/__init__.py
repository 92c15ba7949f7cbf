# SPDX-License-Identifier: Apache-2.0
"""What the administrator wrote: one TOML file per resource, identical on every node.

`values` knows the kinds of value (durations, sizes, addresses), `schema` declares every setting, `loader`
reads and checks a file as a whole, `paths` knows the directories, `reference` prints the page for people.
"""

from __future__ import annotations

from replicator.config.loader import ResourceConfig, load, parse
from replicator.config.paths import (
    config_dir,
    key_dir,
    local_node_name,
    resource_names,
    resource_path,
    run_dir,
)
from replicator.config.schema import Device, Disk, Net, Node, NodeVolume, Options, Volume
from replicator.config.values import Address

__all__ = [
    "Address",
    "Device",
    "Disk",
    "Net",
    "Node",
    "NodeVolume",
    "Options",
    "ResourceConfig",
    "Volume",
    "config_dir",
    "key_dir",
    "load",
    "local_node_name",
    "parse",
    "resource_names",
    "resource_path",
    "run_dir",
]
