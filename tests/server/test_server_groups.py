"""An engine with several KV groups: its clients agree on them, and its parts live in a namespace for each group."""

from typing import Any

import pytest
from support.server import SHARD, Opener, Peer, Refusal, Rig, digests, error_of

from lmcache_trio._core.groups import Group, Need
from lmcache_trio._wire.messages import (
    Ack,
    Done,
    ErrorKind,
    Finished,
    Identify,
    NamespaceKnown,
    Pinned,
    Register,
    Release,
    Reserve,
    Reset,
    Retrieve,
)

EVERY, WINDOW = Group(Need.EVERY, 0, 16), Group(Need.WINDOW, 300, 16)
GROUPS = (EVERY, WINDOW)
PARTS = (SHARD, SHARD // 2)
"""Bytes of a chunk's part, by group."""


async def engine_of(
    rig: Rig, groups: tuple[Group, ...] = GROUPS, parts: tuple[int, ...] = PARTS, name: str = "engine"
) -> tuple[Any, Any]:
    """A scheduler and its worker, registered."""
    said: dict[str, Any] = {"groups": groups, "block_tokens": 16, "chunk_tokens": 256}
    scheduler, worker = await rig.scheduler(name, **said), await rig.worker(name, **said)
    assert await worker.register(shard_bytes=sum(parts), part_bytes=parts)
    return scheduler, worker


async def store(worker: Peer, session: int, chain: list[bytes], group: int) -> None:
    made = await worker.reserve(session, chain, group=group)
    assert made.slot_bytes == PARTS[group]
    assert await worker.commit(made.reservation) == len(chain)


@pytest.mark.parametrize(
    "said", [(), (EVERY,), (WINDOW, EVERY), (EVERY, Group(Need.WINDOW, 301, 16)), (*GROUPS, EVERY)]
)
async def test_a_client_with_other_groups_is_refused_by_name(rig: Rig, said: tuple[Group, ...]) -> None:
    scheduler = await rig.scheduler(groups=GROUPS)
    with pytest.raises(
        Refusal, match=r"2 KV groups \(every of 0 in blocks of 16, window of 300 in blocks of 16 tokens\)"
    ):
        await rig.worker(groups=said)
    scheduler.connection.close()
    await rig.until(engines=0)
    await rig.worker(groups=said)
    with pytest.raises(Refusal, match="all must agree"):
        await rig.scheduler(groups=GROUPS)


async def test_groups_that_cannot_be_are_refused(rig: Rig) -> None:
    for groups, why in (
        ((EVERY, Group(Need.WINDOW, 1, 16)), "give those of its window"),
        ((EVERY, Group(Need.LOCAL, 64, 24)), "least common multiple"),
        ((EVERY, Group(Need.WINDOW, 64, 0)), "least common multiple"),
    ):
        for tokens in (0, 16):  # the chunks do not fit either
            with pytest.raises(Refusal, match=why):
                await rig.scheduler(groups=groups, block_tokens=tokens)


async def test_one_group_of_which_a_hit_needs_all_is_the_same_as_none(rig: Rig) -> None:
    _, worker = await rig.engine("plain")
    namespace = await worker.register()
    named = await rig.worker("named", groups=(EVERY,))
    assert await named.register() == namespace
    assert await named.register(part_bytes=(SHARD,)) == namespace


async def test_the_groups_are_part_of_the_namespace(rig: Rig) -> None:
    found = {await (await rig.worker("none")).register()}
    for number, groups in enumerate(
        [(WINDOW,), GROUPS, (WINDOW, EVERY), (EVERY, Group(Need.LOCAL, 300, 16)), (EVERY, Group(Need.WINDOW, 300, 32))]
    ):
        worker = await rig.worker(f"engine {number}", groups=groups)
        parts = (SHARD,) if len(groups) == 1 else (SHARD // 2, SHARD // 2)
        found.add(await worker.register(block_tokens=32, part_bytes=parts))
    assert len(found) == 6


async def test_parts_live_in_a_namespace_for_each_group(rig: Rig) -> None:
    scheduler, worker = await engine_of(rig)
    assert rig.held("namespaces") == {"namespaces": 2}
    known = await scheduler.pushed(NamespaceKnown)
    assert known.chunk_bytes == sum(PARTS)
    await scheduler.lookup(1, digests(3))
    await store(worker, 1, digests(3), 0)
    await store(worker, 1, digests(3), 1)
    assert (rig.held()["chunks_ready"], rig.held()["bytes_ready"]) == (6, 3 * sum(PARTS))
    assert (await worker.reserve(1, digests(4), group=1)).dropped == {"present": 3}
    for client in (worker, scheduler):
        client.connection.close()
    await rig.until(engines=0)
    assert rig.held("namespaces", "chunks_ready") == {"namespaces": 2, "chunks_ready": 6}  # kept for the next engine
    other, _ = await engine_of(rig, name="other")
    assert isinstance(await other.ask(Reset), Ack)
    assert rig.held("chunks_ready") == {"chunks_ready": 0}


@pytest.mark.parametrize("parts", [(), (SHARD,), (SHARD, SHARD), (SHARD // 2, SHARD // 4, SHARD // 4)])
async def test_a_layout_without_the_bytes_of_each_group_is_refused(rig: Rig, parts: tuple[int, ...]) -> None:
    worker = await rig.worker(groups=GROUPS)
    error = error_of(await worker.ask(Register, b"f" * 32, SHARD, 16, part_bytes=parts))
    assert error.kind is ErrorKind.MISUSE
    assert "the engine's 2 KV groups" in error.message
    assert rig.held("namespaces") == {"namespaces": 0}


async def test_a_group_that_the_engine_does_not_have_is_misuse(rig: Rig) -> None:
    _, worker = await engine_of(rig)
    _, plain = await rig.engine("plain")
    for client, group in ((worker, 2), (plain, 1)):
        for asked in (
            await client.ask(Reserve, 1, b"", digests(1)[0], group),
            await client.ask(Retrieve, b"lease", 0, 1, group),
        ):
            assert error_of(asked).kind is ErrorKind.MISUSE
            assert f"group is {group}" in error_of(asked).message


async def test_a_layout_that_fits_one_group_and_not_the_other_changes_nothing(rig: Rig) -> None:
    _, worker = await engine_of(rig)
    held = rig.held("namespaces", "chunks_ready")
    other = await rig.worker("other", groups=GROUPS, block_tokens=16, chunk_tokens=256)
    parts = (PARTS[0], PARTS[1] + 4096)
    error = error_of(await other.ask(Register, b"f" * 32, sum(parts), 16, part_bytes=parts))
    assert "must tell layouts of other lengths apart" in error.message
    assert rig.held("namespaces", "chunks_ready") == held
    worker.connection.close()
    await rig.until(namespaces=0)
    assert await other.register(shard_bytes=sum(parts), part_bytes=parts)


async def test_a_reset_drops_the_parts_of_every_group(rig: Rig) -> None:
    scheduler, worker = await engine_of(rig)
    await scheduler.lookup(1, digests(3))
    await store(worker, 1, digests(3), 0)
    await store(worker, 1, digests(3), 1)
    pending = await worker.reserve(1, digests(5), group=1)
    assert isinstance(await scheduler.ask(Reset), Ack)
    assert rig.held("chunks_ready", "chunks_writing", "reservations") == {
        "chunks_ready": 0,
        "chunks_writing": 0,
        "reservations": 0,
    }
    assert await worker.commit(pending.reservation) == 0
    assert rig.counted()["reset_chunks"] == 6
    assert (await worker.reserve(1, digests(3), group=1)).dropped == {"reset": 3}
    await scheduler.lookup(2, digests(3))
    await store(worker, 2, digests(3), 1)


async def test_another_identity_moves_every_group_to_another_namespace(rig: Rig) -> None:
    scheduler, worker = await engine_of(rig)
    await scheduler.lookup(1, digests(3))
    await store(worker, 1, digests(3), 0)
    await store(worker, 1, digests(3), 1)
    await scheduler.ask(Identify, b"i" * 32)
    assert rig.held("namespaces", "chunks_ready") == {"namespaces": 4, "chunks_ready": 6}
    await scheduler.lookup(2, digests(3))
    await store(worker, 2, digests(3), 1)


async def test_a_reset_that_is_due_concerns_every_group(rigs: Opener) -> None:
    async with rigs() as rig:
        scheduler, worker = await engine_of(rig)
        await scheduler.lookup(1, digests(2))
        await store(worker, 1, digests(2), 1)
        late = await rig.scheduler("late", groups=GROUPS, chunk_tokens=256)
        assert isinstance(await late.ask(Reset), Ack)
        assert rig.held("chunks_ready") == {"chunks_ready": 2}
        behind = await rig.worker("late", groups=GROUPS)
        assert await behind.register(shard_bytes=sum(PARTS), part_bytes=PARTS)
        assert rig.held("chunks_ready") == {"chunks_ready": 0}


# --- a hit needs of each group what that group says -------------------------------------------------------------------


async def test_a_hit_needs_of_a_window_only_its_last_parts(rig: Rig) -> None:
    scheduler, worker = await engine_of(rig)
    chain = digests(5)
    await scheduler.lookup(1, chain)
    await store(worker, 1, chain, 0)
    assert (await scheduler.lookup(2, chain)).chunks == 0
    await store(worker, 1, chain[3:], 1)
    for session in (1, 2):
        await scheduler.end(session)
    await rig.until(sessions=0)
    before = rig.held()
    answer = await scheduler.lookup(2, chain)
    assert answer.chunks == 5
    pins = [
        await worker.get(Pinned, Retrieve, answer.lease, first, 5 - first, group) for group, first in ((0, 0), (1, 3))
    ]
    assert [pin.slot_bytes for pin in pins] == list(PARTS)
    assert [len(pin.offsets) // 8 for pin in pins] == [5, 2]
    for start, count in ((2, 3), (0, 1), (4, 2)):
        error = error_of(await worker.ask(Retrieve, answer.lease, start, count, 1))
        assert error.kind is ErrorKind.MISUSE
    await scheduler.tell(Release(2))  # what is read stays in place
    for pin in pins:
        assert (await worker.get(Finished, Done, pin.pin)).valid
    await scheduler.end(2)
    await rig.until(sessions=0)
    assert rig.held() == before


@pytest.mark.parametrize(("there", "hit"), [((0, 1), 2), ((1, 2, 4), 3), ((2, 3), 4), ((0, 2, 4), 1), ((4,), 0)])
async def test_a_window_whose_part_is_missing_makes_the_hit_shorter(rig: Rig, there: tuple[int, ...], hit: int) -> None:
    scheduler, worker = await engine_of(rig)
    chain = digests(5)
    await scheduler.lookup(1, chain)
    await store(worker, 1, chain, 0)
    for position in there:
        await store(worker, 1, [chain[position]], 1)
    answer = await scheduler.lookup(2, chain)
    assert answer.chunks == hit
    assert bool(answer.lease) == bool(hit)


async def test_a_lease_ends_in_every_group_with_a_reset(rig: Rig) -> None:
    scheduler, worker = await engine_of(rig)
    chain = digests(3)
    await scheduler.lookup(1, chain)
    await store(worker, 1, chain, 0)
    await store(worker, 1, chain, 1)
    await scheduler.end(1)
    answer = await scheduler.lookup(2, chain)
    pins = [await worker.get(Pinned, Retrieve, answer.lease, 1, 2, group) for group in (0, 1)]
    await scheduler.ask(Reset)
    for group in (0, 1):
        assert error_of(await worker.ask(Retrieve, answer.lease, 1, 2, group)).kind is ErrorKind.GONE
        assert not (await worker.get(Finished, Done, pins[group].pin)).valid
    assert (await scheduler.lookup(3, chain)).chunks == 0


async def test_a_state_is_needed_at_the_boundary_alone(rig: Rig) -> None:
    scheduler, worker = await engine_of(rig, (EVERY, Group(Need.STATE)))
    chain = digests(5)
    await scheduler.lookup(1, chain)
    await store(worker, 1, chain, 0)
    await store(worker, 1, [chain[3]], 1)
    answer = await scheduler.lookup(2, chain)
    assert answer.chunks == 4
    assert (await worker.get(Pinned, Retrieve, answer.lease, 3, 1, 1)).slot_bytes == PARTS[1]


async def test_a_hit_that_ends_with_an_attention_chunk_needs_no_part_of_it(rig: Rig) -> None:
    scheduler, worker = await engine_of(rig, (EVERY, Group(Need.LOCAL, 512, 16)))
    chain = digests(4)
    await scheduler.lookup(1, chain)
    await store(worker, 1, chain, 0)
    answer = await scheduler.lookup(2, chain)
    assert answer.chunks == 4
    assert error_of(await worker.ask(Retrieve, answer.lease, 3, 1, 1)).kind is ErrorKind.MISUSE
    assert (await scheduler.lookup(3, chain[:3])).chunks == 2
    await store(worker, 1, chain[2:3], 1)
    answer = await scheduler.lookup(3, chain[:3])
    assert answer.chunks == 3
    assert (await worker.get(Pinned, Retrieve, answer.lease, 2, 1, 1)).slot_bytes == PARTS[1]


async def test_replicas_whose_parts_have_other_lengths_have_no_namespace(rig: Rig) -> None:
    said: dict[str, Any] = {"groups": GROUPS, "chunk_tokens": 256, "replicas": 2}
    first, second = [await rig.worker(replica=replica, **said) for replica in (0, 1)]
    assert not await first.register(shard_bytes=sum(PARTS), part_bytes=PARTS)
    assert not await second.register(shard_bytes=sum(PARTS), part_bytes=PARTS[::-1])
    assert await second.register(shard_bytes=sum(PARTS), part_bytes=PARTS)
