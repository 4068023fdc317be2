"""The testing engine with a real server in a process of its own: what is stored by one engine comes back in another."""

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import attrs
import numpy as np
import pytest
import torch
import trio

from lmcache_trio._wire.messages import Role
from lmcache_trio.adapters import SchedulerAdapter
from lmcache_trio.client import open_client
from lmcache_trio.demo.connected_engine import ConnectedEngine, connect
from lmcache_trio.demo.engine import Completion, EngineConfig, RetrieveMode, SmallEngine
from lmcache_trio.demo.model import ModelConfig
from lmcache_trio.demo.model_kv import KVLayout
from lmcache_trio.testing.forks import Fork, servers

CHUNK = 64
MODEL = ModelConfig(layers=2, hidden=64, heads=4, kv_heads=2, head_dim=16, intermediate=96, vocabulary=512)
CONFIG = EngineConfig(model=MODEL, num_blocks=64, block_tokens=16, prefill_tokens=CHUNK)

engine_ids = (f"engine {i}" for i in itertools.count())
seeds = itertools.count()


@attrs.frozen(eq=False)
class Server:
    address: str
    process: Fork


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    address = f"unix://{tmp_path}/server.sock"
    arguments = ["-m", "lmcache_trio", "serve", "--address", address, "--set", "memory.size=16MiB"]
    arguments += ["--set", f"chunk_tokens={CHUNK}", "grace=0.1"]
    with servers.start(arguments) as process:
        try:
            assert process.stdout is not None
            assert "ready" in process.stdout.readline()
            yield Server(address, process)
        finally:
            process.terminate()
            process.wait(60)


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """torch's threads spin while they wait for each other: on a busy machine two are ten times slower than one."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def prompt(length: int) -> list[int]:
    """Tokens that no other prompt of this session shares."""
    rng = torch.Generator().manual_seed(1000 + next(seeds))
    return torch.randint(0, MODEL.vocabulary, (length,), generator=rng).tolist()


def generate(engine: SmallEngine, tokens: list[int], count: int = 8) -> Completion:
    engine.submit("r", tokens, count)
    return engine.run()["r"]


def reference(tokens: list[int], count: int = 8, config: EngineConfig = CONFIG) -> tuple[int, ...]:
    return generate(SmallEngine(config), tokens, count).output_ids


def serve_once(server: Server, tokens: list[int], count: int = 8, config: EngineConfig = CONFIG) -> Completion:
    """In an engine that begins and ends here, as an engine that was restarted would."""
    with connect(server.address, config, engine_id=next(engine_ids)) as connected:
        return generate(connected.engine, tokens, count)


async def spoil_arena(server: Server) -> None:
    """Write noise over all of it."""
    async with open_client(server.address, role=Role.WORKER, engine="arena spoiler") as client:
        assert client.arena is not None
        arena = np.frombuffer(client.arena.view(0, client.arena_size), dtype=np.float32)
        arena[:] = torch.randn(len(arena), generator=torch.Generator().manual_seed(0)).numpy()


def statistics(server: Server) -> dict[str, dict[str, int]]:
    async def ask() -> dict[str, dict[str, int]]:
        async with open_client(server.address) as client:
            return await client.statistics()

    return trio.run(ask)


@pytest.mark.parametrize("length", [CHUNK + 1, 200, 3 * CHUNK + 1])
def test_another_engine_gets_the_prompt_back_and_says_the_same(server: Server, length: int) -> None:
    tokens = prompt(length)
    cold = serve_once(server, tokens)
    warm = serve_once(server, tokens)
    assert (cold.reused_tokens, warm.reused_tokens) == (0, (length - 1) // CHUNK * CHUNK)
    assert cold.output_ids == warm.output_ids == reference(tokens)


@pytest.mark.parametrize("load", RetrieveMode)
@pytest.mark.parametrize("window", [40, CHUNK + 1, 2 * CHUNK])
def test_a_hit_brings_of_a_window_its_last_chunks_alone(server: Server, window: int, load: RetrieveMode) -> None:
    config = attrs.evolve(CONFIG, model=attrs.evolve(MODEL, window=window), load=load)
    tokens = prompt(6 * CHUNK + 1)
    cold = serve_once(server, tokens, config=config)
    with connect(server.address, config, engine_id=next(engine_ids)) as connected:
        warm = generate(connected.engine, tokens)
        loaded = connected.worker.statistics()["retrieved_chunks"]
    assert (cold.reused_tokens, warm.reused_tokens) == (0, 6 * CHUNK)
    assert loaded == 6 + -(-(window - 1) // CHUNK)
    assert cold.output_ids == warm.output_ids == reference(tokens, config=config)


def test_a_prompt_of_whole_chunks_leaves_its_last_chunk_to_be_computed(server: Server) -> None:
    tokens = prompt(4 * CHUNK)
    cold, warm = serve_once(server, tokens), serve_once(server, tokens)
    assert warm.reused_tokens == 3 * CHUNK
    assert cold.output_ids == warm.output_ids == reference(tokens)


def test_a_prompt_shorter_than_a_chunk_is_computed_and_nothing_is_stored(server: Server) -> None:
    tokens = prompt(CHUNK - 20)
    assert [serve_once(server, tokens).reused_tokens for _ in range(2)] == [0, 0]


@pytest.mark.parametrize("layout", KVLayout)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_loaded_bytes_are_the_computed_bytes(server: Server, layout: KVLayout, dtype: str) -> None:
    config = attrs.evolve(CONFIG, layout=layout, model=attrs.evolve(MODEL, dtype=dtype))
    tokens = prompt(250)
    kept = []
    for _ in range(2):
        with connect(server.address, config, engine_id=next(engine_ids)) as connected:
            completion = generate(connected.engine, tokens)
            kept.append(connected.engine.kv.storage)
    assert completion.reused_tokens == 3 * CHUNK
    assert torch.equal(kept[0], kept[1])  # the rest too: it was computed in the same shapes from the same bytes
    assert kept[0].count_nonzero() > 0


def test_chunks_completed_by_decoding_come_back_in_the_next_turn(server: Server) -> None:
    first = prompt(100)
    answer = serve_once(server, first, count=100).output_ids
    second = [*first, *answer, *prompt(10)]
    warm = serve_once(server, second)
    assert warm.reused_tokens == 199 // CHUNK * CHUNK > len(first)
    assert warm.output_ids == reference(second)


def test_a_shared_beginning_is_reused_as_far_as_it_goes(server: Server) -> None:
    shared = prompt(2 * CHUNK + 10)
    serve_once(server, shared + prompt(100))
    tokens = shared + prompt(100)
    warm = serve_once(server, tokens)
    assert warm.reused_tokens == 2 * CHUNK
    assert warm.output_ids == reference(tokens)


@pytest.mark.parametrize("load", RetrieveMode)
@pytest.mark.parametrize("two_step", [True, False])
def test_requests_that_run_together_all_get_their_hits(server: Server, load: RetrieveMode, two_step: bool) -> None:
    prompts = {f"r{i}": prompt(100 + 40 * i) for i in range(4)}
    for tokens in prompts.values():
        serve_once(server, tokens)
    kind: dict[str, Any] = {"scheduler_class": SchedulerAdapter} if two_step else {}
    with connect(server.address, attrs.evolve(CONFIG, load=load), engine_id=next(engine_ids), **kind) as connected:
        for request_id, tokens in prompts.items():
            connected.engine.submit(request_id, tokens, 8)
        completions = connected.engine.run()
    for request_id, tokens in prompts.items():
        assert completions[request_id].reused_tokens == (len(tokens) - 1) // CHUNK * CHUNK
        assert completions[request_id].output_ids == reference(tokens)


def test_one_engine_reuses_what_it_stored_itself(server: Server) -> None:
    tokens = prompt(200)
    with connect(server.address, CONFIG, engine_id=next(engine_ids)) as connected:
        first, second = generate(connected.engine, tokens), generate(connected.engine, tokens)
    assert (first.reused_tokens, second.reused_tokens) == (0, 3 * CHUNK)
    assert first.output_ids == second.output_ids


@pytest.mark.parametrize(
    "other",
    [
        attrs.evolve(CONFIG, model=attrs.evolve(MODEL, seed=1)),
        attrs.evolve(CONFIG, layout=KVLayout.BLOCK_FIRST),
        attrs.evolve(CONFIG, block_tokens=32),
        attrs.evolve(CONFIG, model=attrs.evolve(MODEL, dtype="bfloat16")),
    ],
    ids=["weights", "layout", "block size", "dtype"],
)
def test_an_engine_that_differs_shares_nothing(server: Server, other: EngineConfig) -> None:
    tokens = prompt(200)
    serve_once(server, tokens)
    assert serve_once(server, tokens, config=other).reused_tokens == 0
    assert serve_once(server, tokens).reused_tokens == 3 * CHUNK


def test_corrupted_bytes_change_what_is_said_so_the_other_tests_can_fail(server: Server) -> None:
    tokens = prompt(250)
    cold = serve_once(server, tokens)
    trio.run(spoil_arena, server)
    warm = serve_once(server, tokens)
    assert warm.reused_tokens == 3 * CHUNK
    assert warm.output_ids != cold.output_ids


def test_nothing_is_held_once_the_engines_are_gone(server: Server) -> None:
    tokens = prompt(200)
    for _ in range(2):
        serve_once(server, tokens)
    held = statistics(server)["held"]
    for name in ("sessions", "leases", "pins", "reservations"):
        assert held[name] == 0


def test_an_engine_goes_on_when_its_server_is_killed(server: Server) -> None:
    tokens = prompt(200)
    serve_once(server, tokens)
    with connect(server.address, CONFIG, engine_id=next(engine_ids)) as connected:
        assert generate(connected.engine, tokens).reused_tokens == 3 * CHUNK
        server.process.kill()
        server.process.wait(60)
        after = generate(connected.engine, tokens)
        assert connected.engine.pool.free_blocks == CONFIG.num_blocks
    assert after.reused_tokens == 0
    assert after.output_ids == reference(tokens)


@pytest.mark.parametrize("load", RetrieveMode)
def test_a_load_that_fails_is_recomputed_once_and_says_the_same(server: Server, load: RetrieveMode) -> None:
    tokens = prompt(200)
    serve_once(server, tokens)
    with connect(server.address, attrs.evolve(CONFIG, load=load), engine_id=next(engine_ids)) as connected:
        kill_before_the_load(connected, server)
        completion = generate(connected.engine, tokens)
    assert completion.reused_tokens == 0
    assert completion.output_ids == reference(tokens)


def kill_before_the_load(connected: ConnectedEngine, server: Server) -> None:
    """Once the engine has the answer of its lookup, and before it asks for the slots."""
    answered = connected.scheduler.loads_after_alloc

    def kill(*args: object, **kwargs: object) -> object:
        specs = answered(*args, **kwargs)  # type: ignore[arg-type]
        server.process.kill()
        server.process.wait(60)
        return specs

    connected.scheduler.loads_after_alloc = kill  # type: ignore[method-assign,assignment]


def test_an_aborted_request_leaves_nothing_at_the_server(server: Server) -> None:
    with connect(server.address, CONFIG, engine_id=next(engine_ids)) as connected:
        connected.engine.submit("r", prompt(300), 8)
        connected.engine.step()
        connected.engine.abort("r")
        assert connected.engine.pool.free_blocks == CONFIG.num_blocks
        other = generate(connected.engine, prompt(100))  # the connection is ordered: this one's end follows that one's
    assert len(other.output_ids) == 8
    assert statistics(server)["held"]["sessions"] == 0
