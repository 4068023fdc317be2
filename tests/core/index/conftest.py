"""A small arena with an index over it, and the verbs of one engine, for tests that read as sentences."""

import hashlib
import itertools
from collections.abc import Iterable, Sequence
from typing import Any

import pytest

from lmcache_trio._core.index.arena import Arena
from lmcache_trio._core.index.index import Index, Lease, Reservation
from lmcache_trio._core.keys import ChunkKey, join_digests
from lmcache_trio.statistics import table

PAGE = 4096


class World:
    """An arena of *pages* pages, an index, and namespace *name* of *shards* shards of one page each.

    Chunks have short names; chain "abc" is chunk a, then ab, then abc, so chains that begin alike share chunks.
    """

    name = b"n" * 32

    def __init__(self, pages: int, shards: int = 1, **settings: Any) -> None:
        ids = itertools.count(1)
        self.arena = Arena()
        self.index = Index(self.arena, new_id=lambda: next(ids).to_bytes(16, "big"), **settings)
        self.index.grow(pages * PAGE)
        self.index.attach(self.name, [PAGE] * shards)
        self.shards = shards
        self.now = 0.0
        self._sessions = itertools.count(1000)

    def digests(self, chain: str) -> list[bytes]:
        return [hashlib.sha256(chain[: i + 1].encode()).digest() for i in range(len(chain))]

    def key(self, chain: str, namespace: bytes | None = None) -> ChunkKey:
        return ChunkKey(namespace or self.name, self.digests(chain)[-1])

    def reserve(
        self, chain: str, *, known: int = 0, worker: int = 1, shard: int = 0, engine: str = "e", session: int = 1
    ) -> Reservation:
        """Reserve *chain* but for its first *known* chunks."""
        digests = self.digests(chain)
        parent = digests[known - 1] if known else b""
        return self.index.reserve(
            (engine, session), worker, shard, self.name, parent, join_digests(digests[known:]), self.now
        )

    def store(self, chain: str, *, known: int = 0) -> Reservation:
        """Store *chain* whole, all shards of it."""
        reservations = [
            self.reserve(chain, known=known, worker=100 + shard, shard=shard, session=99)
            for shard in range(self.shards)
        ]
        for shard, reservation in enumerate(reservations):
            if reservation.id:
                self.index.commit(reservation.id, 100 + shard)
        return reservations[0]

    def lease(self, chain: str, *, engine: str = "e", session: int | None = None) -> Lease | None:
        number = next(self._sessions) if session is None else session
        return self.index.lease((engine, number), (self.name,), self.digests(chain), self.now)

    def hits(self, chain: str) -> int:
        return self.index.match((self.name,), self.digests(chain))

    def touch(self, chains: Iterable[str]) -> None:
        for chain in chains:
            lease = self.lease(chain)
            assert lease is not None
            self.index.release(lease.id)

    @property
    def held(self) -> dict[str, int]:
        return table(self.index.statistics().held)

    @property
    def counted(self) -> dict[str, int]:
        return table(self.index.statistics())

    @property
    def dropped(self) -> dict[str, int]:
        return {reason: count for reason, count in self.index.statistics().dropped.items() if count}


@pytest.fixture
def world() -> type[World]:
    """The class: call it with the settings that the test needs."""
    return World


def positions(reservation: Reservation) -> Sequence[int]:
    return [slot.position for slot in reservation.slots]
