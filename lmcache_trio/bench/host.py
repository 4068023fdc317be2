"""One client of the benchmark: an engine with a scheduler's and a worker's side, but no model.

`host_process` runs one in a process of its own.
"""

import secrets
from collections.abc import Sequence
from functools import cached_property

import numpy as np
import torch

from lmcache_trio.bench.settings import DEVICE, ROTATION, BenchSettings
from lmcache_trio.bench.site import Site, private_kv, shared_kv
from lmcache_trio.errors import Unavailable

__all__ = ["Host"]


class Host:
    """The process: its prompts, and its engines: one at each server, and one whose KV the server moves."""

    def __init__(self, settings: BenchSettings, rank: int, run: str, addresses: Sequence[str], directory: str) -> None:
        torch.set_num_threads(1)
        self.settings = settings
        self.rank = rank
        self.directory = directory
        self.left_out: dict[str, str] = {}
        """Rows that can't be measured, and why."""
        self.site = Site(settings, addresses[0], run, private_kv(settings), "shm")
        self.device_site: Site | None = None
        if not set(DEVICE).isdisjoint(settings.rows):
            try:
                self.device_site = Site(settings, addresses[0], run, shared_kv(settings), "device")
            except Unavailable as exc:
                self.left_out |= dict.fromkeys(DEVICE, str(exc))
        self.disk_site = Site(settings, addresses[1], run, self.site.kv, "shm") if len(addresses) > 1 else None
        shared = np.random.default_rng(int.from_bytes(run.encode()[:8], "little"))
        self.hot = shared.integers(0, 1 << 30, settings.prompt_chunks * settings.kv.chunk_tokens).tolist()
        self.rng = np.random.default_rng(secrets.randbits(64))
        order = np.random.default_rng(rank).permutation(ROTATION * self._operation_blocks)
        self._order: list[int] = order.tolist()
        self._names = 0
        self.written: dict[str, list[int]] = {}
        """What the last `writeback_disk` left on disk, for a load."""
        self.directly_read = 0
        """Operations' worth of the tier's bytes."""

    @cached_property
    def buffers(self) -> list[torch.Tensor]:
        """Warm private memory for memcpy: `ROTATION` operations' worth of sources, and as much of targets."""
        return [torch.full((self.settings.operation_bytes,), i, dtype=torch.uint8) for i in range(2 * ROTATION)]

    @property
    def sites(self) -> list[Site]:
        return [site for site in (self.site, self.disk_site, self.device_site) if site is not None]

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
