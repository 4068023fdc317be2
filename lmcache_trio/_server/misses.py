"""Why lookups missed: what the server knows of a missed chunk, gathered for `_core.misses`, and the counts by reason.

A lookup that hits whole never comes here. One that misses costs some questions to tables that are in memory, O(log n)
of them for n chunks.
"""

from collections.abc import Sequence

import attrs

from lmcache_trio._core.index.index import Index
from lmcache_trio._core.keys import ChunkKey
from lmcache_trio._core.misses import InMemory, InTiers, Missed, Seen, known_run, reasons_of
from lmcache_trio._core.tiers.plan import Place, Plan
from lmcache_trio._server.counts import Counts
from lmcache_trio._server.drain import Drain
from lmcache_trio._server.engine import Engine
from lmcache_trio._server.tiers.tiers import Tiers

__all__ = ["Misses", "Search"]


@attrs.define(eq=False)
class Search:
    """What a prefetch learned of chunks that it did not bring."""

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

    def note(self, engine: Engine, wanted: Sequence[bytes], hit: int, search: Search | None) -> None:
        """A lookup of *wanted* was answered with *hit* chunks, which are not all. *search* is None if none was made."""
        for missed in self._find(engine, wanted, hit, search):
            self._counts.missed_tokens[missed.reason] += missed.chunks * engine.chunk_tokens

    def _find(self, engine: Engine, wanted: Sequence[bytes], hit: int, search: Search | None) -> list[Missed]:
        index, namespaces = self._index, engine.namespaces
        if not namespaces:
            return reasons_of(Seen(hit, registered=False), len(wanted), lambda: 0)
        part = index.missed_part(namespaces, wanted, hit)
        seen = Seen(
            hit,
            memory=index.place_of(part),
            tiers=self._in_tiers(part, hit, search),
            left=index.departures.find(part.namespace, part.digest),
            fits=sum(index.chunk_bytes(namespace) for namespace in namespaces) <= index.arena.capacity,
            stopping=self._drain.stopping,
            refill=index.filled < engine.refilled_at,
        )

        def is_known(position: int) -> bool:
            keys = [ChunkKey(namespace, wanted[position]) for namespace in namespaces]
            return any(
                index.place_of(key) is not InMemory.ABSENT
                or index.departures.find(key.namespace, key.digest) is not None
                or (search is not None and search.found(group, position, key))
                for group, key in enumerate(keys)
            )

        def end_of_known() -> int:
            if search is not None and seen.tiers is InTiers.LATE:
                return search.reach
            return known_run(is_known, hit, len(wanted))

        return reasons_of(seen, len(wanted), end_of_known)

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
