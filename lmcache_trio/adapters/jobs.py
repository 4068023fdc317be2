"""What a worker has under way and what came of it: one table, shared by the host's threads and the loop.

Only bookkeeping: nothing here waits but `Job.turn`, and `wait_copied` and `wait_ended` on behalf of a host thread.
"""

import math
import time
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any

import trio

from lmcache_trio.adapters.specs import LoadSpec, StoreSpec
from lmcache_trio.threads import Handoff, Latch

__all__ = ["Job", "Jobs"]


class Job:
    """One store or retrieve. *copied* comes when its copy ended, or will not begin; *ended* when all of it is over."""

    __slots__ = ("asked", "before", "copied", "ended", "fence", "kv", "reason", "reported", "spec")

    def __init__(self, spec: StoreSpec | LoadSpec, *, reported: bool, fence: Any, kv: Any) -> None:
        self.spec = spec
        self.kv = kv
        """The `PagedKV` whose blocks it names: what was registered when it was submitted."""
        self.reason = "unavailable"
        """What it is counted as if it does not end well."""
        self.reported = reported
        """Is it named by `take_finished`? One that its host waits for is not."""
        self.asked = trio.Event()
        """In the loop: a store has its slots, or will never have any."""
        self.before: Job | None = None
        """The store that was submitted before this one. A chunk's parent must be reserved before it."""
        self.fence = fence
        """Of KV on a GPU: the event behind what its engine had submitted by then."""
        self.copied: Handoff[bool] = Handoff()
        self.ended: Handoff[bool] = Handoff()

    async def turn(self) -> None:
        """In the loop: until the store before this one has asked. Tasks begin in any order."""
        if self.before is not None:
            await self.before.asked.wait()
            self.before = None


class Jobs:
    """Stores and retrieves from submit to their end."""

    def __init__(self) -> None:
        self._latch = Latch()
        self._running: set[Job] = set()
        self._last_store: Job | None = None
        self._stored: set[str] = set()
        self._retrieved: set[str] = set()
        self._failed_blocks: set[int] = set()
        self._counted: Counter[str] = Counter()
        self._any_ended: Handoff[bool] = Handoff()
        """Renewed by each wait."""

    def begin(self, spec: StoreSpec | LoadSpec, *, reported: bool, fence: Any, kv: Any) -> Job:
        job = Job(spec, reported=reported, fence=fence, kv=kv)
        with self._latch:
            self._running.add(job)
            if isinstance(spec, StoreSpec):
                job.before, self._last_store = self._last_store, job
        return job

    def count(self, what: str, number: int) -> None:
        if number:
            with self._latch:
                self._counted[what] += number

    def end(self, job: Job, *, failed: bool) -> None:
        """All of *job* is over, its copy too. Blocks of a failed retrieve hold anything. Idempotent."""
        with self._latch:
            if job not in self._running:
                return
            self._running.discard(job)
            job.before = None
            if self._last_store is job:
                self._last_store = None
            if isinstance(job.spec, LoadSpec):
                if failed:
                    self._failed_blocks.update(job.spec.block_ids)
                if job.reported:
                    self._retrieved.add(job.spec.request_id)
            elif job.reported:
                self._stored.add(job.spec.request_id)
            job.copied.set(True)
            job.ended.set(True)
            self._any_ended.set(True)

    def copied(self, job: Job) -> None:
        with self._latch:
            job.copied.set(True)

    def stores(self, request_ids: Iterable[str] | None) -> list[Job]:
        """Stores that are under way, of *request_ids* or of all."""
        wanted = None if request_ids is None else set(request_ids)
        with self._latch:
            return [
                job
                for job in self._running
                if isinstance(job.spec, StoreSpec) and (wanted is None or job.spec.request_id in wanted)
            ]

    def wait_retrieve(self, seconds: float) -> None:
        """Block until a job ended, at most *seconds*; return at once when no retrieve is under way, or one is to be
        reported already.
        """
        with self._latch:
            loading = any(isinstance(job.spec, LoadSpec) for job in self._running)
            if not loading or any(self._reportable()):
                return
            if self._any_ended.done:
                self._any_ended = Handoff()
            ended = self._any_ended
        ended.wait(seconds)

    def running(self) -> list[Job]:
        with self._latch:
            return list(self._running)

    def take_finished(self) -> tuple[set[str], set[str]]:
        """Request ids of which no store, or no retrieve, is under way any more, since the last call."""
        with self._latch:
            stored, retrieved = self._reportable()
            self._stored -= stored
            self._retrieved -= retrieved
            return stored, retrieved

    def _reportable(self) -> tuple[set[str], set[str]]:
        storing = {job.spec.request_id for job in self._running if isinstance(job.spec, StoreSpec)}
        loading = {job.spec.request_id for job in self._running if isinstance(job.spec, LoadSpec)}
        return self._stored - storing, self._retrieved - loading

    def take_failed_blocks(self) -> set[int]:
        with self._latch:
            failed, self._failed_blocks = self._failed_blocks, set()
            return failed

    def statistics(self) -> dict[str, int]:
        with self._latch:
            return {"running": len(self._running), **self._counted}


def wait_for(handoffs: Iterable[Handoff[bool]], alive: Callable[[], bool], seconds: float = math.inf) -> bool:
    """Block the calling host thread until all came. They come by notification; a loop that died is noticed too.

    False: that took longer than *seconds*.
    """
    end = time.monotonic() + seconds
    for handoff in handoffs:
        while not handoff.wait(min(1.0, end - time.monotonic())) and alive():
            if time.monotonic() >= end:
                return False
    return True
