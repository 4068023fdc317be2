"""Settings: one tree of frozen classes for a server, one for an engine, and where their values come from."""

from lmcache_trio.config.client import ClientConfig, check_interval, load_client_config
from lmcache_trio.config.server import (
    PRIVATE,
    Access,
    Config,
    Limits,
    default_address,
    default_addresses,
    describe,
    format_size,
    load_config,
)
from lmcache_trio.config.tables import Table, check_ids, parse_path, parse_size, structure

__all__ = [
    "PRIVATE",
    "Access",
    "ClientConfig",
    "Config",
    "Limits",
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
