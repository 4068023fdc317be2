"""What a worker has under way and what came of it: one table, shared by the host's threads and the loop.

Only bookkeeping: nothing here waits but `StoreJob.turn`, and `wait_retrieve` and `wait_for` on behalf of a host thread.
"""

import logging
import math
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Generic, TypeVar

import trio

from lmcache_trio.adapters.specs import LoadSpec, StoreSpec
from lmcache_trio.errors import LMCacheTrioError
from lmcache_trio.threads import Handoff, Lock

__all__ = ["Job", "Jobs", "LoadJob", "StoreJob", "wait_for"]

logger = logging.getLogger("lmcache_trio")
_Spec = TypeVar("_Spec", StoreSpec, LoadSpec)


class Job(Generic[_Spec]):
    """One store or load from its submission to its end.

    *copied* is set when its copy has ended, or will not begin; *ended* when all of it is over.
    """

    __slots__ = ("asked", "copied", "ended", "fence", "kv", "reported", "spec")

    def __init__(self, spec: _Spec, *, reported: bool, fence: Any, kv: Any) -> None:
        self.spec: _Spec = spec
        self.kv = kv
        """The `PagedKV` whose blocks it names: what was registered when it was submitted."""
        self.fence = fence
        """For KV on a GPU: the event behind what its engine had submitted by then."""
        self.reported = reported
        """Does `take_finished` name it? It does not name a job that its host waits for."""
        self.asked = trio.Event()
        """In the loop: its request to the server has gone out, or never will."""
        self.copied: Handoff[bool] = Handoff()
        self.ended: Handoff[bool] = Handoff()


class StoreJob(Job[StoreSpec]):
    """One store. *before* is the store that was submitted before it: a chunk's parent must be reserved before it."""

    __slots__ = ("before", "reason")

    def __init__(self, spec: StoreSpec, *, reported: bool, fence: Any, kv: Any) -> None:
        super().__init__(spec, reported=reported, fence=fence, kv=kv)
        self.before: StoreJob | None = None
        self.reason = "unavailable"
        """What it is counted as if it fails."""

    async def turn(self) -> None:
        """In the loop: wait until the store before this one has asked. Tasks begin in any order."""
        if self.before is not None:
            await self.before.asked.wait()
            self.before = None


class LoadJob(Job[LoadSpec]):
    """One load. With *layers* it is loaded layer by layer: *gates* has a gate per layer, which `Jobs.reached` opens."""

    __slots__ = ("_opened", "gates")

    def __init__(self, spec: LoadSpec, *, reported: bool, fence: Any, kv: Any, layers: int = 0) -> None:
        super().__init__(spec, reported=reported, fence=fence, kv=kv)
        self.gates: list[Handoff[bool]] = [Handoff() for _ in range(layers)]
        self._opened = 0

    def open(self, layers: int) -> None:
        """Open the first *layers* gates, in one thread at a time."""
        for gate in self.gates[self._opened : layers]:
            gate.set(True)
        self._opened = max(self._opened, layers)


class Jobs:
    """Stores and loads from their submission to their end."""

    def __init__(self) -> None:
        self._lock = Lock()
        self._stores: set[StoreJob] = set()
        self._loads: set[LoadJob] = set()
        self._last_store: StoreJob | None = None
        self._stored: set[str] = set()
        self._loaded: set[str] = set()
        self._failed_blocks: set[int] = set()
        self._counted: Counter[str] = Counter()
        self._any_ended: Handoff[bool] = Handoff()
        """Renewed by each wait."""

    def begin_store(self, spec: StoreSpec, *, reported: bool, fence: Any, kv: Any) -> StoreJob:
        job = StoreJob(spec, reported=reported, fence=fence, kv=kv)
        with self._lock:
            self._stores.add(job)
            job.before, self._last_store = self._last_store, job
        return job

    def begin_load(self, spec: LoadSpec, *, reported: bool, fence: Any, kv: Any, layers: int = 0) -> LoadJob:
        job = LoadJob(spec, reported=reported, fence=fence, kv=kv, layers=layers)
        with self._lock:
            self._loads.add(job)
        return job

    # --- progress and ends: each end is idempotent ------------------------------------------------------------------

    def reached(self, jobs: Iterable[LoadJob], layers: int) -> None:
        """The first *layers* layers of *jobs* are in their blocks. Called in any thread."""
        with self._lock:
            for job in jobs:
                job.open(layers)

    def copied(self, jobs: Iterable[StoreJob | LoadJob]) -> None:
        """The copies of *jobs* have ended: nothing reads or writes their blocks any more."""
        with self._lock:
            for job in jobs:
                job.copied.set(True)

    def stored(self, job: StoreJob, kept: int, dropped: Mapping[str, int]) -> None:
        """*job* ended well: *kept* chunks are published, and the others *dropped*, each for its reason."""
        with self._lock:
            if job in self._stores:
                self._counted["stored_chunks"] += kept
                for reason, number in dropped.items():
                    self._counted[f"dropped_{reason}"] += number
                self._end(job)

    def loaded(self, job: LoadJob) -> None:
        """*job* ended well: its blocks hold what the server has vouched for."""
        with self._lock:
            if job in self._loads:
                self._counted["retrieved_chunks"] += job.spec.count
                self._end(job)

    def fail(self, job: StoreJob | LoadJob) -> None:
        """*job* did not end well, if it has not ended. The blocks of a failed load hold anything."""
        with self._lock:
            if isinstance(job, StoreJob):
                if job in self._stores:
                    self._counted[f"dropped_{job.reason}"] += job.spec.chunks
                    self._end(job)
            elif job in self._loads:
                self._counted["failed_chunks"] += job.spec.count
                self._failed_blocks.update(job.spec.block_ids)
                self._end(job)

    @contextmanager
    def contained(self, *jobs: StoreJob | LoadJob) -> Iterator[None]:
        """In the loop: whatever fails within costs *jobs*, those that have not ended, and nothing else."""
        try:
            yield
        except LMCacheTrioError as exc:
            logger.info("%s failed: %s", _named(jobs), exc)
        except Exception:
            self.count("copy_bugs")
            logger.exception("bug in %s: it failed", _named(jobs))
        finally:
            for job in jobs:
                job.asked.set()
                self.fail(job)

    def count(self, what: str) -> None:
        with self._lock:
            self._counted[what] += 1

    def _end(self, job: StoreJob | LoadJob) -> None:
        if isinstance(job, StoreJob):
            self._stores.discard(job)
            job.before = None
            if self._last_store is job:
                self._last_store = None
            if job.reported:
                self._stored.add(job.spec.request_id)
        else:
            self._loads.discard(job)
            if job.reported:
                self._loaded.add(job.spec.request_id)
            job.open(len(job.gates))
        job.copied.set(True)
        job.ended.set(True)
        self._any_ended.set(True)

    # --- what the host asks -----------------------------------------------------------------------------------------

    def stores(self, request_ids: Iterable[str] | None) -> list[StoreJob]:
        """Stores that are under way, of *request_ids* or of all."""
        wanted = None if request_ids is None else set(request_ids)
        with self._lock:
            return [job for job in self._stores if wanted is None or job.spec.request_id in wanted]

    def running(self) -> list[StoreJob | LoadJob]:
        with self._lock:
            return [*self._stores, *self._loads]

    def wait_retrieve(self, seconds: float) -> None:
        """Block until a job ended, at most *seconds*; return at once when no load is under way, or one is to be
        reported already.
        """
        with self._lock:
            if not self._loads or any(self._reportable()):
                return
            if self._any_ended.done:
                self._any_ended = Handoff()
            ended = self._any_ended
        ended.wait(seconds)

    def take_finished(self) -> tuple[set[str], set[str]]:
        """Request ids of which no store, or no load, is under way any more, since the last call."""
        with self._lock:
            stored, loaded = self._reportable()
            self._stored -= stored
            self._loaded -= loaded
            return stored, loaded

    def _reportable(self) -> tuple[set[str], set[str]]:
        storing = {job.spec.request_id for job in self._stores}
        loading = {job.spec.request_id for job in self._loads}
        return self._stored - storing, self._loaded - loading

    def take_failed_blocks(self) -> set[int]:
        with self._lock:
            failed, self._failed_blocks = self._failed_blocks, set()
            return failed

    def statistics(self) -> dict[str, int]:
        with self._lock:
            return {"running": len(self._stores) + len(self._loads), **+self._counted}


def wait_for(handoffs: Iterable[Handoff[bool]], alive: Callable[[], bool], seconds: float = math.inf) -> bool:
    """Block the calling host thread until all *handoffs* are set. A loop that died is noticed too.

    False: that took longer than *seconds*.
    """
    end = time.monotonic() + seconds
    for handoff in handoffs:
        while not handoff.wait(min(1.0, end - time.monotonic())) and alive():
            if time.monotonic() >= end:
                return False
    return True


def _named(jobs: Iterable[StoreJob | LoadJob]) -> str:
    return ", ".join(f"a {type(job.spec).__name__} of {job.spec.request_id}" for job in jobs)
