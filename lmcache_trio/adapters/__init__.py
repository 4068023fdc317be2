"""What an engine that is no Trio program talks to: a scheduler's side, a worker's side, and what they hand each other.

Engine-neutral and synchronous. Importing this imports no torch: only a worker that registers its tensors does.
"""

from lmcache_trio._core.groups import Group, Need
from lmcache_trio.adapters.scheduler import CacheChange, PollingSchedulerAdapter, SchedulerAdapter
from lmcache_trio.adapters.specs import LoadSpec, StoreSpec
from lmcache_trio.adapters.worker import WorkerAdapter

__all__ = [
    "CacheChange",
    "Group",
    "LoadSpec",
    "Need",
    "PollingSchedulerAdapter",
    "SchedulerAdapter",
    "StoreSpec",
    "WorkerAdapter",
]
