"""A tier for authors who write plain blocking code: its methods run in threads."""

from abc import abstractmethod
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any, ClassVar, TypeVar

import trio

from lmcache_trio.abc import ChunkKey, Load, Record, Tier
from lmcache_trio.errors import Unavailable
from lmcache_trio.threads._calls import offload

__all__ = ["BlockingTier"]

T = TypeVar("T")


class BlockingTier(Tier):
    """A `Tier` made of six blocking methods: `start`, `has`, `read`, `write`, `forget`, and `statistics`.

    All but the last run in the tier's own threads, *threads* at a time. With one thread, the default, they need no
    lock. A method owns its buffers until it returns, even if the task that called it was cancelled. An OSError becomes
    `Unavailable` for the caller, as does every call outside of `open`. No method is stopped while it runs: with more
    threads than one, the `start` of a reopening can run beside a `write` from before that still hangs, and must expect
    its files.
    """

    threads: ClassVar[int] = 1

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self._limiter = trio.CapacityLimiter(self.threads)  # one for all openings: a call may outlast its own
        self._opened = False

    @abstractmethod
    def start(self) -> None:
        """Make ready, at each opening: chunks that were stored before are there again, half-written ones are not."""

    @abstractmethod
    def has(self, key: ChunkKey) -> bool:
        """Whether `read` would find the chunk *key*."""

    @abstractmethod
    def read(self, load: Load) -> bool:
        """Fill the buffers. False: the chunk is absent, has other lengths, or failed verification."""

    @abstractmethod
    def write(self, record: Record) -> bool:
        """Keep the chunk, as a whole or not at all. False: it was not taken. True also if the tier had it already."""

    @abstractmethod
    def forget(self, namespace: bytes) -> None:
        """Drop every chunk of *namespace*."""

    @asynccontextmanager
    async def open(self) -> AsyncIterator[None]:
        """Call `start`, and take calls until the block is left."""
        self._opened = True
        try:
            await self._run(self.start)
            yield
        finally:
            self._opened = False

    async def contains(self, keys: Sequence[ChunkKey]) -> Sequence[bool]:
        """`has`, for each."""
        return await self._run(lambda: [self.has(key) for key in keys])

    async def load(self, loads: Sequence[Load]) -> Sequence[bool]:
        """`read`, for each."""
        return await self._run(lambda: [self.read(load) for load in loads])

    async def store(self, records: Sequence[Record]) -> Sequence[bool]:
        """`write`, for each."""
        return await self._run(lambda: [self.write(record) for record in records])

    async def delete(self, namespace: bytes) -> None:
        """`forget` the *namespace*."""
        await self._run(lambda: self.forget(namespace))

    async def _run(self, fn: Callable[[], T]) -> T:
        if not self._opened:
            raise Unavailable(f"the tier {type(self).__name__} is not open")
        try:
            return await offload(fn, limiter=self._limiter)
        except OSError as exc:  # the server fences the tier, and opens it again when it works
            raise Unavailable(f"{type(self).__name__}: {exc}") from exc
