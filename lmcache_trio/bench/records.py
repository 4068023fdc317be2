"""How a server starts whose disk tier knows very many chunks.

The tier is filled through its own interface, with chunks of one byte in chains of 8, each of which takes a page of a
slab: a million, the default, take 5 GiB of disk and some minutes. Then a server is started on it, three times, after
the page cache was told to drop the tier's files. What is asked for is the chunk whose record is read last, so its
lookup is answered by query if the reading was still under way when the answer had come; that is told too.
"""

import secrets
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AsyncExitStack
from pathlib import Path
from statistics import median
from typing import Any

import attrs

from lmcache_trio._core.keys import DEFAULT_CHUNK_TOKENS, DIGEST_BYTES, layout_of, namespace_of
from lmcache_trio._server.plugins import make_backend
from lmcache_trio._wire.messages import Role
from lmcache_trio.abc import ChunkKey, Record, Tier
from lmcache_trio.bench.files import forget
from lmcache_trio.bench.run import look_until, scratch, serving, wait_open
from lmcache_trio.client import open_client
from lmcache_trio.errors import Unavailable

__all__ = ["Start", "measure_records", "typical"]

STARTS = 3
CHAIN = 8
_BATCH = 4000
"""Records in one call of the tier's."""
_FINGERPRINT = b"records".ljust(DIGEST_BYTES)
_WHOLE_SECONDS = 300
Tell = Callable[[str, int, int], None]


@attrs.frozen
class Start:
    """Seconds from the start of `serve`: until it is *ready*, until a lookup is *answered*, until all is *read*.

    *empty*: until one without any tier is, right before it. *lookup* is that lookup's own time; *by_query*: was it
    answered before its record was read?
    """

    empty: float
    ready: float
    answered: float
    read: float
    lookup: float
    by_query: bool


async def measure_records(count: int, tell: Tell, near: Path | None = None) -> list[Start]:
    """Fill a tier with *count* chunks in a folder *near* another, start servers on it, remove it."""
    async with scratch() as folder, scratch(near) as disk:
        table = {"backend": "disk", "path": f"{disk}/tier", "size": _size(count), "slab_size": 64 << 20}
        last = await _fill(table, count, tell)
        found = []
        for number in range(STARTS):
            tell("starts", number, STARTS)
            forget(disk)
            found.append(await _start(table, count, last, folder, number))
        return found


def typical(starts: Sequence[Start]) -> Start:
    """The median of each; by query, if all were."""
    empty, ready, answered, read, lookup = (
        median(getattr(start, name) for start in starts) for name in ("empty", "ready", "answered", "read", "lookup")
    )
    return Start(empty, ready, answered, read, lookup, all(start.by_query for start in starts))


def _size(count: int) -> int:
    """A page a chunk; and as the tier plans 1/64 of its size for its index, 500 bytes a record, 64 times that."""
    return (256 << 20) + count * (4096 + 64 * 500)


async def _fill(table: dict[str, Any], count: int, tell: Tell) -> bytes:
    """Returns the digest that is last in the index file's order."""
    tier: Tier = make_backend("tiers", "tiers.0", table, Tier)  # type: ignore[type-abstract]
    records, last = _records(count), b""
    async with tier.open():
        for done in range(0, count, _BATCH):
            tell("records", done, count)
            batch = [record for _, record in zip(range(min(_BATCH, count - done)), records, strict=False)]
            if not all(await tier.store(batch)):
                raise Unavailable(f"the disk tier did not take {count} chunks: {tier.statistics()}")
            last = max(last, *(record.key.digest for record in batch))
    return last


def _records(count: int) -> Iterator[Record]:
    namespace, parent = namespace_of(layout_of([_FINGERPRINT], DEFAULT_CHUNK_TOKENS)), b""
    for i in range(count):
        digest = secrets.token_bytes(DIGEST_BYTES)
        yield Record(ChunkKey(namespace, digest), parent if i % CHAIN else b"", [memoryview(b"\1")])
        parent = digest


async def _start(table: dict[str, Any], count: int, digest: bytes, folder: Path, number: int) -> Start:
    address = f"unix://{folder}/{number}.sock"
    plain = ["memory.size=64MiB", "device.backend=none"]
    sets = [*plain, *(f"tiers.0.{key}={value}" for key, value in table.items())]
    began = time.perf_counter()
    async with serving(f"unix://{folder}/empty{number}.sock", plain, folder):
        empty = time.perf_counter() - began
    began = time.perf_counter()
    async with AsyncExitStack() as stack:
        await stack.enter_async_context(serving(address, sets, folder))
        ready = time.perf_counter()
        worker = await stack.enter_async_context(open_client(address, role=Role.WORKER, engine="records"))
        await worker.register(_FINGERPRINT, 1, 16)
        scheduler = await stack.enter_async_context(open_client(address, role=Role.SCHEDULER, engine="records"))
        await wait_open(address)
        asked = time.perf_counter()
        answer = await scheduler.lookup(1, [digest], budget=60)
        answered = time.perf_counter()
        if answer.chunks != 1:
            raise Unavailable("a lookup of a chunk that the disk tier has missed")
        by_query = not _tier(await scheduler.statistics())["ready"]
        said = await look_until(scheduler, lambda said: bool(_tier(said)["ready"]), _WHOLE_SECONDS)
        read = time.perf_counter()
    if (found := _tier(said)["chunks"]) != count:
        raise Unavailable(f"{found} of {count} chunks are there after a restart")
    return Start(empty, ready - began, answered - began, read - began, answered - asked, by_query)


def _tier(said: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = said["tiers"][0]["backend"]
    return found
