"""Why lookups missed: what the server knows of a missed chunk, gathered for `_core.misses`, and the counts by reason.

A lookup that hits whole never comes here. One that misses costs some questions to tables that are in memory, O(log n)
of them for n chunks.
"""

from collections.abc import Sequence
from typing import Any

import attrs
import trio

from lmcache_trio._core.departures import Cause
from lmcache_trio._core.index.index import Index
from lmcache_trio._core.keys import ChunkKey
from lmcache_trio._core.misses import InMemory, InTiers, Reason, Seen, known_run, reasons_of
from lmcache_trio._core.tiers.plan import Place, Plan
from lmcache_trio._server.counts import Counts
from lmcache_trio._server.drain import Drain
from lmcache_trio._server.engine import Engine
from lmcache_trio._server.tiers.tiers import Tiers

__all__ = ["Misses", "Search"]

_DETAILS: dict[Reason, dict[InTiers | Cause, str]] = {
    Reason.NOT_ADMITTED: {
        Cause.NO_SPACE: "when it was stored, all memory was in use",
        Cause.SHARE: "when it was stored, its engine had reached write_share",
        InTiers.UNWRITTEN: "no tier took it before it was evicted",
        InTiers.NO_ROOM: "a tier has it, and all memory is in use",
    },
    Reason.LATE: {
        InTiers.UNASKED: "the lookup left tiers no time",
        InTiers.LATE: "tiers had not brought it when the time was over",
    },
    Reason.LEASE_SHARE: {InTiers.NO_SHARE: "a tier has it, and lease_share is used up"},
}


@attrs.define(eq=False)
class Search:
    """What a prefetch, which *began* then, learned of chunks that it did not bring."""

    began: float
    plan: Plan | None = None
    reach: int = 0
    """Chunks that the tiers might still have brought when the time was over."""
    refused: dict[ChunkKey, InTiers] = attrs.field(factory=dict)
    """What a tier has, and memory did not take."""

    def found(self, group: int, position: int, key: ChunkKey) -> bool:
        """Whether a tier has the part."""
        place = Place.UNKNOWN if self.plan is None else self.plan.place(group, position)
        return place in (Place.FOUND, Place.COMING) or key in self.refused


class Misses:
    """Finds the reasons of one lookup after the other, and counts the tokens."""

    def __init__(self, index: Index, tiers: Tiers, drain: Drain, counts: Counts) -> None:
        self._index = index
        self._tiers = tiers
        self._drain = drain
        self._counts = counts

    def note(self, engine: Engine, wanted: Sequence[bytes], hit: int, search: Search | None) -> list[dict[str, Any]]:
        """A lookup of *wanted* was answered with *hit* chunks, which are not all. *search* is None if none was made.

        Returns a table for each run of missed tokens: its `reason`, `from_token`, `tokens`, and more where there is.
        """
        seen = self._look(engine, wanted, hit, search)
        told: list[dict[str, Any]] = []
        runs = reasons_of(seen, len(wanted), lambda: self._end_of_known(engine, wanted, hit, seen, search))
        for missed in runs:
            tokens = missed.chunks * engine.chunk_tokens
            self._counts.missed_tokens[missed.reason] += tokens
            run = {
                "reason": missed.reason.value,
                "from_token": missed.position * engine.chunk_tokens,
                "tokens": tokens,
            }
            told.append(run)
        told[0].update(self._details(engine, seen, runs[0].reason))
        return told

    def bytes_of(self, engine: Engine, hit: int) -> int:
        """Bytes in memory of what a hit of *hit* chunks needs."""
        parts = [hit - group.first(hit, engine.chunk_tokens) for group in engine.groups]
        sizes = [self._index.chunk_bytes(namespace) for namespace in engine.namespaces]
        return sum(count * size for count, size in zip(parts, sizes, strict=False))

    def _look(self, engine: Engine, wanted: Sequence[bytes], hit: int, search: Search | None) -> Seen:
        index, namespaces = self._index, engine.namespaces
        if not namespaces:
            return Seen(hit, registered=False)
        part = index.missed_part(namespaces, wanted, hit)
        return Seen(
            hit,
            memory=index.place_of(part),
            tiers=self._in_tiers(part, hit, search),
            left=index.departures.find(part.namespace, part.digest),
            fits=engine.chunk_bytes <= index.arena.capacity,
            stopping=self._drain.stopping,
            refill=index.filled < engine.refilled_at,
        )

    def _end_of_known(
        self, engine: Engine, wanted: Sequence[bytes], hit: int, seen: Seen, search: Search | None
    ) -> int:
        index = self._index

        def is_known(position: int) -> bool:
            keys = [ChunkKey(namespace, wanted[position]) for namespace in engine.namespaces]
            return any(
                index.place_of(key) is not InMemory.ABSENT
                or index.departures.find(key.namespace, key.digest) is not None
                or (search is not None and search.found(group, position, key))
                for group, key in enumerate(keys)
            )

        if search is not None and seen.tiers is InTiers.LATE:
            return search.reach
        return known_run(is_known, hit, len(wanted))

    def _details(self, engine: Engine, seen: Seen, reason: Reason) -> dict[str, Any]:
        """What else there is to tell of the chunk of *seen*, which was missed for *reason*."""
        left = seen.left
        if reason is Reason.NOT_REGISTERED:
            missing = sorted(set(range(engine.shards * engine.replicas)) - set(engine.layouts))
            return {"detail": f"workers {missing[:8]} of {engine.shards * engine.replicas} have not registered"}
        if reason is Reason.TOO_LARGE:
            return {"detail": f"a chunk takes {engine.chunk_bytes} bytes, and memory has {self._index.arena.capacity}"}
        details: dict[str, Any] = {}
        if left is not None and left.cause is Cause.EVICTED and seen.memory is InMemory.ABSENT:
            details["evicted_seconds_ago"] = round(trio.current_time() - left.when, 3)
            details["idle_seconds"] = round(left.idle, 3)
        if reason is Reason.TIER_FENCED:
            closed = next(runner for runner in self._tiers.runners if not runner.calls.open)
            fence = closed.calls.fence
            details["detail"] = f"the tier {closed.name} is {fence.state.value}: {fence.reason}".removesuffix(": ")
        elif reason in _DETAILS:
            cause = seen.tiers if left is None or left.cause is Cause.EVICTED else left.cause
            details["detail"] = _DETAILS[reason].get(cause, "")
        return details

    def _in_tiers(self, part: ChunkKey, hit: int, search: Search | None) -> InTiers:
        runners = self._tiers.runners
        if not runners:
            return InTiers.NONE
        if search is not None and search.reach > hit:
            return InTiers.LATE
        if search is not None and part in search.refused:
            return search.refused[part]
        if not all(runner.calls.open for runner in runners):
            return InTiers.CLOSED
        if search is None:
            return InTiers.UNASKED
        mark = hash((part.namespace, part.digest))
        return InTiers.UNWRITTEN if any(mark in writer.unwritten for writer in self._tiers.writers) else InTiers.NONE
