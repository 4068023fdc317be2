"""Lookups that memory does not cover: their answers, the loads that they share, and their ends."""

from typing import Any

import pytest
import trio
import trio.testing
from support.server import digests
from support.tiers import LoopTier, Worlds

from lmcache_trio._wire.messages import Answer, AnswerState, Ended, Lookup, Release

ANSWERED, PENDING = AnswerState.ANSWERED, AnswerState.PENDING


async def test_a_lookup_of_a_tiers_chunks_is_pending_at_once_and_pushed_when_they_are_loaded(
    worlds: Worlds, tier: LoopTier, autojump_clock: trio.testing.MockClock
) -> None:
    async with worlds(tier) as world:
        before = world.held()
        tier.fill(world.namespace, digests(4))
        first = await world.ask(1, digests(6))
        assert (first.state, first.chunks) == (PENDING, 0)
        answer = await world.pushed()
        assert (answer.id, answer.asked, answer.state, answer.chunks) == (0, first.asked, ANSWERED, 4)
        assert await world.read(answer, digests(4))
        await world.scheduler.end(1)
        await world.settled()
        assert world.held() == before
        assert (await world.ask(2, digests(4))).chunks == 4
        assert tier.calls["load"] == 4


async def test_a_lookup_covered_by_memory_is_answered_inline_whatever_the_tier_does(
    worlds: Worlds, tier: LoopTier, autojump_clock: trio.testing.MockClock
) -> None:
    async with worlds(tier) as world:
        await world.store(1, digests(4))
        await world.settled()
        tier.stall("contains", "load", "store", hang=True)
        assert (await world.ask(2, digests(5))).state is PENDING
        start = trio.current_time()
        for session in range(10, 20):
            assert (await world.ask(session, digests(4))).chunks == 4
        assert trio.current_time() == start
        tier.go_on()


async def test_the_budget_gives_the_prefix_that_is_resident_by_then(
    worlds: Worlds, tier: LoopTier, autojump_clock: trio.testing.MockClock
) -> None:
    async with worlds(tier, prefetch_budget=3.0, prefetch_bytes=1) as world:  # one load at a time
        await world.store(1, digests(1))
        await world.settled()
        tier.fill(world.namespace, digests(6))
        before = world.held()
        tier.stall("load")
        assert (await world.ask(2, digests(6))).state is PENDING
        await world.settled()
        released, tier._stalls["load"] = tier._stalls["load"], (trio.Event(), False)
        released[0].set()  # the load under way goes on, the next one stalls
        start = trio.current_time()
        answer = await world.pushed()
        assert trio.current_time() - start == pytest.approx(3.0)
        assert (answer.state, answer.chunks) == (ANSWERED, 2)
        await world.scheduler.end(2)
        await world.settled()
        assert world.held() == before
        tier.go_on()


async def test_a_request_may_bring_a_shorter_budget_and_with_none_tiers_are_not_asked(
    worlds: Worlds, tier: LoopTier, autojump_clock: trio.testing.MockClock
) -> None:
    async with worlds(tier) as world:
        tier.fill(world.namespace, digests(2))
        tier.stall("load")
        start = trio.current_time()
        assert (await world.lookup(1, digests(2), budget_ms=250)).chunks == 0
        assert trio.current_time() - start == pytest.approx(0.25)
        asked = tier.calls["contains"]
        assert (await world.ask(2, digests(2), budget_ms=0)).state is ANSWERED
        assert tier.calls["contains"] == asked
        start = trio.current_time()
        assert (await world.lookup(3, digests(2), budget_ms=60_000)).chunks == 0
        assert trio.current_time() - start == pytest.approx(2.0)  # the server's own is the longest
        tier.go_on()
        assert (await world.lookup(4, digests(2))).chunks == 2


async def test_the_answer_stays_the_same_however_often_its_status_is_asked(
    worlds: Worlds, tier: LoopTier, autojump_clock: trio.testing.MockClock
) -> None:
    async with worlds(tier) as world:
        tier.fill(world.namespace, digests(3))
        tier.stall("load")
        first = await world.ask(1, digests(3))
        for _ in range(3):
            status = await world.status(1)
            assert (status.state, status.asked) == (PENDING, first.asked)
        tier.go_on()
        answer = await world.pushed()
        for _ in range(3):
            status = await world.status(1)
            assert (status.state, status.chunks, status.lease) == (ANSWERED, 3, answer.lease)
        assert (await world.status(99)).state is AnswerState.UNKNOWN
        await world.scheduler.end(1)
        assert (await world.status(1)).state is AnswerState.UNKNOWN


async def test_equal_loads_are_shared(worlds: Worlds, tier: LoopTier, autojump_clock: trio.testing.MockClock) -> None:
    async with worlds(tier) as world:
        before = world.held()
        tier.fill(world.namespace, digests(4))
        tier.stall("load")
        for session in range(5):
            assert (await world.ask(session, digests(4))).state is PENDING
        tier.go_on()
        assert [(await world.pushed()).chunks for _ in range(5)] == [4] * 5
        assert tier.calls["load"] == 4
        for session in range(5):
            await world.scheduler.end(session)
        await world.settled()
        assert world.held() == before


async def test_when_the_first_asker_is_killed_the_second_gets_its_hit_from_the_same_load(
    worlds: Worlds, tier: LoopTier, autojump_clock: trio.testing.MockClock
) -> None:
    async with worlds(tier) as world:
        other = await world.rig.scheduler("other")
        worker = await world.rig.worker("other")
        assert await worker.register() == world.namespace
        before = world.held()
        tier.fill(world.namespace, digests(3))
        tier.stall("load")
        assert (await world.ask(1, digests(3), other)).state is PENDING
        await world.settled()
        assert (await world.ask(1, digests(3))).state is PENDING
        await world.settled()
        other.connection.close()
        await world.settled()
        tier.go_on()
        assert (await world.pushed()).chunks == 3
        assert (tier.calls["load"], tier.cancelled["load"]) == (3, 0)
        await world.scheduler.end(1)
        await world.settled()
        assert {**world.held(), "tasks": before["tasks"]} == before


@pytest.mark.parametrize("how", ["release", "end", "another lookup", "the connection lost"])
@pytest.mark.parametrize("stalled", ["contains", "load"])
async def test_a_lookup_that_is_not_wanted_any_more_leaves_nothing_and_ends_its_loads(
    worlds: Worlds, tier: LoopTier, autojump_clock: trio.testing.MockClock, how: str, stalled: str
) -> None:
    async with worlds(tier) as world:
        await world.store(9, digests(1))
        await world.settled()
        tier.fill(world.namespace, digests(4))
        before = world.held()
        tier.stall(stalled)
        assert (await world.ask(1, digests(4))).state is PENDING
        await world.settled()
        assert world.held()["prefetches"] == 1
        assert tier.now["load"] == (3 if stalled == "load" else 0)
        if how == "release":
            await world.scheduler.tell(Release(1))
        elif how == "end":
            await world.scheduler.tell(Ended(1))
        elif how == "another lookup":
            assert (await world.ask(1, digests(1))).chunks == 1
        else:
            world.scheduler.connection.close()
        await world.settled()
        after = world.held()
        assert after["prefetches"] == 0
        assert tier.now["load"] == 0
        assert tier.cancelled["load"] == (3 if stalled == "load" else 0)
        tier.go_on()
        if how != "the connection lost":
            await world.scheduler.end(1)
            await world.settled()
            assert world.held() == before
            assert not any(isinstance(message, Answer) for message in world.scheduler.pushes)
        else:
            assert {**after, "calls": 0, "tasks": 0} == {**before, "calls": 0, "tasks": 0} | (
                {"0:LoopTier calls": 1} if stalled == "contains" else {}
            )


async def test_a_slot_stays_owned_until_the_hung_call_has_returned(
    worlds: Worlds, tier: LoopTier, autojump_clock: trio.testing.MockClock
) -> None:
    async with worlds(tier, tier_timeout=60.0) as world:
        before = world.held()
        tier.fill(world.namespace, digests(1))
        tier.stall("load", hang=True)
        assert (await world.lookup(1, digests(1))).chunks == 0
        await world.scheduler.end(1)
        await world.settled()
        held = world.held()
        assert (held["prefetches"], held["chunks_writing"], held["0:LoopTier loads_in_flight"]) == (0, 1, 1)
        again = await world.ask(2, digests(1))  # wanted anew while the old one is ending: it waits for its slot
        assert again.state is PENDING
        await world.settled()
        assert tier.calls["load"] == 1
        tier.go_on()
        assert (await world.pushed()).chunks == 1
        await world.scheduler.end(2)
        await world.settled()
        assert world.held() == before


async def test_the_leading_run_may_mix_memory_and_tiers(worlds: Worlds, autojump_clock: trio.testing.MockClock) -> None:
    near, far = LoopTier(), LoopTier()
    async with worlds(near, far) as world:
        before = world.held()
        await world.store(9, digests(1))
        await world.settled()
        near.chunks.clear()
        far.chunks.clear()
        chain = digests(8)
        near.fill(world.namespace, [chain[1], chain[3], chain[4]])
        far.fill(world.namespace, [chain[1], chain[2], chain[5], chain[7]])
        former = world.rig.counted()
        answer = await world.lookup(1, chain)
        assert (answer.chunks, answer.loaded) == (6, 5)
        after = world.rig.counted()
        of_each = (after["requested_tokens"] - former["requested_tokens"]) // len(chain)
        gained = {source: count - former["hit_tokens"][source] for source, count in after["hit_tokens"].items()}
        assert gained == {"memory": of_each, "tier": 5 * of_each}
        assert await world.read(answer, chain)
        assert {key.digest for key in near.keys("load")} == {chain[1], chain[3], chain[4]}
        assert {key.digest for key in far.keys("load")} == {chain[2], chain[5]}
        await world.scheduler.end(1)
        await world.settled()
        assert world.held() == before


async def test_a_tier_that_hangs_costs_a_lookup_a_part_of_its_budget_and_the_next_tier_still_serves(
    worlds: Worlds, autojump_clock: trio.testing.MockClock
) -> None:
    near, far = LoopTier(), LoopTier()
    async with worlds(near, far, prefetch_budget=2.0, tier_timeout=60.0) as world:
        far.fill(world.namespace, digests(3))
        near.stall("contains", hang=True)
        start = trio.current_time()
        answer = await world.lookup(1, digests(3))
        assert answer.chunks == 3
        assert trio.current_time() - start == pytest.approx(0.5)
        answer = await world.lookup(2, [*digests(3), *digests(1, "nowhere")])  # the hung one may yet have it
        assert answer.chunks == 3
        assert trio.current_time() - start == pytest.approx(2.5)
        near.go_on()


async def test_loads_are_bounded_by_bytes_in_flight_and_go_by_the_nearest_deadline(
    worlds: Worlds, tier: LoopTier, autojump_clock: trio.testing.MockClock
) -> None:
    async with worlds(tier, prefetch_bytes=2 * (64 << 10), prefetch_budget=4.0) as world:
        patient, hasty = digests(4, "patient"), digests(4, "hasty")
        tier.fill(world.namespace, [*patient, *hasty])
        tier.stall("load")
        await world.ask(1, patient, budget_ms=4000)
        await world.settled()
        await world.ask(2, hasty, budget_ms=1000)
        await world.settled()
        assert (tier.calls["load"], world.tier()["bytes_in_flight"]) == (2, 2 * (64 << 10))
        tier.go_on()
        assert (await world.pushed()).session == 2
        assert (await world.pushed()).session == 1
        assert tier.most["load"] == 2
        order = [key.digest for key in tier.keys("load")]
        assert set(order[:2]) == set(patient[:2])
        assert set(order[2:6]) == set(hasty)


async def test_a_thousand_lookups_parked_on_a_stalled_tier_cost_a_task_each_and_disturb_no_other(
    worlds: Worlds, tier: LoopTier, autojump_clock: trio.testing.MockClock
) -> None:
    async with worlds(tier) as world:
        await world.store(5000, digests(4))
        await world.settled()
        before = world.held()
        tier.stall("contains", "load", "store", hang=True)
        for session in range(1000):
            assert (await world.ask(session, digests(2, f"prompt {session}"))).state is PENDING
        await world.settled()
        held = world.held()
        assert (held["prefetches"], held["tasks"] - before["tasks"]) == (1000, 1000)
        assert tier.now["contains"] == 1
        start = trio.current_time()
        assert (await world.ask(6000, digests(4))).chunks == 4
        assert await world.store(6001, digests(2, "new")) == 2
        assert await world.read(await world.ask(6002, digests(2, "new")), digests(2, "new"))
        assert trio.current_time() == start
        answers = [await world.pushed() for _ in range(1000)]
        assert {(answer.state, answer.chunks) for answer in answers} == {(ANSWERED, 0)}
        assert trio.current_time() - start == pytest.approx(2.0)
        for session in [*range(1000), 6000, 6002]:
            await world.scheduler.end(session)
        tier.go_on()
        await world.settled()
        assert world.held() == before
        assert tier.calls["contains"] < 10


async def test_chunks_that_were_loaded_are_not_evicted_before_the_answer(
    worlds: Worlds, tier: LoopTier, autojump_clock: trio.testing.MockClock
) -> None:
    async with worlds(tier, size=1 << 20, lease_share=1.0) as world:  # room for 15 chunks
        chain = digests(4)
        tier.fill(world.namespace, chain)
        tier.stall("load")
        await world.ask(1, chain)
        await world.settled()
        (released, _), tier._stalls["load"] = tier._stalls["load"], (trio.Event(), False)
        tier.fill(world.namespace, digests(1, "slow"))
        await world.ask(2, [*chain[:3], *digests(1, "slow")])  # waits on; keeps the first three
        released.set()
        assert (await world.pushed()).chunks == 4
        await world.scheduler.end(1)
        for i in range(10):
            await world.store(100 + i, digests(8, f"flood {i}"))
        tier.go_on()
        assert (await world.pushed()).chunks == 4


async def test_a_load_that_misses_makes_the_hit_shorter(
    worlds: Worlds, tier: LoopTier, autojump_clock: trio.testing.MockClock
) -> None:
    async with worlds(tier) as world:
        before = world.held()
        tier.fill(world.namespace, digests(4))
        real = tier.load

        async def load(loads: Any) -> Any:
            hits = await real(loads)
            return [hit and item.key.digest != digests(4)[2] for hit, item in zip(hits, loads, strict=True)]

        tier.load = load  # type: ignore[method-assign]
        assert (await world.lookup(1, digests(4))).chunks == 2
        await world.scheduler.end(1)
        await world.settled()
        assert world.held() == before
        assert world.tier()["loads_missed"] == 1


async def test_more_than_lease_share_is_neither_loaded_nor_offered(
    worlds: Worlds, tier: LoopTier, autojump_clock: trio.testing.MockClock
) -> None:
    async with worlds(tier, size=2 << 20, lease_share=0.25) as world:  # 512 KiB: 8 chunks
        before = world.held()
        tier.fill(world.namespace, digests(20))
        answer = await world.lookup(1, digests(20))
        assert answer.chunks == 8
        assert tier.calls["load"] == 8
        assert (await world.lookup(2, digests(4, "absent"))).chunks == 0
        await world.scheduler.end(1)
        await world.scheduler.end(2)
        await world.settled()
        assert world.held() == before


async def test_a_worker_that_leaves_during_the_wait_makes_it_a_miss(
    worlds: Worlds, tier: LoopTier, autojump_clock: trio.testing.MockClock
) -> None:
    async with worlds(tier) as world:
        tier.fill(world.namespace, digests(2))
        tier.stall("load")
        await world.ask(1, digests(2))
        await world.settled()
        world.worker.connection.close()
        await world.settled()
        tier.go_on()
        assert (await world.pushed()).chunks == 0


async def test_lookups_of_one_session_in_one_burst_leave_the_last_ones_lease(
    worlds: Worlds, tier: LoopTier, autojump_clock: trio.testing.MockClock
) -> None:
    async with worlds(tier) as world:
        await world.store(9, digests(2))
        await world.settled()
        chain = digests(4)
        tier.fill(world.namespace, chain)
        packed = b"".join(chain)
        await world.scheduler.tell(Lookup(1001, 1, 0, packed, 4))
        await world.scheduler.tell(Lookup(1002, 1, 0, packed, 2))
        first = await world.scheduler.reply(1001)
        second = await world.scheduler.reply(1002)
        assert isinstance(first, Answer)
        assert isinstance(second, Answer)
        assert (first.state, second.state, second.chunks) == (PENDING, ANSWERED, 2)
        await world.settled()
        assert await world.read(second, chain)
        assert (await world.status(1)).lease == second.lease
