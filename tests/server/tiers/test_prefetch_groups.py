"""Lookups of an engine with several KV groups that memory does not cover: of each group, what the hit needs."""

from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing
from lmcache_trio_backends.disk import DiskConfig, DiskTier
from support.server import HeapConfig, digests, open_rig
from support.tiers import SHARD, LoopTier, World, content

from lmcache_trio._core.groups import Group, Need
from lmcache_trio._core.keys import ChunkKey, namespaces_of
from lmcache_trio._wire.messages import (
    Ack,
    Answer,
    AnswerState,
    Done,
    Ended,
    Finished,
    Pinned,
    Release,
    Reset,
    Retrieve,
)
from lmcache_trio.abc import Tier

GROUPS = (Group(Need.EVERY, 0, 16), Group(Need.WINDOW, 300, 16))
"""In chunks of 256 tokens a hit needs the window's last two parts."""


class Engine(World):
    """A server with tiers, and one engine with groups, whose parts have one length."""

    @property
    def namespaces(self) -> tuple[bytes, ...]:
        return namespaces_of(self.namespace, len(GROUPS))

    def fill(self, tier: LoopTier, chain: Sequence[bytes], window: Sequence[bytes]) -> None:
        """Give *tier* the parts of *chain* in the first group, and those of *window* in the second."""
        for namespace, there in zip(self.namespaces, (chain, window), strict=True):
            tier.fill(namespace, there)

    async def store_parts(self, session: int, chain: Sequence[bytes], group: int) -> int:
        made = await self.worker.reserve(session, chain, group=group)
        offsets = [int.from_bytes(made.offsets[i : i + 8], "little") for i in range(0, len(made.offsets), 8)]
        for digest, offset in zip(chain, offsets, strict=True):
            self.rig.memory.view(offset, SHARD)[:] = content(ChunkKey(self.namespaces[group], digest))
        return await self.worker.commit(made.reservation)

    async def reads(self, answer: Answer, chain: Sequence[bytes]) -> bool:
        """Whether the lease has of each group what the hit needs, and the right bytes."""
        for number, group in enumerate(GROUPS):
            first = group.first(answer.chunks, 256)
            pinned = await self.worker.get(Pinned, Retrieve, answer.lease, first, answer.chunks - first, number)
            offsets = [int.from_bytes(pinned.offsets[i : i + 8], "little") for i in range(0, len(pinned.offsets), 8)]
            for digest, offset in zip(chain[first : answer.chunks], offsets, strict=True):
                if self.rig.memory.view(offset, SHARD) != content(ChunkKey(self.namespaces[number], digest)):
                    return False
            if not (await self.worker.get(Finished, Done, pinned.pin)).valid:
                return False
        return True

    def loaded(self, tier: LoopTier, chain: Sequence[bytes]) -> list[list[int]]:
        """The positions of the parts that were loaded from *tier*, by group."""
        keys = tier.keys("load")
        return [
            sorted(chain.index(key.digest) for key in keys if key.namespace == namespace)
            for namespace in self.namespaces
        ]


@asynccontextmanager
async def open_engine(*tiers: Tier, size: int = 16 << 20, **settings: Any) -> AsyncIterator[Engine]:
    """A server with *tiers*, and an engine with groups."""
    said: dict[str, Any] = {"groups": GROUPS, "block_tokens": 16, "chunk_tokens": 256}
    async with open_rig(HeapConfig(size), tiers=tiers, **settings) as rig:
        scheduler, worker = await rig.scheduler(**said), await rig.worker(**said)
        namespace = await worker.register(shard_bytes=2 * SHARD, part_bytes=(SHARD, SHARD))
        try:
            yield Engine(rig, scheduler, worker, namespace)
        finally:
            for tier in tiers:
                if isinstance(tier, LoopTier):
                    tier.go_on()


Engines = Callable[..., AbstractAsyncContextManager[Engine]]


@pytest.fixture
def engines(autojump_clock: trio.testing.MockClock) -> Engines:
    """`open_engine`, under a clock that jumps."""
    return open_engine


async def test_a_hit_from_a_tier_loads_of_a_window_only_the_last_parts(engines: Engines, tier: LoopTier) -> None:
    async with engines(tier) as engine:
        before = engine.held()
        chain = digests(6)
        engine.fill(tier, chain[:5], chain[:5])
        answer = await engine.lookup(1, chain)
        assert answer.chunks == 5
        assert engine.loaded(tier, chain) == [[0, 1, 2, 3, 4], [3, 4]]
        assert await engine.reads(answer, chain)
        await engine.scheduler.end(1)
        await engine.settled()
        assert engine.held() == before
        assert (await engine.ask(2, chain[:5])).chunks == 5  # all in memory


@pytest.mark.parametrize(
    ("window", "hit", "needed"),
    [((0, 1), 2, [0, 1]), ((1, 2, 4), 3, [1, 2]), ((0, 2, 4), 1, [0]), ((4,), 0, []), ((), 0, [])],
)
async def test_a_window_whose_part_no_tier_has_makes_the_hit_shorter(
    engines: Engines, tier: LoopTier, window: Sequence[int], hit: int, needed: list[int]
) -> None:
    async with engines(tier) as engine:
        before, chain = engine.held(), digests(5)
        engine.fill(tier, chain, [chain[position] for position in window])
        answer = await engine.lookup(1, chain)
        assert answer.chunks == hit
        assert engine.loaded(tier, chain) == [list(range(hit)), needed]  # and nothing that this hit does not need
        assert not hit or await engine.reads(answer, chain)
        await engine.scheduler.end(1)
        await engine.settled()
        assert engine.held() == before


async def test_a_hit_may_mix_memory_and_tiers_group_by_group(engines: Engines, tier: LoopTier) -> None:
    async with engines(tier, LoopTier()) as engine:
        chain = digests(5)
        await engine.ask(1, chain, budget_ms=0)
        assert await engine.store_parts(1, chain[:4], 0) == 4
        assert await engine.store_parts(1, chain[3:4], 1) == 1
        await engine.scheduler.end(1)
        await engine.settled()
        before = engine.held()
        tier.log.clear()
        engine.fill(tier, chain[4:], chain[2:])
        assert (await engine.lookup(2, chain, budget_ms=0)).chunks == 0
        answer = await engine.lookup(2, chain)
        assert (answer.chunks, answer.loaded) == (5, 1)
        assert engine.loaded(tier, chain) == [[4], [4]]
        assert await engine.reads(answer, chain)
        await engine.scheduler.end(2)
        await engine.settled()
        assert engine.held() == before


async def test_a_window_that_a_further_tier_has_is_loaded_from_there(engines: Engines, tier: LoopTier) -> None:
    further = LoopTier()
    async with engines(tier, further) as engine:
        chain = digests(4)
        engine.fill(tier, chain, [])
        engine.fill(further, [], chain[2:])
        answer = await engine.lookup(1, chain)
        assert (answer.chunks, answer.loaded) == (4, 4)
        assert (engine.loaded(tier, chain), engine.loaded(further, chain)) == ([[0, 1, 2, 3], []], [[], [2, 3]])
        assert await engine.reads(answer, chain)


async def test_a_part_whose_load_misses_makes_the_hit_shorter(engines: Engines, tier: LoopTier) -> None:
    async with engines(tier) as engine:
        before, chain = engine.held(), digests(5)
        engine.fill(tier, chain, chain[:4])
        tier.stall("load")
        assert (await engine.ask(1, chain)).state is AnswerState.PENDING
        await engine.settled()
        del tier.chunks[ChunkKey(engine.namespaces[1], chain[3])]
        tier.go_on()
        answer = await engine.pushed()
        assert (answer.chunks, answer.loaded) == (3, 3)
        assert await engine.reads(answer, chain)
        await engine.scheduler.end(1)
        await engine.settled()
        assert engine.held() == before


@pytest.mark.parametrize("how", ["released", "ended", "lost"])
async def test_a_lookup_that_is_not_wanted_any_more_leaves_nothing_of_any_group(
    engines: Engines, tier: LoopTier, how: str
) -> None:
    async with engines(tier) as engine:
        chain = digests(5)
        engine.fill(tier, chain, chain)
        tier.stall("load")
        before = engine.held()
        assert (await engine.ask(1, chain)).state is AnswerState.PENDING
        await engine.settled()
        assert engine.held() != before
        if how == "released":
            await engine.scheduler.tell(Release(1))
        elif how == "ended":
            await engine.scheduler.tell(Ended(1))
        else:
            engine.scheduler.connection.close()
        await engine.settled()
        tier.go_on()
        await engine.settled()
        engine.worker.connection.close()
        await engine.settled()
        held = engine.held()
        same = {name: value for name, value in held.items() if name not in ("sessions", "tasks")}
        assert same == {name: before[name] for name in same}


async def test_parts_are_written_back_by_group_and_dropped_by_a_reset(engines: Engines, tier: LoopTier) -> None:
    async with engines(tier) as engine:
        chain = digests(3)
        await engine.ask(1, chain, budget_ms=0)
        assert await engine.store_parts(1, chain, 0) == 3
        assert await engine.store_parts(1, chain[1:], 1) == 2
        await engine.settled()
        parents = dict(tier.keys("store"))
        first, second = engine.namespaces
        assert parents == {
            ChunkKey(first, chain[0]): b"",
            ChunkKey(first, chain[1]): chain[0],
            ChunkKey(first, chain[2]): chain[1],
            ChunkKey(second, chain[1]): b"",
            ChunkKey(second, chain[2]): b"",
        }
        assert isinstance(await engine.scheduler.ask(Reset), Ack)
        assert tier.calls["delete"] == 2
        assert tier.chunks == {}
        assert (await engine.lookup(2, chain)).chunks == 0


async def test_a_restarted_server_has_the_parts_of_each_group_from_its_disk(tmp_path: Path) -> None:
    chain, disk = digests(5), DiskConfig(path=str(tmp_path / "disk"), size=16 << 20)
    async with open_engine(DiskTier(disk), grace=30.0) as engine:  # the end waits for writeback
        await engine.ask(1, chain, budget_ms=0)
        assert await engine.store_parts(1, chain, 0) == 5
        for position in (1, 2, 4):
            assert await engine.store_parts(1, [chain[position]], 1) == 1
        await engine.scheduler.end(1)
    async with open_engine(DiskTier(disk), prefetch_budget=30.0) as engine:
        before = engine.held()
        answer = await engine.lookup(1, chain)
        assert answer.chunks == 3  # the fifth part of the window has no fourth one beside it
        assert await engine.reads(answer, chain)
        assert engine.rig.counted()["loaded_chunks"] == 5  # three of the first group, two of the window
        await engine.scheduler.end(1)
        await engine.rig.until(sessions=0, leases=0)
        assert engine.held() == before
