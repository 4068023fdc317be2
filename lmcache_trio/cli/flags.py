"""Flags that several commands have, and the settings that they make."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter

from lmcache_trio.errors import ConfigError

if TYPE_CHECKING:
    from lmcache_trio.config import Config

__all__ = ["Address", "ConfigFile", "ServersFile", "ServersSets", "Sets", "Switch", "Timeout", "load_settings"]

Switch = Annotated[bool, Parameter(negative=())]
ConfigFile = Annotated[Path | None, Parameter(name="--config")]
Sets = Annotated[tuple[str, ...], Parameter(name="--set", consume_multiple=True, negative=())]
Address = Annotated[str | None, Parameter(help="The server's address; short for --set address=….")]

# Of a command that asks a running server:
ServersFile = Annotated[
    ConfigFile,
    Parameter(
        help="The server's own TOML file, which has its address; by default the one that LMCACHE_TRIO_CONFIG names."
    ),
]
ServersSets = Annotated[Sets, Parameter(help="Settings as key=value, as for serve.")]
Timeout = Annotated[float, Parameter(help="Seconds to wait for the server at most.")]


def load_settings(config: Path | None, sets: Sequence[str], address: str | None) -> "Config":
    from lmcache_trio.config import load_config

    named_by = "--config"
    if config is None and os.environ.get("LMCACHE_TRIO_CONFIG"):
        named_by = "LMCACHE_TRIO_CONFIG"
        config = Path(os.environ[named_by])
    try:
        return load_config(config, sets if address is None else (*sets, f"address={address}"))
    except ConfigError as exc:
        if exc.key == "--config":
            raise ConfigError(named_by, exc.problem) from exc
        raise
