"""What other clients notice of lookups that are parked on a tier that hangs: their latencies, without and with them.

Two ways to hang, each with a server of its own: no question to the disk is answered; or every load is stuck in a
thread with its slot reserved, for chunks that only the disk has. One engine, a process, looks up, stores and retrieves,
all in memory and every byte copied, while another one's lookups wait. Idle and parked take turns, so that a machine
that drifts drifts for both: the disk hangs while nobody has a named pipe open for writing. It prints nothing.
"""

import itertools
import os
import secrets
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any, Literal

import attrs
import trio

from lmcache_trio._core.keys import DIGEST_BYTES
from lmcache_trio._wire.messages import MAX_RESERVED, Role
from lmcache_trio.bench.machine import Meter
from lmcache_trio.bench.rows import Round
from lmcache_trio.bench.run import BenchProcess, ask, child, play, scratch, serving, wait_open
from lmcache_trio.bench.settings import BenchSettings, KVShape
from lmcache_trio.client import Client, open_client
from lmcache_trio.errors import Unavailable

__all__ = ["CALLS", "VERBS", "Figures", "Parked", "measure_parked"]

Call = Literal["contains", "load"]
CALLS: tuple[Call, ...] = ("contains", "load")
"""Of the tier's, that hang."""
VERBS = {"lookup": "sync_lookup_8k_hit", "store": "store", "retrieve": "retrieve"}
"""What is told, and the row of the benchmark that it is, of small chunks; a retrieve reads what the store left."""
KV = KVShape(layers=2, kv_heads=1, head_dim=32)
"""64 KiB a chunk: small, because bytes are not what is measured."""
OPERATIONS = 500
"""Of each verb, in a round."""
_PARKED_BYTES = 4096
"""Of a chunk that is waited for."""
_FILL = MAX_RESERVED
_WAIT = 600
"""Seconds that a parked lookup is let wait: longer than the run."""

_sessions = itertools.count(1)


@attrs.frozen
class Figures:
    """Seconds of one verb: medians over the rounds."""

    idle_p50: float
    idle_p99: float
    parked_p50: float
    parked_p99: float

    @property
    def ratio(self) -> float:
        """Of the 99th percentiles, parked to idle."""
        return self.parked_p99 / self.idle_p99


@attrs.frozen
class Parked:
    """By verb; how many loads were stuck with a slot reserved; and the cores that other processes kept busy."""

    figures: dict[str, Figures]
    loading: int
    others: float


async def measure_parked(count: int, rounds: int, tell: Callable[[str, int, int], None]) -> dict[Call, Parked]:
    """*count* lookups wait at the same time. `Unavailable` when it could not be measured."""
    found: dict[Call, Parked] = {}
    for number, call in enumerate(CALLS):

        def told(i: int, call: Call = call, before: int = number * (rounds + 1)) -> None:
            tell(f"{call} hangs", before + i, len(CALLS) * (rounds + 1))

        async with scratch() as folder:
            found[call] = await _measure(call, count, rounds, folder, told)
    return found


async def _measure(call: Call, count: int, rounds: int, folder: Path, tell: Callable[[int], None]) -> Parked:
    address, disk = f"unix://{folder}/server.sock", _disk(folder, (rounds + 1) * (count + 2 * OPERATIONS))
    prompts = [_digests(count) for _ in range(rounds + 1)]  # what was loaded in one round could be a hit in the next
    tell(0)
    if call == "load":
        async with serving(address, _sets(disk), folder):
            await wait_open(address)
            await _fill(address, [digest for some in prompts for digest in some])
    samples: dict[bool, list[dict[str, Round]]] = {False: [], True: []}
    loading = 0
    async with AsyncExitStack() as stack:
        valve = stack.enter_context(_Valve(folder / "valve"))
        faulty = {"backend": "faulty", "fifo": str(valve.path), **{f"inner.{key}": disk[key] for key in disk}}
        faulty |= {"faults.0.kind": "hang_thread", "faults.0.on": call, "faults.0.rate": 1.0}
        server = await stack.enter_async_context(serving(address, _sets(faulty), folder))
        await wait_open(address)
        settings = BenchSettings(KV, operation=1, rows=tuple(VERBS.values()))
        arguments = ["-m", "lmcache_trio.bench.host_process", settings.as_json(), "0", secrets.token_hex(8), address]
        host = await stack.enter_async_context(child(arguments, folder / "host.log"))
        await host.hear()
        scheduler, worker = await _engine(stack, address)
        settled = trio.lowlevel.checkpoint if call == "load" else partial(_until, worker, _has_written)
        everyone = [os.getpid(), server.process.pid, host.process.pid]
        before = Meter.read(everyone)
        for i in range(rounds + 1):  # the first is a rehearsal
            tell(i)
            idle = await _round(host, partial(_until, worker, _is_idle))
            async with _parked(scheduler, worker, valve, prompts[i]):
                parked = await _round(host, settled)
                loading = max(loading, (await worker.statistics())["tiers"][0]["loads_in_flight"])
            if i:
                samples[False].append(idle)
                samples[True].append(parked)
            else:
                before = Meter.read(everyone)
        others = Meter.read(everyone).others_since(before)
    return Parked({verb: _figures(samples, verb) for verb in VERBS}, loading, others)


def _figures(samples: dict[bool, list[dict[str, Round]]], verb: str) -> Figures:
    rounds = {on: [one[verb] for one in samples[on]] for on in (False, True)}
    return Figures(*(median(figure(r) for r in rounds[on]) for on in (False, True) for figure in (_p50, _p99)))


def _p50(r: Round) -> float:
    return r.p50


def _p99(r: Round) -> float:
    return r.p99


class _Valve:
    """While it is open, somebody has the pipe open for writing, and no call hangs. Made open."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._fd = -1

    def open(self) -> None:
        self._fd = os.open(self.path, os.O_RDWR)  # waits for no reader

    def close(self) -> None:
        os.close(self._fd)
        self._fd = -1

    def __enter__(self) -> "_Valve":
        os.mkfifo(self.path, 0o600)
        self.open()
        return self

    def __exit__(self, *exc: object) -> None:
        if self._fd >= 0:
            self.close()


def _disk(folder: Path, chunks: int) -> dict[str, Any]:
    """With room for as many *chunks* and, 500 bytes each of 1/64 of it, their records: none is evicted."""
    size = (256 << 20) + chunks * (KV.chunk_bytes + 64 * 500)
    return {"backend": "disk", "path": f"{folder}/tier", "size": size, "slab_size": 256 << 20}


def _sets(tier: dict[str, Any]) -> list[str]:
    return [
        *(f"tiers.0.{key}={value}" for key, value in tier.items()),
        *("memory.size=256MiB", f"tier_timeout={_WAIT * 2}", f"prefetch_budget={_WAIT}", "device.backend=none"),
    ]


def _digests(count: int) -> list[bytes]:
    return [secrets.token_bytes(DIGEST_BYTES) for _ in range(count)]


async def _engine(stack: AsyncExitStack, address: str) -> tuple[Client, Client]:
    """The other engine's scheduler and worker. Its namespace is the same at every server."""
    worker = await stack.enter_async_context(open_client(address, role=Role.WORKER, engine="parked"))
    await worker.register(bytes(DIGEST_BYTES), _PARKED_BYTES, 16)
    return await stack.enter_async_context(open_client(address, role=Role.SCHEDULER, engine="parked")), worker


async def _fill(address: str, prompts: Sequence[bytes]) -> None:
    """Have the disk hold *prompts*, chunks of whatever bytes: nobody will see them."""
    async with AsyncExitStack() as stack:
        scheduler, worker = await _engine(stack, address)
        for first in range(0, len(prompts), _FILL):
            some, session = prompts[first : first + _FILL], next(_sessions)
            await scheduler.lookup(session, [])
            made = await worker.reserve(session, b"", some)
            if (await worker.commit(made.reservation)).published != len(some):
                raise Unavailable(f"the server dropped what was to be looked up: {dict(made.dropped)}")
            scheduler.end(session)
            await _until(worker, partial(_has_stored, first + len(some)))


@asynccontextmanager
async def _parked(client: Client, observer: Client, valve: _Valve, prompts: Sequence[bytes]) -> AsyncIterator[None]:
    """All of *prompts* wait in the body; after it nothing waits, hangs or is owed to the disk."""
    valve.close()
    async with trio.open_nursery() as nursery:
        for first in range(0, len(prompts), _FILL):
            for digest in prompts[first : first + _FILL]:
                nursery.start_soon(_park, client, digest)
            await _until(observer, partial(_waits, len(prompts[: first + _FILL])))
        yield
        nursery.cancel_scope.cancel()
    valve.open()
    await _until(observer, _is_idle)


def _has_stored(count: int, said: dict[str, Any]) -> bool:
    return bool(said["tiers"][0]["stores"] >= count)


def _waits(count: int, said: dict[str, Any]) -> bool:
    return bool(said["held"]["prefetches"] == count and said["tiers"][0]["calls"])


def _is_idle(said: dict[str, Any]) -> bool:
    return not said["held"]["prefetches"] and not said["tiers"][0]["loads_in_flight"] and _has_written(said)


def _has_written(said: dict[str, Any]) -> bool:
    return not said["tiers"][0]["bytes_queued"]


async def _until(client: Client, there: Callable[[dict[str, Any]], bool]) -> None:
    with trio.move_on_after(60):
        while not there(said := await client.statistics()):
            tier = said["tiers"][0]
            if tier["fenced"]:
                raise Unavailable(f"the disk tier is fenced: {tier['reason']}")
        return
    raise Unavailable("the server did not come to the state that was to be measured within a minute")


async def _park(client: Client, digest: bytes) -> None:
    session = next(_sessions)
    try:
        await client.lookup(session, [digest], budget=_WAIT)
        raise Unavailable("a lookup was answered that was to wait")
    finally:
        client.end(session)


async def _round(host: BenchProcess, settled: Callable[[], Awaitable[None]]) -> dict[str, Round]:
    """*settled* comes before each verb: whatever can be written back of the one before has been by then."""
    found = {}
    for verb, row in VERBS.items():
        await ask([host], hot=True)
        await settled()
        found[verb] = await play(row, OPERATIONS, [host], None)
    return found
