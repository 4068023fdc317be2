"""A synchronous scheduler's side: how much of a prompt the cache has, and under which lease.

`adapter` has the verbs that a host calls. Its members: `prompts` names chunks, `lookup_table` holds the requests and
asks the server, and `lookup_machine` decides each step of one lookup. `changes` is what the server says of its memory.
`polling` is the adapter whose check waits.
"""

from lmcache_trio.adapters.scheduler.adapter import SchedulerAdapter
from lmcache_trio.adapters.scheduler.changes import CacheChange
from lmcache_trio.adapters.scheduler.polling import PollingSchedulerAdapter

__all__ = ["CacheChange", "PollingSchedulerAdapter", "SchedulerAdapter"]
