"""What a server tells a scheduler that watches of its tiers' chunks."""

from collections.abc import Sequence
from typing import Any

import pytest
import trio
from support.server import SHARD, digests
from support.tiers import LoopTier, World, Worlds

from lmcache_trio._core.keys import split_digests
from lmcache_trio._wire.codec import encode
from lmcache_trio._wire.messages import Ack, Changed, Ping, Pong, Reset, Watch
from lmcache_trio.abc import ChunkKey, ObservedTier, Record


class TellingTier(LoopTier, ObservedTier):
    """A dict that tells what comes and what leaves. `evict` drops chunks, as a tier does by itself."""

    async def store(self, records: Sequence[Record]) -> list[bool]:
        taken = await super().store(records)
        if self.observer is not None:
            self.observer.came([record.key for record in records])
        return taken

    async def contains(self, keys: Sequence[ChunkKey]) -> list[bool]:
        found = await super().contains(keys)
        if self.observer is not None:
            self.observer.came([key for key, is_there in zip(keys, found, strict=True) if is_there])
        return found

    def evict(self, namespace: bytes, chain: Sequence[bytes]) -> None:
        keys = [ChunkKey(namespace, digest) for digest in chain]
        for key in keys:
            del self.chunks[key]
        if self.observer is not None:
            self.observer.left(keys)


@pytest.fixture
def telling() -> TellingTier:
    return TellingTier()


async def watch(world: World) -> None:
    await world.scheduler.tell(Watch())
    await world.scheduler.get(Pong, Ping)


async def said(world: World) -> tuple[int, list[bytes], list[bytes], bool]:
    """The tier, what came, what left, and whether all was cleared."""
    message = await world.scheduler.pushed(Changed)
    return message.tier, split_digests(message.came), split_digests(message.left), message.cleared


async def test_a_chunk_is_told_to_be_on_the_tier_once_it_is_written_and_to_have_left_once_it_was_evicted(
    worlds: Worlds, telling: TellingTier
) -> None:
    async with worlds(LoopTier(), telling) as world:
        await watch(world)
        telling.stall("store")
        await world.store(1, digests(3))
        assert await said(world) == (0, digests(3), [], False)
        telling.go_on()
        assert await said(world) == (2, digests(3), [], False), "not the first tier, which cannot say what it evicts"
        telling.evict(world.namespace, digests(3)[2:])
        assert await said(world) == (2, [], digests(3)[2:], False)


async def test_what_was_there_before_is_told_when_a_lookup_finds_it(worlds: Worlds, telling: TellingTier) -> None:
    async with worlds(telling) as world:
        await watch(world)
        telling.fill(world.namespace, digests(3))
        assert (await world.lookup(1, digests(4))).chunks == 3
        await world.scheduler.get(Pong, Ping)  # memory is told at the end of a client's turn
        heard = [await said(world) for _ in range(2)]
        assert sorted((tier, sorted(came)) for tier, came, _, _ in heard) == [(n, sorted(digests(3))) for n in (0, 1)]


async def test_of_a_tier_that_is_fenced_nothing_is_believed(
    worlds: Worlds, telling: TellingTier, unavailable: Exception
) -> None:
    async with worlds(telling) as world:
        await watch(world)
        await world.store(1, digests(2))
        assert [(await said(world))[0] for _ in range(2)] == [0, 1]
        telling.failing["store"] = unavailable
        await world.store(2, digests(1, "more"))
        assert await said(world) == (0, digests(1, "more"), [], False)
        assert await said(world) == (1, [], [], True)
        assert telling.observer is not None
        telling.observer.came([ChunkKey(world.namespace, digests(1)[0])])  # by a call that hung until now
        await world.settled()
        await world.scheduler.get(Pong, Ping)
        assert not [push for push in world.scheduler.pushes if isinstance(push, Changed)]
        telling.failing.clear()
        await trio.sleep(60)
        await world.settled()
        assert not world.tier()["fenced"]
        await world.store(3, digests(2, "new"))
        assert [await said(world) for _ in range(2)] == [(n, digests(2, "new"), [], False) for n in (0, 1)]


async def test_a_reset_clears_and_what_is_deleted_is_not_told_meanwhile(worlds: Worlds, telling: TellingTier) -> None:
    async with worlds(telling) as world:
        await watch(world)
        await world.store(1, digests(2))
        assert [(await said(world))[0] for _ in range(2)] == [0, 1]
        telling.stall("delete")
        asked: Any = world.scheduler.get(Ack, Reset)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(lambda: asked)
            await world.settled()
            assert telling.observer is not None
            telling.observer.came([ChunkKey(world.namespace, digests(1)[0])])
            await world.settled()
            telling.go_on()
        heard = [push for push in world.scheduler.pushes if isinstance(push, Changed)]
        assert {(push.tier, push.came, push.cleared) for push in heard} == {(0, b"", True), (1, b"", True)}


async def test_nothing_is_noted_while_nobody_watches(worlds: Worlds, telling: TellingTier) -> None:
    async with worlds(telling) as world:
        presence = world.rig.server._parts.tiers.runners[0].presence
        await world.store(1, digests(2))
        await world.settled()
        assert telling.observer is None
        assert presence.changes.take() == {}
        watcher, worker = await world.rig.engine("watcher")
        await watcher.tell(Watch())
        await watcher.get(Pong, Ping)
        assert telling.observer is presence
        watcher.connection.close()
        worker.connection.close()
        await world.rig.until(engines=1)
        await world.store(2, digests(2, "more"))  # which finds that nobody watches any more
        await world.settled()
        assert telling.observer is None
        await world.store(3, digests(2, "and more"))
        telling.evict(world.namespace, digests(2))
        await world.settled()
        assert presence.changes.take() == {}


async def test_a_scheduler_that_does_not_read_is_told_that_it_missed_some(worlds: Worlds, telling: TellingTier) -> None:
    async with worlds(telling, size=64 * SHARD) as world:
        await watch(world)
        (peer,) = [each for each in world.rig.server._parts.peers if str(each).endswith("(scheduler)")]
        telling.stall("store")
        await world.store(1, digests(2))
        assert await said(world) == (0, digests(2), [], False)
        peer.outbox.append(encode(Pong(99, b"b" * 16)))  # as if its socket were full
        telling.go_on()
        await world.settled()
        assert len(peer.outbox) == 1
        peer.queued.set()
        await world.settled()
        assert not peer.outbox
        await world.scheduler.get(Pong, Ping)
        assert await said(world) == (0, [], [], True)
