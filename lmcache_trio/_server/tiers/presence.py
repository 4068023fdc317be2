"""What one tier says of its chunks, for the schedulers that watch: which came to it, and which left it.

A tier that cannot say it is told of as holding nothing. So is a tier while it is fenced, and what it held before is not
believed any more when it works again: a lookup that finds a chunk there tells it anew.
"""

from collections.abc import Callable, Sequence

from lmcache_trio._core.index.changes import EVERY, Changes
from lmcache_trio._core.keys import ChunkKey
from lmcache_trio._server.tiers.calls import GuardedCalls
from lmcache_trio._server.tiers.writer import TierWriter
from lmcache_trio.abc import ObservedTier, Tier

__all__ = ["TierPresence"]


class TierPresence:
    """Notes in `changes` what *tier* says, while anybody watches."""

    def __init__(self, calls: GuardedCalls, tier: Tier, writer: TierWriter) -> None:
        self.changes = Changes()
        self.when_changed: list[Callable[[], None]] = []
        """Called at each change. None may wait."""
        self._calls = calls
        self._tier = tier if isinstance(tier, ObservedTier) else None
        self._writer = writer
        calls.when_fenced.append(self._lose_all)

    @property
    def is_known(self) -> bool:
        """Can the tier say which chunks it has?"""
        return self._tier is not None

    def watch(self) -> None:
        """Note what changes from now on."""
        if self._tier is not None:
            self._tier.observer = self
            self.changes.watched = True

    def unwatch(self) -> None:
        """Nobody watches any more."""
        if self._tier is not None:
            self._tier.observer = None
            self.changes.watched = False

    def came(self, keys: Sequence[ChunkKey]) -> None:
        """The tier says so. What a fenced tier says is late, and a namespace that is being deleted is not served."""
        if self._calls.open:
            for key in keys:
                if not self._writer.is_deleting(key.namespace):
                    self.changes.note(key.namespace, key.digest, is_there=True)
            self._stir()

    def left(self, keys: Sequence[ChunkKey]) -> None:
        """The tier says so."""
        for key in keys:
            self.changes.note(key.namespace, key.digest, is_there=False)
        self._stir()

    def forget(self, namespace: bytes) -> None:
        """No chunk of *namespace* from before is served any more."""
        if self.changes.watched:
            self.changes.clear(namespace)
            self._stir()

    def _lose_all(self) -> None:
        if self.changes.watched:
            self.changes.clear(EVERY)
            self._stir()

    def _stir(self) -> None:
        for tell in self.when_changed:
            tell()
