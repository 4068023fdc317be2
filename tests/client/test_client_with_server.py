"""The client of a Trio program against a server in the same loop, over real sockets and real shared memory."""

import fcntl
import os
import tempfile
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path

import pytest
import trio

from lmcache_trio import Client, Config, Role, Server, open_client, open_server
from lmcache_trio._transport.arena_map import ArenaMap
from lmcache_trio._wire.messages import MAX_RESERVED
from lmcache_trio.adapters import Group, Need
from lmcache_trio.errors import Gone, Misuse, ProtocolError, Unavailable

SHARD = 4096
DIGESTS = [bytes([i]) * 32 for i in range(1, 4)]


@asynccontextmanager
async def engine(
    tmp_path: Path, *, size: int = 1 << 20, groups: Sequence[Group] = (), part_bytes: Sequence[int] = ()
) -> AsyncIterator[tuple[Server, Client, Client]]:
    """A server, a scheduler, and a worker that registered."""
    config = Config(address=f"unix://{tmp_path}/c.sock", memory={"backend": "cpu", "size": size}, grace=0.1)
    with trio.fail_after(60):
        async with open_server(config) as server:
            said = partial(open_client, config.address, engine="e", block_tokens=16 if groups else 0, groups=groups)
            async with said(role=Role.SCHEDULER) as scheduler:
                async with said(role=Role.WORKER) as worker:
                    await worker.register(b"f" * 32, sum(part_bytes) or SHARD, 16, part_bytes=part_bytes)
                    while not worker.taken:
                        await worker.ping()
                    yield server, scheduler, worker


async def test_what_is_stored_is_retrieved_byte_for_byte(tmp_path: Path) -> None:
    async with engine(tmp_path) as (_, scheduler, worker):
        assert (await scheduler.lookup(1, DIGESTS)).chunks == 0
        async with worker.storing(1, b"", DIGESTS) as storing:
            assert list(storing.slots) == [0, 1, 2]
            for position, slot in storing.slots.items():
                slot[:] = bytes([position + 7]) * SHARD
        answer = await scheduler.lookup(2, DIGESTS)
        assert answer.chunks == 3
        async with worker.retrieving(answer.lease, 1, 2) as chunks:
            assert [bytes(chunk) for chunk in chunks] == [bytes([8]) * SHARD, bytes([9]) * SHARD]


async def test_a_hit_of_several_groups_has_the_parts_that_it_needs_and_no_more(tmp_path: Path) -> None:
    groups, lengths = (Group(Need.EVERY, 0, 16), Group(Need.STATE)), (SHARD, 100)
    async with engine(tmp_path, groups=groups, part_bytes=lengths) as (_, scheduler, worker):
        await scheduler.lookup(1, DIGESTS)
        for group, digests in ((0, DIGESTS), (1, DIGESTS[1:2])):  # a state is that of its boundary
            async with worker.storing(1, b"", digests, group=group) as storing:
                for position, slot in storing.slots.items():
                    slot[:] = bytes([10 * group + position]) * lengths[group]
        answer = await scheduler.lookup(2, DIGESTS)
        assert answer.chunks == 2
        async with worker.retrieving(answer.lease, 0, 2) as chunks:
            assert [bytes(chunk) for chunk in chunks] == [bytes([i]) * SHARD for i in range(2)]
        async with worker.retrieving(answer.lease, 1, 1, group=1) as states:
            assert [bytes(state) for state in states] == [bytes([10]) * 100]
        for group, start in ((0, 2), (1, 0), (2, 1)):
            with pytest.raises(Misuse):
                await worker.retrieve(answer.lease, start, 1, group=group)


async def test_a_store_of_more_than_a_message_asks_for_is_asked_for_in_lots_that_make_one_chain(tmp_path: Path) -> None:
    digests = [number.to_bytes(32, "big") for number in range(2 * MAX_RESERVED + 10)]
    size = 2 * SHARD * (MAX_RESERVED + MAX_RESERVED // 2)  # of which one engine may be writing half at a time
    async with engine(tmp_path, size=size) as (server, scheduler, worker):
        await scheduler.lookup(1, digests)
        with pytest.raises(Misuse, match=f"{len(digests)} digests: reserve {MAX_RESERVED} at a time"):
            await worker.reserve(1, b"", digests)
        with pytest.raises(ZeroDivisionError):
            async with worker.storing(1, b"", digests):
                raise ZeroDivisionError
        await worker.ping()
        assert server.statistics()["held"]["reservations"] == 0  # of none of them
        async with worker.storing(1, b"", digests) as storing:
            room = len(storing.slots)
            assert list(storing.slots) == list(range(room))  # leading chunks, and the arena is shorter than all
            assert MAX_RESERVED < room < 2 * MAX_RESERVED
            assert sum(storing.dropped.values()) == len(digests) - room
            for position, slot in storing.slots.items():
                slot[:] = position.to_bytes(2, "big") * (SHARD // 2)
        answer = await scheduler.lookup(2, digests[: room // 2])
        async with worker.retrieving(answer.lease, 0, answer.chunks) as chunks:
            assert [int.from_bytes(chunk[:2], "big") for chunk in chunks] == list(range(room // 2))


async def test_a_store_whose_body_raises_is_aborted_and_leaves_nothing(tmp_path: Path) -> None:
    async with engine(tmp_path) as (server, scheduler, worker):
        await scheduler.lookup(1, DIGESTS)
        with pytest.raises(ZeroDivisionError):
            async with worker.storing(1, b"", DIGESTS):
                raise ZeroDivisionError
        await worker.ping()
        assert server.statistics()["held"]["reservations"] == 0
        assert (await scheduler.lookup(2, DIGESTS)).chunks == 0


async def test_a_read_across_a_reset_is_told_that_it_is_stale(tmp_path: Path) -> None:
    async with engine(tmp_path) as (_, scheduler, worker):
        await scheduler.lookup(1, DIGESTS)
        async with worker.storing(1, b"", DIGESTS):
            pass
        answer = await scheduler.lookup(2, DIGESTS)
        with pytest.raises(Gone, match="not valid"):
            async with worker.retrieving(answer.lease, 0, 3):
                await scheduler.reset()


async def test_storing_needs_a_layout_and_an_arena(tmp_path: Path) -> None:
    async with engine(tmp_path) as (server, scheduler, _):
        with pytest.raises(Unavailable, match=r"Role\.WORKER"):
            async with scheduler.storing(1, b"", DIGESTS):
                pass
        async with open_client(server.address, role=Role.WORKER, engine="other") as worker:
            with pytest.raises(Misuse, match="register"):
                async with worker.storing(1, b"", DIGESTS):
                    pass


async def test_nobody_listening_is_unavailable_at_once(tmp_path: Path) -> None:
    with trio.fail_after(60), pytest.raises(Unavailable):
        async with open_client(f"unix://{tmp_path}/nobody.sock"):
            pass


@pytest.fixture
def arena_file() -> Iterator[int]:
    """What a server passes: 16 MiB, of which one page is there."""
    fd = os.memfd_create("arena", os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, 16 << 20)
    os.pwrite(fd, b"a" * 16, 0)
    yield fd
    os.close(fd)


def test_an_arena_that_could_shrink_or_is_too_short_or_no_memory_is_not_mapped(arena_file: int) -> None:
    with pytest.raises(ProtocolError, match="not a sealed one of 16777216"):
        ArenaMap(arena_file, 16 << 20)
    fcntl.fcntl(arena_file, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK)
    with pytest.raises(ProtocolError, match="passed an arena of 16777216 bytes, not"):
        ArenaMap(arena_file, (16 << 20) + 1)
    with tempfile.TemporaryFile() as file, pytest.raises(ProtocolError, match="no anonymous file"):
        ArenaMap(file.fileno(), 4096)


async def test_a_mapping_is_whole_from_the_start_and_has_no_view_beyond_it(arena_file: int) -> None:
    fcntl.fcntl(arena_file, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK)
    arena = ArenaMap(arena_file, 16 << 20)
    view = arena.view(0, 4096)
    assert bytes(view[:16]) == b"a" * 16
    for offset, length in ((16 << 20, 1), ((16 << 20) - 4, 5), (-1, 1), (1 << 30, 1)):
        with pytest.raises(ProtocolError, match="outside"):
            arena.view(offset, length)
    arena.view((16 << 20) - 4, 4)[:] = b"last"
    assert os.pread(arena_file, 4, (16 << 20) - 4) == b"last"
    await arena.populate(8192)
    assert arena.populated == 8192
    del arena
    assert bytes(view[:16]) == b"a" * 16  # a view keeps the mapping
