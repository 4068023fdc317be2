"""The disk tier alone, killed again and again in its writes, on the same directory."""

import signal
from pathlib import Path
from random import Random

import pytest
from lmcache_trio_backends.disk import DiskConfig, DiskTier
from support import disk_worker

from lmcache_trio.testing.forks import servers
from lmcache_trio.testing.tier_contract import is_right, key_of, load_of

WORKER = disk_worker.__file__
SIZE = 24 << 20
KILLS = 8


@pytest.mark.parametrize("seed", range(5))
async def test_after_each_of_many_kills_every_hit_is_right_and_usage_is_exact(tmp_path: Path, seed: int) -> None:
    random = Random(seed)
    found = 0
    for kill in range(KILLS):
        with servers.start([WORKER, str(tmp_path), str(seed * KILLS + kill)]) as process:
            assert process.stdout is not None
            for _ in range(random.randrange(40)):
                process.stdout.readline()
            process.send_signal(signal.SIGKILL)
        tier = DiskTier(DiskConfig(path=str(tmp_path), size=SIZE, slab_size=4 << 20))
        async with tier.open():
            assert sum(file.stat().st_blocks * 512 for file in [tmp_path, *tmp_path.iterdir()]) <= SIZE
            held = tier.statistics()
            loads = [load_of(key_of(n), (n * 10_000 + 1, 4096)) for n in range(60)]
            hits = await tier.load(loads)
            assert all(is_right(load) for load, hit in zip(loads, hits, strict=True) if hit)
            pages = [1 + -(-len(load.shards[0]) // 4096) for load, hit in zip(loads, hits, strict=True) if hit]
            assert (held["chunks"], held["bytes_used"]) == (len(pages), 4096 * sum(pages))
            assert tier.statistics()["corrupt"] == 0
            found += len(pages)
    assert found > 0
