"""What an operation makes: messages, copies, allocations. A clock would not notice one more of them, or not surely.

Each kind of count is first shown to see what it is there to see.
"""

import gc
import secrets
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
import trio
from support.counting import BLOCKS, TOKENS, counted_side, tap, tracing
from torch.profiler import ProfilerActivity, profile

from lmcache_trio import Config, open_client, open_server
from lmcache_trio._core.index.arena import Arena
from lmcache_trio._core.index.index import Index
from lmcache_trio._core.index.session import Session
from lmcache_trio._wire.codec import encode
from lmcache_trio._wire.messages import (
    PROTOCOL_VERSION,
    Answer,
    AnswerState,
    Commit,
    Done,
    Ended,
    Hello,
    Lookup,
    Message,
    Register,
    Reserve,
    Retrieve,
    Role,
    Taken,
)
from lmcache_trio.adapters.worker.paged import PagedKV
from lmcache_trio.testing.sides import CHUNK, ServerProcess, Side, make_kv


@pytest.fixture
def side(tmp_path: Path) -> Iterator[Side]:
    with counted_side(tmp_path, make_kv(1)) as made:
        client = made.scheduler._link.client
        assert client is not None
        made.scheduler._link.call(client.ping, timeout=5)  # the push that names the namespace was heard
        yield made


# --- messages ---------------------------------------------------------------------------------------------------------


def test_a_lookup_is_one_request_and_one_reply_and_its_end_one_notice(side: Side) -> None:
    side.store("r", TOKENS, BLOCKS)
    messages = tap(side.scheduler._link)
    assert side.lookup("hit", TOKENS) == len(TOKENS)
    assert messages.take() == ([Lookup], 1)
    assert side.lookup("miss", [7, *TOKENS[1:]]) == 0
    assert messages.take() == ([Lookup], 1)
    side.scheduler.end_session("hit")
    assert messages.take() == ([Ended], 0)
    assert side.lookup("hit", TOKENS) == len(TOKENS)  # the same id again is another request
    assert messages.take() == ([Lookup], 1)


def test_asking_again_for_an_answer_says_nothing(side: Side) -> None:
    side.store("r", TOKENS, BLOCKS)
    side.lookup("q", TOKENS)
    messages = tap(side.scheduler._link)
    for _ in range(3):
        assert side.lookup("q", TOKENS) == len(TOKENS)
    assert messages.take() == ([], 0)


def test_a_request_that_grew_sends_only_the_digests_that_are_new(side: Side) -> None:
    side.lookup("q", TOKENS[: 2 * CHUNK])
    side.scheduler.cleanup_lookup_result("q")
    messages = tap(side.scheduler._link)
    side.lookup("q", TOKENS)
    (said,) = [message for message in messages.said if isinstance(message, Lookup)]
    assert (said.start, len(said.digests), said.upto) == (2, 32, 3)
    assert messages.take() == ([Lookup], 1)


def test_a_store_is_two_requests_and_two_replies_however_many_chunks(side: Side) -> None:
    side.scheduler.extend("r", TOKENS)
    spec = side.scheduler.store_spec("r", 0, BLOCKS)
    messages = tap(side.worker._link)
    side.worker.store_now([spec])
    assert messages.take() == ([Reserve, Commit], 2)
    assert side.worker.statistics()["stored_chunks"] == 3


def test_a_retrieve_is_two_requests_and_two_replies_however_many_chunks(side: Side) -> None:
    side.store("r", TOKENS, BLOCKS)
    side.lookup("q", TOKENS)
    schedulers = tap(side.scheduler._link)
    spec = side.scheduler.update_after_alloc("q", len(TOKENS), block_ids=BLOCKS)
    assert spec is not None
    assert schedulers.take() == ([Taken], 0)
    messages = tap(side.worker._link)
    side.worker.retrieve_now([spec])
    assert messages.take() == ([Retrieve, Done], 2)
    assert side.worker.take_failed_blocks() == set()


def test_a_tap_sees_a_message_too_many(side: Side) -> None:
    messages = tap(side.scheduler._link)
    client = side.scheduler._link.client
    assert client is not None
    side.scheduler._link.call(client.lookup, 1, [], timeout=5)
    side.scheduler._link.call(client.lookup_status, 1, timeout=5)
    said, heard = messages.take()
    assert (len(said), heard) == (2, 2)


async def test_an_echo_is_sent_back_as_it_is_in_order_and_counted(tmp_path: Path) -> None:
    with trio.fail_after(5):
        config = Config(address=f"unix://{tmp_path}/s.sock", memory={"backend": "cpu", "size": 1 << 20})
        async with open_server(config) as server, open_client(server.address) as client:
            came: list[bytes] = []
            client.on_echo = came.append
            pushed: list[Message] = []
            client.on_push = pushed.append
            heard = client.heard
            client.echo_nowait(b"one" * 80)
            client.echo_nowait(b"")
            await client.ping()
            assert came == [b"\0" + b"one" * 80, b"\0"]
            assert client.heard == heard + 3 + len(pushed)  # the arena may have grown meanwhile, which is told too


# --- copies and temporaries -------------------------------------------------------------------------------------------

LAYERS, CHUNK_BLOCKS = 4, 16
SHAPE = (2, 64, 16, 2, 64)  # 4 KiB a block and piece


def paged(layers: int = LAYERS) -> tuple[PagedKV, int]:
    """KV with a tensor a layer, as engines have it, and the bytes of one chunk."""
    kv = PagedKV({f"{i}": torch.randn(SHAPE).to(torch.bfloat16) for i in range(layers)})
    return kv, kv.groups[0].block_bytes * CHUNK_BLOCKS


@contextmanager
def counting_torch() -> Iterator[Callable[[], tuple[int, dict[str, int]]]]:
    """Bytes that torch allocated in this thread, and calls by operator."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        yield lambda: (
            sum(max(0, event.self_cpu_memory_usage) for event in profiler.key_averages()),
            {event.key: event.count for event in profiler.key_averages()},
        )


def test_the_counters_see_a_temporary_as_large_as_a_chunk() -> None:
    _, chunk = paged()
    source = torch.zeros(chunk, dtype=torch.uint8)
    with counting_torch() as counted:
        source.clone()
    assert counted()[0] >= chunk
    with tracing() as peak:
        source.numpy().copy()
        assert peak() >= chunk


def test_a_store_gathers_without_torch_and_without_a_temporary() -> None:
    kv, chunk = paged()
    slot, index = np.zeros(chunk, np.uint8), kv.check(list(range(63, 63 - CHUNK_BLOCKS, -1)))
    with counting_torch() as counted, tracing() as peak:
        kv.groups[0].gather(index, slot)
        traced = peak()
    allocated, calls = counted()
    assert allocated < chunk // 8
    assert not [name for name in calls if "copy" in name or "index" in name]
    assert traced < chunk // 8


def test_a_store_of_blocks_that_lie_apart_makes_no_temporary_either() -> None:
    """Blocks first, then layers: nothing is contiguous but a block of a layer."""
    whole = torch.randn(64, LAYERS, 16, 2, 64)
    kv = PagedKV({f"{i}": whole[:, i] for i in range(LAYERS)}, num_blocks=64)
    chunk = kv.groups[0].block_bytes * CHUNK_BLOCKS
    slot, index = np.zeros(chunk, np.uint8), kv.check(list(range(63, 63 - CHUNK_BLOCKS, -1)))
    with counting_torch() as counted, tracing() as peak:
        kv.groups[0].gather(index, slot)
        traced = peak()
    allocated, calls = counted()
    assert not [name for name in calls if "copy" in name or "index" in name]
    assert allocated < chunk // 8
    assert traced < chunk // 8


def test_a_retrieve_scatters_without_torch_and_without_a_temporary() -> None:
    kv, chunk = paged()
    slot, index = np.zeros(chunk, np.uint8), kv.check(list(range(63, 63 - CHUNK_BLOCKS, -1)))
    with counting_torch() as counted, tracing() as peak:
        kv.groups[0].scatter(slot, CHUNK_BLOCKS, slice(CHUNK_BLOCKS), index)
        traced = peak()
    allocated, calls = counted()
    assert allocated < chunk // 8
    assert not [name for name in calls if "copy" in name or "index" in name]
    assert traced < chunk // 8


def test_neither_side_of_a_worker_makes_a_temporary_as_large_as_a_chunk(tmp_path: Path) -> None:
    """Through server, threads and arena: 1 MiB a chunk, where all that is said and kept takes some kilobytes."""
    shape = (2, 16, 16, 4, 128)
    server = ServerProcess(f"unix://{tmp_path}/s.sock", "memory.size=16MiB")
    server.start()
    try:
        side = Side(server.address, {f"{i}": torch.randn(shape) for i in range(4)})
        try:
            chunk = 4 * 2 * 4 * 16 * 4 * 128 * 4
            side.store("warm", TOKENS, list(range(12)))
            side.scheduler.extend("r", [9, *TOKENS[1:]])
            spec = side.scheduler.store_spec("r", 0, list(range(11, -1, -1)))
            with tracing() as peak:
                side.worker.store_now([spec])
                assert peak() < chunk // 4
            side.lookup("q", TOKENS)
            load = side.scheduler.update_after_alloc("q", len(TOKENS), block_ids=list(range(12)))
            assert load is not None
            with tracing() as peak:
                side.worker.retrieve_now([load])
                assert peak() < chunk // 4
            assert side.worker.take_failed_blocks() == set()
        finally:
            side.close()
    finally:
        server.kill()


# --- what stays -------------------------------------------------------------------------------------------------------


async def test_lookups_that_ended_leave_nothing_behind_on_either_side(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # ended sessions may still store, so many of them
    monkeypatch.setattr("lmcache_trio._core.index.session.MOST_ENDED", 100)
    digests = [bytes([i]) * 32 for i in range(32)]
    with trio.fail_after(30):
        config = Config(address=f"unix://{tmp_path}/s.sock", memory={"backend": "cpu", "size": 1 << 20})
        async with (
            open_server(config) as server,
            open_client(server.address, role=Role.SCHEDULER, engine="e") as scheduler,
            open_client(server.address, role=Role.WORKER, engine="e") as worker,
        ):
            await worker.register(b"f" * 32, 4096, 16)
            await scheduler.lookup(1, [])
            made = await worker.reserve(1, b"", digests)
            await worker.commit(made.reservation)

            async def some(first: int) -> None:
                for session in range(first, first + 200):
                    assert (await scheduler.lookup(session, digests)).chunks == 32
                    scheduler.end(session)
                await scheduler.ping()

            await some(1000)
            await some(2000)  # serials up to 256 are no objects of their own
            gc.collect()
            before = sys.getallocatedblocks()
            await some(3000)
            gc.collect()
            assert sys.getallocatedblocks() - before < 100  # less than one for two lookups
            assert server.statistics()["held"]["sessions"] == 1


def test_a_session_is_little_for_a_garbage_collection_to_look_at() -> None:
    """Ten thousand of them, each with 32 chunks leased, must not stop the loop: what is counted is what it visits."""
    namespace, digests = bytes(32), [bytes([i]) * 32 for i in range(32)]
    arena = Arena()
    index = Index(arena, new_id=lambda: secrets.token_bytes(16))
    index.grow(64 * 4096)
    index.attach(namespace, [1])
    made = index.reserve(("e", 0), 1, 0, namespace, b"", b"".join(digests), 0.0)
    assert len(index.commit(made.id, 1)) == 32
    sessions = []
    before = visited()
    for number in range(1, 101):
        session = Session(number)
        lease = index.lease(("e", number), (namespace,), session.lookup(0, b"".join(digests), 32, 1), 0.0)
        assert lease is not None
        assert session.answer(1, lease.chunks, lease.id, lease.expires)
        sessions.append(session)
    assert (visited() - before) / len(sessions) < 30


def visited() -> int:
    """Objects that a full collection looks at, and what it follows from them."""
    gc.collect()
    return sum(1 + len(gc.get_referents(found)) for found in gc.get_objects())


def test_what_is_said_is_as_short_as_it_can_be() -> None:
    """Bytes of the longest messages of one 8,192-token request beyond its 32 digests of 32 bytes."""
    digests = bytes(32 * 32)
    assert len(encode(Lookup(1 << 40, 1 << 60, 0, digests, 32))) - len(digests) < 100
    assert len(encode(Reserve(1 << 40, 1 << 60, digests[:32], digests))) - len(digests) < 120
    assert len(encode(Answer(1 << 40, 1 << 60, 1 << 40, AnswerState.ANSWERED, 32, bytes(16), 30_000))) < 120
    assert len(encode(Hello(PROTOCOL_VERSION, "worker", bytes(16), Role.WORKER, "engine"))) < 180  # once per connection
    assert len(encode(Register(1, bytes(32), 1 << 25, 16))) < 120
