# SPDX-License-Identifier: Apache-2.0
"""Where things are and what this machine is called: directories and names, each with its override.

Tests and unprivileged users run whole clusters on one machine through these variables.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping
from pathlib import Path

from replicator.config.schema import NAME, NAME_HINT
from replicator.config.values import shown
from replicator.errors import ConfigError


def config_dir(environ: Mapping[str, str] = os.environ) -> Path:
    """Where the configuration files are; REPLICATOR_CONFIG_DIR overrides."""
    return _directory(environ, "REPLICATOR_CONFIG_DIR", "/etc/replicator")


def run_dir(environ: Mapping[str, str] = os.environ) -> Path:
    """Where the sockets are; REPLICATOR_RUN_DIR overrides."""
    return _directory(environ, "REPLICATOR_RUN_DIR", "/run/replicator")


def key_dir(environ: Mapping[str, str] = os.environ) -> Path:
    """Where keys and pinned certificates are; REPLICATOR_KEY_DIR overrides."""
    return _directory(environ, "REPLICATOR_KEY_DIR", "/etc/replicator/keys")


def local_node_name(environ: Mapping[str, str] = os.environ) -> str:
    """The name to look this machine up by: REPLICATOR_NODE, else the host name."""
    return environ.get("REPLICATOR_NODE") or socket.gethostname()


def resource_path(name: str, directory: Path | None = None) -> Path:
    """The file of resource `name`; ConfigError when that cannot be the name of a resource."""
    if not NAME.fullmatch(name):
        raise ConfigError([f"{shown(name)}: not the name of a resource ({NAME_HINT})"])
    return (directory or config_dir()) / f"{name}.toml"


def resource_names(directory: Path | None = None) -> tuple[str, ...]:
    """Names of all resources configured here, sorted; none when there is no such directory."""
    try:
        entries = sorted(os.listdir(directory or config_dir()))
    except FileNotFoundError:
        return ()
    except OSError as error:
        raise ConfigError([f"{directory or config_dir()}: cannot be listed: {error.strerror}"]) from error
    stems = (entry.removesuffix(".toml") for entry in entries if entry.endswith(".toml"))
    return tuple(stem for stem in stems if NAME.fullmatch(stem))


def _directory(environ: Mapping[str, str], variable: str, default: str) -> Path:
    value = environ.get(variable) or default
    if not value.startswith("/"):
        raise ConfigError([f"{variable}: {shown(value)} is not an absolute path"])
    return Path(value)
