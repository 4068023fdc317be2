"""What a server tells a scheduler that watches: chunks that came into memory, and chunks that left it."""

from typing import Any

import pytest
import trio
from support.server import SHARD, HeapConfig, Opener, Peer, digests

from lmcache_trio._core.groups import Group, Need
from lmcache_trio._core.keys import split_digests
from lmcache_trio._wire.codec import encode
from lmcache_trio._wire.messages import Ack, Changed, Ping, Pong, Reset, Watch

pytestmark = pytest.mark.usefixtures("autojump_clock")


async def watching(*schedulers: Peer) -> None:
    for scheduler in schedulers:
        await scheduler.tell(Watch())
        await scheduler.get(Pong, Ping)


def said(message: Changed) -> tuple[int, list[bytes], list[bytes], bool]:
    return message.group, split_digests(message.came), split_digests(message.left), message.cleared


async def test_a_scheduler_that_watches_is_told_what_any_engine_of_its_namespace_stored(rigs: Opener) -> None:
    async with rigs() as rig:
        (one, worker), (other, _), (deaf, _) = [await rig.engine(name) for name in ("one", "other", "deaf")]
        await watching(one, other)
        await rig.stored(one, worker, 1, digests(3))
        for scheduler in (one, other):
            assert said(await scheduler.pushed(Changed)) == (0, digests(3), [], False)
        await deaf.get(Pong, Ping)
        assert not [push for push in deaf.pushes if isinstance(push, Changed)]


async def test_what_is_evicted_has_left_and_is_told_before_the_slots_are_used(rigs: Opener) -> None:
    async with rigs(HeapConfig(size=4 * SHARD), write_share=1.0) as rig:
        scheduler, worker = await rig.engine()
        await watching(scheduler)
        await rig.stored(scheduler, worker, 1, digests(3, "old"))
        assert said(await scheduler.pushed(Changed)) == (0, digests(3, "old"), [], False)
        await scheduler.lookup(2, digests(2, "new"))
        made = await worker.reserve(2, digests(2, "new"))
        assert said(await scheduler.pushed(Changed)) == (0, [], digests(3, "old")[2:], False)
        assert await worker.commit(made.reservation) == 2
        assert said(await scheduler.pushed(Changed)) == (0, digests(2, "new"), [], False)


async def test_a_reset_clears_for_every_engine_of_the_namespace(rigs: Opener) -> None:
    async with rigs() as rig:
        (one, worker), (other, _) = [await rig.engine(name) for name in ("one", "other")]
        await watching(one, other)
        await rig.stored(one, worker, 1, digests(3))
        await one.get(Ack, Reset)
        for scheduler in (one, other):
            assert said(await scheduler.pushed(Changed)) == (0, digests(3), [], False)
            assert said(await scheduler.pushed(Changed)) == (0, [], [], True)


async def test_parts_are_told_by_their_group(rigs: Opener) -> None:
    groups = (Group(block_tokens=16), Group(Need.WINDOW, 32, 16))
    named: dict[str, Any] = {"groups": groups, "block_tokens": 16, "chunk_tokens": 16}
    async with rigs() as rig:
        scheduler, worker = await rig.scheduler(**named), await rig.worker(**named)
        assert await worker.register(shard_bytes=2 * SHARD, part_bytes=(SHARD, SHARD))
        await watching(scheduler)
        await scheduler.lookup(1, digests(2))
        for group in (1, 0):
            made = await worker.reserve(1, digests(2), group=group)
            assert await worker.commit(made.reservation) == 2
            assert said(await scheduler.pushed(Changed)) == (group, digests(2), [], False)


async def test_nothing_is_noted_while_nobody_watches(rigs: Opener) -> None:
    async with rigs() as rig:
        scheduler, worker = await rig.engine()
        changes = rig.server._parts.index.changes
        await rig.stored(scheduler, worker, 1, digests(3))
        assert not changes.watched
        assert changes.take() == {}
        watcher, its_worker = await rig.engine("watcher")
        await watching(watcher)
        assert changes.watched
        watcher.connection.close()
        its_worker.connection.close()
        await rig.until(engines=1)
        await rig.stored(scheduler, worker, 2, digests(3, "more"))  # which finds that nobody watches any more
        await rig.stored(scheduler, worker, 3, digests(3, "and more"))
        assert not changes.watched
        assert changes.take() == {}


async def test_for_a_scheduler_that_does_not_read_nothing_is_queued_and_it_is_told_that_it_missed_some(
    rigs: Opener,
) -> None:
    async with rigs() as rig:
        (slow, _), (quick, worker) = [await rig.engine(name) for name in ("slow", "quick")]
        await watching(slow, quick)
        (peer,) = [each for each in rig.server._parts.peers if str(each).endswith("'slow' (scheduler)")]
        peer.outbox.append(encode(Pong(99, b"b" * 16)))  # as if its socket were full
        await rig.stored(quick, worker, 1, digests(3))
        assert len(peer.outbox) == 1
        peer.queued.set()
        with trio.fail_after(5):
            while peer.outbox:
                await trio.lowlevel.checkpoint()
        await rig.stored(quick, worker, 2, digests(2, "more"))
        assert said(await slow.pushed(Changed)) == (0, [], [], True)
        assert said(await slow.pushed(Changed)) == (0, digests(2, "more"), [], False)
