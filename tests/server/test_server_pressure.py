"""Many at once, and little room: aborted lookups, two writers of one prompt, an arena that is small or growing."""

import random

import trio
from support.server import HeapConfig, Opener, Rig, digests

from lmcache_trio._wire.codec import POSITIONS, encode
from lmcache_trio._wire.messages import (
    Abort,
    Ack,
    ArenaGrown,
    Ended,
    Lookup,
    Ping,
    Pinned,
    Pong,
    Release,
    Retrieve,
    Taken,
)


async def test_a_thousand_lookups_aborted_at_random_points_leave_held_as_before(rig: Rig) -> None:
    scheduler, worker = await rig.engine()
    await rig.stored(scheduler, worker, 0, digests(4))
    await rig.until(bytes_taken=rig.memory.size)
    await scheduler.get(Pong, Ping)
    before, chance = rig.held(), random.Random(1)
    for session in range(1, 1001):
        steps = [
            Lookup(session + 10_000, session, 0, b"".join(digests(4)), chance.randint(0, 4)),
            Taken(session, b"?" * 16),
            Release(session),
            Ended(session),
        ]
        for message in steps[: chance.randint(1, 4)]:
            await scheduler.tell(message)
        if chance.random() < 0.3:
            answer = await scheduler.lookup(session, digests(4))
            if chance.random() < 0.5:
                pinned = await worker.get(Pinned, Retrieve, answer.lease, 0, 4)
                assert pinned.pin
            if chance.random() < 0.5:
                made = await worker.reserve(session, digests(1, str(session)), parent=digests(4)[3])
                await worker.get(Ack, Abort, made.reservation)
        if chance.random() < 0.02:
            scheduler.connection.close()
            scheduler = await rig.scheduler(token=scheduler.token)
        if session % 50 == 0:
            worker.connection.close()
            worker = await rig.worker(token=worker.token)
            await worker.register()
        await scheduler.tell(Ended(session))
    scheduler.connection.close()
    worker.connection.close()
    await rig.until(connections=0)
    scheduler, worker = await rig.engine()
    await scheduler.get(Pong, Ping)
    await rig.until(**before)


async def test_two_engines_that_store_one_prompt_at_once_do_not_wait_and_both_hit_it_after(rig: Rig) -> None:
    (one, one_worker), (two, two_worker) = await rig.engine("one"), await rig.engine("two")
    await one.lookup(1, digests(3))
    await two.lookup(1, digests(3))
    first = await one_worker.reserve(1, digests(3))
    second = await two_worker.reserve(1, digests(3))
    assert POSITIONS.unpack(first.positions) == (0, 1, 2)
    assert (second.reservation, second.dropped) == (b"", {"writing": 3})
    assert (await two.lookup(2, digests(3))).chunks == 0
    assert await one_worker.commit(first.reservation) == 3
    assert (await two.lookup(2, digests(3))).chunks == 3
    assert (await one.lookup(2, digests(3))).chunks == 3


async def test_when_every_slot_is_leased_a_store_is_dropped_at_once_and_counted(rigs: Opener) -> None:
    async with rigs(HeapConfig(size=(64 << 10) * 2 + 4096), lease_share=1.0, write_share=1.0) as rig:
        scheduler, worker = await rig.engine()
        await rig.stored(scheduler, worker, 1, digests(2))
        assert (await scheduler.lookup(2, digests(2))).chunks == 2
        await scheduler.lookup(3, digests(2, "more"))
        assert (await worker.reserve(3, digests(2, "more"))).dropped == {"no_space": 2}
        await scheduler.end(2)
        await scheduler.get(Pong, Ping)
        assert POSITIONS.unpack((await worker.reserve(3, digests(2, "more"))).positions) == (0, 1)
        assert rig.counted()["evictions"] == 2


async def test_a_client_that_dies_with_a_flood_of_requests_under_way_leaves_nothing(rig: Rig) -> None:
    scheduler, worker = await rig.engine()
    before = rig.held("sessions", "leases", "queued_messages", "tasks")
    flooding = await rig.scheduler("flood")
    with trio.move_on_after(0.05):
        for number in range(1, 10_000):
            await flooding.connection.send(encode(Lookup(number, number, 0, b"".join(digests(2)), 2)))
    flooding.connection.close()
    await rig.until(connections=2, **before)
    assert before["sessions"] == 0
    await scheduler.get(Pong, Ping)
    await worker.get(Pong, Ping)


async def test_taken_leaves_the_lease_share(rigs: Opener) -> None:
    async with rigs(HeapConfig(size=(64 << 10) * 4 + 4096 * 5), lease_share=0.5, write_share=1.0) as rig:
        scheduler, worker = await rig.engine()
        await rig.stored(scheduler, worker, 1, digests(4))
        first = await scheduler.lookup(2, digests(4))
        assert first.chunks == 2
        assert (await scheduler.lookup(3, digests(4, "none"))).chunks == 0
        await scheduler.tell(Taken(2, first.lease))
        assert (await scheduler.lookup(4, digests(4))).chunks >= 2
        assert rig.held("leases") == {"leases": 2}


async def test_clients_are_told_when_the_arena_grows(rigs: Opener) -> None:
    async with rigs(HeapConfig(size=4 << 20, pieces=4)) as rig:
        await rig.until(bytes_taken=1 << 20)
        worker = await rig.worker()
        rig.memory.go_on.release()
        assert (await worker.pushed(ArenaGrown)).taken == 2 << 20
        rig.memory.go_on.release()
        assert (await worker.pushed(ArenaGrown)).taken == 3 << 20
        assert rig.held("bytes_taken") == {"bytes_taken": 3 << 20}


async def test_an_arena_smaller_than_one_prompt_stores_the_chunks_that_fit_and_counts_the_rest(rigs: Opener) -> None:
    async with rigs(HeapConfig(size=(64 << 10) * 3 + 4096), write_share=1.0) as rig:
        scheduler, worker = await rig.engine()
        await scheduler.lookup(1, digests(8))
        made = await worker.reserve(1, digests(8))
        assert POSITIONS.unpack(made.positions) == (0, 1, 2)
        assert made.dropped == {"no_space": 5}
        assert await worker.commit(made.reservation) == 3


async def test_after_every_operation_held_is_as_before(rig: Rig) -> None:
    scheduler, worker = await rig.engine()
    await rig.until(bytes_taken=rig.memory.size)
    await scheduler.get(Pong, Ping)
    before = rig.held()
    for session in range(20):
        await scheduler.lookup(session, digests(3))
        made = await worker.reserve(session, digests(3))
        await worker.get(Ack, Abort, made.reservation)
        await scheduler.end(session)
    await scheduler.get(Pong, Ping)
    assert rig.held() == before
