"""The Trio scheduler of docs/howto does what the page says, against a real server."""

import hashlib
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from itertools import count
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import trio
from support.programs import DOCS, load_program

from lmcache_trio import Client, Config, Role, chain_digests, open_client, open_server, seed_of

CHUNK_TOKENS = 16
SHARD_BYTES = 8192


@pytest.fixture(scope="module")
def page() -> ModuleType:
    """docs/howto/trio_scheduler.py, which is in no package."""
    return load_program("howto/trio_scheduler.py")


def test_it_takes_thirty_lines() -> None:
    lines = [line for line in (DOCS / "howto" / "trio_scheduler.py").read_text().splitlines() if line.strip()]
    assert len(lines) <= 30
    assert max(map(len, lines)) <= 120  # and none of them is two


# --8<-- connect
class Engine:
    """Gives each prompt a session of its own, and names its chunks."""

    def __init__(self, page: Any, scheduler: Client, worker: Client, model: str) -> None:
        self._page, self._scheduler, self._worker = page, scheduler, worker
        self._seed, self._sessions = seed_of(model), count(1)

    async def serve(self, tokens: Sequence[int]) -> tuple[list[bytes], int]:
        async def compute(known: int) -> list[bytes]:
            return all_kv_of(tokens)[known:]

        digests = chain_digests(self._seed, tokens, self._scheduler.chunk_tokens)
        found: tuple[list[bytes], int] = await self._page.serve(
            self._scheduler, self._worker, next(self._sessions), digests, compute
        )
        return found


@asynccontextmanager
async def engine(page: Any, address: str, model: str) -> AsyncIterator[Engine]:
    async with (
        open_client(address, role=Role.SCHEDULER, engine=model) as scheduler,
        open_client(address, role=Role.WORKER, engine=model) as worker,
    ):
        await worker.register(b"the layout of its bytes", SHARD_BYTES, block_tokens=CHUNK_TOKENS)
        yield Engine(page, scheduler, worker, model)


# --8<-- end


def all_kv_of(tokens: Sequence[int]) -> list[bytes]:
    """Each full chunk's KV depends on every token up to its end."""
    ends = range(CHUNK_TOKENS, len(tokens) + 1, CHUNK_TOKENS)
    return [hashlib.shake_128(repr(list(tokens[:end])).encode()).digest(SHARD_BYTES) for end in ends]


@pytest.fixture
def config(tmp_path: Path) -> Config:
    memory = {"backend": "cpu", "size": 4 << 20}
    return Config(address=f"unix://{tmp_path}/server.ipc", chunk_tokens=CHUNK_TOKENS, memory=memory)


async def test_what_one_prompt_computed_the_next_one_reads(page: Any, config: Config) -> None:
    with trio.fail_after(60):
        async with open_server(config) as server, engine(page, server.address, "model") as it:
            tokens = list(range(100))  # 6 full chunks and a tail
            assert await it.serve(tokens) == (all_kv_of(tokens), 0)
            assert await it.serve(tokens) == (all_kv_of(tokens), 6)
            longer = [*tokens, *range(60)]
            assert await it.serve(longer) == (all_kv_of(longer), 6)


async def test_prompts_served_at_the_same_time_leave_nothing_held(page: Any, config: Config) -> None:
    with trio.fail_after(60):
        async with (
            open_server(config) as server,
            engine(page, server.address, "model") as it,
            open_client(server.address) as observer,
        ):

            async def serve(first: int) -> None:
                tokens = [first, *range(63)]
                kv, _ = await it.serve(tokens)
                assert kv == all_kv_of(tokens)

            before = (await observer.statistics())["held"]
            async with trio.open_nursery() as nursery:
                for i in range(20):
                    nursery.start_soon(serve, i % 5)
            held = (await observer.statistics())["held"]
            for name in ("sessions", "leases", "pins", "reservations"):
                assert held[name] == before[name] == 0


async def test_two_models_share_nothing_though_their_tokens_are_equal(page: Any, config: Config) -> None:
    with trio.fail_after(60):
        async with open_server(config) as server:
            for model in ("one", "two"):
                async with engine(page, server.address, model) as it:
                    _, reused = await it.serve(list(range(64)))
                    assert reused == 0
