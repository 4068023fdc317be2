"""All tiers of a server, nearest first: what is asked of the tiers together, and nothing that is one tier's alone."""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import trio

from lmcache_trio._core.index import Index
from lmcache_trio._core.keys import ChunkKey
from lmcache_trio._server.plugins import make_backend
from lmcache_trio._server.tier import Branch, Keeper
from lmcache_trio._server.tier_loads import Start
from lmcache_trio._server.tier_writes import Deletion
from lmcache_trio.abc import Memory, Tier
from lmcache_trio.config import Config
from lmcache_trio.errors import ConfigError

__all__ = ["FIRST_OPENING", "Tiers", "make_tiers"]

FIRST_OPENING = 0.3
"""Seconds that a start gives its tiers to open, beside what else it does: most do, and a setting that is wrong is then
told at once. One that takes longer opens in the background; a server is ready in under a second, whatever its tiers."""
WRITEBACK_SHARE = 0.5
"""Of the arena, at most, is queued for a tier: in a small one there must be room for what is stored next."""


def make_tiers(config: Config) -> list[Tier]:
    """The tiers that `[[tiers]]` names, each made with the rest of its table."""
    return [make_backend("tiers", f"tiers.{i}", table, Tier) for i, table in enumerate(config.tiers)]  # type: ignore[type-abstract]


class Tiers:
    """Made without a task; `open` starts one a tier. *reserved* is called when a load got a slot, which falls due."""

    def __init__(
        self,
        tiers: Sequence[Tier],
        index: Index,
        memory: Memory,
        config: Config,
        reserved: Callable[[], None],
    ) -> None:
        self._index = index
        self._config = config
        self._opened_by = -math.inf
        names = [str(table["backend"]) for table in config.tiers] or [type(tier).__name__ for tier in tiers]
        self.keepers = [
            Keeper(f"{i}:{name}", tier, index, memory, config)
            for i, (name, tier) in enumerate(zip(names, tiers, strict=True))
        ]
        for keeper in self.keepers:
            keeper.loading.room = self._room
            keeper.loading.reserved = reserved
            keeper.loading.loaded = partial(self._loaded, keeper)
            keeper.writing.limit = self._writeback_limit

    def __len__(self) -> int:
        return len(self.keepers)

    @property
    def any_open(self) -> bool:
        """Whether there is a tier that may be asked."""
        return any(keeper.open for keeper in self.keepers)

    @property
    def refusal(self) -> ConfigError | None:
        """The setting for which a tier could not be opened, if that is so."""
        return next((keeper.refusal for keeper in self.keepers if keeper.refusal is not None), None)

    def open(self, start: Start, branch: Branch) -> None:
        """Start all; they open by themselves."""
        self._opened_by = trio.current_time() + FIRST_OPENING
        for keeper in self.keepers:
            start(keeper.run, branch)

    async def wait_opened(self) -> None:
        """Until all are open, or failed to be, or have had their time. ConfigError: one cannot be, as it is set up."""
        with trio.move_on_at(self._opened_by):
            for keeper in self.keepers:
                await keeper.opened.wait()
        if self.refusal is not None:  # its task ends the server too, but this one may run on before that
            raise self.refusal

    def stored(self, keys: Sequence[ChunkKey]) -> None:
        """*keys* became READY by a store: write them back, in the background."""
        for keeper in self.keepers:
            for key in keys:
                keeper.writing.offer(key)

    def used(self, namespace: bytes, digests: Sequence[bytes]) -> None:
        """*digests* were offered to an engine: those that a tier has not taken are offered to it again."""
        for keeper in self.keepers:
            keeper.writing.used(namespace, digests)

    def forget(self, namespace: bytes) -> list[Deletion]:
        """Serve nothing of *namespace* any more. Returns the deletions, which go on by themselves."""
        return [keeper.forget(namespace) for keeper in self.keepers]

    async def wait_idle(self) -> None:
        """Until all is written back that will be."""
        for keeper in self.keepers:
            await keeper.writing.wait_idle()

    @property
    def bytes_queued(self) -> int:
        """Bytes that are still to be written to tiers."""
        return sum(keeper.writing.queue.bytes_queued + keeper.writing.queue.bytes_writing for keeper in self.keepers)

    def statistics(self) -> list[dict[str, Any]]:
        """One table a tier."""
        return [keeper.statistics() for keeper in self.keepers]

    def _loaded(self, source: Keeper, keys: Sequence[ChunkKey]) -> None:
        for keeper in self.keepers:
            if keeper is not source:
                for key in keys:
                    keeper.writing.offer(key)

    def _room(self) -> int:
        """Bytes that may still be loaded: what is loaded and waits for its lookup counts as leases do."""
        loads = [keeper.loading.loads for keeper in self.keepers]
        return self._index.room_to_offer - sum(some.bytes_landed + some.bytes_in_flight for some in loads)

    def _writeback_limit(self) -> int:
        return min(self._config.writeback_bytes, int(self._index.bytes_taken * WRITEBACK_SHARE))
