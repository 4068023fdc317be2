"""Chunks for a tier's tests: keys, the bytes that belong to them, and records and loads of both. They test nothing."""

from collections.abc import Sequence
from random import Random

from lmcache_trio.abc import ChunkKey, Load, Record, Tier

__all__ = ["LENGTHS", "content", "held", "is_right", "is_scribbled", "key_of", "load_of", "record_of", "scribble"]

LENGTHS = (40_001, 4096)
"""A chunk of two shards, of which one is no whole number of pages."""


def key_of(number: int, namespace: int = 0) -> ChunkKey:
    """A key of its own for each *number* in each *namespace*."""
    return ChunkKey(bytes([namespace]) * 32, Random(number).randbytes(32))


def content(key: ChunkKey, lengths: Sequence[int] = LENGTHS) -> list[bytes]:
    """The bytes that belong to *key*: no two keys share a page."""
    random = Random(key.namespace + key.digest)
    return [random.randbytes(length) for length in lengths]


def record_of(key: ChunkKey, lengths: Sequence[int] = LENGTHS, parent: bytes = b"") -> Record:
    """*key* and its bytes, to be stored."""
    return Record(key, parent, [memoryview(shard) for shard in content(key, lengths)])


def load_of(key: ChunkKey, lengths: Sequence[int] = LENGTHS) -> Load:
    """*key*, and buffers to load it into."""
    return Load(key, [memoryview(bytearray(b"\xee" * length)) for length in lengths])


def is_right(load: Load) -> bool:
    """Whether its buffers hold what belongs to its key."""
    return [bytes(view) for view in load.shards] == content(load.key, [len(view) for view in load.shards])


def held(tier: Tier) -> tuple[int | str, int | str]:
    """Chunks and bytes that *tier* says it holds."""
    found = tier.statistics()
    return found["chunks"], found["bytes_used"]


def scribble(load: Load) -> None:
    """Write into its buffers what belongs to no chunk."""
    for view in load.shards:
        view[:] = b"\xdd" * len(view)


def is_scribbled(load: Load) -> bool:
    """Whether they still hold that."""
    return all(bytes(view) == b"\xdd" * len(view) for view in load.shards)
