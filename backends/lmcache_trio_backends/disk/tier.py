"""The `disk` tier: chunks in preallocated slab files, named by an SQLite index, in one directory of one server.

What was stored outlives the server, killed or not; what was damaged is a miss, never a wrong byte. docs/reference/
disk-tier.md says how the bytes lie, what each durability level promises, and what each kind of failure does.

It refuses to share its directory, to grow beyond its size, and to guess: bytes that fail their checksum are dropped.
"""

from collections import Counter
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager

import attrs
import trio

from lmcache_trio.abc import ChunkKey, Load, LocalTier, Record
from lmcache_trio.errors import ConfigError, Unavailable
from lmcache_trio.threads import offload
from lmcache_trio_backends.disk.admission import make_admission
from lmcache_trio_backends.disk.config import Budget, DiskConfig, failure_of, usable_size
from lmcache_trio_backends.disk.engine import DiskLife
from lmcache_trio_backends.disk.home import Home
from lmcache_trio_backends.disk.slabs import ByteIO

__all__ = ["DiskConfig", "DiskTier"]

COUNTS = (
    *("hits", "misses", "stored", "evicted", "disk_full"),
    *("corrupt", "lost_slabs", "lost_index", "lost_changes"),
)
DROP_REASONS = ("admission", "no_space", "not_ready", "size", "writing")


def _as_it_is(io: ByteIO) -> ByteIO:
    return io


class DiskTier(LocalTier):
    """Chunks on one disk. Every call but `statistics` is made inside `open()`."""

    Config = DiskConfig

    def __init__(self, config: DiskConfig) -> None:
        super().__init__(config)
        self.wrap_io: Callable[[ByteIO], ByteIO] = _as_it_is
        """Stands between the tier and its slabs from the next `open()` on: for fault injection below the checksums."""
        self._home = Home(config.path)
        self._admit = make_admission(config.admission)
        self._counts: Counter[str] = Counter()
        self._life: DiskLife | None = None
        self._was_open = False
        self._anew = False

    @asynccontextmanager
    async def open(self) -> AsyncIterator[None]:
        """Lock the directory and read its index; a large one is read on in the background, while stores are dropped.

        ConfigError for a setting that does not fit this machine, at the first time; after that, whatever is wrong is
        `Unavailable`, because it may pass.
        """
        try:
            size = await offload(usable_size, self.config)
        except (OSError, ConfigError) as exc:
            raise self._refused(exc) from exc
        life = DiskLife(attrs.evolve(self.config, size=size), self._home, self._admit, self._counts, self.wrap_io)
        try:
            await life.start(anew=self._anew)
        except ConfigError as exc:
            await life.end()
            raise self._refused(exc) from exc
        except BaseException:
            await life.end()
            raise
        self._was_open, self._anew = True, False
        failure: Exception | None = None
        try:
            async with trio.open_nursery() as house:
                house.start_soon(life.reading.run)
                house.start_soon(life.keep_house)
                await life.reading.under_way.wait()
                self._life = life
                try:
                    yield
                except Exception as exc:  # noqa: BLE001 - raised again below: the nursery would wrap it in a group
                    failure = exc
                house.cancel_scope.cancel()
        finally:
            self._life = None
            self._anew = life.corrupt
            await life.end()
        if failure is not None:
            raise failure

    async def contains(self, keys: Sequence[ChunkKey]) -> Sequence[bool]:
        """Which of *keys* are published."""
        return await self._living().contains(keys)

    async def load(self, loads: Sequence[Load]) -> Sequence[bool]:
        """Read and verify; what fails is dropped from the disk and counted (`corrupt`)."""
        return await self._living().load(loads)

    async def store(self, records: Sequence[Record]) -> Sequence[bool]:
        """Write, evicting what was least recently used; True once a restart would find it."""
        return await self._living().store(records)

    async def delete(self, namespace: bytes) -> None:
        """Forget every chunk of *namespace*; when it returns, for good."""
        await self._living().delete(namespace)

    def statistics(self) -> dict[str, int | str]:
        """Held: `chunks`, `bytes_used`, `bytes_taken` by slabs, `ready` (0: the index is read). The rest is counted."""
        held: dict[str, int | str] = {"chunks": 0, "bytes_used": 0, "bytes_capacity": Budget.of(self.config.size).slabs}
        if self._life is not None:
            held |= self._life.statistics()
        names = [*COUNTS, *(f"dropped_{why}" for why in DROP_REASONS)]
        return held | {name: self._counts[name] for name in names}

    def _refused(self, exc: OSError | ConfigError) -> ConfigError | Unavailable:
        """Why it can't be opened, or, once it was open, can't be now."""
        failure = exc if isinstance(exc, ConfigError) else failure_of(self.config.path, exc)
        if isinstance(failure, ConfigError) and self._was_open:
            return Unavailable(f"the disk tier in {self.config.path!r}: {exc}")
        return failure

    def _living(self) -> DiskLife:
        if self._life is None:
            raise Unavailable(f"the disk tier in {self.config.path!r} is not open")
        return self._life
