"""The part of `TierContract` that cancels: any call, at any step, leaves the tier usable and owns nothing any more."""

import os

from lmcache_trio.abc import Load, Record, Tier
from lmcache_trio.testing.cancelling import cancelled_at
from lmcache_trio.testing.tier_chunks import content, held, is_right, is_scribbled, key_of, load_of, record_of, scribble

__all__ = ["TierCancellations"]

MANY_STEPS = 200


class TierCancellations:
    """Its subclass has the fixture `tier`."""

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
            before = held(tier)
            for step in range(MANY_STEPS):
                loads = [load_of(key, big) for key in keys]
                done = not await cancelled_at(step, lambda loads=loads: tier.load(loads))  # type: ignore[misc]
                for load in loads:
                    scribble(load)
                check = load_of(keys[0], big)
                assert list(await tier.load([check])) == [True]
                assert is_right(check)
                assert all(is_scribbled(load) for load in loads)
                assert held(tier) == before
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
                assert held(tier) == (0, 0)
                if done:
                    assert step
                    return
        raise AssertionError(f"a store was still not done after {MANY_STEPS} steps")

    async def test_a_question_cancelled_at_any_point_leaves_the_tier_usable(self, tier: Tier) -> None:
        keys = [key_of(i) for i in range(3)]
        async with tier.open():
            assert all(await tier.store([record_of(key) for key in keys[:2]]))
            before = held(tier)
            for step in range(MANY_STEPS):
                done = not await cancelled_at(step, lambda: tier.contains(keys))
                assert list(await tier.contains(keys)) == [True, True, False]
                assert held(tier) == before
                if done:
                    return
        raise AssertionError(f"a question was still not done after {MANY_STEPS} steps")

    async def test_an_opening_cancelled_at_any_point_can_be_made_again_and_leaks_nothing(self, tier: Tier) -> None:
        async def open_and_leave() -> None:
            async with tier.open():
                await tier.contains([key_of(1)])

        async with tier.open():
            assert all(await tier.store([record_of(key_of(1))]))
            before = held(tier)
        files = open_files()
        for step in range(MANY_STEPS):
            done = not await cancelled_at(step, open_and_leave)
            assert open_files() == files
            async with tier.open():
                load = load_of(key_of(1))
                assert list(await tier.load([load])) == [True]
                assert is_right(load)
                assert held(tier) == before
            if done:
                return
        raise AssertionError(f"an opening was still not done after {MANY_STEPS} steps")

    async def test_a_delete_cancelled_at_any_point_can_be_finished(self, tier: Tier) -> None:
        async with tier.open():
            for step in range(MANY_STEPS):
                assert all(await tier.store([record_of(key_of(i)) for i in range(3)]))
                done = not await cancelled_at(step, lambda: tier.delete(key_of(0).namespace))
                await tier.delete(key_of(0).namespace)
                assert held(tier) == (0, 0)
                if done:
                    return
        raise AssertionError(f"a delete was still not done after {MANY_STEPS} steps")


def open_files() -> int:
    """Of this process, where the system tells."""
    try:
        return len(os.listdir("/proc/self/fd"))
    except OSError:
        return 0
