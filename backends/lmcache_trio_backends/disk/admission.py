"""Which chunks the disk takes: all, or only those that were offered before.

An admission keeps marks of keys in bounded memory, and nothing on disk.
"""

from typing import Protocol

from lmcache_trio.abc import ChunkKey

__all__ = ["ADMISSIONS", "Admission", "make_admission"]


class Admission(Protocol):
    """Called once for each chunk that is offered and absent."""

    def __call__(self, key: ChunkKey) -> bool: ...


class SecondHit:
    """Take a chunk when it is offered for the second time, so that one-off prompts don't wear the disk.

    Two sets of 8-byte fingerprints; when the newer is full it becomes the older, and the older is forgotten. So at
    least the last *size* and at most the last 2 * *size* offers are remembered, in under 10 MiB for the default.
    Two chunks that share a fingerprint (1 in 2**64) cost one needless write.
    """

    def __init__(self, size: int = 50_000) -> None:
        self._size = size
        self._newer: set[int] = set()
        self._older: set[int] = set()

    def __len__(self) -> int:
        return len(self._newer) + len(self._older)

    def __call__(self, key: ChunkKey) -> bool:
        mark = hash((key.namespace, key.digest))
        if mark in self._newer or mark in self._older:
            self._newer.discard(mark)
            self._older.discard(mark)
            return True
        if len(self._newer) >= self._size:
            self._older, self._newer = self._newer, set()
        self._newer.add(mark)
        return False


ADMISSIONS = ("all", "second_hit")


def make_admission(name: str) -> Admission | None:
    """The policy by its name in the configuration. None takes every chunk."""
    return SecondHit() if name == "second_hit" else None
