"""A tier that keeps each chunk in a file of its own. Simple, and whole: it passes `TierContract`."""

from pathlib import Path

import attrs
import xxhash

from lmcache_trio.abc import ChunkKey, Load, Record
from lmcache_trio.threads import BlockingTier


@attrs.frozen
class FilesConfig:
    path: str = attrs.field(metadata={"help": "A directory for this server alone."})
    size: int = attrs.field(metadata={"help": "Bytes of chunks to keep.", "unit": "bytes"})


class FilesTier(BlockingTier):
    Config, _sizes = FilesConfig, dict[Path, int]()  # of the files that are there: `start` looks

    def start(self) -> None:
        self._remove("*/*.tmp")  # half written

    def has(self, key: ChunkKey) -> bool:
        return self._file(key) in self._sizes

    def read(self, load: Load) -> bool:
        if self._sizes.get(path := self._file(load.key)) != 16 + sum(map(len, load.shards)):
            return False
        with path.open("rb", buffering=0) as file:
            return all(file.readinto(view) == len(view) for view in load.shards) and file.read() == _checksum(load)

    def write(self, record: Record) -> bool:
        size, path = 16 + sum(map(len, record.shards)), self._file(record.key)
        if path in self._sizes or sum(self._sizes.values()) + size > self.config.size:
            return path in self._sizes
        path.parent.mkdir(parents=True, exist_ok=True)
        path.with_suffix(".tmp").write_bytes(b"".join([*record.shards, _checksum(record)]))
        path.with_suffix(".tmp").replace(path)  # there as a whole, or not there
        self._sizes[path] = size
        return True

    def forget(self, namespace: bytes) -> None:
        self._remove(f"{namespace.hex()}/*")

    def statistics(self) -> dict[str, int | str]:
        return {"chunks": len(self._sizes), "bytes_used": sum(self._sizes.values()), "bytes_capacity": self.config.size}

    def _file(self, key: ChunkKey) -> Path:
        return Path(self.config.path, key.namespace.hex(), key.digest.hex())

    def _remove(self, pattern: str) -> None:
        for path in Path(self.config.path).glob(pattern):
            path.unlink()
        self._sizes = {path: path.stat().st_size for path in Path(self.config.path).glob("*/*")}


def _checksum(chunk: Load | Record) -> bytes:
    return xxhash.xxh3_128(b"".join([str([*map(len, chunk.shards)]).encode(), *chunk.shards])).digest()
