"""A process that stores into a disk tier until it is killed: `disk_worker.py DIRECTORY SEED`.

Chunk n has the bytes that `tier_contract.content` gives for its key, in shards of n * 10,000 + 1 and 4,096 bytes: so
whoever opens the directory after the kill can tell a right byte from a wrong one. One line is printed after each batch.
"""

import sys
from random import Random

import trio
from lmcache_trio_backends.disk import DiskConfig, DiskTier

from lmcache_trio.testing.tier_contract import key_of, record_of

CHUNKS = 60


async def main(path: str, seed: int) -> None:
    tier = DiskTier(DiskConfig(path=path, size=24 << 20, slab_size=4 << 20))
    random = Random(seed)
    async with tier.open():
        while True:
            numbers = {random.randrange(CHUNKS) for _ in range(random.randrange(1, 5))}
            taken = await tier.store([record_of(key_of(n), (n * 10_000 + 1, 4096)) for n in numbers])
            if random.random() < 0.02:
                await tier.delete(key_of(0).namespace)
            print(sum(taken), flush=True)


if __name__ == "__main__":
    trio.run(main, sys.argv[1], int(sys.argv[2]))
