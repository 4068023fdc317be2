"""For tests of adapters: a real server in a process of its own, and both sides of a small engine in this one.

Nothing here is a fake: what is killed dies, and what is stored lies in shared memory. It refuses to be fast.
"""

import itertools
import signal
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
import trio

from lmcache_trio.adapters import Group, PollingSchedulerAdapter, SchedulerAdapter, WorkerAdapter
from lmcache_trio.adapters.shared_kv import shared_tensor
from lmcache_trio.adapters.worker.shm_mover import Probe, no_probe
from lmcache_trio.client import open_client
from lmcache_trio.testing.forks import Fork, servers
from lmcache_trio.threads import Handoff

__all__ = ["BLOCK", "BLOCKS", "CHUNK", "ServerProcess", "Side", "make_kv", "same_blocks", "shared_kv", "wait_until"]

CHUNK, BLOCK = 64, 16
LAYERS, BLOCKS, HEADS, HEAD = 3, 64, 2, 8

engine_ids = (f"adapter engine {i}" for i in itertools.count())


class ServerProcess:
    """`lmcache-trio serve` at one address; may be killed and started again."""

    def __init__(self, address: str, *sets: str) -> None:
        self.address = address
        self._sets = ("memory.size=4MiB", f"chunk_tokens={CHUNK}", "grace=0.1", *sets)
        self.process: Fork | None = None

    def start(self) -> None:
        arguments = ["-m", "lmcache_trio", "serve", "--address", self.address]
        arguments += [part for setting in self._sets for part in ("--set", setting)]
        self.process = servers.start(arguments)
        assert self.process.stdout is not None
        assert "ready" in self.process.stdout.readline()

    def wait_tier(self) -> None:
        """Wait until the first tier is open; what is stored or asked for before does not reach it."""
        wait_until(lambda: bool(self.statistics()["tiers"][0]["state"] == "open"))

    def end(self, how: int = signal.SIGTERM) -> None:
        if self.process is not None:
            self.process.send_signal(signal.SIGCONT)
            self.process.send_signal(how)
            self.process.wait(60)
            assert self.process.stdout is not None
            self.process.stdout.close()
            self.process = None

    def kill(self) -> None:
        self.end(signal.SIGKILL)

    def pause(self) -> None:
        """It stays connected, and says nothing any more."""
        assert self.process is not None
        self.process.send_signal(signal.SIGSTOP)

    def go_on(self) -> None:
        assert self.process is not None
        self.process.send_signal(signal.SIGCONT)

    def statistics(self) -> dict[str, Any]:
        async def ask() -> dict[str, Any]:
            with trio.fail_after(60):
                async with open_client(self.address) as client:
                    return await client.statistics()

        return trio.run(ask)

    @property
    def held(self) -> dict[str, Any]:
        held: dict[str, Any] = self.statistics()["held"]
        return held


def make_kv(seed: int | None = None) -> dict[str, torch.Tensor]:
    """Paged KV with the block dimension second; zeros without a *seed*."""
    shape = (2, BLOCKS, BLOCK, HEADS, HEAD)
    if seed is None:
        return {f"layer {i}": torch.zeros(shape) for i in range(LAYERS)}
    generator = torch.Generator().manual_seed(seed)
    return {f"layer {i}": torch.randn(shape, generator=generator) for i in range(LAYERS)}


def shared_kv(seed: int | None = None) -> dict[str, torch.Tensor]:
    """`make_kv`, in memory that the server can open."""
    made = make_kv(seed)
    shape = (LAYERS, 2, BLOCKS, BLOCK, HEADS, HEAD)
    layers = shared_tensor(sum(t.nbytes for t in made.values())).view(torch.float32).view(shape)
    for layer, tensor in zip(layers, made.values(), strict=True):
        layer.copy_(tensor)
    return dict(zip(made, layers, strict=True))


def same_blocks(a: dict[str, torch.Tensor], at: list[int], b: dict[str, torch.Tensor], bt: list[int]) -> bool:
    """Do blocks *at* of *a* hold byte for byte what blocks *bt* of *b* hold?"""
    return all(torch.equal(a[name][:, at], b[name][:, bt]) for name in a)


class Side:
    """Both sides of one engine with one worker. *groups*: its KV groups; *layers*: the names of the layers of each."""

    def __init__(  # noqa: PLR0913  (keywords, each a setting of its own)
        self,
        address: str,
        kv: dict[str, torch.Tensor],
        *,
        block_tokens: int = BLOCK,
        groups: Sequence[Group] = (),
        layers: Sequence[Sequence[str]] | None = None,
        scheduler: type[SchedulerAdapter] = PollingSchedulerAdapter,
        worker: type[WorkerAdapter] = WorkerAdapter,
        probe: Probe = no_probe,
        identity: Sequence[str | bytes] = ("a model",),
        **settings: Any,
    ) -> None:
        both: dict[str, Any] = {"engine_id": next(engine_ids), "block_tokens": block_tokens, "groups": groups}
        both["connect_timeout"] = 30.0
        self.kv = kv
        self.scheduler = scheduler(address, identity=identity, **both, **settings)
        self.worker = worker(address, reply_timeout=30.0, probe=probe, **both)
        self.worker.register_kv_caches(kv, groups=layers)

    def store(self, request_id: str, tokens: list[int], blocks: list[int]) -> None:
        self.scheduler.extend(request_id, tokens)
        self.worker.store_now([self.scheduler.store_spec(request_id, 0, blocks)])

    def lookup(self, request_id: str, tokens: list[int]) -> int:
        self.scheduler.maybe_submit_lookup_request(request_id, tokens)
        found: list[int | None] = [None]

        def answered() -> bool:
            found[0] = self.scheduler.check_lookup_result(request_id)
            return found[0] is not None

        wait_until(answered)
        assert found[0] is not None
        return found[0]

    def load(self, request_id: str, tokens: int, blocks: list[int]) -> set[int]:
        spec = self.scheduler.update_after_alloc(request_id, tokens, block_ids=blocks)
        assert spec is not None
        self.worker.retrieve_now([spec])
        return self.worker.take_failed_blocks()

    def wait_healthy(self) -> None:
        wait_until(lambda: self.scheduler.is_healthy() and self.worker.is_healthy())

    def check_round_trip(self, request_id: str, tokens: list[int], source: list[int], target: list[int]) -> None:
        """What is stored from the blocks *source* is found, and comes back into the blocks *target* byte for byte."""
        self.store(request_id, tokens, source)
        assert self.lookup(f"{request_id} again", tokens) == len(tokens)
        assert self.load(f"{request_id} again", len(tokens), target) == set()
        assert same_blocks(self.kv, source, self.kv, target)

    def close(self) -> None:
        self.worker.shutdown()
        self.scheduler.shutdown()


def wait_until(true: Callable[[], bool], timeout: float = 60.0) -> None:
    """For what another process or thread will do soon, and tells nobody: ask again, bounded widely."""
    never: Handoff[bool] = Handoff()
    deadline = time.monotonic() + timeout
    while not true():
        if time.monotonic() > deadline:
            raise AssertionError("it did not come true in time")
        never.wait(0.002)
