"""An index file that is damaged, or larger than it may be: the tier opens, serves nothing wrong and goes on."""

import sqlite3
import struct
from pathlib import Path
from random import Random
from typing import Any

import pytest
import trio
from lmcache_trio_backends.disk import DiskConfig, DiskTier
from lmcache_trio_backends.disk.config import Budget
from lmcache_trio_backends.disk.files import Files
from lmcache_trio_backends.disk.home import INDEX_NAME, Home
from lmcache_trio_backends.disk.records import Row

from lmcache_trio.errors import Unavailable
from lmcache_trio.testing.tier_contract import is_right, key_of, load_of, record_of

MIB = 1 << 20
COUNT = 5


def disk_tier(path: Path, size: int = 24 * MIB) -> DiskTier:
    return DiskTier(DiskConfig(path=str(path), size=size, slab_size=4 * MIB))


def physical(path: Path) -> int:
    return sum(found.stat().st_blocks * 512 for found in [path, *path.rglob("*")])


def query(path: Path, sql: str, *parameters: object) -> list[Any]:
    db = sqlite3.connect(Home(str(path)).inside / INDEX_NAME)
    try:
        with db:
            return db.execute(sql, parameters).fetchall()
    finally:
        db.close()


async def loaded(tier: DiskTier, *numbers: int, lengths: tuple[int, ...] = (40_001, 4096)) -> list[bool]:
    loads = [load_of(key_of(n), lengths) for n in numbers]
    hits = list(await tier.load(loads))
    assert all(is_right(load) for load, hit in zip(loads, hits, strict=True) if hit)
    return hits


async def settled(tier: DiskTier) -> None:
    await tier.delete(b"\7" * 32)


# ---- rows

BIG = (1 << 63) - 1
DAMAGE = {
    "a torn list of shards": ("shards", b"\0\x11"),
    "no shards": ("shards", b""),
    "half a shard more": ("shards", struct.pack("<5Q", 40_001, 1, 4096, 1, 1)),
    "a shard of no bytes": ("shards", struct.pack("<2Q", 0, 1)),
    "a shard of more bytes than there are": ("shards", struct.pack("<2Q", 1 << 63, 1)),
    "shards that are a text": ("shards", "0123456789abcdef"),
    "shards that are a number": ("shards", 16),
    "a short key": ("key", b"k"),
    "an empty key": ("key", b""),
    "a key that is a text": ("key", "k" * 64),
    "a short parent": ("parent", b"p"),
    "a parent that is a text": ("parent", "p" * 32),
    "a place before the beginning": ("place", -4096),
    "a place between pages": ("place", 1),
    "a place that is a fraction": ("place", 4096.5),
    "a place that is a text": ("place", "4096, or so"),
    "a place that is bytes": ("place", b"\xff, \xff"),
    "a generation below 0": ("generation", -1),
    "the last generation of all": ("generation", BIG),
    "a generation that is a text": ("generation", "new"),
    "a recency below 0": ("recency", -1),
    "the last recency of all": ("recency", BIG),
    "a recency that is a text": ("recency", "now"),
}


@pytest.mark.parametrize("what", DAMAGE)
async def test_a_row_that_cannot_be_ours_is_dropped_and_counted_and_the_others_serve(tmp_path: Path, what: str) -> None:
    column, value = DAMAGE[what]
    tier = disk_tier(tmp_path)
    async with tier.open():
        assert all(await tier.store([record_of(key_of(n)) for n in range(COUNT)]))
        one = int(tier.statistics()["bytes_used"]) // COUNT
    name = key_of(2).namespace + key_of(2).digest
    query(tmp_path, f"UPDATE chunks SET {column} = ? WHERE key = ?", value, name)
    async with tier.open():
        assert await loaded(tier, *range(COUNT)) == [n != 2 for n in range(COUNT)]
        await settled(tier)
        assert (tier.statistics()["chunks"], tier.statistics()["bytes_used"]) == (COUNT - 1, (COUNT - 1) * one)
        assert all(await tier.store([record_of(key_of(n)) for n in (2, 100)]))
    async with tier.open():
        assert all(await loaded(tier, *range(COUNT), 100))
        assert tier.statistics()["corrupt"] == 1
    assert query(tmp_path, "SELECT count(*) FROM chunks") == [(COUNT + 1,)]


async def test_rows_that_name_the_same_bytes_are_one_and_the_others_are_counted(tmp_path: Path) -> None:
    tier = disk_tier(tmp_path)
    async with tier.open():
        assert all(await tier.store([record_of(key_of(n)) for n in range(COUNT)]))
    query(tmp_path, "UPDATE chunks SET place = 0")
    async with tier.open():
        assert sum(await loaded(tier, *range(COUNT))) <= 1
        await settled(tier)
        assert int(tier.statistics()["chunks"]) <= 1
        assert int(tier.statistics()["corrupt"]) >= COUNT - 1
        assert all(await tier.store([record_of(key_of(n)) for n in range(COUNT)]))
    async with tier.open():
        assert all(await loaded(tier, *range(COUNT)))


async def test_an_index_of_nothing_but_damaged_rows_is_read_to_its_end(tmp_path: Path) -> None:
    tier = disk_tier(tmp_path)
    async with tier.open():
        assert all(await tier.store([record_of(key_of(n), (100,)) for n in range(700)]))
    last = max(key_of(n).namespace + key_of(n).digest for n in range(700))
    query(tmp_path, "UPDATE chunks SET shards = x'0011' WHERE key <> ?", last)
    async with tier.open():
        assert sum(await loaded(tier, *range(700), lengths=(100,))) == 1
        assert tier.statistics()["corrupt"] == 699


@pytest.mark.parametrize("value", [b"short", "a text of thirty-two characters!"])
async def test_a_deletion_whose_note_is_damaged_costs_the_directory_and_is_not_undone(
    tmp_path: Path, value: object
) -> None:
    tier = disk_tier(tmp_path)
    async with tier.open():
        assert all(await tier.store([record_of(key_of(n)) for n in range(COUNT)]))
    query(tmp_path, "INSERT INTO forgotten VALUES (?, 100)", value)
    with pytest.raises(Unavailable, match="damaged"):
        async with tier.open():
            await settled(tier)
    async with tier.open():
        assert await loaded(tier, *range(COUNT)) == [False] * COUNT
        assert list(await tier.store([record_of(key_of(1))])) == [True]


@pytest.mark.parametrize("value", [0, -4096, 4097, "many"])
async def test_a_damaged_slab_size_costs_the_directory(tmp_path: Path, value: object) -> None:
    tier = disk_tier(tmp_path)
    async with tier.open():
        assert all(await tier.store([record_of(key_of(n)) for n in range(COUNT)]))
    query(tmp_path, "UPDATE facts SET value = ? WHERE name = 'slab_size'", value)
    for hits in (0, 1):
        async with tier.open():
            assert sum(await loaded(tier, *range(COUNT))) == hits
            await settled(tier)
            assert list(await tier.store([record_of(key_of(1))])) == [True]


async def test_an_index_that_is_corrupt_in_the_middle_is_begun_anew(tmp_path: Path) -> None:
    """It opens, and SQLite finds out while it is read."""
    tier = disk_tier(tmp_path)
    keys = [key_of(n) for n in range(400)]
    async with tier.open():
        assert all(await tier.store([record_of(key, (4096,)) for key in keys]))
    raw = bytearray((Home(str(tmp_path)).inside / INDEX_NAME).read_bytes())
    page = raw.index(max(key.digest for key in keys)) // 4096
    raw[page * 4096 : page * 4096 + 64] = b"\xff" * 64
    (Home(str(tmp_path)).inside / INDEX_NAME).write_bytes(raw)
    with pytest.raises(Unavailable, match="malformed"):
        async with tier.open():
            await settled(tier)
    async with tier.open():
        assert await loaded(tier, *range(400), lengths=(4096,)) == [False] * 400
        assert tier.statistics()["bytes_used"] == 0
        assert list(await tier.store([record_of(key_of(1))])) == [True]
    async with tier.open():
        assert await loaded(tier, 1) == [True]


# ---- its size


async def test_an_index_that_is_larger_than_its_share_of_a_smaller_size_is_begun_anew(tmp_path: Path) -> None:
    """60,000 rows: 6.5 MiB of index, where the smaller tier has 256 KiB for it."""
    config = DiskConfig(path=str(tmp_path), size=2048 * MIB, slab_size=MIB)
    files = Files(config, Budget.of(config.size), Home(config.path))
    files.open(False)
    random = Random(0)
    rows = sorted(Row(random.randbytes(64), b"", n * 4096, n + 1, n + 1, (4096,), (1,)) for n in range(60_000))
    for n in range(0, len(rows), files.index.batch):
        files.index.publish(rows[n : n + files.index.batch])
    files.close()
    assert physical(tmp_path) > 6 * MIB
    tier = disk_tier(tmp_path, 4 * MIB)
    async with tier.open():
        assert physical(tmp_path) <= 4 * MIB
        assert tier.statistics()["chunks"] == 0
        for n in range(40):
            assert list(await tier.store([record_of(key_of(n), (100_000,))])) == [True]
            assert physical(tmp_path) <= 4 * MIB
        assert await loaded(tier, 39, lengths=(100_000,)) == [True]
    assert physical(tmp_path) <= 4 * MIB
    with trio.fail_after(5):
        async with tier.open():
            assert await loaded(tier, 39, lengths=(100_000,)) == [True]
