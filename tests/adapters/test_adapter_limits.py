"""Prompts that no one message can name: a shorter hit, or several messages, and never an exception in the engine."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from lmcache_trio._wire.messages import MAX_DIGESTS
from lmcache_trio.adapters import LoadSpec, PollingSchedulerAdapter, StoreSpec, WorkerAdapter
from lmcache_trio.adapters.shared_kv import shared_tensor
from lmcache_trio.testing.sides import ServerProcess, wait_until

MANY = MAX_DIGESTS + 300
WIDTH = 256  # blocks of one token, so that few chunks are many blocks


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Callable[..., ServerProcess]]:
    made: list[ServerProcess] = []

    def start(*sets: str) -> ServerProcess:
        made.append(ServerProcess(f"unix://{tmp_path}/s.ipc", *sets))
        made[-1].start()
        return made[-1]

    yield start
    for each in made:
        each.kill()


def scheduler(server: ServerProcess) -> PollingSchedulerAdapter:
    return PollingSchedulerAdapter(
        server.address, engine_id="e", identity=["a model"], block_tokens=1, connect_timeout=30, lookup_timeout=60
    )


def worker(server: ServerProcess, kv: torch.Tensor) -> WorkerAdapter:
    made = WorkerAdapter(server.address, engine_id="e", block_tokens=1, connect_timeout=30, reply_timeout=30)
    made.register_kv_caches({"layer": kv})
    return made


def private(blocks: int) -> torch.Tensor:
    return torch.zeros(2, blocks, 1, 1, 1)


def shared(blocks: int) -> torch.Tensor:
    return shared_tensor(2 * blocks * 4).view(torch.float32).view(2, blocks, 1, 1, 1)


def test_a_prompt_of_more_chunks_than_a_lookup_can_name_is_a_shorter_hit(server: Callable[..., ServerProcess]) -> None:
    there = server("chunk_tokens=1", "memory.size=4MiB", "write_share=1.0")
    one, other = scheduler(there), worker(there, private(MANY))
    try:
        tokens = range(MANY)
        one.maybe_submit_lookup_request("r", tokens)
        assert one.check_lookup_result("r") == 0
        other.store_now([one.store_spec("r", 0, range(MANY))])
        stored = other.statistics().get("stored_chunks", 0)
        assert stored > 900  # what fits in the arena
        assert sum(other.statistics().values()) == MANY  # and the rest was dropped, and counted
        one.maybe_submit_lookup_request("q", tokens)
        hit = one.check_lookup_result("q")
        assert 0 < hit <= stored
        assert one._lookups.requests["q"].lookup.sent == MAX_DIGESTS
        one.free_lookup_locks("q")
        one.maybe_submit_lookup_request("q", tokens)  # digests beyond are not sent later either
        assert one.check_lookup_result("q") == hit
    finally:
        other.shutdown()
        one.shutdown()


def store(adapter: WorkerAdapter, spec: StoreSpec, how: str) -> None:
    if how == "now":
        adapter.store_now([spec])
    else:
        adapter.submit_store(spec)


def retrieve(adapter: WorkerAdapter, spec: LoadSpec, how: str) -> None:
    if how == "now":
        adapter.retrieve_now([spec])
    else:
        adapter.submit_retrieve(spec)
        wait_until(lambda: adapter.take_finished()[1] == {spec.request_id})


@pytest.mark.parametrize("kv", [private, shared], ids=["shm", "device"])
@pytest.mark.parametrize("how", ["now", "in the background"])
def test_more_blocks_than_a_message_can_name_are_moved_by_several(
    server: Callable[..., ServerProcess], kv: Callable[[int], torch.Tensor], how: str
) -> None:
    there = server(f"chunk_tokens={WIDTH}", "memory.size=8MiB")
    chunks = MAX_DIGESTS // WIDTH + 2
    blocks = chunks * WIDTH
    one, tensor = scheduler(there), kv(2 * blocks)
    other = worker(there, tensor)
    try:
        assert other.path == ("shm" if kv is private else "device"), other.path_reason
        tensor[:, :blocks] = torch.arange(2.0 * blocks).view(2, blocks, 1, 1, 1)
        one.extend("r", range(blocks))
        store(other, one.store_spec("r", 0, range(blocks)), how)
        wait_until(lambda: other.statistics() == {"running": 0, "stored_chunks": chunks})
        assert other.take_finished()[0] == (set() if how == "now" else {"r"})
        one.maybe_submit_lookup_request("q", range(blocks))
        assert one.check_lookup_result("q") == blocks
        into = range(blocks + 3, 2 * blocks)  # the first three blocks are there already
        spec = one.update_after_alloc("q", blocks - 3, local_tokens=3, block_ids=into)
        assert spec is not None
        retrieve(other, spec, how)
        assert other.take_failed_blocks() == set()
        assert torch.equal(tensor[:, blocks + 3 :], tensor[:, 3:blocks])
        assert not tensor[:, blocks : blocks + 3].any()
    finally:
        other.shutdown()
        one.shutdown()


def test_parts_of_a_store_follow_each_other() -> None:
    digests = [bytes([i]) * 32 for i in range(5)]
    spec = StoreSpec("r", 1, b"p" * 32, b"".join(digests), tuple(range(10)))
    assert spec.parts(5, 10) == [spec]
    first, second, third = spec.parts(5, 5)
    assert (first.parent, first.digests, first.block_ids) == (b"p" * 32, b"".join(digests[:2]), (0, 1, 2, 3))
    assert (second.parent, second.digests, second.block_ids) == (digests[1], b"".join(digests[2:4]), (4, 5, 6, 7))
    assert (third.parent, third.digests, third.block_ids) == (digests[3], digests[4], (8, 9))
    assert spec.parts(2, 10) == [first, second, third]


def test_parts_of_a_load_skip_blocks_of_the_first_chunk_alone() -> None:
    spec = LoadSpec("r", 1, b"lease", 7, 3, 1, tuple(range(4)), 32, 16)  # ends inside the last chunk
    assert spec.parts(6) == [spec]
    first, second, third = spec.parts(2)
    assert (first.start, first.count, first.skip_blocks, first.block_ids) == (7, 1, 1, (0,))
    assert (second.start, second.count, second.skip_blocks, second.block_ids) == (8, 1, 0, (1, 2))
    assert (third.start, third.count, third.skip_blocks, third.block_ids) == (9, 1, 0, (3,))


def test_blocks_that_lie_in_no_chunk_stay_in_the_last_part_to_be_refused_there() -> None:
    spec = LoadSpec("r", 1, b"lease", 0, 2, 0, tuple(range(5)), 32, 16)
    assert [part.block_ids for part in spec.parts(2)] == [(0, 1), (2, 3, 4)]
