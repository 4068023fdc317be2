"""The `disk` tier: chunks in preallocated slab files, named by an SQLite index, in one directory of one server."""

from lmcache_trio_backends.disk.config import DiskConfig
from lmcache_trio_backends.disk.engine import DiskTier

__all__ = ["DiskConfig", "DiskTier"]
