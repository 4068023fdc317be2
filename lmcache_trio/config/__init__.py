"""Settings: one tree of frozen classes for a server, one for an engine, and where their values come from.

Defaults < file (TOML) < environment < flags. A plain table is structured into its class strictly, and each problem ends
in one `ConfigError` with the dotted key and the fix. A backend's table is kept as it is, and structured into the
backend's own `Config` class once the backend is found.
"""

from lmcache_trio.config.addresses import default_address, default_addresses
from lmcache_trio.config.client import ClientConfig, check_interval, load_client_config
from lmcache_trio.config.server import (
    PRIVATE,
    Access,
    Config,
    Http,
    Limits,
    Records,
    describe,
    load_config,
)
from lmcache_trio.config.tables import Table, check_ids, structure
from lmcache_trio.config.values import format_size, parse_path, parse_size

__all__ = [
    "PRIVATE",
    "Access",
    "ClientConfig",
    "Config",
    "Http",
    "Limits",
    "Records",
    "Table",
    "check_ids",
    "check_interval",
    "default_address",
    "default_addresses",
    "describe",
    "format_size",
    "load_client_config",
    "load_config",
    "parse_path",
    "parse_size",
    "structure",
]
