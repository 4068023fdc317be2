"""One client of the benchmark: an engine's process, with a scheduler's and a worker's side, but no model.

Run as `python -m lmcache_trio.bench.host SETTINGS RANK RUN ADDRESS [DISK_ADDRESS DIRECTORY]`. It reads one JSON object
a line, and writes one for each: `{"prepare": row, "n": n}` is answered when all is ready, so that several hosts begin
together; `{"go": true}` by what was measured. A line that names an `error` is its last.
"""

import gc
import json
import os
import secrets
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property

import attrs
import numpy as np
import torch
import xxhash

from lmcache_trio._wire.messages import Message
from lmcache_trio.adapters import PollingSchedulerAdapter, WorkerAdapter
from lmcache_trio.adapters.specs import LoadSpec, StoreSpec
from lmcache_trio.bench.settings import ROTATION, Settings
from lmcache_trio.client import Client
from lmcache_trio.errors import LMCacheTrioError, Unavailable
from lmcache_trio.threads import Handoff

__all__ = ["Host", "Job", "Site", "main"]

_ARENA_SECONDS = 120.0
"""For a server to take its arena: 4 GB/s where memory is free."""


@attrs.frozen
class Job:
    """What is timed. *run* gives seconds an operation; *finish* checks what came of it, and is not timed."""

    run: Callable[[], list[float]]
    moved: int = 0
    finish: Callable[[], None] = lambda: None


class TimedWorker(WorkerAdapter):
    """Notes when the last copy ended, before its commit: the moment from which a writeback counts."""

    copied_at = 0.0

    def _before_commit(self, spec: StoreSpec) -> None:
        self.copied_at = time.perf_counter()


class Site:
    """One engine at one server: both its sides."""

    def __init__(self, settings: Settings, address: str, run: str, kv: Mapping[str, torch.Tensor]) -> None:
        engine = f"bench {run} {os.getpid()}"
        self.settings = settings
        self.scheduler = PollingSchedulerAdapter(
            address,
            engine_id=engine,
            identity=["lmcache-trio bench", run],
            block_tokens=settings.kv.block_tokens,
            chunk_tokens=settings.kv.chunk_tokens,
            lookup_timeout=30.0,
        )
        self.worker = TimedWorker(
            address,
            engine_id=engine,
            block_tokens=settings.kv.block_tokens,
            chunk_tokens=settings.kv.chunk_tokens,
            path="shm",
        )
        if self.scheduler._link.client is None or self.worker._link.client is None:
            raise Unavailable(f"no server answers at {address}")
        self._warm_arena(self.worker._link.client)
        self.worker.register_kv_caches(kv)
        self.scheduler._link.call(self.client.ping, timeout=10)  # news of the namespace came before its reply
        if not self.scheduler.is_healthy():
            raise Unavailable("the server did not take this engine's layout; its log says why")

    @property
    def client(self) -> Client:
        """The scheduler's connection: what an adapter's lookups go through."""
        client = self.scheduler._link.client
        if client is None:
            raise Unavailable("the server is gone")
        return client

    @staticmethod
    def _warm_arena(client: Client) -> None:
        """Wait until the server has its arena, and put all of it into this process' page tables."""
        if client.arena is None:
            raise Unavailable(f"this client got no arena: {client.arena_note}")
        grown: Handoff[bool] = Handoff()

        def look(message: Message) -> None:
            if client.taken >= client.arena_size:
                grown.set(True)

        client.on_push = look
        if client.taken < client.arena_size and grown.wait(_ARENA_SECONDS) is None:
            raise Unavailable(f"the server took {client.taken} of {client.arena_size} bytes of its arena, and no more")
        client.arena._populate(0, client.arena_size)

    def store_specs(self, prompts: Mapping[str, list[int]], blocks: Callable[[int], list[int]]) -> list[StoreSpec]:
        for request_id, tokens in prompts.items():
            self.scheduler.extend(request_id, tokens)
        return [self.scheduler.store_spec(request_id, 0, blocks(i)) for i, request_id in enumerate(prompts)]

    def load_specs(self, prompts: Mapping[str, list[int]], blocks: Callable[[int], list[int]]) -> list[LoadSpec]:
        """Look *prompts* up: all must be there."""
        specs = []
        for i, (request_id, tokens) in enumerate(prompts.items()):
            self.lookup(request_id, tokens)
            spec = self.scheduler.update_after_alloc(request_id, len(tokens), block_ids=blocks(i))
            assert spec is not None
            specs.append(spec)
        return specs

    def lookup(self, request_id: str, tokens: list[int]) -> None:
        self.scheduler.maybe_submit_lookup_request(request_id, tokens)
        found = self.scheduler.check_lookup_result(request_id)
        if found != len(tokens):
            raise Unavailable(f"{found} of {len(tokens)} tokens were found: something was evicted or dropped")

    def end(self, request_ids: Sequence[str]) -> None:
        for request_id in request_ids:
            self.scheduler.end_session(request_id)
        self.scheduler._link.call(self.client.ping, timeout=30)  # in order: they have ended now

    def count_stored(self) -> int:
        return self.worker.statistics().get("stored_chunks", 0)

    def close(self) -> None:
        self.worker.shutdown()
        self.scheduler.shutdown()


class Host:
    """The process: its paged KV, its prompts, and one site a server."""

    def __init__(self, settings: Settings, rank: int, run: str, addresses: Sequence[str], directory: str) -> None:
        torch.set_num_threads(1)
        self.settings = settings
        self.rank = rank
        self.directory = directory
        self.kv = make_kv(settings)
        self.sites = [Site(settings, address, run, self.kv) for address in addresses]
        shared = np.random.default_rng(int.from_bytes(run.encode()[:8], "little"))
        self.hot = shared.integers(0, 1 << 30, settings.prompt_chunks * settings.kv.chunk_tokens).tolist()
        self.rng = np.random.default_rng(secrets.randbits(64))
        order = np.random.default_rng(rank).permutation(ROTATION * self._operation_blocks)
        self._order: list[int] = order.tolist()
        self._names = 0
        self.stored: dict[str, list[int]] = {}
        """What the last `store` left in memory, for a retrieve."""
        self.stored_hash = 0
        """Of the bytes of the last of them."""
        self.written: dict[str, list[int]] = {}
        """What the last `writeback_disk` left on disk, for a load."""

    @cached_property
    def buffers(self) -> list[torch.Tensor]:
        """Warm private memory for memcpy: `ROTATION` operations' worth of sources, and as much of targets."""
        return [torch.full((self.settings.operation_bytes,), i, dtype=torch.uint8) for i in range(2 * ROTATION)]

    def hash_of(self, blocks: list[int]) -> int:
        """Of the bytes of *blocks*, in all layers."""
        found = xxhash.xxh3_64()
        index = torch.tensor(blocks)
        for tensor in self.kv.values():
            found.update(tensor[:, index].view(torch.uint8).flatten().numpy().data)
        return found.intdigest()

    @property
    def site(self) -> Site:
        return self.sites[0]

    @property
    def _operation_blocks(self) -> int:
        return self.settings.operation_tokens // self.settings.kv.block_tokens

    def blocks(self, operation: int) -> list[int]:
        """The blocks of one operation: scattered over the whole paged KV, none in two of `ROTATION`."""
        start = operation % ROTATION * self._operation_blocks
        return self._order[start : start + self._operation_blocks]

    def fresh_prompts(self, n: int) -> dict[str, list[int]]:
        size = self.settings.operation_tokens
        return {self.name(): self.rng.integers(0, 1 << 30, size).tolist() for _ in range(n)}

    def name(self) -> str:
        """A request id that was never used."""
        self._names += 1
        return f"{self.rank}-{self._names}"

    def keep_hot(self) -> None:
        """See that the hot prompt is in memory: looked up, and stored if it is not all there."""
        scheduler, worker, name = self.site.scheduler, self.site.worker, self.name()
        scheduler.maybe_submit_lookup_request(name, self.hot)
        if scheduler.check_lookup_result(name) != len(self.hot):
            step = self.settings.operation_chunks
            for first in range(0, self.settings.prompt_chunks, step):
                count = min(step, self.settings.prompt_chunks - first)
                blocks = self.blocks(first // step)[: count * scheduler.num_blocks_per_chunk()]
                worker.store_now([scheduler.store_spec(name, first, blocks)])
        self.site.end([name])

    def close(self) -> None:
        for site in self.sites:
            site.close()


def make_kv(settings: Settings) -> dict[str, torch.Tensor]:
    """One tensor a layer, as engines make them: (2, blocks, block tokens, heads, head dim). No two blocks are alike."""
    kv = settings.kv
    blocks = ROTATION * settings.operation_tokens // kv.block_tokens
    shape = (2, blocks, kv.block_tokens, kv.kv_heads, kv.head_dim)
    made = {}
    for i in range(kv.layers):
        tensor = torch.empty(shape, dtype=getattr(torch, kv.torch_dtype))
        flat = tensor.view(torch.uint8).flatten().numpy()
        words = flat[: flat.size // 4 * 4].view(np.uint32)
        words[:] = np.arange(i * words.size, (i + 1) * words.size, dtype=np.uint64).astype(np.uint32)
        made[f"layers.{i}"] = tensor
    return made


def main(arguments: Sequence[str]) -> None:
    settings, rank, run = Settings.of_json(arguments[0]), int(arguments[1]), arguments[2]
    addresses, directory = [arguments[3], *arguments[4:5]], arguments[5] if len(arguments) > 5 else ""
    try:
        host = Host(settings, rank, run, addresses, directory)
        pids = [site.client._connection.peer_pid for site in host.sites]
        gc.collect()
        gc.freeze()  # as engines do
        _say(ready=True, pids=pids)
        serve(host)
        host.close()
    except LMCacheTrioError as exc:
        _say(error=str(exc))


def serve(host: Host) -> None:
    """Do as standard input says, until it ends."""
    from lmcache_trio.bench.phases import PHASES

    job: Job | None = None
    for line in sys.stdin:
        asked = json.loads(line)
        if "prepare" in asked:
            job = PHASES[asked["prepare"]](host, asked["n"])
            _say(ready=True)
        elif "hot" in asked:
            host.keep_hot()
            _say(ready=True)
        elif job is not None:
            _say(**measure(job))
            job = None


def measure(job: Job) -> dict[str, object]:
    """Run *job*: one `Part`."""
    cpu, began = time.process_time(), time.perf_counter()
    times = job.run()
    ended, used = time.perf_counter(), time.process_time() - cpu
    job.finish()
    return {"times": times, "began": began, "ended": ended, "cpu": used, "moved": job.moved}


def _say(**values: object) -> None:
    print(json.dumps(values), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
