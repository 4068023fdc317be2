"""How it grows: lookups by prompt length, index size, open sessions and clients; what the index takes; how it starts.

Two servers at once, one that holds a thousand chunks and one that holds up to a million, so that what is compared was
measured in the same minute. It prints nothing; `plots` draws what it returns.
"""

import json
import secrets
import signal
import time
from collections.abc import Callable, Sequence
from contextlib import AsyncExitStack
from pathlib import Path
from statistics import median
from typing import Any

import attrs
import trio

from lmcache_trio._core.keys import DIGEST_BYTES
from lmcache_trio.bench.light import CHUNK_TOKENS, DOCUMENT_CHUNKS
from lmcache_trio.bench.machine import anonymous_bytes
from lmcache_trio.bench.rows import HostPart, Round
from lmcache_trio.bench.run import BenchProcess, child, scratch, serving

__all__ = ["Grown", "GrowthPlan", "Point", "grow"]

_SLOT = 4096
Tell = Callable[[str, int, int], None]


@attrs.frozen
class GrowthPlan:
    """How far. The defaults take about two minutes and 5 GiB of shared memory."""

    lengths: tuple[int, ...] = (1024, 2048, 4096, 8192, 16_384, 32_768, 65_536, 131_072)
    chunks: tuple[int, ...] = (1000, 10_000, 100_000, 1_000_000)
    clients: tuple[int, ...] = (1, 2, 4, 8, 16)
    sessions: int = 10_000
    rounds: int = 5
    lookups: int = 200
    ready_arena: int = 16 << 30


@attrs.frozen
class Point:
    """*series* at *x*: microseconds of one lookup, and lookups with their ends a second, all clients together."""

    series: str
    x: int
    p50_us: float
    p99_us: float
    ops_s: float


@attrs.frozen
class Grown:
    """All points, and single figures by name."""

    points: tuple[Point, ...]
    figures: dict[str, float]

    def as_json(self) -> str:
        return json.dumps(attrs.asdict(self), indent=1) + "\n"

    def of(self, series: str) -> list[Point]:
        return [point for point in self.points if point.series == series]


async def grow(plan: GrowthPlan, tell: Tell) -> Grown:
    """Measure all of *plan*."""
    points: list[Point] = []
    figures: dict[str, float] = {}
    async with scratch() as folder:
        figures["ready_s"] = await _ready(plan, folder, tell)
        points += await _by_index(plan, folder, figures, tell)
        points += await _by_clients(plan, folder, tell)
    return Grown(tuple(points), figures)


async def _ready(plan: GrowthPlan, folder: Path, tell: Tell) -> float:
    """From the start of `serve` to its line, with a large arena that it goes on taking in the background."""
    took = []
    for number in range(3):
        tell("start", number, 3)
        began = time.perf_counter()
        async with serving(f"unix://{folder}/ready{number}.sock", [f"memory.size={plan.ready_arena}"], folder):
            took.append(time.perf_counter() - began)
    return median(took)


async def _by_index(plan: GrowthPlan, folder: Path, figures: dict[str, float], tell: Tell) -> list[Point]:
    small_documents = max(2, -(-plan.chunks[0] // DOCUMENT_CHUNKS))
    largest = max(small_documents, -(-plan.chunks[-1] // DOCUMENT_CHUNKS))
    points: list[Point] = []
    async with AsyncExitStack() as stack:
        small, _ = await _pair(stack, folder, "small", small_documents)
        large, server = await _pair(stack, folder, "large", largest)
        await _do(small, "fill", documents=small_documents)
        heap = 0
        for step, chunks in enumerate(plan.chunks):
            tell(f"{chunks:,} chunks", step, len(plan.chunks) + 3)
            await _do(large, "fill", documents=max(2, -(-chunks // DOCUMENT_CHUNKS)))
            if step == 0:
                heap = anonymous_bytes(server.process.pid)
            points.append(await _point("index", chunks, plan, [large], "lookup", 8192))
        indexed = (largest - small_documents) * DOCUMENT_CHUNKS
        if indexed:
            per_chunk = (anonymous_bytes(server.process.pid) - heap) / indexed
            figures["index_bytes_a_chunk_beyond_the_digest"] = per_chunk - DIGEST_BYTES
        tell(f"{plan.sessions:,} sessions", len(plan.chunks), len(plan.chunks) + 3)
        await _do(large, "open", sessions=plan.sessions)
        figures |= {f"longest_{name}_ms_while_filling": value * 1e3 for name, value in (await _pauses(server)).items()}
        figures["full_to_empty_p50"] = await _full_to_empty(plan, small, large)
        figures |= {f"longest_{name}_ms": value * 1e3 for name, value in (await _pauses(server)).items()}
        tell("prompt lengths", len(plan.chunks) + 1, len(plan.chunks) + 3)
        for tokens in plan.lengths:
            points.append(await _point("length, small index", tokens, plan, [small], "lookup", tokens))
            points.append(await _point("length, large index", tokens, plan, [large], "lookup", tokens))
            points.append(await _point("length, tokens in", tokens, plan, [small], "sync", tokens))
    return points


async def _by_clients(plan: GrowthPlan, folder: Path, tell: Tell) -> list[Point]:
    points = []
    run = secrets.token_hex(8)
    address = f"unix://{folder}/clients.sock"
    async with AsyncExitStack() as stack:
        await stack.enter_async_context(serving(address, _sets(2), folder))
        clients: list[BenchProcess] = []
        for i, count in enumerate(plan.clients):
            tell(f"{count} clients", i, len(plan.clients))
            while len(clients) < count:
                arguments = ["-m", "lmcache_trio.bench.light", address, str(len(clients)), run]
                clients.append(await stack.enter_async_context(child(arguments, folder / "light.log")))
                await clients[-1].hear()
            await _do(clients[0], "fill", documents=2)
            points.append(await _point("clients", count, plan, clients, "lookup", 8192))
    return points


async def _pair(stack: AsyncExitStack, folder: Path, name: str, documents: int) -> tuple[BenchProcess, BenchProcess]:
    """A watched server with room for *documents*, and a client of it."""
    address = f"unix://{folder}/{name}.sock"
    server = await stack.enter_async_context(
        serving(address, _sets(documents), folder, "lmcache_trio.bench.watched", ())
    )
    arguments = ["-m", "lmcache_trio.bench.light", address, "0", secrets.token_hex(8)]
    client = await stack.enter_async_context(child(arguments, folder / "light.log"))
    await client.hear()
    return client, server


def _sets(documents: int) -> list[str]:
    """A lease outlives the run, and all sessions together may hold whatever they looked up."""
    size = (documents + 1) * DOCUMENT_CHUNKS * _SLOT + (1 << 20)
    return [f"memory.size={size}", f"chunk_tokens={CHUNK_TOKENS}", "lease_timeout=3600", "lease_share=1"]


async def _point(series: str, x: int, plan: GrowthPlan, clients: Sequence[BenchProcess], do: str, tokens: int) -> Point:
    rounds = [await _round(clients, do, tokens, plan.lookups) for _ in range(plan.rounds + 1)][1:]
    return Point(
        series,
        x,
        median(r.p50 for r in rounds) * 1e6,
        median(r.p99 for r in rounds) * 1e6,
        median(r.operations / r.seconds for r in rounds),
    )


async def _full_to_empty(plan: GrowthPlan, small: BenchProcess, large: BenchProcess) -> float:
    """A lookup's p50 with all those chunks and sessions, as a share of an empty server's: by turns, in one minute."""
    shares = []
    for _ in range(2 * plan.rounds):
        one = await _round([small], "lookup", 8192, plan.lookups)
        other = await _round([large], "lookup", 8192, plan.lookups)
        shares.append(other.p50 / one.p50)
    return median(shares)


async def _round(clients: Sequence[BenchProcess], do: str, tokens: int, n: int) -> Round:
    for client in clients:
        await client.say(do=do, tokens=tokens, n=n)
    return Round([HostPart(**await client.hear()) for client in clients], None)


async def _pauses(server: BenchProcess) -> dict[str, float]:
    server.process.send_signal(signal.SIGUSR1)
    said: dict[str, float] = await server.hear()
    return said


async def _do(client: BenchProcess, what: str, **arguments: Any) -> dict[str, Any]:
    await client.say(do=what, **arguments)
    with trio.fail_after(600):
        return await client.hear()
