"""A KV-cache server for LLM engines. The public names, re-exported; importing this never imports torch.

Each name is imported when it is first used: reading a configuration opens no transport, and the command line runs its
first line 1 ms after the interpreter, which matters to a Ctrl-C.
"""

from lmcache_trio.errors import ConfigError, Gone, LMCacheTrioError, Misuse, ProtocolError, Unavailable

TYPE_CHECKING = False  # checkers know the name; the typing module would take 20 ms
if TYPE_CHECKING:
    from typing import Any

    from lmcache_trio._core.keys import chain_digests, seed_of
    from lmcache_trio._server.supervise import Server, open_server
    from lmcache_trio._wire.messages import Role
    from lmcache_trio.client import Client, open_client
    from lmcache_trio.config import Config, load_config

    __version__: str

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
    "Config": "lmcache_trio.config",
    "Role": "lmcache_trio._wire.messages",
    "Server": "lmcache_trio._server.supervise",
    "chain_digests": "lmcache_trio._core.keys",
    "load_config": "lmcache_trio.config",
    "open_client": "lmcache_trio.client",
    "open_server": "lmcache_trio._server.supervise",
    "seed_of": "lmcache_trio._core.keys",
}


def __getattr__(name: str) -> "Any":
    if name == "__version__":
        from importlib.metadata import PackageNotFoundError, version

        try:
            return version("lmcache-trio")
        except PackageNotFoundError:
            return "(not installed)"
    if name not in _LATER:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_LATER[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
