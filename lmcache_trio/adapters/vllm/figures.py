"""What one process of an engine has counted since it was last asked: the connector's part of vLLM's metrics.

vLLM asks each of its processes after each step, adds the answers up, and hands them to `stats`. A figure is a number,
or a list of observations; nothing was counted where the answer is empty. vLLM is not imported here.
"""

import time
from collections.abc import Callable, Mapping
from typing import Protocol, TypeAlias

import attrs

__all__ = ["DROPPED", "METRICS", "Found", "LookupTimes", "Metric", "WorkerFigures", "added"]

Found: TypeAlias = dict[str, "int | list[float]"]
"""By name: a count, or the observations of a histogram."""

DROPPED = "dropped_"


@attrs.frozen
class Metric:
    """One metric of vLLM's. It is a histogram if it has *buckets*, and a counter otherwise."""

    name: str
    documentation: str
    buckets: tuple[float, ...] = ()


METRICS: Mapping[str, Metric] = {
    "lookup_seconds": Metric(
        "vllm:lmcache_trio_lookup_seconds",
        "Seconds from a prompt's first lookup to its answer.",
        (0.0001, 0.0003, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0),
    ),
    "stored_chunks": Metric("vllm:lmcache_trio_stored_chunks", "Chunks that were stored, per rank and KV group."),
    "stored_bytes": Metric("vllm:lmcache_trio_stored_bytes", "Bytes of KV that were stored."),
    "retrieved_chunks": Metric("vllm:lmcache_trio_loaded_chunks", "Chunks that were loaded, per rank and KV group."),
    "retrieved_bytes": Metric("vllm:lmcache_trio_loaded_bytes", "Bytes of KV that were loaded."),
    "failed_chunks": Metric(
        "vllm:lmcache_trio_failed_chunks", "Chunks whose load failed, per rank and KV group: they are computed."
    ),
    DROPPED: Metric(
        "vllm:lmcache_trio_dropped_chunks", "Chunks that were not stored, by reason, per rank and KV group."
    ),
    "copy_bugs": Metric("vllm:lmcache_trio_copy_bugs", "Stores and loads that failed by a bug; the log has each."),
}
"""By the name of the figure. All figures that begin with DROPPED are one metric, with the reason as a label."""


class LookupTimes:
    """In the scheduler: how long each lookup took, from the first question to the answer that vLLM was given."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._asked: dict[str, float] = {}
        self._seconds: list[float] = []

    def ask(self, request_id: str) -> None:
        """The request is looked up from now on."""
        self._asked[request_id] = self._clock()

    def answer(self, request_id: str) -> bool:
        """Its lookup is answered. True: for the first time. It counts once, however often vLLM is given the answer."""
        asked = self._asked.pop(request_id, None)
        if asked is not None:
            self._seconds.append(self._clock() - asked)
        return asked is not None

    def forget(self, request_id: str) -> None:
        """The request is over. A lookup without an answer is not counted."""
        self._asked.pop(request_id, None)

    def take(self) -> Found:
        """What was counted since the last call."""
        seconds, self._seconds = self._seconds, []
        return {"lookup_seconds": seconds} if seconds else {}


class Moves(Protocol):
    """The part of `WorkerAdapter` that is used here."""

    @property
    def bytes_stored(self) -> int: ...
    @property
    def bytes_loaded(self) -> int: ...
    def statistics(self) -> dict[str, int]: ...


class WorkerFigures:
    """In a worker: what *moves*, its adapter, has counted since the last call."""

    def __init__(self, moves: Moves) -> None:
        self._moves = moves
        self._former: Mapping[str, int] = {}

    def take(self) -> Found:
        """What was counted since the last call. Chunks are counted per rank and KV group."""
        counted = self._moves.statistics()
        del counted["running"]
        now = {**counted, "stored_bytes": self._moves.bytes_stored, "retrieved_bytes": self._moves.bytes_loaded}
        former, self._former = self._former, now
        return {name: total - former.get(name, 0) for name, total in now.items() if total != former.get(name, 0)}


def added(one: Mapping[str, "int | list[float]"], other: Mapping[str, "int | list[float]"]) -> Found:
    """What both have counted."""
    both: Found = dict(one)
    for name, value in other.items():
        before = both.get(name)
        if isinstance(value, list):
            both[name] = [*before, *value] if isinstance(before, list) else value
        else:
            both[name] = value + before if isinstance(before, int) else value
    return both
