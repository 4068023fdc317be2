"""The one door to threads: blocking calls, a thread with a queue, a tier made of blocking methods, and a Trio loop for
hosts that have none.

No other module of this package imports `threading`. Every thread made here is a daemon, so a call that hangs never
keeps a process from ending. A task may stop waiting for a call, but the call runs on: it keeps its buffers until it
returns. A forked child inherits no thread: portals and dedicated threads are not alive in it.
"""

from lmcache_trio.threads._calls import DedicatedThread, Handoff, Lock, offload, offload_owned
from lmcache_trio.threads._forks import inherited
from lmcache_trio.threads._portal import Portal
from lmcache_trio.threads._tier import BlockingTier

__all__ = ["BlockingTier", "DedicatedThread", "Handoff", "Lock", "Portal", "inherited", "offload", "offload_owned"]
