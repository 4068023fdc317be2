"""A worker's jobs: those that are under way, what came of the others, and the KV that they name.

One table is shared by the host's threads and the loop. In the loop, `Jobs.run` has a mover carry out one job; a failure
costs that job and nothing else. Only `wait_retrieve` and `wait_for` keep a host thread waiting.
"""

import logging
import math
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Generic, Protocol, TypeVar

import attrs
import trio

from lmcache_trio.adapters.specs import LoadSpec, StoreSpec
from lmcache_trio.client import Client
from lmcache_trio.errors import Gone, LMCacheTrioError, Unavailable
from lmcache_trio.threads import Handoff, Lock

if TYPE_CHECKING:
    from lmcache_trio.adapters.worker.paged import PagedKV
    from lmcache_trio.host_memory import BlockIndex

__all__ = ["Job", "Jobs", "LoadJob", "Moved", "Mover", "RegisteredKV", "StoreJob", "reply_within", "wait_for"]

logger = logging.getLogger("lmcache_trio")
_Spec = TypeVar("_Spec", StoreSpec, LoadSpec)

MOST_FAILED = 65_536
"""Requests with a failed load that are remembered, for a host that never asks for them."""


class Job(Generic[_Spec]):
    """One store or load from its submission to its end.

    *blocks* are those that its spec names, in *kv*; those of a store have a row per part. *fence*, for KV on a GPU, is
    the event behind what the engine had submitted by then. *reported*: `take_finished` names the job; it does not name
    one that its host waits for.
    """

    __slots__ = ("asked", "blocks", "copied", "ended", "fence", "kv", "reported", "spec")

    def __init__(self, spec: _Spec, blocks: "BlockIndex", *, kv: "PagedKV", fence: Any, reported: bool) -> None:
        self.spec: _Spec = spec
        self.blocks = blocks
        self.kv = kv
        self.fence = fence
        self.reported = reported
        self.asked = trio.Event()
        """In the loop: its request to the server has gone out, or never will."""
        self.copied: Handoff[bool] = Handoff()
        """Its copy has ended, or will not begin: nothing reads or writes its blocks any more."""
        self.ended: Handoff[bool] = Handoff()


class StoreJob(Job[StoreSpec]):
    """One store. Its mover waits for *before*, the store submitted before it, to have asked: tasks begin in any order,
    and a chunk's parent must be reserved before it. *reason* is what the store is counted as if it fails.
    """

    __slots__ = ("before", "reason")

    def __init__(self, spec: StoreSpec, blocks: "BlockIndex", *, kv: "PagedKV", fence: Any, reported: bool) -> None:
        super().__init__(spec, blocks, kv=kv, fence=fence, reported=reported)
        self.before: StoreJob | None = None
        self.reason = "unavailable"


class LoadJob(Job[LoadSpec]):
    """One load."""

    __slots__ = ()


@attrs.frozen
class Moved:
    """What came of a job: the chunks that were stored and are kept, or loaded; and those of a store that were dropped,
    by reason.
    """

    chunks: int
    dropped: Mapping[str, int] = attrs.field(factory=dict)


class Mover(Protocol):
    """Moves the blocks of one job, for a client that has an arena. `Jobs.run` contains what it raises.

    It returns or raises once nothing touches the blocks, and sets `copied` if they are free before that.
    """

    async def store(self, client: Client, job: StoreJob) -> Moved:
        """Store the blocks of *job*."""
        ...

    async def load(self, client: Client, job: LoadJob) -> Moved | None:
        """Fill the blocks of *job*. None: the server does not vouch for what they hold now."""
        ...


@attrs.define(eq=False)
class RegisteredKV:
    """Which KV the host registered, which one the server knows of, and the tokens of a chunk there."""

    latest: "PagedKV | None" = None
    """What the host registered last."""
    known: "PagedKV | None" = None
    """In the loop: the one whose layout the server of this connection was told last."""
    chunk_tokens: int = 0
    """0 before it is known."""

    def check(self, client: Client, job: StoreJob | LoadJob, *, alike: bool) -> None:
        """In the loop, as *job*'s request goes out: `Gone` if it was planned for another layout than the server's.

        *alike*: other KV will do, if it has the same layout.
        """
        spec, known = job.spec, self.known
        if spec.chunk_tokens != client.chunk_tokens:
            why = f"its chunks have {spec.chunk_tokens} tokens, and the server's {client.chunk_tokens}"
        elif known is None:
            raise Unavailable("the layout is not registered")
        elif job.kv is not known and not (alike and job.kv.layout == known.layout):
            why = "other KV caches were registered"
        else:
            return
        if isinstance(job, StoreJob):
            job.reason = "layout"
        raise Gone(f"the layout changed after it was planned: {why}")


class Jobs:
    """The table of stores and loads, from their submission to their end. *mover* moves them."""

    def __init__(self, mover: Mover | None) -> None:
        self.mover = mover
        """In the loop: the mover of jobs that begin now; None if the path that was asked for cannot be had."""
        self._lock = Lock()
        self._stores: set[StoreJob] = set()
        self._loads: set[LoadJob] = set()
        self._last_store: StoreJob | None = None
        self._stored: set[str] = set()
        self._loaded: set[str] = set()
        self._failed_blocks: set[int] = set()
        self._failed_requests: dict[str, None] = {}
        self._counted: Counter[str] = Counter()
        self.bytes_stored = 0
        """Of the chunks that were stored and are kept."""
        self.bytes_loaded = 0
        self._any_ended: Handoff[bool] = Handoff()
        """Renewed by each wait."""

    def begin(self, job: StoreJob | LoadJob) -> None:
        """*job* is under way from now on."""
        with self._lock:
            if isinstance(job, StoreJob):
                self._stores.add(job)
                job.before, self._last_store = self._last_store, job
            else:
                self._loads.add(job)

    async def run(self, client: Client | None, job: StoreJob | LoadJob) -> None:
        """In the loop: the whole of *job*. It fails without a server, without a mover, and by whatever is raised."""
        moved: Moved | None = None
        try:
            if client is None or client.arena is None or self.mover is None:
                return
            if isinstance(job, StoreJob):
                moved = await self.mover.store(client, job)
            elif job.spec.lease:  # else its answer was used up before the engine allocated: a miss
                moved = await self.mover.load(client, job)
        except LMCacheTrioError as exc:
            logger.info("a %s of %s failed: %s", type(job.spec).__name__, job.spec.request_id, exc)
        except Exception:
            self.count("copy_bugs")
            logger.exception("bug in a %s of %s: it failed", type(job.spec).__name__, job.spec.request_id)
        finally:
            job.asked.set()
            self.end(job, moved)

    def end(self, job: StoreJob | LoadJob, moved: Moved | None = None) -> None:
        """*job* is over, unless it was before; *moved* is what came of it. None: it failed, and the blocks of a failed
        load hold anything.
        """
        with self._lock:
            if isinstance(job, StoreJob):
                if job not in self._stores:
                    return
                self._stores.remove(job)
                job.before = None
                if self._last_store is job:
                    self._last_store = None
                came = moved or Moved(0, {job.reason: job.spec.chunks})
                self._counted["stored_chunks"] += came.chunks
                self.bytes_stored += came.chunks * job.blocks[0].size * job.kv.groups[job.spec.group].block_bytes
                for reason, number in came.dropped.items():
                    self._counted[f"dropped_{reason}"] += number
            elif job not in self._loads:
                return
            else:
                self._loads.remove(job)
                if moved is None:
                    self._counted["failed_chunks"] += job.spec.count
                    self._failed_blocks.update(job.spec.block_ids)
                    self._failed_requests[job.spec.request_id] = None
                    if len(self._failed_requests) > MOST_FAILED:
                        del self._failed_requests[next(iter(self._failed_requests))]
                else:
                    self._counted["retrieved_chunks"] += moved.chunks
                    self.bytes_loaded += job.blocks.size * job.kv.groups[job.spec.group].block_bytes
            if job.reported:
                (self._stored if isinstance(job, StoreJob) else self._loaded).add(job.spec.request_id)
            job.copied.set(True)
            job.ended.set(True)
            self._any_ended.set(True)

    def count(self, what: str) -> None:
        with self._lock:
            self._counted[what] += 1

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

    def take_failed_requests(self) -> set[str]:
        """Request ids of which a load failed, and no load is under way any more, since the last call."""
        with self._lock:
            failed = self._failed_requests.keys() - {job.spec.request_id for job in self._loads}
            for request_id in failed:
                del self._failed_requests[request_id]
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


@contextmanager
def reply_within(seconds: float) -> Iterator[None]:
    """`Unavailable` if what is awaited within takes longer than *seconds*."""
    with trio.move_on_after(seconds) as scope:
        yield
    if scope.cancelled_caught:
        raise Unavailable(f"the server did not reply within {seconds} s")
