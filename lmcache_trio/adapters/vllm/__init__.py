"""The vLLM connector: `kv_connector="LMCacheTrioConnector"`, `kv_connector_module_path="lmcache_trio.adapters.vllm"`.

`docs/howto/vllm.md` shows its configuration. The connector is imported when it is first asked for, so that everything
beside it can be imported, and tested, where vLLM is not installed.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lmcache_trio.adapters.vllm.connector import LMCacheTrioConnector

__all__ = ["LMCacheTrioConnector"]


def __getattr__(name: str) -> object:
    if name == "LMCacheTrioConnector":
        from lmcache_trio.adapters.vllm.connector import LMCacheTrioConnector

        return LMCacheTrioConnector
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
