"""A tier that fails on purpose: `FaultyTier` wraps any other and injects faults into its calls, and beneath them.

    tier = FaultyTier.around(mine, [Fault("bit_flip", on="load", rate=0.1), Fault("error", on="store", at=(3,))])

From a server's configuration, where it needs no test code at all:

    [[tiers]]
    backend = "faulty"
    inner = { backend = "disk", path = "/var/cache/kv", size = "10GiB" }
    faults = [{ kind = "delay", on = "load", rate = 0.5, seconds = 2.0 }]

Faults of bytes (`bit_flip`, `short_read`, `torn_write`), `error`, `no_space` and `hang_thread` are injected *beneath*
the tier's own checks if it lets us stand there (`Wrappable`); else they show as they would on a tier that checks
nothing. What is drawn depends on the seed and on the order of calls, and on nothing else.
"""

import errno
import math
import os
from collections import Counter
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from contextvars import ContextVar
from random import Random
from typing import Any, Protocol, Self, runtime_checkable

import attrs
import trio

from lmcache_trio._server.plugins import make_backend
from lmcache_trio.abc import ByteIO, ChunkKey, Load, Record, Tier
from lmcache_trio.config import structure
from lmcache_trio.errors import ConfigError, Unavailable
from lmcache_trio.testing.faults import BENEATH, KINDS, OF_BYTES, OPERATIONS, Fault, spoil
from lmcache_trio.testing.gate import Gate
from lmcache_trio.threads import offload

__all__ = ["KINDS", "OPERATIONS", "ByteIO", "Fault", "FaultyConfig", "FaultyTier", "Wrappable"]


@attrs.frozen
class FaultyConfig:
    """Settings of `[[tiers]]` with `backend = "faulty"`."""

    inner: Mapping[str, Any] = attrs.field(metadata={"help": "The tier to be wrapped: `backend` and its own settings."})
    faults: tuple[Mapping[str, Any], ...] = attrs.field(
        default=(), metadata={"help": "What goes wrong: tables with `kind`, `on`, and `rate` or `at`."}
    )
    seed: int = attrs.field(default=0, metadata={"help": "The same seed and calls give the same faults."})
    fifo: str = attrs.field(
        default="",
        metadata={
            "unit": "path",
            "help": "A named pipe: `hang_thread` blocks until another process opens it for writing.",
        },
    )


@runtime_checkable
class Wrappable(Protocol):
    """A tier that lets another stand between it and its bytes, from its next `open` on. Implementing it is optional."""

    wrap_io: Callable[[Any], Any]


class FaultyTier(Tier):
    """*faults* may be changed at any time. `release` ends every hang, and all hangs to come."""

    Config = FaultyConfig

    def __init__(self, config: FaultyConfig) -> None:
        super().__init__(config)
        if not isinstance(config.inner.get("backend"), str):
            raise ConfigError("inner.backend", 'is missing or no string; name the tier, as in backend = "disk"')
        faults = [structure(Fault, table, f"faults.{i}") for i, table in enumerate(config.faults)]
        tier: Tier = make_backend("tiers", "inner", config.inner, Tier)  # type: ignore[type-abstract]
        self._set_up(tier, faults, config)

    @classmethod
    def around(cls, inner: Tier, faults: Sequence[Fault] = (), *, seed: int = 0, fifo: str = "") -> Self:
        """*inner*, with *faults*."""
        self = cls.__new__(cls)
        config = FaultyConfig(inner={}, seed=seed, fifo=fifo)
        Tier.__init__(self, config)
        self._set_up(inner, faults, config)
        return self

    def _set_up(self, inner: Tier, faults: Sequence[Fault], config: FaultyConfig) -> None:
        self.inner = inner
        self.faults = list(faults)
        self.injected: Counter[str] = Counter()
        self._random = Random(config.seed)
        self._calls: Counter[str] = Counter()
        self._gate = Gate(config.fifo)
        self._threads = trio.CapacityLimiter(math.inf)  # the loop's own are for others
        self._beneath = isinstance(inner, Wrappable)
        if isinstance(inner, Wrappable):
            inner.wrap_io = lambda io: _FaultyBytes(io, self._gate)

    @property
    def hanging(self) -> int:
        """Calls and threads that hang now."""
        return self._gate.hanging

    async def wait_hanging(self, count: int) -> None:
        """Until *count* calls and threads hang at the same time."""
        await self._gate.wait_hanging(count)

    def release(self) -> None:
        """End every hang, also in threads."""
        self._gate.release()

    @asynccontextmanager
    async def open(self) -> AsyncIterator[None]:
        """Open the tier inside; what hangs in a thread is released at the end."""
        self._gate.open()
        try:
            await self._meet("open")
            async with self.inner.open():
                yield
        finally:
            self._gate.close()

    async def contains(self, keys: Sequence[ChunkKey]) -> Sequence[bool]:
        """Ask the tier inside."""
        if any(fault.kind == "drop" for fault in await self._meet("contains")):
            return [False] * len(keys)
        return await self.inner.contains(keys)

    async def load(self, loads: Sequence[Load]) -> Sequence[bool]:
        """Load from the tier inside."""
        faults = await self._meet("load")
        if any(fault.kind == "drop" for fault in faults):
            return [False] * len(loads)
        with _active(faults):
            hits = list(await self.inner.load(loads))
        for fault in faults if not self._beneath else ():
            for i in [i for i, hit in enumerate(hits) if hit][:1]:
                spoil(loads[i].shards, fault.kind)
                hits[i] = fault.kind == "bit_flip"  # half of the bytes is what even the simplest tier notices
        return hits

    async def store(self, records: Sequence[Record]) -> Sequence[bool]:
        """Store in the tier inside."""
        faults = await self._meet("store")
        if any(fault.kind == "drop" for fault in faults):
            return [True] * len(records)
        for fault in faults if not self._beneath else ():
            if records and fault.kind in OF_BYTES:
                copies = [memoryview(bytearray(view)) for view in records[0].shards]
                spoil(copies, fault.kind)
                records = [attrs.evolve(records[0], shards=copies), *records[1:]]
        with _active(faults):
            return await self.inner.store(records)

    async def delete(self, namespace: bytes) -> None:
        """Delete in the tier inside."""
        if not any(fault.kind == "drop" for fault in await self._meet("delete")):
            await self.inner.delete(namespace)

    def statistics(self) -> dict[str, int | str]:
        """The inner tier's, how many calls and threads hang now, and how many faults of each kind there were."""
        return {
            **self.inner.statistics(),
            "hanging": self.hanging,
            **{f"injected_{kind}": n for kind, n in sorted(self.injected.items())},
        }

    async def _meet(self, operation: str) -> list[Fault]:
        """Draw this call's faults and suffer those that need no bytes; the others are returned."""
        self._calls[operation] += 1
        number = self._calls[operation]
        left = []
        for fault in list(self.faults):
            if fault.on != operation or not (number in fault.at or self._random.random() < fault.rate):
                continue
            self.injected[fault.kind] += 1
            beneath = self._beneath and fault.kind in BENEATH and operation in ("load", "store")
            if beneath or fault.kind in OF_BYTES or fault.kind == "drop":
                left.append(fault)
            else:
                await self._suffer(fault)
        return left

    async def _suffer(self, fault: Fault) -> None:
        if fault.kind == "delay":
            await trio.sleep(fault.seconds)
        elif fault.kind == "hang":
            await self._gate.hang()
        elif fault.kind == "hang_thread":
            await offload(self._gate.block, limiter=self._threads)
        else:
            number = errno.ENOSPC if fault.kind == "no_space" else errno.EIO
            raise Unavailable(f"injected: {os.strerror(number)}")


_faults: ContextVar[list[Fault] | None] = ContextVar("_faults", default=None)
"""What this call is still to suffer beneath; Trio hands the context on to child tasks and to threads."""


class _active:
    def __init__(self, faults: Sequence[Fault]) -> None:
        self._left = list(faults)

    def __enter__(self) -> None:
        self._before = _faults.set(self._left)

    def __exit__(self, *exc: object) -> None:
        _faults.reset(self._before)


class _FaultyBytes:
    """Stands between a tier and its bytes; each fault of a call strikes once, at its first read or write."""

    def __init__(self, io: ByteIO, gate: Gate) -> None:
        self._io = io
        self._gate = gate

    def read(self, offset: int, view: memoryview) -> int:
        kind = self._strike()
        if kind == "short_read":
            return self._io.read(offset, view[: len(view) // 2])
        got = self._io.read(offset, view)
        if kind is not None:
            spoil([view], kind)
        return got

    def write(self, offset: int, view: memoryview) -> None:
        kind = self._strike()
        if kind == "torn_write":
            view = view[: len(view) // 2]
        elif kind is not None:
            view = memoryview(bytearray(view))
            spoil([view], kind)
        self._io.write(offset, view)

    def _strike(self) -> str | None:
        """Suffer the next fault; the kind of one of bytes is returned."""
        left = _faults.get()
        try:
            kind = left.pop(0).kind if left else None
        except IndexError:  # another thread of this call took it
            return None
        if kind == "hang_thread":
            self._gate.block()
            return None
        if kind in ("error", "no_space"):
            number = errno.ENOSPC if kind == "no_space" else errno.EIO
            raise OSError(number, f"injected: {os.strerror(number)}")
        return kind
