"""What became of the latest lookups that missed: the answers to "why did I miss?", and the records of all lookups.

A lookup is one record, a plain table of figures and names, without tokens or digests. Those that missed are kept here,
`MOST` of them. With `[records]` the record of each lookup also goes to a file, behind the thread door.
"""

import time
from collections import deque
from collections.abc import Sequence
from typing import Any

import trio

from lmcache_trio._core.index.session import Session
from lmcache_trio._server.engine import Engine
from lmcache_trio._server.misses import Misses, Search
from lmcache_trio._server.records import RecordQueue

__all__ = ["MOST", "TOLD", "Requests"]

MOST = 1024
"""Lookups that missed and are remembered, 1.5 KB each."""
TOLD = 100
"""Records in one answer, at most."""


class Requests:
    """Makes the records. *records* is None where no file was asked for."""

    def __init__(self, misses: Misses, records: RecordQueue | None) -> None:
        self.are_all_noted = records is not None
        """Whether lookups that hit whole are noted too."""
        self._misses = misses
        self._records = records
        self._recent: deque[dict[str, Any]] = deque(maxlen=MOST)

    def note(self, engine: Engine, session: Session, wanted: Sequence[bytes], search: Search | None) -> None:
        """The lookup of *wanted* was answered as *session* says. *search* is None if tiers were not asked."""
        hit, tokens = session.chunks, engine.chunk_tokens
        missed = self._misses.note(engine, wanted, hit, search) if hit < len(wanted) else []
        record = {
            "time": round(time.time(), 3),
            "request": session.request,
            "engine": engine.name,
            "tokens": len(wanted) * tokens,
            "hit_tokens": {"memory": (hit - session.loaded) * tokens, "tier": session.loaded * tokens},
            "missed_tokens": missed,
            "wait_seconds": 0.0 if search is None else round(trio.current_time() - search.began, 6),
            "bytes": self._misses.bytes_of(engine, hit),
        }
        if missed:
            self._recent.append(record)
        if self._records is not None:
            self._records.write(record)

    def find(self, request: str) -> list[dict[str, Any]]:
        """The latest records, `TOLD` at most and the latest one first: of *request*, or of all if it is empty."""
        found: list[dict[str, Any]] = []
        for record in reversed(self._recent):
            if len(found) == TOLD:
                break
            if request in ("", record["request"]):
                found.append(record)
        return found
