"""What the index remembers of each lease, pin and reservation, and of whom they belong to.

Records are identities, made and ended by `index` alone; no rule stands here. There are as many as there are reads and
writes in progress, which is few beside the chunks: those are rows.
"""

from array import array
from collections.abc import Hashable, Sequence
from typing import Generic, TypeVar

import attrs

from lmcache_trio._core.grants import SessionKey
from lmcache_trio._core.rows import Namespace

__all__ = ["Leased", "Owner", "Owners", "Pinned", "Reserved"]

K = TypeVar("K", bound=Hashable)


@attrs.define(eq=False)
class Leased:
    """*offered*: not taken yet. *stale*: its namespace was reset."""

    id: bytes
    session: SessionKey
    namespace: Namespace
    rows: "array[int]"
    expires: float
    offered: bool = True
    stale: bool = False


@attrs.define(eq=False)
class Pinned:
    """A worker's read in progress."""

    worker: int
    namespace: Namespace
    rows: "array[int]"
    stale: bool = False


@attrs.define(eq=False)
class Reserved:
    """A copy in progress into *shards* shards of each of *rows*."""

    id: bytes
    session: SessionKey
    worker: int
    namespace: Namespace
    rows: Sequence[int]
    shards: int
    deadline: float


@attrs.define(eq=False)
class Owner:
    """What one session or one worker owns, by id."""

    lease: bytes = b""
    pins: set[bytes] = attrs.field(factory=set)
    reservations: set[bytes] = attrs.field(factory=set)
    begun: set[int] = attrs.field(factory=set)  # rows that the session began and that are WRITING still

    def is_idle(self) -> bool:
        return not (self.lease or self.pins or self.reservations or self.begun)


class Owners(Generic[K]):
    """Owners by key; one that owns nothing is not kept."""

    def __init__(self) -> None:
        self._owners: dict[K, Owner] = {}

    def __len__(self) -> int:
        return len(self._owners)

    def of(self, key: K) -> Owner:
        """The record of *key*, made if there is none."""
        owner = self._owners.get(key)
        if owner is None:
            owner = self._owners[key] = Owner()
        return owner

    def get(self, key: K) -> Owner | None:
        return self._owners.get(key)

    def tidy(self, key: K) -> None:
        """Drop the record of *key* if it owns nothing any more."""
        owner = self._owners.get(key)
        if owner is not None and owner.is_idle():
            del self._owners[key]
