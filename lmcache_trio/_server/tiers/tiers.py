"""All tiers of a server, nearest first, and the questions that concern them together."""

import logging
import math
from collections.abc import Sequence

import trio

from lmcache_trio._core.index.index import Index
from lmcache_trio._core.tiers.fence import Fence
from lmcache_trio._core.tiers.loads import Loads
from lmcache_trio._server.clock import Clock
from lmcache_trio._server.plugins import make_backend
from lmcache_trio._server.tasks import Branch, Starter
from lmcache_trio._server.tiers.calls import GuardedCalls
from lmcache_trio._server.tiers.loader import MOST, TierLoader
from lmcache_trio._server.tiers.runner import TierRunner
from lmcache_trio._server.tiers.writer import Deletion, TierWriter
from lmcache_trio.abc import LocalTier, Memory, Tier
from lmcache_trio.config import Config
from lmcache_trio.errors import ConfigError
from lmcache_trio.statistics import TierStatistics

__all__ = ["FIRST_OPENING", "Tiers", "make_tiers"]

log = logging.getLogger("lmcache_trio.server")

FIRST_OPENING = 0.3
"""Seconds that a start gives its tiers to open, beside its other work. Most tiers do, so a wrong setting ends the start
at once. A slower tier opens in the background: a server is ready in under a second with any tiers. For a `LocalTier`
the start waits without a limit, so that its wrong settings end the start on any machine."""


def make_tiers(config: Config) -> list[Tier]:
    """The tiers that `[[tiers]]` names, each made with the rest of its table."""
    return [make_backend("tiers", f"tiers.{i}", table, Tier) for i, table in enumerate(config.tiers)]  # type: ignore[type-abstract]


class Tiers:
    """The runners of all tiers. Made without a task; `open` starts one task per tier."""

    def __init__(self, tiers: Sequence[Tier], index: Index, memory: Memory, clock: Clock, config: Config) -> None:
        self._opened_by = -math.inf
        self._patience = config.tier_timeout
        names = [str(table["backend"]) for table in config.tiers] or [type(tier).__name__ for tier in tiers]
        guarded = [GuardedCalls(f"{i}:{name}", Fence(), config.tier_timeout) for i, name in enumerate(names)]
        self.writers = [
            TierWriter(calls, tier, index, memory, config) for calls, tier in zip(guarded, tiers, strict=True)
        ]
        """A chunk that became READY by a store is offered to each."""
        every = [Loads(most_bytes=config.prefetch_bytes, most=MOST) for _ in tiers]
        self.runners: list[TierRunner] = []
        for calls, tier, loads, writer in zip(guarded, tiers, every, self.writers, strict=True):
            others = [other for other in self.writers if other is not writer]
            loader = TierLoader(calls, tier, index, memory, clock, config, loads, every, others)
            self.runners.append(TierRunner(tier, calls, loader, writer))

    @property
    def any_open(self) -> bool:
        """Whether at least one tier may be called."""
        return any(runner.calls.open for runner in self.runners)

    @property
    def refusal(self) -> ConfigError | None:
        """The wrong setting that kept a tier from opening, if there is one."""
        return next((runner.refusal for runner in self.runners if runner.refusal is not None), None)

    def open(self, start: Starter, branch: Branch) -> None:
        """Start all runners, which open their tiers."""
        self._opened_by = trio.current_time() + FIRST_OPENING
        for runner in self.runners:
            start(runner.run, branch)

    async def wait_opened(self) -> None:
        """Wait until each tier is open or has failed to open, or `FIRST_OPENING` is over. In any case, wait until each
        `LocalTier` is open or has failed to open. Raises `refusal`.
        """
        with trio.move_on_at(self._opened_by):
            for runner in self.runners:
                await runner.opened.wait()
        for runner in self.runners:
            if isinstance(runner.tier, LocalTier):
                with trio.move_on_after(self._patience) as patience:
                    await runner.settled.wait()
                if patience.cancelled_caught:
                    log.warning("the start waits for the tier %s, which is not open yet: it may hang", runner.name)
                    await runner.settled.wait()
        if self.refusal is not None:  # its runner's task ends the server too, maybe later than this one
            raise self.refusal

    def forget(self, namespace: bytes) -> list[Deletion]:
        """Serve no chunk of *namespace* from before. Returns the deletions, which the runners carry out."""
        return [runner.forget(namespace) for runner in self.runners]

    async def wait_idle(self) -> None:
        """Wait until every tier has written all offered chunks, or is fenced."""
        for writer in self.writers:
            await writer.wait_idle()

    @property
    def bytes_queued(self) -> int:
        """Bytes that are still to be written to tiers."""
        return sum(writer.queue.bytes_queued + writer.queue.bytes_writing for writer in self.writers)

    @property
    def capacity(self) -> int:
        """Bytes of chunks that the largest tier can hold. Each tier is written all chunks."""
        return max((int(runner.tier.statistics()["bytes_capacity"]) for runner in self.runners), default=0)

    def statistics(self) -> tuple[TierStatistics, ...]:
        return tuple(runner.statistics() for runner in self.runners)
