"""The parts of a running server, in one record that handlers and connections are given.

`supervise.open_server` makes the parts in order of need, each whole, and this record last.
"""

import attrs

from lmcache_trio._core.index.index import Index
from lmcache_trio._server.answers import Answers
from lmcache_trio._server.clock import Clock
from lmcache_trio._server.counts import Counts
from lmcache_trio._server.drain import Drain
from lmcache_trio._server.engines import Engines
from lmcache_trio._server.peers import Peers
from lmcache_trio._server.tasks import Tasks
from lmcache_trio._server.tiers.tiers import Tiers
from lmcache_trio._server.transfer.worker import TransferWorker
from lmcache_trio._server.turns import Turns
from lmcache_trio.abc import Memory
from lmcache_trio.config import Config

__all__ = ["Parts"]


@attrs.frozen(eq=False)
class Parts:
    """Each part below is made from those above it. *sockets* are the files that an end in a hurry must remove."""

    config: Config
    boot: bytes
    memory: Memory
    tasks: Tasks
    counts: Counts
    drain: Drain
    turns: Turns
    sockets: set[str]
    index: Index
    clock: Clock
    tiers: Tiers
    answers: Answers
    transfer: TransferWorker | None
    engines: Engines
    peers: Peers
