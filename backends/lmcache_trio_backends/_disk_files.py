"""The files of one disk tier, opened and closed together. Both block, and run in the index file's thread.

PATH/lock          held by flock while a server lives; its process id
PATH/index[-wal]   SQLite: one row a chunk
PATH/slab-00000…   the chunks' bytes
"""

from collections.abc import Callable, Sequence
from pathlib import Path

from lmcache_trio_backends._disk_config import Budget, DiskConfig
from lmcache_trio_backends._disk_index import IndexFile
from lmcache_trio_backends._disk_records import ALIGNMENT
from lmcache_trio_backends._disk_slabs import Lock, Slabs, flush_directory, probe

__all__ = ["Files"]


class Files:
    """Lock, index and slabs. Nothing is open before `open`, nor after it failed."""

    def __init__(self, config: DiskConfig, budget: Budget) -> None:
        self._config = config
        self._path = Path(config.path)
        self._slab_size = config.slab_size // ALIGNMENT * ALIGNMENT
        self._lock: Lock | None = None
        flush = config.durability == "power"
        self.index = IndexFile(self._path / "index", room=budget.index, wal_room=budget.wal, flush=flush)
        self.slabs = Slabs(self._path, slab_size=self._slab_size, capacity=budget.slabs, direct=config.direct)

    def open(self, anew: bool) -> None:
        """Lock the directory, try what is asked of its file system, open all. *anew*: begin empty."""
        new = [path for path in (self._path, *self._path.parents) if not path.exists()]
        self._path.mkdir(mode=0o700, parents=True, exist_ok=True)
        if self._config.durability == "power":
            for path in reversed(new):
                flush_directory(path.parent)
        self._lock = Lock(self._path)
        try:
            probe(self._path, direct=self._config.direct)
            if anew:
                self.index.remove()
            self.index.open()
            slab_size = self.index.fact("slab_size")
            if slab_size is None or slab_size <= 0 or slab_size % ALIGNMENT:  # new: nothing names the bytes of any slab
                self.slabs.remove()
                slab_size = self.index.fact("slab_size", self._slab_size) or self._slab_size
            self.slabs.slab_size = slab_size
            self.slabs.open()
        except BaseException:
            self.close()
            raise

    def check(self) -> None:
        """OSError when the directory is gone."""
        if self._lock is not None:
            self._lock.check()

    def close(self, owed: Sequence[Callable[[], None]] = (), *, flush: bool = False) -> None:
        """Do what is *owed* to the index, *flush* the slabs, close. Idempotent; a failure leaves nothing open."""
        lock, self._lock = self._lock, None
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
                if lock is not None:
                    lock.close()
