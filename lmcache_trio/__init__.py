"""A KV-cache server for LLM engines. The public names, re-exported; importing this never imports torch."""

from lmcache_trio.errors import ConfigError, Gone, LMCacheTrioError, Misuse, ProtocolError, Unavailable

__all__ = ["ConfigError", "Gone", "LMCacheTrioError", "Misuse", "ProtocolError", "Unavailable"]
