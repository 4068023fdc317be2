"""What a scheduler believes of a disk, against the disk: it may believe too little, and never too much."""

import errno
import hashlib
from pathlib import Path
from random import Random

import pytest
import trio
import trio.testing
from lmcache_trio_backends.disk import DiskConfig, DiskTier
from support.live import Live, OpenLive

from lmcache_trio._core.keys import split_digests
from lmcache_trio._wire.messages import Changed, Message, Watch
from lmcache_trio.abc import ByteIO, ChunkKey

MIB = 1 << 20
CHUNKS = 5


class Disk(DiskTier):
    """A disk that spoils what it reads, or fails, as it is told."""

    def __init__(self, path: Path) -> None:
        super().__init__(DiskConfig(path=str(path), size=4 * MIB, slab_size=MIB))
        self.wrap_io = lambda io: Bytes(io, self)
        self.spoils = self.fails = False


class Bytes:
    def __init__(self, io: ByteIO, disk: Disk) -> None:
        self._io, self._disk = io, disk

    def read(self, offset: int, view: memoryview) -> int:
        found = self._io.read(offset, view)
        if self._disk.spoils:
            view[0] ^= 1
        return found

    def write(self, offset: int, view: memoryview) -> None:
        if self._disk.fails:
            raise OSError(errno.ENODEV, "injected")
        self._io.write(offset, view)


class Belief:
    """The chunks that the scheduler takes for present on the disk."""

    def __init__(self, server: Live) -> None:
        self.digests: set[bytes] = set()
        self.lost: set[bytes] = set()
        self.cleared = 0
        self._server = server
        server.scheduler.on_push = self._on_push

    def _on_push(self, message: Message) -> None:
        if isinstance(message, Changed):
            if message.cleared:
                self.digests.clear()
                self.cleared += 1
            if message.tier:
                self.lost.update(split_digests(message.left))
                self.digests.update(split_digests(message.came))
                self.digests.difference_update(split_digests(message.left))

    async def settled(self) -> None:
        """Everything that was to be told has been told."""
        await self._server.written_back()
        await self._server.scheduler.ping()
        await trio.testing.wait_all_tasks_blocked(0.01)


def chain(number: int) -> list[bytes]:
    """A prompt of five chunks; its first two are shared with every third other."""
    names = [f"{number % 3 if i < 2 else number} {i}" for i in range(CHUNKS)]
    return [hashlib.sha256(name.encode()).digest() for name in names]


@pytest.mark.parametrize("seed", range(3))
async def test_a_scheduler_never_believes_a_chunk_to_be_on_the_disk_that_is_not(
    live: OpenLive, tmp_path: Path, seed: int
) -> None:
    random, disk = Random(seed), Disk(tmp_path / "kv")
    async with live(disk) as server:
        belief = Belief(server)
        server.scheduler.notice_nowait(Watch())
        await server.scheduler.ping()
        namespace = server.worker.namespace
        ever = set[bytes]()
        for n in range(80):
            what = random.choices(("store", "look up", "spoil", "fail", "reset"), (20, 20, 4, 1, 1))[0]
            number = random.randrange(40)
            if n >= 60:  # more than the disk can hold
                what, number = "store", n
            if what in ("store", "fail"):
                disk.fails = what == "fail"
                await server.store(chain(number))
            elif what in ("look up", "spoil"):
                disk.spoils = what == "spoil"
                await server.hits(chain(number))
            else:
                await server.scheduler.reset()
            await belief.settled()
            disk.spoils = disk.fails = False
            while server.tier()["fenced"]:
                assert not belief.digests
                await trio.sleep(0.1)
            await belief.settled()
            told = list(belief.digests)
            ever |= belief.digests
            there = await disk.contains([ChunkKey(namespace, digest) for digest in told])
            assert all(there), f"after {what}"
        assert len(ever) > CHUNKS
        assert belief.lost, "the disk is too large to evict anything"
