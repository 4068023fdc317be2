"""One tier's life in the server:

    runner      opens the tier, waits for its fence, closes it, waits, probes, opens it again
    |- contains   asks which chunks it has, one call at a time
    |- loader     loads chunks from it into memory, one task per load
    `- writer     writes chunks back to it and deletes namespaces, one call at a time

A tier is opened in the background, and used while its fence is open. A failure answers every question and load, ends
the three branches and closes the tier. After a while the tier is opened again and asked for a chunk that no engine has,
and the deletions that it owes are carried out. Then it serves. A call that hangs in a thread keeps only its own tier
fenced, until it returns.
"""

import trio

from lmcache_trio._core.keys import DIGEST_BYTES, ChunkKey
from lmcache_trio._core.tiers.fence import FenceState
from lmcache_trio._server.tasks import Branch
from lmcache_trio._server.tiers.calls import GuardedCalls
from lmcache_trio._server.tiers.contains import ContainsBatcher
from lmcache_trio._server.tiers.loader import TierLoader
from lmcache_trio._server.tiers.presence import TierPresence
from lmcache_trio._server.tiers.writer import Deletion, TierWriter
from lmcache_trio.abc import Tier
from lmcache_trio.errors import ConfigError, Unavailable
from lmcache_trio.statistics import TierStatistics

__all__ = ["TierRunner"]

ABSENT = ChunkKey(bytes(DIGEST_BYTES), bytes(DIGEST_BYTES))
"""No engine stores this chunk: a tier is asked for it as a probe."""


class TierRunner:
    """Runs one tier. `settled`: its first `open` has returned or failed. `opened`: it has served, or failed to."""

    def __init__(self, tier: Tier, calls: GuardedCalls, loader: TierLoader, writer: TierWriter) -> None:
        self.name = calls.name
        self.tier = tier
        self.calls = calls
        self.contains = ContainsBatcher(calls, tier)
        self.loader = loader
        self.writer = writer
        self.presence = TierPresence(calls, tier, writer)
        self.opened = trio.Event()
        self.settled = trio.Event()
        self.refusal: ConfigError | None = None
        """The wrong setting that keeps the tier from opening at all."""

    async def run(self, branch: Branch) -> None:
        """Run the tier until cancelled. ConfigError: its first opening refused a setting."""
        while True:
            try:
                await self._live(branch)
            except Exception as exc:
                refusal = _refusal_in(exc)
                if refusal is not None and not self.opened.is_set():
                    if not refusal.key.startswith("tiers."):  # a backend names its own setting
                        number = self.name.partition(":")[0]
                        refusal = ConfigError(f"tiers.{number}.{refusal.key}", refusal.problem)
                    self.refusal = refusal
                    self.settled.set()
                    self.opened.set()
                    raise refusal from exc
                self.calls.failed(exc if refusal is None else Unavailable(str(refusal)))
            fence = self.calls.fence
            if fence.state is not FenceState.FENCED:
                self.calls.failed(Unavailable("it closed by itself"))
            self.settled.set()
            self.opened.set()
            await trio.sleep_until(fence.until)
            fence.probe(trio.current_time())

    async def _live(self, branch: Branch) -> None:
        """Serve from one opening to the next fence."""
        async with self.tier.open():
            self.settled.set()
            await self.tier.contains([ABSENT])
            while self.writer.deletions:
                await self.writer.delete_one()
            self.calls.works()
            self.opened.set()
            async with branch() as start:
                start(self.contains.run)
                start(self.loader.run, start)
                start(self.writer.run)
                await self.calls.watch()

    def forget(self, namespace: bytes) -> Deletion:
        """Serve no chunk of *namespace* from before: its questions are answered with no, and its loads have missed."""
        deletion = self.writer.forget(namespace)
        self.contains.give_up(namespace)
        self.loader.give_up(namespace)
        self.presence.forget(namespace)
        return deletion

    def statistics(self) -> TierStatistics:
        fence, loader, writer = self.calls.fence, self.loader, self.writer
        return TierStatistics(
            name=self.name,
            state=fence.state.value,
            fenced=fence.state is not FenceState.OPEN,
            reason=fence.reason,
            failures=fence.failures,
            bugs=self.calls.bugs,
            calls=len(self.calls.under_way),
            questions=len(self.contains),
            loads_held=len(loader.loads),
            loads_in_flight=loader.loads.in_flight,
            bytes_in_flight=loader.loads.bytes_in_flight,
            loads=loader.landed,
            loads_missed=loader.missed,
            loads_without_room=loader.no_room,
            bytes_loaded=loader.bytes_loaded,
            stores=writer.stored,
            stores_refused=writer.refused,
            bytes_stored=writer.bytes_stored,
            bytes_queued=writer.queue.bytes_queued + writer.queue.bytes_writing,
            dropped=writer.queue.dropped + writer.dropped_fenced,
            deletions_owed=len(writer.deletions),
            backend=self.tier.statistics(),
        )


def _refusal_in(exc: Exception) -> ConfigError | None:
    """The ConfigError that *exc* is, or that a nursery of the tier's has wrapped."""
    if isinstance(exc, ExceptionGroup):
        return next((found for inner in exc.exceptions if (found := _refusal_in(inner)) is not None), None)
    return exc if isinstance(exc, ConfigError) else None
