"""The one door to threads: calls that block, a thread with a queue, a tier out of blocking methods, and a Trio loop for
hosts that have none.

Nothing else in this package imports `threading`. Every thread made here is a daemon: a call that hangs never keeps a
process from ending. A wait may be given up; a call that runs cannot, so whoever gives up a wait leaves its buffers to
the call until that returns. A forked child inherits no thread: portals and dedicated threads are not alive there.
"""

from lmcache_trio.threads._calls import offload, offload_owned
from lmcache_trio.threads._dedicated import DedicatedThread
from lmcache_trio.threads._forks import inherited
from lmcache_trio.threads._portal import Portal
from lmcache_trio.threads._tier import BlockingTier
from lmcache_trio.threads._values import Handoff, Lock

__all__ = ["BlockingTier", "DedicatedThread", "Handoff", "Lock", "Portal", "inherited", "offload", "offload_owned"]
