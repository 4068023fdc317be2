"""One tier and its life in the server:

    tier
    |- questions   which chunks it has
    |- loads       from it into memory; a task each
    `- writes      back to it, and deletions

It is opened in the background, and used while its fence is open. A failure ends the three branches, closes the tier and
tells everyone who waits; after a while it is opened again, asked for a chunk that nobody has, and owed deletions are
carried out, before it may serve. A call that hangs in a thread holds up only that: until it returns, the tier stays
fenced.
"""

from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from typing import Any

import trio

from lmcache_trio._core.fence import Fence, FenceState
from lmcache_trio._core.index import Index
from lmcache_trio._core.keys import DIGEST_BYTES, ChunkKey
from lmcache_trio._server.tier_calls import Calls
from lmcache_trio._server.tier_loads import Loading, Start
from lmcache_trio._server.tier_questions import Questions
from lmcache_trio._server.tier_writes import Deletion, Writing
from lmcache_trio.abc import Memory, Tier
from lmcache_trio.config import Config
from lmcache_trio.errors import ConfigError, Unavailable

__all__ = ["Branch", "Keeper"]

Branch = Callable[[], AbstractAsyncContextManager[Start]]
"""`async with branch() as start`: tasks that end with the block. Given by `supervise`."""

NOBODYS = ChunkKey(bytes(DIGEST_BYTES), bytes(DIGEST_BYTES))


class Keeper:
    """Keeps one tier. `opened` is set when it was opened for the first time, or failed to be."""

    def __init__(self, name: str, tier: Tier, index: Index, memory: Memory, config: Config) -> None:
        self.name = name
        self.tier = tier
        self.calls = Calls(name, Fence(patience=config.tier_timeout), self._give_up)
        self.questions = Questions(self.calls, tier)
        self.loading = Loading(self.calls, tier, index, memory, config.prefetch_bytes)
        self.writing = Writing(self.calls, tier, index, memory, config.tier_timeout)
        self.opened = trio.Event()
        self.refusal: ConfigError | None = None
        """Why it cannot be opened at all, as it is set up."""

    @property
    def open(self) -> bool:
        """Whether it may be asked."""
        return self.calls.open

    async def run(self, branch: Branch) -> None:
        """Keep it, until cancelled; ConfigError if its settings do not fit, at the first time."""
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
                    self.opened.set()
                    raise refusal from exc
                self.calls.failed(exc if refusal is None else Unavailable(str(refusal)))
            fence = self.calls.fence
            if fence.state is not FenceState.FENCED:
                self.calls.failed(Unavailable("it closed by itself"))
            self.opened.set()
            await trio.sleep_until(fence.until)
            fence.probe(trio.current_time())

    async def _live(self, branch: Branch) -> None:
        """From one opening to the next fence."""
        async with self.tier.open():
            await self.tier.contains([NOBODYS])
            while self.writing.deletions:
                await self.writing.delete_one()
            self.calls.works()
            self.opened.set()
            async with branch() as start:
                start(self.questions.run)
                start(self.loading.run, start)
                start(self.writing.run)
                await self.calls.watch()

    def forget(self, namespace: bytes) -> Deletion:
        """Nothing of *namespace* is served from now on; what began before comes to nothing."""
        deletion = self.writing.forget(namespace)
        self.questions.give_up(namespace)
        self.loading.give_up(namespace)
        return deletion

    def _give_up(self) -> None:
        """The tier is fenced: whoever waits for it is told."""
        self.questions.give_up()
        self.loading.give_up()
        self.writing.give_up()

    def statistics(self) -> dict[str, Any]:
        """What `lmcache-trio status` says of it; the backend's own figures under `backend`."""
        fence, loading, writing = self.calls.fence, self.loading, self.writing
        return {
            "name": self.name,
            "state": fence.state.value,
            "fenced": fence.state is not FenceState.OPEN,
            "reason": fence.reason,
            "failures": fence.failures,
            "bugs": self.calls.bugs,
            "calls": fence.under_way,
            "questions": len(self.questions),
            "loads_held": len(loading.loads),
            "loads_in_flight": loading.loads.in_flight,
            "bytes_in_flight": loading.loads.bytes_in_flight,
            "loads": loading.landed,
            "loads_missed": loading.missed,
            "loads_without_room": loading.no_room,
            "bytes_loaded": loading.bytes_loaded,
            "stores": writing.stored,
            "stores_refused": writing.refused,
            "bytes_stored": writing.bytes_stored,
            "bytes_queued": writing.queue.bytes_queued + writing.queue.bytes_writing,
            "dropped": writing.queue.dropped + writing.dropped_fenced,
            "deletions_owed": len(writing.deletions),
            "backend": self.tier.statistics(),
        }


def _refusal_in(exc: Exception) -> ConfigError | None:
    """The ConfigError that *exc* is, or that a nursery of the tier's has wrapped."""
    if isinstance(exc, ExceptionGroup):
        return next((found for inner in exc.exceptions if (found := _refusal_in(inner)) is not None), None)
    return exc if isinstance(exc, ConfigError) else None
