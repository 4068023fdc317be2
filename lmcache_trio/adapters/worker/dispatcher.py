"""From a spec to the mover that carries it out: the jobs that it makes, and the choice between the two paths."""

import logging
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, TypeVar, get_args

import trio

from lmcache_trio._wire.messages import MAX_DIGESTS, MAX_RESERVED
from lmcache_trio.adapters.link import Link
from lmcache_trio.adapters.specs import LoadSpec, StoreSpec
from lmcache_trio.adapters.worker.device_mover import DeviceMover
from lmcache_trio.adapters.worker.jobs import Jobs, LoadJob, StoreJob, wait_for
from lmcache_trio.adapters.worker.mover import Mover, RegisteredKV
from lmcache_trio.adapters.worker.shm_mover import ShmMover
from lmcache_trio.adapters.worker.store_step import StoreStep
from lmcache_trio.client import Client
from lmcache_trio.errors import Misuse, Unavailable

if TYPE_CHECKING:
    from lmcache_trio.adapters.worker.paged import PagedKV

__all__ = ["Dispatcher", "Path"]

logger = logging.getLogger("lmcache_trio")
Path = Literal["auto", "device", "shm"]
_Spec = TypeVar("_Spec", StoreSpec, LoadSpec)


class Dispatcher:
    """Submits jobs of the KV in *registered*, whose blocks have *block_tokens* tokens, and chooses their mover."""

    def __init__(  # noqa: PLR0913  (what it connects)
        self,
        wanted: Path,
        link: Link,
        jobs: Jobs,
        registered: RegisteredKV,
        block_tokens: int,
        shm: ShmMover,
        device: DeviceMover,
    ) -> None:
        if wanted not in get_args(Path):
            raise Misuse(f"path is {wanted!r}: it must be one of {', '.join(get_args(Path))}")
        self.wanted = wanted
        self.path: Literal["device", "shm"] = "shm"
        self.reason = "no KV is registered yet"
        self.mover: Mover | None = None if wanted == "device" else shm
        """The mover of `path`; None if that is not the path that was asked for."""
        self._link = link
        self._jobs = jobs
        self._registered = registered
        self._block_tokens = block_tokens
        self._shm = shm
        self._device = device
        self._choices = 0

    # --- choosing, in the loop --------------------------------------------------------------------------------------

    async def choose(self, client: Client, kv: "PagedKV") -> None:
        """Choose the path for *client*'s connection, where the layout of *kv* is registered."""
        if self.wanted == "shm":
            self._take("shm", "it was asked for")
            return
        self._choices = mine = self._choices + 1
        try:
            await self._device.attach(client, kv.tensors, kv.num_blocks)
        except (Unavailable, Misuse, trio.TooSlowError) as exc:
            if client.lost:
                raise
            if mine == self._choices:  # else the layout was registered anew meanwhile: that registration chooses
                self._take("shm", str(exc) or "the server took too long to open the KV")
        else:
            self._take("device", "the server has opened this engine's KV")

    def _take(self, path: Literal["device", "shm"], reason: str) -> None:
        if (path, reason) != (self.path, self.reason):
            self.path, self.reason = path, reason
            copier = None if self.wanted == "device" else self._shm
            self.mover = self._device if path == "device" else copier
            if self.mover is not None:
                logger.info("KV takes the path %r: %s", path, reason)
            else:
                logger.warning("working without a cache: the path 'device' was asked for, but %s", reason)

    # --- submitting, called by the host -----------------------------------------------------------------------------

    def store(self, specs: Sequence[StoreSpec], *, reported: bool, step: StoreStep | None = None) -> list[StoreJob]:
        """Submit *specs*: each by itself, or with *step* all of them layer by layer.

        A spec makes several jobs where one message cannot name all of it: 65,536 tokens in chunks of 256.
        """
        jobs = [
            self._jobs.begin_store(part, reported=reported, fence=fence, kv=self._registered.latest)
            for spec, fence in self._planned(specs)
            for part in spec.parts(MAX_RESERVED, MAX_DIGESTS)
        ]
        for together in [[job] for job in jobs] if step is None else [jobs]:
            self._start(self._store, together, step)
        return jobs

    def load(self, specs: Sequence[LoadSpec], *, reported: bool, layers: int = 0) -> list[LoadJob]:
        """Submit *specs*: each by itself, or all of them by *layers* layers. Jobs as in `store`."""
        jobs = [
            self._jobs.begin_load(part, reported=reported, fence=fence, kv=self._registered.latest, layers=layers)
            for spec, fence in self._planned(specs)
            for part in spec.parts(MAX_DIGESTS)
        ]
        for together in [[job] for job in jobs] if not layers else [jobs]:
            self._start(self._load, together)
        return jobs

    def _planned(self, specs: Sequence[_Spec]) -> list[tuple[_Spec, Any]]:
        """*specs* with this worker's values, each with its fence. `Misuse`: its blocks are not this worker's."""
        planned = [spec.planned_for(self._registered.chunk_tokens, self._block_tokens) for spec in specs]
        for spec in planned:
            self.kv.check(spec.block_ids)
        return [(spec, self.kv.fence()) for spec in planned]

    @property
    def kv(self) -> "PagedKV":
        """What the host registered last."""
        if self._registered.latest is None:
            raise Misuse("register_kv_caches comes before stores and retrieves")
        return self._registered.latest

    def wait(self, jobs: Sequence[StoreJob | LoadJob]) -> None:
        """Block until *jobs* are over; those that a dead loop leaves behind fail."""
        wait_for([job.ended for job in jobs], lambda: self._link.alive)
        self._fail(jobs)

    def _start(self, run: Callable[..., Awaitable[None]], jobs: Sequence[StoreJob | LoadJob], *more: object) -> None:
        if not self._link.spawn(run, jobs, *more, refused=partial(self._fail, jobs)):
            self._fail(jobs)

    def _fail(self, jobs: Sequence[StoreJob | LoadJob]) -> None:
        for job in jobs:
            self._jobs.fail(job)

    # --- running, in the loop ---------------------------------------------------------------------------------------

    async def _store(self, client: Client | None, jobs: Sequence[StoreJob], step: StoreStep | None) -> None:
        with self._jobs.contained(*jobs):
            if client is not None and client.arena is not None and self.mover is not None:
                await self.mover.store(client, jobs, step)

    async def _load(self, client: Client | None, jobs: Sequence[LoadJob]) -> None:
        with self._jobs.contained(*jobs):
            if client is not None and client.arena is not None and self.mover is not None:
                wanted = [job for job in jobs if job.spec.lease]
                for job in jobs:
                    if not job.spec.lease:  # its answer was used up before the engine allocated: a miss
                        self._jobs.fail(job)
                await self.mover.load(client, wanted)
