"""The dicts of a large index do not grow in the same message: each that does stops the server's loop for a while."""

import hashlib
import sys
from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from lmcache_trio._core.index.arena import Arena
from lmcache_trio._core.index.generations import Layout, Namespace
from lmcache_trio._core.index.spread import spread

CHUNKS = 100_000
MESSAGE = 512
"""Chunks stored by one message, the largest that the benchmark sends."""


@given(st.integers(1, 100), st.integers(16, 4096), st.floats(0, 1))
def test_every_key_has_a_table_and_tables_have_shares_within_two(tables: int, keys: int, first: float) -> None:
    keys = max(keys, 16 * tables)
    table_of = spread(keys, tables, first=first)
    assert len(table_of) == keys
    shares = Counter(table_of)
    assert sorted(shares) == list(range(tables))
    assert max(shares.values()) <= 2 * min(shares.values()) + 2  # a key more or less by rounding


def test_at_most_a_few_tables_of_directory_and_arena_grow_in_one_message() -> None:
    namespace, arena = Namespace(0, b"namespace", Layout((4096,), (0,), 4096)), Arena()
    arena.grow(CHUNKS * 4096)
    tables = [*namespace.tables, *arena._given]
    sizes = [sys.getsizeof(table) for table in tables]
    most = grown = 0
    for start in range(0, CHUNKS, MESSAGE):
        for row in range(start, start + MESSAGE):
            digest = hashlib.sha256(row.to_bytes(4, "little")).digest()
            namespace.table_of[digest[0]][digest] = row
            arena.allocate(4096)
        before, sizes = sizes, [sys.getsizeof(table) for table in tables]
        growing = sum(one != other for one, other in zip(before, sizes, strict=True))
        if start > CHUNKS // 4:  # a small table grows in no time, and all of them soon one after another
            most, grown = max(most, growing), grown + growing
    assert grown >= len(tables)  # each grew at least once while it was watched
    assert most <= len(tables) // 8
