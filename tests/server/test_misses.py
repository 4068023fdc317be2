"""Why lookups missed, as a server tells it: each reason is provoked, and is counted in tokens."""

from typing import Any

import pytest
import trio
from support.server import SHARD, HeapConfig, Opener, Peer, Rig, digests
from support.tiers import LoopTier, open_world

from lmcache_trio._core.groups import Group, Need
from lmcache_trio._wire.messages import Ack, Answer, Identify, Lookup, Reset

pytestmark = pytest.mark.usefixtures("autojump_clock")

TOKENS = 128  # of a chunk


def missed(rig: Rig) -> dict[str, int]:
    """Missed chunks by reason, without those that none was missed for."""
    told = rig.counted()
    chunks = {reason: tokens // TOKENS for reason, tokens in told["missed_tokens"].items() if tokens}
    assert sum(told["missed_tokens"].values()) + sum(told["hit_tokens"].values()) == told["requested_tokens"]
    assert sum(chunks.values()) == told["misses"]
    return chunks


async def asked(scheduler: Peer, session: int, names: list[bytes]) -> int:
    """A lookup and the end of its request. Returns the length of its hit."""
    found = await scheduler.lookup(session, names)
    await scheduler.end(session)
    return found.chunks


async def test_a_prompt_that_no_engine_stored_was_never_stored(rigs: Opener) -> None:
    async with rigs() as rig:
        scheduler, _ = await rig.engine()
        assert await asked(scheduler, 1, digests(3)) == 0
        assert missed(rig) == {"never_stored": 3}


async def test_of_a_longer_prompt_only_the_tail_is_new(rigs: Opener) -> None:
    async with rigs() as rig:
        scheduler, worker = await rig.engine()
        await rig.stored(scheduler, worker, 1, digests(3))
        assert await asked(scheduler, 2, digests(3) + digests(2, "new")) == 3
        assert missed(rig) == {"never_stored": 3, "new_tail": 2}


async def test_what_was_evicted_is_told_from_what_is_new(rigs: Opener) -> None:
    async with rigs(HeapConfig(size=4 * SHARD), write_share=1.0) as rig:
        scheduler, worker = await rig.engine()
        await rig.stored(scheduler, worker, 1, digests(4, "old"))
        await rig.stored(scheduler, worker, 2, digests(2, "new"))
        before = missed(rig)
        assert await asked(scheduler, 3, digests(4, "old") + digests(1, "tail")) == 2
        assert missed(rig) == {**before, "evicted": 2, "new_tail": 1}


async def test_what_another_engine_is_storing_is_no_hit_yet(rigs: Opener) -> None:
    async with rigs() as rig:
        (scheduler, worker), (other, _) = await rig.engine(), await rig.engine("other")
        await scheduler.lookup(1, digests(3))
        assert (await worker.reserve(1, digests(3))).reservation
        assert await asked(other, 1, digests(4)) == 0
        assert missed(rig) == {"never_stored": 3, "writing": 3, "new_tail": 1}


async def test_leases_beyond_their_share_shorten_a_hit(rigs: Opener) -> None:
    async with rigs(HeapConfig(size=8 * SHARD), lease_share=0.5, write_share=1.0) as rig:
        scheduler, worker = await rig.engine()
        await rig.stored(scheduler, worker, 1, digests(6))
        before = missed(rig)
        assert await asked(scheduler, 2, digests(6) + digests(1, "tail")) == 4
        assert missed(rig) == {**before, "lease_share": 2, "new_tail": 1}


async def test_a_store_that_got_no_slot_was_not_admitted(rigs: Opener) -> None:
    async with rigs(HeapConfig(size=4 * SHARD), lease_share=1.0, write_share=1.0) as rig:
        scheduler, worker = await rig.engine()
        await rig.stored(scheduler, worker, 1, digests(3))
        assert (await scheduler.lookup(2, digests(3))).chunks == 3  # and keeps them
        await scheduler.lookup(3, digests(3, "other"))
        made = await worker.reserve(3, digests(3, "other"))
        assert dict(made.dropped) == {"no_space": 2}
        await worker.commit(made.reservation)
        await scheduler.end(3)
        before = missed(rig)
        assert await asked(scheduler, 4, digests(3, "other")) == 1
        assert missed(rig) == {**before, "not_admitted": 2}


async def test_an_engine_without_all_its_workers_is_not_registered(rigs: Opener) -> None:
    async with rigs() as rig:
        scheduler = await rig.scheduler()
        assert await asked(scheduler, 1, digests(3)) == 0
        assert missed(rig) == {"not_registered": 3}


async def test_a_chunk_that_memory_cannot_hold_is_too_large(rigs: Opener) -> None:
    async with rigs(HeapConfig(size=4 * SHARD)) as rig:
        scheduler, worker = await rig.scheduler(), await rig.worker()
        await worker.register(shard_bytes=5 * SHARD)
        assert await asked(scheduler, 1, digests(3)) == 0
        assert missed(rig) == {"too_large": 3}


async def test_after_a_reset_prompts_miss_by_it_until_as_much_is_stored_again(rigs: Opener) -> None:
    async with rigs() as rig:
        (scheduler, worker), (other, _) = await rig.engine(), await rig.engine("other")
        await rig.stored(scheduler, worker, 1, digests(3))
        await scheduler.get(Ack, Reset)
        before = missed(rig)
        for peer in (scheduler, other):  # which share the chunks
            assert await asked(peer, 2, digests(3)) == 0
        assert missed(rig) == {**before, "reset": 6}
        await scheduler.get(Ack, Identify, b"i" * 32)  # as adapters do after a reset
        await rig.stored(scheduler, worker, 3, digests(3, "again"))
        assert missed(rig) == {**before, "reset": 9}
        assert await asked(scheduler, 4, digests(2, "more")) == 0
        assert missed(rig) == {**before, "reset": 9, "never_stored": before["never_stored"] + 2}


async def test_a_state_that_was_evicted_is_the_reason_though_all_tokens_are_there(rigs: Opener) -> None:
    groups = (Group(block_tokens=16), Group(Need.STATE, 0, 16))
    named: dict[str, Any] = {"groups": groups, "block_tokens": 16, "chunk_tokens": 128}
    async with rigs(HeapConfig(size=6 * SHARD), write_share=1.0) as rig:
        scheduler, worker = await rig.scheduler(**named), await rig.worker(**named)
        assert await worker.register(shard_bytes=2 * SHARD, part_bytes=(SHARD, SHARD))
        await scheduler.lookup(1, digests(3))
        for group in (1, 0):
            made = await worker.reserve(1, digests(3), group=group)
            assert await worker.commit(made.reservation) == 3
        await scheduler.end(1)
        await scheduler.lookup(2, digests(1, "other"))  # evicts the states of the first two chunks, which are cold
        for group in (1, 0):
            made = await worker.reserve(2, digests(1, "other"), group=group)
            assert await worker.commit(made.reservation) == 1
        await scheduler.end(2)
        before = missed(rig)
        assert await asked(scheduler, 3, digests(2)) == 0
        assert missed(rig) == {**before, "evicted": 2}


# --- tiers ------------------------------------------------------------------------------------------------------------


async def test_what_a_tier_does_not_bring_in_time_is_late_and_the_rest_is_new() -> None:
    tier = LoopTier()
    async with open_world(tier) as world:
        tier.fill(world.namespace, digests(4))
        tier.stall("load")
        assert (await world.lookup(1, digests(6), budget_ms=250)).chunks == 0
        assert missed(world.rig) == {"late": 4, "new_tail": 2}


async def test_a_lookup_that_leaves_tiers_no_time_is_late_for_what_memory_had() -> None:
    tier = LoopTier()
    async with open_world(tier, size=4 * SHARD, write_share=1.0) as world:
        await world.store(1, digests(4, "old"))
        await world.settled()
        await world.store(2, digests(2, "new"))
        await world.settled()
        before = missed(world.rig)
        assert (await world.lookup(3, digests(4, "old"), budget_ms=0)).chunks == 2
        assert missed(world.rig) == {**before, "late": before.get("late", 0) + 2}


async def test_what_a_fenced_tier_may_have_is_missed_for_it() -> None:
    tier = LoopTier()
    async with open_world(tier, size=4 * SHARD, write_share=1.0) as world:
        await world.store(1, digests(4, "old"))
        await world.settled()
        await world.store(2, digests(2, "new"))
        await world.settled()
        tier.failing = {"contains": OSError("gone"), "open": OSError("gone")}
        await world.lookup(3, digests(1, "probe"))
        before = missed(world.rig)
        assert (await world.lookup(4, digests(4, "old") + digests(1, "tail"))).chunks == 2
        assert (await world.lookup(5, digests(2, "unknown"))).chunks == 0
        assert missed(world.rig) == {
            **before,
            "tier_fenced": before.get("tier_fenced", 0) + 4,
            "new_tail": before.get("new_tail", 0) + 1,
        }


async def test_what_a_tier_did_not_take_was_not_admitted() -> None:
    class Full(LoopTier):
        async def store(self, records: Any) -> list[bool]:
            return [False] * len(records)

    async with open_world(Full(), size=4 * SHARD, write_share=1.0) as world:
        await world.store(1, digests(4, "old"))
        await world.settled()
        await world.store(2, digests(2, "new"))
        await world.settled()
        before = missed(world.rig)
        assert (await world.lookup(3, digests(4, "old"))).chunks == 2
        assert missed(world.rig) == {**before, "not_admitted": 2}


async def test_what_a_tier_lost_since_was_evicted() -> None:
    tier = LoopTier()
    async with open_world(tier, size=8 * SHARD, write_share=1.0) as world:
        await world.store(1, digests(4, "old"))
        await world.settled()
        await world.store(2, digests(6, "new"))
        await world.settled()
        tier.chunks.clear()
        before = missed(world.rig)
        assert (await world.lookup(3, digests(4, "old") + digests(2, "tail"))).chunks == 2
        assert missed(world.rig) == {**before, "evicted": 2, "new_tail": 2}


async def test_what_a_tier_has_and_no_lease_may_have_is_missed_for_the_share() -> None:
    tier = LoopTier()
    async with open_world(tier, size=8 * SHARD, lease_share=0.5, write_share=1.0) as world:
        tier.fill(world.namespace, digests(6))
        assert (await world.lookup(1, digests(6))).chunks == 4
        assert missed(world.rig) == {"lease_share": 2}


# --- ends -------------------------------------------------------------------------------------------------------------


async def test_a_server_that_ends_says_so(rigs: Opener) -> None:
    async with rigs(grace=30.0) as rig:
        scheduler, worker = await rig.engine()
        await rig.stored(scheduler, worker, 1, digests(3))
        before = missed(rig)
        rig.server._parts.drain.stopping = True
        assert await asked(scheduler, 2, digests(3)) == 0
        assert missed(rig) == {**before, "stopping": 3}


async def test_a_lookup_that_hits_whole_counts_no_miss(rigs: Opener) -> None:
    async with rigs() as rig:
        scheduler, worker = await rig.engine()
        await rig.stored(scheduler, worker, 1, digests(3))
        before = missed(rig)
        assert await asked(scheduler, 2, digests(3)) == 3
        assert (await scheduler.get(Answer, Lookup, 3, 0, b"", 0)).chunks == 0  # which asks for nothing
        assert missed(rig) == before


async def test_a_lookup_under_cancellation_counts_nothing() -> None:
    tier = LoopTier()
    async with open_world(tier) as world:
        tier.fill(world.namespace, digests(4))
        tier.stall("load")
        await world.ask(1, digests(4))
        await world.scheduler.end(1)
        await world.settled()
        with trio.move_on_after(5):
            await trio.sleep_forever()
        assert missed(world.rig) == {}
