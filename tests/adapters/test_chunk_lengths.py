"""The tokens of a chunk are the engine's own: engines of any block size, and of different chunks, on one server."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch

from lmcache_trio.adapters import SchedulerAdapter, WorkerAdapter
from lmcache_trio.adapters.shared_kv import shared_tensor
from lmcache_trio.errors import Misuse
from lmcache_trio.testing.sides import ServerProcess, wait_until

BLOCKS, HEAD = 24, 4


class Engine:
    """Both sides of an engine whose blocks have *block_tokens*; its chunks have *chunk_tokens*, if that is given."""

    number = 0

    def __init__(
        self,
        address: str,
        block_tokens: int,
        chunk_tokens: int | None,
        *,
        path: str = "shm",
        seed: int | None = None,
        **more: Any,
    ) -> None:
        Engine.number += 1
        shape = (2, BLOCKS, block_tokens, 1, HEAD)
        self.kv = shared_tensor(2 * BLOCKS * block_tokens * HEAD * 4).view(torch.float32).view(shape)
        if seed is not None:
            self.kv.copy_(torch.randn(shape, generator=torch.Generator().manual_seed(seed)))
        same: dict[str, Any] = {"engine_id": f"chunk lengths {Engine.number}", "block_tokens": block_tokens}
        same |= {"chunk_tokens": chunk_tokens, "connect_timeout": 30.0} | more
        self.scheduler = SchedulerAdapter(address, identity=["a model"], **same)
        self.worker = WorkerAdapter(address, path=path, reply_timeout=30.0, **same)  # type: ignore[arg-type]
        self.worker.register_kv_caches({"layer": self.kv}, num_blocks=BLOCKS)

    @property
    def chunk(self) -> int:
        return self.scheduler.chunk_tokens

    def store(self, request_id: str, tokens: Sequence[int]) -> int:
        """Store the whole chunks of *tokens* from the first blocks on. How many tokens that are."""
        chunks = len(self.scheduler.extend(request_id, tokens))
        blocks = range(chunks * self.chunk // self.scheduler.block_tokens)
        self.worker.store_now([self.scheduler.store_spec(request_id, 0, blocks)])
        return chunks * self.chunk

    def lookup(self, request_id: str, tokens: Sequence[int]) -> int:
        found: list[int | None] = []

        def answered() -> bool:
            found.append(self.scheduler.check_lookup_result(request_id))
            return found[-1] is not None

        self.scheduler.maybe_submit_lookup_request(request_id, tokens)
        wait_until(answered)
        assert found[-1] is not None
        return found[-1]

    def load(self, request_id: str, tokens: int) -> bool:
        """Load *tokens* into the first blocks. Were all of them filled?"""
        blocks = range(tokens // self.scheduler.block_tokens)
        spec = self.scheduler.update_after_alloc(request_id, tokens, block_ids=blocks)
        assert spec is not None
        self.worker.retrieve_now([spec])
        return not self.worker.take_failed_blocks()

    def close(self) -> None:
        self.worker.shutdown()
        self.scheduler.shutdown()


Make = Callable[..., Engine]


@pytest.fixture
def engines() -> Iterator[Make]:
    with ExitStack() as stack:

        def make(*args: Any, **kwargs: Any) -> Engine:
            engine = Engine(*args, **kwargs)
            stack.callback(engine.close)
            return engine

        yield make


@pytest.mark.parametrize("path", ["shm", "device"])
@pytest.mark.parametrize(
    ("block_tokens", "chunk_tokens", "chunk"),
    [
        (16, None, 64),
        (48, None, 96),
        (384, None, 384),
        (544, None, 544),
        (1152, None, 1152),
        (16, 16, 16),
        (16, 80, 80),
    ],
)
def test_an_engine_of_any_block_size_gets_back_what_another_of_its_kind_stored(
    live_server: ServerProcess, engines: Make, path: str, block_tokens: int, chunk_tokens: int | None, chunk: int
) -> None:
    tokens = list(range(3 * chunk + 5))
    one = engines(live_server.address, block_tokens, chunk_tokens, path=path, seed=1)
    assert (one.worker.path, one.chunk) == (path, chunk)
    assert one.store("r", tokens) == 3 * chunk
    other = engines(live_server.address, block_tokens, chunk_tokens, path=path)
    assert other.lookup("q", tokens) == 3 * chunk
    assert other.load("q", 3 * chunk)
    filled = 3 * chunk // block_tokens
    assert torch.equal(other.kv[:, :filled], one.kv[:, :filled])
    assert not other.kv[:, filled:].any()


def test_engines_of_different_chunks_share_a_server_and_nothing_else(live_server: ServerProcess, engines: Make) -> None:
    """Their blocks are alike, and their tokens and model too: bytes of chunks of another length would be wrong KV."""
    tokens = list(range(256))
    fine, coarse = (engines(live_server.address, 16, chunk, seed=chunk) for chunk in (16, 64))
    assert fine.store("r", tokens) == coarse.store("r", tokens) == 256
    assert live_server.held["chunks_ready"] == 16 + 4
    for stored in (fine, coarse):
        reader = engines(live_server.address, 16, stored.chunk)
        assert reader.lookup("q", tokens[:200]) == 200 // stored.chunk * stored.chunk
        assert reader.load("q", 192)
        assert torch.equal(reader.kv[:, :12], stored.kv[:, :12])
        reader.close()
    assert engines(live_server.address, 16, 32).lookup("q", tokens) == 0


def test_chunks_of_different_lengths_come_back_from_one_disk(tmp_path: Path, engines: Make) -> None:
    tier = f'tiers=[{{ backend = "disk", path = "{tmp_path}/disk", size = "64MiB", slab_size = "4MiB" }}]'
    server = ServerProcess(f"unix://{tmp_path}/s.sock", tier, "grace=20")
    server.start()
    try:
        server.wait_tier()
        stored = [engines(server.address, block, chunk, seed=block) for block, chunk in ((16, 16), (48, None))]
        counts = [engine.store("r", range(300)) for engine in stored]
        assert counts == [288, 288]
        server.end()  # which writes to the disk what it still owes
        server.start()
        server.wait_tier()
        for engine in stored:
            reader = engines(server.address, engine.scheduler.block_tokens, engine.chunk)
            wait_until(reader.scheduler.is_healthy)
            assert reader.lookup("q", range(300)) == 288
            assert reader.load("q", 288)
            filled = 288 // engine.scheduler.block_tokens
            assert torch.equal(reader.kv[:, :filled], engine.kv[:, :filled])
    finally:
        server.kill()


@pytest.mark.parametrize("path", ["shm", "device"])
def test_an_engine_keeps_its_chunks_when_a_server_of_another_setting_takes_over(
    live_server: ServerProcess, tmp_path: Path, engines: Make, path: str
) -> None:
    tokens = list(range(256))
    one = engines(live_server.address, 16, None, path=path, seed=1)
    assert one.store("r", tokens) == 256
    live_server.end()
    successor = ServerProcess(live_server.address, "chunk_tokens=256")
    successor.start()
    try:
        wait_until(lambda: one.scheduler.is_healthy() and one.worker.is_healthy())
        assert one.chunk == 64
        assert one.store("s", tokens[:128]) == 128
        assert one.lookup("q", tokens) == 128
        later = engines(successor.address, 16, None, path=path)
        assert later.chunk == 256
        assert later.lookup("q", tokens) == 0
    finally:
        successor.kill()


@pytest.mark.parametrize("met_first", [True, False])
@pytest.mark.parametrize(
    ("block_tokens", "token_bytes", "chunk"),
    [(16, 0, 128), (16, 12 << 10, 176), (48, 1 << 10, 240), (528, 8 << 10, 528)],
)
def test_an_engine_has_the_same_chunks_without_a_server_and_with_one_of_default_settings(
    tmp_path: Path, engines: Make, block_tokens: int, token_bytes: int, chunk: int, met_first: bool
) -> None:
    tokens = list(range(chunk))
    server = ServerProcess(f"unix://{tmp_path}/s.sock", "chunk_tokens=auto")
    if met_first:
        server.start()
    try:
        seconds = 30.0 if met_first else 0.01
        one = engines(server.address, block_tokens, None, token_bytes=token_bytes, connect_timeout=seconds, seed=1)
        assert one.chunk == chunk
        alone = one.scheduler.extend("before", tokens)
        if not met_first:
            server.start()
        wait_until(lambda: one.scheduler.is_healthy() and one.worker.is_healthy())
        assert one.chunk == chunk
        assert one.scheduler.extend("behind", tokens) == alone
        assert one.store("r", tokens) == chunk
        other = engines(server.address, block_tokens, None, token_bytes=token_bytes)
        assert other.lookup("q", tokens) == chunk
        assert other.load("q", chunk)
        assert torch.equal(other.kv[:, : chunk // block_tokens], one.kv[:, : chunk // block_tokens])
    finally:
        server.kill()


def test_prompts_are_hashed_anew_when_the_first_server_has_a_number_of_its_own(tmp_path: Path, engines: Make) -> None:
    tokens = list(range(256))
    server = ServerProcess(f"unix://{tmp_path}/s.sock", "chunk_tokens=32")
    one = engines(server.address, 16, None, token_bytes=1 << 10, connect_timeout=0.01, seed=1)
    assert one.chunk == 256
    assert len(one.scheduler.extend("r", tokens)) == 1
    server.start()
    try:
        wait_until(lambda: one.scheduler.is_healthy() and one.worker.is_healthy())
        assert (one.chunk, len(one.scheduler.extend("r", tokens))) == (32, 8)
    finally:
        server.kill()


def test_a_worker_that_names_no_length_gives_way_to_a_scheduler_that_has_one(
    live_server: ServerProcess, engines: Make
) -> None:
    """As where the scheduler has met another server before, and the worker has not."""
    tokens = list(range(256))
    same: dict[str, Any] = {"engine_id": "gives way", "block_tokens": 16, "connect_timeout": 30.0}
    worker = WorkerAdapter(live_server.address, reply_timeout=30.0, **same)
    scheduler = SchedulerAdapter(live_server.address, identity=["a model"], chunk_tokens=32, **same)
    try:
        worker.register_kv_caches({"layer": engines(live_server.address, 16, 32, seed=3).kv}, num_blocks=BLOCKS)
        wait_until(scheduler.is_healthy)
        assert scheduler.chunk_tokens == 32
        scheduler.extend("r", tokens)
        worker.store_now([scheduler.store_spec("r", 0, range(16))])
        assert worker.statistics()["stored_chunks"] == 8
    finally:
        worker.shutdown()
        scheduler.shutdown()


def test_a_worker_that_wants_other_chunks_than_its_scheduler_is_refused_by_name(
    live_server: ServerProcess, engines: Make
) -> None:
    one = engines(live_server.address, 16, 64)
    one.worker.shutdown()
    same: dict[str, Any] = {"engine_id": f"chunk lengths {Engine.number}", "connect_timeout": 30.0}
    with pytest.raises(Misuse, match=r"chunks of 64 tokens .* asks for chunks of 128 tokens of blocks of 16 tokens"):
        WorkerAdapter(live_server.address, block_tokens=16, chunk_tokens=128, **same)
    with pytest.raises(Misuse, match="asks for any chunks of blocks of 24 tokens"):
        WorkerAdapter(live_server.address, block_tokens=24, **same)


@pytest.mark.parametrize("kind", [SchedulerAdapter, WorkerAdapter])
def test_chunks_that_are_not_whole_blocks_are_refused_before_anything_is_sent(kind: Any) -> None:
    more: dict[str, Any] = {"identity": ["a model"]} if kind is SchedulerAdapter else {}
    with pytest.raises(Misuse, match=r"chunk_tokens \(100\) is not a multiple of the engine's block_tokens \(48\)"):
        kind("unix:///nowhere", engine_id="e", block_tokens=48, chunk_tokens=100, **more)
