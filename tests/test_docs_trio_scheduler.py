"""The Trio scheduler of docs/howto does what the page says, against a real server."""

import hashlib
import importlib.util
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import trio

from lmcache_trio import Config, Role, open_client, open_server, seed_of

PAGE = Path(__file__).parent.parent / "docs" / "howto" / "trio_scheduler.py"
CHUNK_TOKENS = 16
SHARD_BYTES = 8192


@pytest.fixture(scope="module")
def page() -> ModuleType:
    """docs/howto/trio_scheduler.py, which is in no package."""
    spec = importlib.util.spec_from_file_location("trio_scheduler", PAGE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def kv_of(prefix: Sequence[int]) -> bytes:
    """A chunk's KV: it depends on every token up to its end."""
    return hashlib.shake_128(repr(list(prefix)).encode()).digest(SHARD_BYTES)


async def compute(tokens: Sequence[int], known: list[bytes]) -> list[bytes]:
    ends = range((len(known) + 1) * CHUNK_TOKENS, len(tokens) + 1, CHUNK_TOKENS)
    return [kv_of(tokens[:end]) for end in ends]


# --8<-- connect
@asynccontextmanager
async def engine(page: Any, address: str, model: str, layout: bytes) -> AsyncIterator[Any]:
    async with (
        open_client(address, role=Role.SCHEDULER, engine=model) as scheduler,
        open_client(address, role=Role.WORKER, engine=model) as worker,
    ):
        await worker.register(layout, SHARD_BYTES, block_tokens=CHUNK_TOKENS)
        yield page.Scheduler(scheduler, worker, seed_of(model), compute)


# --8<-- end


@pytest.fixture
def config(tmp_path: Path) -> Config:
    memory = {"backend": "cpu", "size": 4 << 20}
    return Config(address=f"ipc://{tmp_path}/server.ipc", chunk_tokens=CHUNK_TOKENS, memory=memory)


async def test_what_one_prompt_computed_the_next_one_reads(page: Any, config: Config) -> None:
    with trio.fail_after(20):
        async with open_server(config) as server, engine(page, server.address, "model", b"layout") as scheduler:
            tokens = list(range(100))  # 6 full chunks and a tail
            expected = [kv_of(tokens[:end]) for end in range(16, 97, 16)]
            assert await scheduler.serve(tokens) == (expected, 0)
            assert await scheduler.serve(tokens) == (expected, 6)
            longer = [*tokens, *range(60)]
            assert await scheduler.serve(longer) == ([*expected, *await compute(longer, expected)], 6)


async def test_prompts_served_at_the_same_time_leave_nothing_held(page: Any, config: Config) -> None:
    with trio.fail_after(20):
        async with (
            open_server(config) as server,
            engine(page, server.address, "model", b"layout") as scheduler,
            open_client(server.address) as observer,
        ):
            before = (await observer.statistics())["held"]

            async def serve(first: int) -> None:
                tokens = [first, *range(63)]
                kv, _ = await scheduler.serve(tokens)
                assert kv == await compute(tokens, [])

            async with trio.open_nursery() as nursery:
                for i in range(20):
                    nursery.start_soon(serve, i % 5)
            held = (await observer.statistics())["held"]
            for name in ("sessions", "leases", "pins", "reservations"):
                assert held[name] == before[name] == 0


async def test_two_models_share_nothing_though_their_tokens_are_equal(page: Any, config: Config) -> None:
    with trio.fail_after(20):
        async with open_server(config) as server:
            for model in ("one", "two"):
                async with engine(page, server.address, model, b"layout") as scheduler:
                    _, reused = await scheduler.serve(list(range(64)))
                    assert reused == 0
