"""The disk tier's settings, and how its size is shared out."""

from collections.abc import Callable
from typing import Any

import attrs

from lmcache_trio.errors import ConfigError
from lmcache_trio_backends._disk_policy import ADMISSIONS
from lmcache_trio_backends._disk_records import ALIGNMENT

__all__ = ["DURABILITIES", "MIN_SIZE", "Budget", "DiskConfig"]

DURABILITIES = ("process", "periodic", "power")
MIN_SIZE = 4 << 20
_MARGIN = 64 << 10
"""Bytes for the directory itself, the lock, and blocks in which the file system notes where a slab's blocks are."""


def _at_least(least: int) -> Callable[[object, Any, int], None]:
    def check(instance: object, attribute: Any, value: int) -> None:
        if value < least:
            raise ConfigError(attribute.name, f"{value} is too small; give {least} or more")

    return check


def _one_of(names: tuple[str, ...]) -> Callable[[object, Any, str], None]:
    def check(instance: object, attribute: Any, value: str) -> None:
        if value not in names:
            raise ConfigError(attribute.name, f"{value!r} is none of {', '.join(names)}")

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
            "help": "A directory for this server alone, as in `/var/cache/kv` or `~/kv`: empty, or made when it is not"
            " there.",
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
            " later; `power`, a power failure at once."
        },
    )
    admission: str = attrs.field(
        default="all",
        validator=_one_of(ADMISSIONS),
        metadata={"help": "Which chunks are taken: `all`, or `second_hit`, those offered for the second time."},
    )
    direct: bool = attrs.field(
        default=False, metadata={"help": "Read and write past the page cache (O_DIRECT); refused where it can't be."}
    )
    slab_size: int = attrs.field(
        default=1 << 30,
        validator=_at_least(1 << 20),
        metadata={
            "unit": "bytes",
            "help": "Bytes by which the tier grows; a directory keeps the one it was made with.",
        },
    )
    threads: int = attrs.field(
        default=4,
        validator=_at_least(1),
        metadata={"help": "Reads and writes in flight at one time."},
    )


@attrs.frozen
class Budget:
    """*size* shared out: bytes of slabs, of the index file, and of its write-ahead log."""

    slabs: int
    index: int
    wal: int

    @classmethod
    def of(cls, size: int) -> "Budget":
        """1/64 for the index: enough for chunks of 32 KiB (a record is planned with 500 bytes)."""
        index = max(256 << 10, size // 64)
        wal = min(8 << 20, max(1 << 20, size // 32))
        return cls((size - index - wal - _MARGIN) // ALIGNMENT * ALIGNMENT, index, wal)
