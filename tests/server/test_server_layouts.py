"""A change of one shard's layout ends its engine's grants under the former layout, and no other engine's."""

from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from support.server import Rig, digests, error_of

from lmcache_trio._wire.messages import (
    AnswerState,
    Commit,
    Committed,
    Done,
    ErrorKind,
    Finished,
    LookupStatus,
    Pinned,
    Retrieve,
)

OTHER = b"o" * 32

Change = Callable[[Any, Any], Awaitable[None]]


async def registered_anew(rig: Rig, second: Any) -> None:
    await second.register(OTHER)


async def replaced(rig: Rig, second: Any) -> None:
    again = await rig.worker(shard=1, shards=2, token=second.token)
    await again.register(OTHER)


changes = pytest.mark.parametrize("change", [registered_anew, replaced])


async def two_shards(rig: Rig) -> tuple[Any, Any, Any]:
    scheduler = await rig.scheduler(shards=2)
    first, second = await rig.worker(shard=0, shards=2), await rig.worker(shard=1, shards=2)
    await first.register()
    await second.register()
    return scheduler, first, second


async def store(first: Any, second: Any, session: int, digests: Any) -> None:
    made = [await worker.reserve(session, digests) for worker in (first, second)]
    for worker, reserved in zip((first, second), made, strict=True):
        await worker.commit(reserved.reservation)


@changes
async def test_leases_and_pins_of_every_shard_end_with_the_layout(rig: Rig, change: Change) -> None:
    scheduler, first, second = await two_shards(rig)
    await scheduler.lookup(1, digests(3))
    await store(first, second, 1, digests(3))
    answer = await scheduler.lookup(2, digests(3))
    assert answer.chunks == 3
    pinned = await first.get(Pinned, Retrieve, answer.lease, 0, 3)
    await change(rig, second)
    assert (await first.get(Finished, Done, pinned.pin)).valid is False
    assert error_of(await first.ask(Retrieve, answer.lease, 0, 3)).kind is ErrorKind.GONE
    status = await scheduler.get(type(answer), LookupStatus, 2)
    assert (status.state, status.chunks, status.lease) == (AnswerState.ANSWERED, 0, b"")
    assert rig.held("leases", "pins", "bytes_retained") == {"leases": 0, "pins": 0, "bytes_retained": 0}
    assert (await scheduler.lookup(2, digests(3))).chunks == 0


@changes
async def test_a_reservation_of_the_former_layout_is_refused_by_any_shard_and_kept_until_its_copy_ended(
    rig: Rig, change: Change
) -> None:
    scheduler, first, second = await two_shards(rig)
    await scheduler.lookup(1, digests(2))
    reserved = await first.reserve(1, digests(2))
    await change(rig, second)
    assert rig.held("chunks_writing", "chunks_quarantined") == {"chunks_writing": 0, "chunks_quarantined": 2}
    committed = await first.get(Committed, Commit, reserved.reservation)
    assert (committed.published, committed.kept) == (0, 0)
    assert rig.held("chunks_quarantined", "chunks_ready") == {"chunks_quarantined": 0, "chunks_ready": 0}
    again = await first.reserve(1, digests(2))
    assert await first.commit(again.reservation) == 0
    assert again.dropped == {}


async def test_an_equal_layout_that_comes_back_ends_nothing(rig: Rig) -> None:
    scheduler, first, second = await two_shards(rig)
    await scheduler.lookup(1, digests(3))
    await store(first, second, 1, digests(3))
    answer = await scheduler.lookup(2, digests(3))
    pinned = await first.get(Pinned, Retrieve, answer.lease, 0, 3)
    again = await rig.worker(shard=1, shards=2, token=second.token)
    await again.register()
    assert (await first.get(Finished, Done, pinned.pin)).valid
    assert (await again.get(Pinned, Retrieve, answer.lease, 0, 3)).slot_bytes


async def test_while_a_shard_is_missing_a_lease_cannot_be_used(rig: Rig) -> None:
    scheduler, first, second = await two_shards(rig)
    await scheduler.lookup(1, digests(3))
    await store(first, second, 1, digests(3))
    answer = await scheduler.lookup(2, digests(3))
    await rig.worker(shard=1, shards=2, token=second.token)
    assert error_of(await first.ask(Retrieve, answer.lease, 0, 3)).kind is ErrorKind.GONE


async def test_another_engine_of_the_former_layout_keeps_its_grants(rig: Rig) -> None:
    one, its_worker = await rig.engine("one")
    await rig.stored(one, its_worker, 1, digests(3))
    other, worker = await rig.engine("other")
    answer = await other.lookup(1, digests(3))
    pinned = await worker.get(Pinned, Retrieve, answer.lease, 0, 3)
    await other.lookup(2, digests(5))
    reserved = await worker.reserve(2, digests(5)[3:], digests(3)[-1])
    await its_worker.register(OTHER)
    assert (await worker.get(Finished, Done, pinned.pin)).valid
    assert await worker.commit(reserved.reservation) == 2
