"""The files of one disk tier, opened and closed together. Both block, and run in the index file's thread.

In the directory that `_disk_home` keeps:

lmcache-trio-index[-wal]   SQLite: one row a chunk
lmcache-trio-slab-00000…   the chunks' bytes
"""

from collections.abc import Callable, Sequence

from lmcache_trio_backends._disk_config import Budget, DiskConfig
from lmcache_trio_backends._disk_home import INDEX_NAME, Home
from lmcache_trio_backends._disk_index import IndexFile
from lmcache_trio_backends._disk_records import ALIGNMENT
from lmcache_trio_backends._disk_slabs import Slabs, probe

__all__ = ["Files"]


class Files:
    """Directory, index and slabs. Nothing is open before `open`, nor after it failed."""

    def __init__(self, config: DiskConfig, budget: Budget, home: Home) -> None:
        self._config = config
        self._home = home
        self._slab_size = config.slab_size // ALIGNMENT * ALIGNMENT
        flush = config.durability == "power"
        self.index = IndexFile(home.inside / INDEX_NAME, room=budget.index, wal_room=budget.wal, flush=flush)
        self.slabs = Slabs(home, slab_size=self._slab_size, capacity=budget.slabs, direct=config.direct)

    def open(self, anew: bool) -> None:
        """Lock the directory, try what is asked of its file system, open all. *anew*: begin empty."""
        self._home.open(flush=self._config.durability == "power")
        try:
            probe(self._home, direct=self._config.direct)
            if anew:
                self.index.remove()
            self.index.open()
            slab_size = self.index.fact("slab_size")
            if slab_size is None or slab_size <= 0 or slab_size % ALIGNMENT:  # new: nothing names the bytes of any slab
                self.slabs.remove()
                slab_size = self.index.fact("slab_size", self._slab_size) or self._slab_size
            self.slabs.slab_size = slab_size
            self.slabs.open()
            self._home.check()  # SQLite was given a path
        except BaseException:
            self.close()
            raise

    def check(self) -> None:
        """OSError when the directory is gone."""
        self._home.check()

    def close(self, owed: Sequence[Callable[[], None]] = (), *, flush: bool = False) -> None:
        """Do what is *owed* to the index, *flush* the slabs, close. Idempotent; a failure leaves nothing open."""
        try:
            for write in owed:
                write()
            if flush:
                self.slabs.flush()
        finally:
            try:
                self.index.close()
            finally:
                self.slabs.close()
                self._home.close()
