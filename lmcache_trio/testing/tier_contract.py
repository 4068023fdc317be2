"""The suite that every `Tier` passes. Subclass it, say how one is made, and run it with pytest and pytest-trio.

    class TestMine(TierContract):
        @pytest.fixture
        def make_tier(self, tmp_path: Path) -> MakeTier:
            return lambda size: MyTier(MyConfig(path=str(tmp_path), size=size))

It refuses to look behind the interface, and promises a tier nothing about where buffers lie or how long they are.
"""

from collections.abc import Callable, Sequence
from random import Random

import pytest
import trio

from lmcache_trio.abc import ChunkKey, Load, Record, Tier
from lmcache_trio.errors import Unavailable
from lmcache_trio.testing.cancelling import cancelled_at

__all__ = ["MakeTier", "TierContract", "content", "key_of", "load_of", "record_of"]

SIZE = 24 << 20
LENGTHS = (40_001, 4096)
"""A chunk of two shards, of which one is no whole number of pages."""
MANY_STEPS = 200

MakeTier = Callable[[int], Tier]
"""Makes a tier of about so many bytes, not yet open. Called again, it may lead to the same place."""


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


class TierContract:
    """What any tier promises. A fresh one, of 24 MiB, is made for each test."""

    @pytest.fixture
    def make_tier(self) -> MakeTier:
        """Override it."""
        raise NotImplementedError("a subclass of TierContract overrides the fixture make_tier")

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
            _scribble(load)
            assert all(await tier.load([load_of(key_of(2)), load_of(key_of(1))]))
            assert _is_scribbled(load)

    async def test_after_a_call_nothing_keeps_the_buffer_from_being_resized(self, tier: Tier) -> None:
        key = key_of(1)
        buffers = [bytearray(shard) for shard in content(key)]
        async with tier.open():
            for step in range(MANY_STEPS):
                views = [memoryview(buffer) for buffer in buffers]
                stored = not await cancelled_at(step, lambda views=views: tier.store([Record(key, b"", views)]))  # type: ignore[misc]
                loaded = not await cancelled_at(step, lambda views=views: tier.load([Load(key, views)]))  # type: ignore[misc]
                for view, buffer in zip(views, buffers, strict=True):
                    view.release()
                    buffer.append(0)  # BufferError while anything else still looks into it
                    buffer.pop()
                if stored and loaded:
                    return
        raise AssertionError(f"a store and a load were still not done after {MANY_STEPS} steps")

    async def test_a_load_cancelled_at_any_point_leaves_the_tier_usable_and_owns_no_buffer(self, tier: Tier) -> None:
        keys = [key_of(i) for i in range(3)]
        big = (3 << 20, 70_000)
        async with tier.open():
            assert all(await tier.store([record_of(key, big) for key in keys]))
            before = _held(tier)
            for step in range(MANY_STEPS):
                loads = [load_of(key, big) for key in keys]
                done = not await cancelled_at(step, lambda loads=loads: tier.load(loads))  # type: ignore[misc]
                for load in loads:
                    _scribble(load)
                check = load_of(keys[0], big)
                assert list(await tier.load([check])) == [True]
                assert is_right(check)
                assert all(_is_scribbled(load) for load in loads)
                assert _held(tier) == before
                if done:
                    return
        raise AssertionError(f"a load was still not done after {MANY_STEPS} steps")

    async def test_a_store_cancelled_at_any_point_leaves_the_tier_usable_and_leaks_nothing(self, tier: Tier) -> None:
        async with tier.open():
            for step in range(MANY_STEPS):
                keys = [key_of(100 * step + i) for i in range(3)]
                records = [record_of(key) for key in keys]
                done = not await cancelled_at(step, lambda records=records: tier.store(records))  # type: ignore[misc]
                for key, there in zip(keys, await tier.contains(keys), strict=True):
                    load = load_of(key)
                    assert list(await tier.load([load])) == [there]
                    assert not there or is_right(load)
                await tier.delete(keys[0].namespace)
                assert _held(tier) == (0, 0)
                if done:
                    assert step
                    return
        raise AssertionError(f"a store was still not done after {MANY_STEPS} steps")

    async def test_a_delete_cancelled_at_any_point_can_be_finished(self, tier: Tier) -> None:
        async with tier.open():
            for step in range(MANY_STEPS):
                assert all(await tier.store([record_of(key_of(i)) for i in range(3)]))
                done = not await cancelled_at(step, lambda: tier.delete(key_of(0).namespace))
                await tier.delete(key_of(0).namespace)
                assert _held(tier) == (0, 0)
                if done:
                    return
        raise AssertionError(f"a delete was still not done after {MANY_STEPS} steps")

    async def test_what_was_stored_is_there_after_it_was_opened_again(self, tier: Tier) -> None:
        async with tier.open():
            await tier.store([record_of(key_of(i)) for i in range(5)])
            before = _held(tier)
        async with tier.open():
            loads = [load_of(key_of(i)) for i in range(5)]
            assert all(await tier.load(loads))
            assert all(is_right(load) for load in loads)
            assert _held(tier) == before

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

    async def test_it_never_holds_more_than_its_capacity_and_what_it_says_it_holds_is_right(self, tier: Tier) -> None:
        lengths = (600_000, 40_000)
        kept = []
        async with tier.open():
            capacity = int(tier.statistics()["bytes_capacity"])
            assert 0 < capacity <= SIZE
            for i in range(3 * SIZE // 640_000):
                if (await tier.store([record_of(key_of(i), lengths)]))[0]:
                    kept.append(key_of(i))
                assert int(tier.statistics()["bytes_used"]) <= capacity
            loads = [load_of(key, lengths) for key in kept]
            hits = await tier.load(loads)
            assert any(hits)
            assert all(is_right(load) for load, hit in zip(loads, hits, strict=True) if hit)
            assert sum(hits) * 640_000 <= capacity

    async def test_a_chunk_larger_than_the_tier_is_not_taken(self, tier: Tier) -> None:
        async with tier.open():
            assert list(await tier.store([record_of(key_of(1), (SIZE + 1,))])) == [False]
            assert list(await tier.store([record_of(key_of(2))])) == [True]

    async def test_delete_forgets_one_namespace_and_no_other(self, tier: Tier) -> None:
        gone, stays = key_of(1, namespace=1), key_of(2, namespace=2)
        async with tier.open():
            await tier.store([record_of(stays)])
            before = _held(tier)
            await tier.store([record_of(gone)])
            await tier.delete(gone.namespace)
            assert list(await tier.contains([gone, stays])) == [False, True]
            assert list(await tier.load([load_of(gone)])) == [False]
            assert _held(tier) == before
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
            assert _held(tier) == (0, 0)

    async def test_outside_of_open_it_is_unavailable(self, tier: Tier) -> None:
        with pytest.raises(Unavailable):
            await tier.contains([key_of(1)])
        async with tier.open():
            pass
        with pytest.raises(Unavailable):
            await tier.load([load_of(key_of(1))])


def _held(tier: Tier) -> tuple[int | str, int | str]:
    found = tier.statistics()
    return found["chunks"], found["bytes_used"]


def _scribble(load: Load) -> None:
    for view in load.shards:
        view[:] = b"\xdd" * len(view)


def _is_scribbled(load: Load) -> bool:
    return all(bytes(view) == b"\xdd" * len(view) for view in load.shards)
