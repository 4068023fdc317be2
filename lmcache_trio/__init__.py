"""A KV-cache server for LLM engines. The public names, re-exported; importing this never imports torch.

Server and client are imported when they are first named, so that reading a configuration opens no transport.
"""

from typing import TYPE_CHECKING, Any

from lmcache_trio._core.keys import chain_digests, seed_of
from lmcache_trio._wire.messages import Role
from lmcache_trio.config import Config, load_config
from lmcache_trio.errors import ConfigError, Gone, LMCacheTrioError, Misuse, ProtocolError, Unavailable

if TYPE_CHECKING:
    from lmcache_trio._server.supervise import Server, open_server
    from lmcache_trio.client import Client, open_client

__all__ = [
    "Client",
    "Config",
    "ConfigError",
    "Gone",
    "LMCacheTrioError",
    "Misuse",
    "ProtocolError",
    "Role",
    "Server",
    "Unavailable",
    "chain_digests",
    "load_config",
    "open_client",
    "open_server",
    "seed_of",
]

_LATER = {
    "Client": "lmcache_trio.client",
    "Server": "lmcache_trio._server.supervise",
    "open_client": "lmcache_trio.client",
    "open_server": "lmcache_trio._server.supervise",
}


def __getattr__(name: str) -> Any:
    if name not in _LATER:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_LATER[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
