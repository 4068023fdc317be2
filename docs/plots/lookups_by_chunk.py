"""Measures what a lookup of 8,192 and of 131,072 tokens costs by the length of a chunk.

Run as `python docs/plots/lookups_by_chunk.py [ROUNDS]`. There is one server, and one engine per length, whose chunks
are one byte long. The engines take turns in each round, so that a machine that drifts drifts for all. It prints the
medians over the rounds, in microseconds per lookup: the server's processor time of a hit with its lease and its end,
and of a miss; the engine's of tokens in, count out.
"""

import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import trio

from lmcache_trio._wire.messages import MAX_RESERVED, Role
from lmcache_trio.adapters import PollingSchedulerAdapter
from lmcache_trio.bench import lookups
from lmcache_trio.client import Client, open_client
from lmcache_trio.threads import Handoff

LENGTHS = (16, 32, 64, 128, 256)
PROMPTS = {8_192: 60, 131_072: 10}
"""Tokens, and lookups of each kind in a round."""
SECONDS = 120.0
SETS = ("memory.size=256MiB", "lease_share=1", "lease_timeout=3600", "grace=0")


def server_seconds(pid: int) -> float:
    """The processor time of all threads; the kernel counts it in nanoseconds."""
    tasks = Path(f"/proc/{pid}/task").iterdir()
    return sum(int((task / "schedstat").read_text().split()[0]) for task in tasks) / 1e9


class Engine:
    """A scheduler, whose longest prompt is stored, and in its loop a worker that only reserves and commits."""

    def __init__(self, address: str, chunk: int) -> None:
        self.chunk, self.name, self.lookups = chunk, f"chunks of {chunk}", 0
        self.scheduler = PollingSchedulerAdapter(
            address, engine_id=self.name, identity=["m"], block_tokens=16, chunk_tokens=chunk, lookup_timeout=SECONDS
        )
        self.tokens = [(i * 7919 + chunk) % 50_000 for i in range(max(PROMPTS))]
        self.digests = self.scheduler.extend("hot", self.tokens)
        registered: Handoff[Client] = Handoff()
        self.scheduler._link.spawn(self._keep_worker, address, registered)
        worker = registered.wait(SECONDS)
        assert worker is not None
        self.settle()
        self.scheduler._link.call(self._store, worker, timeout=SECONDS)

    async def _keep_worker(self, client: Client | None, address: str, registered: Handoff[Client]) -> None:
        async with open_client(address, role=Role.WORKER, engine=self.name, block_tokens=16) as worker:
            await worker.register(b"one byte".ljust(32), 1, 16)
            registered.set(worker)
            await trio.sleep_forever()

    async def _store(self, worker: Client) -> None:
        client, parent = self.client, b""
        await client.lookup(1 << 40, [])
        for start in range(0, len(self.digests), MAX_RESERVED):
            lot = self.digests[start : start + MAX_RESERVED]
            made = await worker.reserve(1 << 40, parent, lot)
            assert (await worker.commit(made.reservation)).published == len(lot)
            parent = lot[-1]
        client.end(1 << 40)

    @property
    def client(self) -> Client:
        client = self.scheduler._link.client
        assert client is not None
        return client

    def settle(self) -> None:
        """Until the server has done all that it was told."""
        self.scheduler._link.call(self.client.ping, timeout=SECONDS)

    def hits(self, tokens: int, n: int) -> None:
        digests = self.digests[: tokens // self.chunk]
        lookups.in_loop(self.scheduler, lambda client: lookups.lookups(client, digests, n))

    def misses(self, tokens: int, n: int) -> None:
        prompts = lookups.unknown_prompts(tokens // self.chunk, n)
        lookups.in_loop(self.scheduler, lambda client: lookups.misses(client, prompts))

    def whole(self, tokens: int, n: int) -> None:
        self.lookups += n
        names = [f"{self.lookups - i}" for i in range(n)]
        lookups.sync_lookups(self.scheduler, names, self.tokens[:tokens])


def measured(pid: int, engine: Engine, run: Callable[[int, int], None], tokens: int, n: int) -> tuple[float, float]:
    """Microseconds per lookup: the server's, and this process'."""
    engine.settle()
    theirs, own = server_seconds(pid), time.process_time()
    run(tokens, n)
    own = time.process_time() - own
    engine.settle()
    return (server_seconds(pid) - theirs) / n * 1e6, own / n * 1e6


def main(rounds: int) -> None:
    with tempfile.TemporaryDirectory(prefix="lmcache-trio-") as folder:
        address = f"unix://{folder}/s.sock"
        words = [sys.executable, "-m", "lmcache_trio", "serve", "--address", address, "--set", *SETS]
        with subprocess.Popen(words, stdout=subprocess.PIPE) as server:
            assert server.stdout is not None
            server.stdout.readline()
            engines = [Engine(address, chunk) for chunk in LENGTHS]
            found: dict[tuple[int, int], list[tuple[float, float, float]]] = {}
            for number in range(rounds + 1):  # the first is a rehearsal
                for tokens, n in PROMPTS.items():
                    for engine in engines:
                        hit, _ = measured(server.pid, engine, engine.hits, tokens, n)
                        miss, _ = measured(server.pid, engine, engine.misses, tokens, n)
                        _, whole = measured(server.pid, engine, engine.whole, tokens, n)
                        if number:
                            found.setdefault((tokens, engine.chunk), []).append((hit, miss, whole))
            for engine in engines:
                engine.scheduler.shutdown()
            server.terminate()
    for (tokens, chunk), times in found.items():
        hit, miss, whole = (round(statistics.median(column)) for column in zip(*times, strict=True))
        print(f"{tokens:7} tokens, chunks of {chunk:3}: hit {hit:6}, miss {miss:5}, engine {whole:6}")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 6)
