"""The index file holds as many records as were planned for it, of however many shards, and so does its log."""

from pathlib import Path
from random import Random

import pytest
from lmcache_trio_backends.disk import DiskConfig, DiskTier
from lmcache_trio_backends.disk.config import Budget
from lmcache_trio_backends.disk.index_file import IndexFile
from lmcache_trio_backends.disk.records import MAX_SHARDS, Doomed, Row, index_cost

from lmcache_trio.testing.tier_contract import is_right, key_of, load_of, record_of

MIB = 1 << 20


def some_row(random: Random, number: int, shards: int) -> Row:
    sums = [random.randrange(1 << 64) for _ in range(shards)]
    place, lengths = 4096 * random.randrange(1 << 40), (MIB,) * shards
    return Row(random.randbytes(64), random.randbytes(32), place, number, number, lengths, tuple(sums))


@pytest.mark.parametrize("shards", [1, 8, 50, 51, 52, 53, 54, 55, 56, 64, 100, 200, MAX_SHARDS])
@pytest.mark.parametrize("size", [4 * MIB, 256 * MIB])
def test_what_was_planned_for_the_index_file_fits_into_it_and_its_log(tmp_path: Path, shards: int, size: int) -> None:
    budget = Budget.of(size)
    index = IndexFile(tmp_path / "index", room=budget.index, wal_room=budget.wal, flush=False)
    index.open()
    random, live, number = Random(shards), list[Row](), 0
    most = budget.index // index_cost(shards)
    for _ in range(3):  # filled, then in random places emptied and filled again
        while len(live) < most:
            rows = [some_row(random, number + i + 1, shards) for i in range(min(index.batch, most - len(live)))]
            number += len(rows)
            index.publish(rows)
            live += rows
            assert (tmp_path / "index-wal").stat().st_size <= budget.wal
        random.shuffle(live)
        for _ in range(0, most // 2, index.batch):
            index.erase([Doomed(0, row[0], row[3]) for row in live[: index.batch]])
            del live[: index.batch]
    index.close()
    assert (tmp_path / "index").stat().st_size <= budget.index


async def test_a_chunk_of_more_shards_than_the_index_is_planned_for_is_not_taken(tmp_path: Path) -> None:
    tier = DiskTier(DiskConfig(path=str(tmp_path), size=24 * MIB, slab_size=4 * MIB))
    most = (100,) * MAX_SHARDS
    async with tier.open():
        assert list(await tier.store([record_of(key_of(1), (*most, 100)), record_of(key_of(2), most)])) == [False, True]
        assert tier.statistics()["dropped_size"] == 1
        load = load_of(key_of(2), most)
        assert list(await tier.load([load])) == [True]
        assert is_right(load)
