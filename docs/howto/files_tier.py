"""A tier that keeps each chunk in a file of its own. Simple, and whole: it passes `TierContract`."""

from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TypeVar

import attrs
import trio
import xxhash

from lmcache_trio.abc import ChunkKey, Load, Record, Tier
from lmcache_trio.errors import Unavailable
from lmcache_trio.threads import offload

T = TypeVar("T")


@attrs.frozen
class FilesConfig:
    path: str = attrs.field(metadata={"help": "A directory for this server alone."})
    size: int = attrs.field(metadata={"help": "Bytes of chunks to keep.", "unit": "bytes"})


class FilesTier(Tier):
    Config = FilesConfig

    def __init__(self, config: FilesConfig) -> None:
        super().__init__(config)
        self._root, self._sizes, self._opened = Path(config.path), dict[Path, int](), False
        self._one_at_a_time = trio.CapacityLimiter(1)

    @asynccontextmanager
    async def open(self) -> AsyncIterator[None]:
        self._opened = True
        try:
            await self._in_thread(lambda: self._remove("*/*.tmp"))  # half written
            yield
        finally:
            self._opened = False

    async def contains(self, keys: Sequence[ChunkKey]) -> Sequence[bool]:
        return await self._in_thread(lambda: [self._file(key) in self._sizes for key in keys])

    async def load(self, loads: Sequence[Load]) -> Sequence[bool]:
        return await self._in_thread(lambda: [self._read(load) for load in loads])

    async def store(self, records: Sequence[Record]) -> Sequence[bool]:
        return await self._in_thread(lambda: [self._write(record) for record in records])

    async def delete(self, namespace: bytes) -> None:
        await self._in_thread(lambda: self._remove(f"{namespace.hex()}/*"))

    def statistics(self) -> dict[str, int | str]:
        return {"chunks": len(self._sizes), "bytes_used": sum(self._sizes.values()), "bytes_capacity": self.config.size}

    async def _in_thread(self, fn: Callable[[], T]) -> T:
        if not self._opened:
            raise Unavailable("the tier is not open")
        try:
            return await offload(fn, limiter=self._one_at_a_time)
        except OSError as exc:  # the server fences the tier, and opens it again when it works
            raise Unavailable(f"{self._root}: {exc}") from exc

    def _file(self, key: ChunkKey) -> Path:
        return self._root / key.namespace.hex() / key.digest.hex()

    def _remove(self, pattern: str) -> None:
        for path in self._root.glob(pattern):
            path.unlink()
        self._sizes = {path: path.stat().st_size for path in self._root.glob("*/*")}

    def _read(self, load: Load) -> bool:
        if self._sizes.get(path := self._file(load.key)) != 16 + sum(map(len, load.shards)):
            return False
        with path.open("rb", buffering=0) as file:
            checksum, whole = file.read(16), all(file.readinto(shard) == len(shard) for shard in load.shards)
        return whole and checksum == _checksum(load.shards)

    def _write(self, record: Record) -> bool:
        size, path = 16 + sum(map(len, record.shards)), self._file(record.key)
        if path in self._sizes or sum(self._sizes.values()) + size > self.config.size:
            return path in self._sizes
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.with_suffix(".tmp").open("wb") as file:
            file.writelines([_checksum(record.shards), *record.shards])
        path.with_suffix(".tmp").replace(path)  # there as a whole, or not there
        self._sizes[path] = size
        return True


def _checksum(shards: Sequence[memoryview]) -> bytes:
    return xxhash.xxh3_128(b"".join([str([len(shard) for shard in shards]).encode(), *shards])).digest()
