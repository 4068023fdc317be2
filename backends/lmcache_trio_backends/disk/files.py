"""The files of one disk tier, opened and closed together. All calls block.

In the directory that `home` keeps:

lmcache-trio-index[-wal]   SQLite: one row per chunk
lmcache-trio-slab-00000…   the chunks' bytes
"""

import logging
import os
import resource
from collections.abc import Callable, Sequence

from lmcache_trio.errors import ConfigError
from lmcache_trio_backends.disk.config import Budget, DiskConfig
from lmcache_trio_backends.disk.home import INDEX_NAME, Home
from lmcache_trio_backends.disk.index_file import IndexFile
from lmcache_trio_backends.disk.records import ALIGNMENT
from lmcache_trio_backends.disk.slabs import NO_SPACE, Slabs, fallocate, probe

__all__ = ["Files"]

_RESERVE = "lmcache-trio-reserve"
"""A file that keeps the log's space while no server runs, so that a tier on a full disk can be opened and read."""
_OTHER_DESCRIPTORS = 64
"""File descriptors that a server needs beside the slabs', for its own files and a few engines."""
log = logging.getLogger("lmcache_trio.disk")


class Files:
    """Directory, index and slabs. They are closed before `open`, and after it failed."""

    def __init__(self, config: DiskConfig, budget: Budget, home: Home) -> None:
        self._config = config
        self._home = home
        self._wal_room = budget.wal
        self._slab_size = config.slab_size // ALIGNMENT * ALIGNMENT
        flush = config.durability == "power"
        self.index = IndexFile(home.inside / INDEX_NAME, room=budget.index, wal_room=budget.wal, flush=flush)
        self.slabs = Slabs(home, slab_size=self._slab_size, capacity=budget.slabs, direct=config.direct)
        self.lost_changes = 0
        self.index_lost = False
        """`open` found a damaged index, or slabs without an index: the tier begins empty."""

    def open(self, anew: bool) -> None:
        """Lock the directory, try its file system, open all files. *anew*: begin empty."""
        self._home.open(flush=self._config.durability == "power")
        try:
            probe(self._home, direct=self._config.direct)
            self._home.remove_file(_RESERVE)  # the log takes its space, also on a full disk
            if anew:
                self.index.remove()
            why = "it was found damaged" if anew else ""
            why = self.index.open() or why
            slab_size = self.index.fact("slab_size")
            if slab_size is None or slab_size <= 0 or slab_size % ALIGNMENT:  # new: it names no bytes
                removed = self.slabs.remove()
                if why or removed:
                    self.index_lost = True
                    why = why or ("its slab size is damaged" if slab_size is not None else "it is gone, or empty")
                    log.warning("%s: %s: all %d slabs are given up, and begun anew", self.index.path, why, removed)
                slab_size = self.index.fact("slab_size", self._slab_size) or self._slab_size
            elif self.index.behind:
                text = "%s is %d changes behind: its log is cut, damaged or gone, or it is an older copy; they are lost"
                log.warning(text, self.index.path, self.index.behind)
                self.lost_changes = self.index.behind
            self.slabs.slab_size = slab_size
            self._check_descriptors()
            self.slabs.open()
            self._home.check()  # SQLite was given a path
        except BaseException:
            self.close()
            raise

    def _check_descriptors(self) -> None:
        """ConfigError if this process may not have all slabs open at one time."""
        soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        slabs = -(-self.slabs.capacity // self.slabs.slab_size)
        if 0 <= soft < slabs + _OTHER_DESCRIPTORS:  # RLIM_INFINITY is -1
            problem = (
                f"{self.slabs.capacity} bytes are {slabs} slabs of {self.slabs.slab_size}, each a file, and this"
                f" process may have {soft} open; allow {slabs + _OTHER_DESCRIPTORS} (`ulimit -n`, LimitNOFILE= of"
                " systemd), or begin in a new directory with a larger slab_size"
            )
            raise ConfigError("slab_size", problem)

    def grow(self) -> int:
        """As `Slabs.grow`, less the bytes that the index may still need; OSError also if the directory is gone."""
        self._home.check()
        return self.slabs.grow(self.index.spare)

    def _keep_reserve(self) -> None:
        fd = -1
        try:
            fd = self._home.open_file(_RESERVE, os.O_RDWR | os.O_CREAT)
            fallocate(fd, 0, self._wal_room)
        except OSError as exc:
            if fd >= 0:
                os.ftruncate(fd, 0)
            if exc.errno not in NO_SPACE:
                raise
        finally:
            if fd >= 0:
                os.close(fd)

    def close(self, owed: Sequence[Callable[[], None]] = (), *, flush: bool = False) -> None:
        """Make the *owed* writes to the index, *flush* the slabs, close all, also after a failure. Idempotent."""
        try:
            for write in owed:
                write()
            if flush:
                self.slabs.flush()
        finally:
            try:
                if self.index.close():
                    self._keep_reserve()
            finally:
                self.slabs.close()
                self._home.close()
