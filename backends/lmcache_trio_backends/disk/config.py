"""The disk tier's settings, and how its size is shared out."""

import errno
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import attrs

from lmcache_trio.errors import ConfigError, Unavailable
from lmcache_trio_backends.disk.admission import ADMISSIONS
from lmcache_trio_backends.disk.records import ALIGNMENT

__all__ = ["DURABILITIES", "MIN_SIZE", "Budget", "DiskConfig", "failure_of", "usable_size"]

log = logging.getLogger("lmcache_trio.disk")

DURABILITIES = ("process", "periodic", "power")
MIN_SIZE = 4 << 20
_BAD_PATH = (errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EEXIST, errno.ELOOP, errno.ENAMETOOLONG)
_MARGIN = 64 << 10
"""Bytes for the directory itself, the lock, and the file system's own maps of the slabs."""


def _at_least(least: int) -> Callable[[object, Any, int], None]:
    def check(instance: object, attribute: Any, value: int) -> None:
        if value < least:
            raise ConfigError(attribute.name, f"{value} is too small; give {least} or more")

    return check


def _one_of(names: tuple[str, ...]) -> Callable[[object, Any, str], None]:
    def check(instance: object, attribute: Any, value: str) -> None:
        if value not in names:
            raise ConfigError(attribute.name, f"{value!r} is not one of {', '.join(names)}")

    return check


def _is_given(instance: object, attribute: Any, value: str) -> None:
    if not value:
        raise ConfigError(attribute.name, "is empty; give a directory for this server alone")


@attrs.frozen
class DiskConfig:
    """Settings of `[[tiers]]` with `backend = "disk"`."""

    path: str = attrs.field(
        validator=_is_given,
        metadata={
            "unit": "path",
            "help": "A directory for this server alone, as in `/var/cache/kv` or `~/kv`: empty, or made if it does not"
            " exist.",
        },
    )
    size: int = attrs.field(
        validator=_at_least(MIN_SIZE),
        metadata={"unit": "bytes", "help": 'Bytes on disk that all its files together may take, as in "100GiB".'},
    )
    durability: str = attrs.field(
        default="process",
        validator=_one_of(DURABILITIES),
        metadata={
            "help": "What a stored chunk outlives: `process`, the server's death; `periodic`, also a power failure 5 s"
            " later; `power`, any power failure."
        },
    )
    admission: str = attrs.field(
        default="all",
        validator=_one_of(ADMISSIONS),
        metadata={"help": "Chunks to take: `all`, or with `second_hit` those that are offered for the second time."},
    )
    direct: bool = attrs.field(
        default=False,
        metadata={"help": "Read and write past the page cache, by O_DIRECT; refused if a disk has none."},
    )
    slab_size: int = attrs.field(
        default=1 << 30,
        validator=_at_least(1 << 20),
        metadata={
            "unit": "bytes",
            "help": "Bytes by which the tier grows; a directory keeps the value of its first use.",
        },
    )
    threads: int = attrs.field(
        default=4,
        validator=_at_least(1),
        metadata={"help": "Reads and writes in flight at one time."},
    )


@attrs.frozen
class Budget:
    """The shares of *size*: bytes of slabs, of the index file, and of its write-ahead log."""

    slabs: int
    index: int
    wal: int

    @classmethod
    def of(cls, size: int) -> "Budget":
        """1/64 for the index: enough for chunks of 32 KiB (a record is planned with 500 bytes)."""
        index = max(256 << 10, size // 64)
        wal = min(8 << 20, max(1 << 20, size // 32))
        return cls((size - index - wal - _MARGIN) // ALIGNMENT * ALIGNMENT, index, wal)


def failure_of(path: str, exc: Exception) -> ConfigError | Unavailable:
    """*exc*, for which a tier in *path* could not be opened, as callers know it: ConfigError unless it may pass."""
    if not isinstance(exc, OSError) or exc.errno not in _BAD_PATH:
        return Unavailable(f"the disk tier in {path!r}: {exc}")
    why = f"{exc.strerror} (for uid {os.geteuid()})" if isinstance(exc, PermissionError) else exc.strerror
    return ConfigError("path", f"{path!r} can't be used: {why}; give another directory")


def usable_size(config: DiskConfig) -> int:
    """`size`, or the size of the whole file system if that is less. It blocks. ConfigError: that is too little.

    The present use of the disk by others does not count: it may change, and the tier grows into free space.
    """
    path = Path(config.path)
    disk = os.statvfs(next(place for place in (path, *path.absolute().parents) if place.exists()))
    total = disk.f_blocks * disk.f_frsize
    if not total or config.size <= total:  # some file systems give none
        return config.size
    if total < MIN_SIZE:
        raise ConfigError("path", f"the file system of {config.path!r} has {total} bytes; give one of {MIN_SIZE}")
    log.warning("size is %d, but the file system of %s has %d bytes in all: it is %d", config.size, path, total, total)
    return total
