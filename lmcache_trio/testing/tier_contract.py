"""The suite that every `Tier` passes. Subclass it, say how one is made, and run it with pytest and pytest-trio.

    class TestMine(TierContract):
        @pytest.fixture
        def make_tier(self, tmp_path: Path) -> MakeTier:
            return lambda size: MyTier(MyConfig(path=str(tmp_path), size=size))

Where a tier's bytes can be measured from outside, override the fixture `footprint` too. The suite itself refuses to
look behind the interface, and promises a tier nothing about where buffers lie or how long they are.
"""

from collections.abc import Callable, Sequence
from random import Random

import pytest
import trio

from lmcache_trio.abc import ChunkKey, ObservedTier, Record, Tier
from lmcache_trio.errors import Unavailable
from lmcache_trio.testing.tier_cancellations import TierCancellations
from lmcache_trio.testing.tier_chunks import content, held, is_right, is_scribbled, key_of, load_of, record_of, scribble

__all__ = ["Footprint", "MakeTier", "TierContract", "content", "is_right", "key_of", "load_of", "record_of"]

SIZE = 24 << 20

MakeTier = Callable[[int], Tier]
"""Makes a tier of about so many bytes, not yet open. Called again, it may lead to the same place."""
Footprint = Callable[[], int]
"""Bytes that the tiers of `make_tier` take now, measured by somebody else, as `du` does."""


class TierContract(TierCancellations):
    """What any tier promises. A fresh one, of 24 MiB, is made for each test."""

    @pytest.fixture
    def make_tier(self) -> MakeTier:
        """Override it."""
        raise NotImplementedError("a subclass of TierContract overrides the fixture make_tier")

    @pytest.fixture
    def footprint(self) -> Footprint | None:
        """Override it if it can be measured."""
        return None

    @pytest.fixture
    def tier(self, make_tier: MakeTier) -> Tier:
        """The tier under test, not yet open."""
        return make_tier(SIZE)

    async def test_what_was_stored_comes_back_byte_for_byte(self, tier: Tier) -> None:
        shapes = [(1,), (4095,), (4096,), (4097,), (3, 70_000, 4096), ((1 << 20) + 3, 5)]
        async with tier.open():
            for i, lengths in enumerate(shapes):
                assert list(await tier.store([record_of(key_of(i), lengths)])) == [True]
            for i, lengths in enumerate(shapes):
                load = load_of(key_of(i), lengths)
                assert list(await tier.load([load])) == [True]
                assert is_right(load)

    async def test_a_batch_comes_back_in_its_order(self, tier: Tier) -> None:
        keys = [key_of(i) for i in range(20)]
        async with tier.open():
            assert all(await tier.store([record_of(key) for key in keys]))
            loads = [load_of(key) for key in reversed(keys)]
            assert all(await tier.load(loads))
            assert all(is_right(load) for load in loads)

    async def test_absent_is_a_miss_and_no_error(self, tier: Tier) -> None:
        async with tier.open():
            assert list(await tier.contains([key_of(1)])) == [False]
            assert list(await tier.load([load_of(key_of(1))])) == [False]
            await tier.delete(key_of(1).namespace)

    async def test_a_batch_with_some_absent_gives_the_others(self, tier: Tier) -> None:
        there = [key_of(i) for i in (1, 3)]
        async with tier.open():
            assert all(await tier.store([record_of(key) for key in there]))
            keys = [key_of(i) for i in range(5)]
            loads = [load_of(key) for key in keys]
            assert list(await tier.contains(keys)) == [False, True, False, True, False]
            assert list(await tier.load(loads)) == [False, True, False, True, False]
            assert is_right(loads[1])
            assert is_right(loads[3])

    async def test_nothing_asked_is_nothing_answered(self, tier: Tier) -> None:
        async with tier.open():
            assert list(await tier.contains([])) == []
            assert list(await tier.load([])) == []
            assert list(await tier.store([])) == []

    async def test_the_same_digest_in_another_namespace_is_another_chunk(self, tier: Tier) -> None:
        one, other = key_of(1, namespace=1), key_of(1, namespace=2)
        assert one.digest == other.digest
        async with tier.open():
            await tier.store([record_of(one)])
            assert list(await tier.contains([one, other])) == [True, False]
            await tier.store([record_of(other)])
            loads = [load_of(one), load_of(other)]
            assert all(await tier.load(loads))
            assert all(is_right(load) for load in loads)

    async def test_other_lengths_than_were_stored_are_a_miss(self, tier: Tier) -> None:
        async with tier.open():
            await tier.store([record_of(key_of(1), (100, 4096))])
            for lengths in [(100,), (100, 4095), (100, 4096, 1), (4096, 100)]:
                assert list(await tier.load([load_of(key_of(1), lengths)])) == [False]

    async def test_stored_twice_is_there_once(self, tier: Tier) -> None:
        async with tier.open():
            assert list(await tier.store([record_of(key_of(1))])) == [True]
            before = tier.statistics()
            assert list(await tier.store([record_of(key_of(1))])) == [True]
            after = tier.statistics()
            assert (after["chunks"], after["bytes_used"]) == (before["chunks"], before["bytes_used"])

    async def test_after_a_store_the_buffer_is_the_callers_own(self, tier: Tier) -> None:
        key = key_of(1)
        buffers = [bytearray(shard) for shard in content(key)]
        async with tier.open():
            assert all(await tier.store([Record(key, b"", [memoryview(buffer) for buffer in buffers])]))
            for buffer in buffers:
                buffer[:] = b"\xaa" * len(buffer)
            load = load_of(key)
            assert all(await tier.load([load]))
            assert is_right(load)

    async def test_after_a_load_the_buffer_is_the_callers_own(self, tier: Tier) -> None:
        async with tier.open():
            await tier.store([record_of(key_of(1)), record_of(key_of(2))])
            load = load_of(key_of(1))
            assert all(await tier.load([load]))
            scribble(load)
            assert all(await tier.load([load_of(key_of(2)), load_of(key_of(1))]))
            assert is_scribbled(load)

    async def test_what_was_stored_is_there_after_it_was_opened_again(self, tier: Tier) -> None:
        async with tier.open():
            await tier.store([record_of(key_of(i)) for i in range(5)])
            before = held(tier)
        async with tier.open():
            loads = [load_of(key_of(i)) for i in range(5)]
            assert all(await tier.load(loads))
            assert all(is_right(load) for load in loads)
            assert held(tier) == before

    async def test_an_error_inside_comes_out_as_itself_and_the_tier_opens_again(self, tier: Tier) -> None:
        with pytest.raises(LookupError):
            async with tier.open():
                await tier.store([record_of(key_of(1))])
                raise LookupError
        with trio.CancelScope() as scope:
            async with tier.open():
                scope.cancel()
                await trio.lowlevel.checkpoint()
        async with tier.open():
            load = load_of(key_of(1))
            assert list(await tier.load([load])) == [True]
            assert is_right(load)

    async def test_it_never_holds_more_than_its_capacity_and_what_it_says_it_holds_is_right(
        self, tier: Tier, footprint: Footprint | None
    ) -> None:
        lengths = (600_000, 40_000)
        keys = [key_of(i) for i in range(3 * SIZE // 640_000)]
        async with tier.open():
            capacity = int(tier.statistics()["bytes_capacity"])
            assert 0 < capacity <= SIZE
            for i, key in enumerate(keys, 1):
                await tier.store([record_of(key, lengths)])
                assert footprint is None or footprint() <= SIZE
                if i % 20 and i < len(keys):
                    continue
                given = 640_000 * sum([await self._comes_back(tier, key, lengths) for key in keys[:i]])
                assert given <= int(tier.statistics()["bytes_used"]) <= capacity  # what it gives, it holds
                assert given == 640_000 * int(tier.statistics()["chunks"])
            assert given
        assert footprint is None or footprint() <= SIZE

    @staticmethod
    async def _comes_back(tier: Tier, key: ChunkKey, lengths: Sequence[int]) -> bool:
        load = load_of(key, lengths)
        (hit,) = await tier.load([load])
        assert not hit or is_right(load)
        return hit

    async def test_a_chunk_larger_than_the_tier_is_not_taken(self, tier: Tier) -> None:
        async with tier.open():
            assert list(await tier.store([record_of(key_of(1), (SIZE + 1,))])) == [False]
            assert list(await tier.store([record_of(key_of(2))])) == [True]

    async def test_delete_forgets_one_namespace_and_no_other(self, tier: Tier) -> None:
        gone, stays = key_of(1, namespace=1), key_of(2, namespace=2)
        async with tier.open():
            await tier.store([record_of(stays)])
            before = held(tier)
            await tier.store([record_of(gone)])
            await tier.delete(gone.namespace)
            assert list(await tier.contains([gone, stays])) == [False, True]
            assert list(await tier.load([load_of(gone)])) == [False]
            assert held(tier) == before
        async with tier.open():
            assert list(await tier.contains([gone, stays])) == [False, True]
            assert list(await tier.store([record_of(gone)])) == [True]

    async def test_many_may_use_it_at_the_same_time(self, tier: Tier) -> None:
        async def use(seed: int) -> None:
            random = Random(seed)
            for _ in range(10):
                keys = [key_of(random.randrange(30)) for _ in range(3)]
                if random.random() < 0.5:
                    await tier.store([record_of(key) for key in dict.fromkeys(keys)])
                else:
                    loads = [load_of(key) for key in keys]
                    for load, hit in zip(loads, await tier.load(loads), strict=True):
                        assert not hit or is_right(load)
                if random.random() < 0.05:
                    await tier.delete(keys[0].namespace)

        async with tier.open():
            async with trio.open_nursery() as users:
                for seed in range(8):
                    users.start_soon(use, seed)
            await tier.delete(key_of(0).namespace)
            assert held(tier) == (0, 0)

    async def test_a_chunk_that_an_observed_tier_told_of_never_leaves_in_silence(self, tier: Tier) -> None:
        """Passes for a tier that is no `ObservedTier`."""
        if not isinstance(tier, ObservedTier):
            return
        lengths, keys = (600_000, 40_000), [key_of(i) for i in range(2 * SIZE // 640_000)]
        believed = _Believed()
        async with tier.open():
            await tier.store([record_of(keys[0], lengths)])
            tier.observer = believed
            assert await tier.contains(keys[:1])
            for i, key in enumerate(keys, 1):
                await tier.store([record_of(key, lengths)])
                has = dict(zip(keys[:i], await tier.contains(keys[:i]), strict=True))
                assert believed.keys <= {key for key in has if has[key]}
            assert believed.keys
            tier.observer = None
            before = set(believed.keys)
            await tier.store([record_of(key_of(len(keys)), lengths)])
            await tier.contains(keys)
            assert believed.keys == before

    async def test_outside_of_open_it_is_unavailable(self, tier: Tier) -> None:
        with pytest.raises(Unavailable):
            await tier.contains([key_of(1)])
        async with tier.open():
            pass
        with pytest.raises(Unavailable):
            await tier.load([load_of(key_of(1))])


class _Believed:
    """What an observer takes for present."""

    def __init__(self) -> None:
        self.keys: set[ChunkKey] = set()

    def came(self, keys: Sequence[ChunkKey]) -> None:
        self.keys.update(keys)

    def left(self, keys: Sequence[ChunkKey]) -> None:
        self.keys.difference_update(keys)
