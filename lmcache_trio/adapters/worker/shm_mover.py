"""The mover of the path `shm`: this process copies between its blocks and slots of the arena, in threads.

    store    reserve --> copy --> commit          load    pin --> copy --> is it still valid?

A store of a step copies each layer once it is written, and is committed after the step's end; a load by layers copies
layer 0 of all jobs of its step, then layer 1 of all. A copy that began is never abandoned.
"""

import logging
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np

from lmcache_trio._core.keys import split_digests
from lmcache_trio._wire.codec import unpack_positions
from lmcache_trio._wire.messages import Pinned, Reserved
from lmcache_trio.adapters.specs import LoadSpec, StoreSpec
from lmcache_trio.adapters.worker.copiers import Copiers
from lmcache_trio.adapters.worker.jobs import Jobs, LoadJob, StoreJob
from lmcache_trio.adapters.worker.mover import Probe, RegisteredKV, reply_within
from lmcache_trio.adapters.worker.store_step import StoreStep
from lmcache_trio.client import Client
from lmcache_trio.errors import LMCacheTrioError

__all__ = ["ShmMover"]

logger = logging.getLogger("lmcache_trio")


class ShmMover:
    """Copies in the threads of *copiers*. *reply_timeout*: seconds that it waits for one reply of the server."""

    def __init__(
        self, jobs: Jobs, registered: RegisteredKV, copiers: Copiers, reply_timeout: float, probe: Probe | None = None
    ) -> None:
        self._jobs = jobs
        self._registered = registered
        self._copiers = copiers
        self._reply_timeout = reply_timeout
        self._probe = probe

    async def store(self, client: Client, jobs: Sequence[StoreJob], step: StoreStep | None = None) -> None:
        """See `Mover.store`. A job that fails costs those of its step, too."""
        granted: list[tuple[StoreJob, Reserved]] = []
        try:
            for job in jobs:
                if step is not None:
                    await job.turn()  # before the time for its own reply begins
                with reply_within(self._reply_timeout):
                    await job.turn()
                    self._registered.check(client, job, alike=True)
                    spec = job.spec
                    reserved = await client.reserve(spec.session, spec.parent, split_digests(spec.digests))
                job.asked.set()
                granted.append((job, reserved))
            if step is None:
                if any(reserved.reservation for _, reserved in granted):
                    await self._copiers.run(self._gather, client, granted)
            else:
                for layer, written in enumerate(step.written):
                    await written.wait()
                    if step.dropped:
                        break
                    await self._copiers.run(self._gather, client, granted, layer, step.fences[layer])
            self._jobs.copied(jobs)
            if step is not None:
                await step.finished.wait()
                if step.dropped:
                    return
            while granted:
                job, reserved = granted.pop(0)
                kept, dropped = 0, dict(reserved.dropped)
                if reserved.reservation:
                    with reply_within(self._reply_timeout):
                        kept = (await client.commit(reserved.reservation)).kept
                    aborted = len(unpack_positions(reserved.positions)) - kept
                    dropped["aborted"] = dropped.get("aborted", 0) + aborted
                self._jobs.stored(job, kept, dropped)
        finally:
            for _, reserved in granted:
                client.abort_nowait(reserved.reservation)

    async def load(self, client: Client, jobs: Sequence[LoadJob]) -> None:
        """See `Mover.load`."""
        pinned: list[tuple[LoadJob, Pinned]] = []
        try:
            for job in jobs:
                spec = job.spec
                try:
                    self._registered.check(client, job, alike=False)
                    with reply_within(self._reply_timeout):
                        pinned.append((job, await client.retrieve(spec.lease, spec.start, spec.count)))
                except LMCacheTrioError as exc:
                    self._refused(job, exc)
            if pinned:
                await self._copiers.run(self._scatter, client, pinned)
            self._jobs.copied(jobs)
            while pinned:
                job, pin = pinned.pop(0)
                valid = False
                try:
                    with reply_within(self._reply_timeout):
                        valid = await client.done(pin.pin)
                except LMCacheTrioError as exc:
                    self._refused(job, exc)
                if valid and job.kv is self._registered.latest:
                    self._jobs.loaded(job)
        finally:
            for _, pin in pinned:
                client.done_nowait(pin.pin)

    def _refused(self, job: LoadJob, exc: LMCacheTrioError) -> None:
        """The server gave *job* no pin, or did not vouch for what it read: the others of its step go on."""
        logger.info("a load of %s failed: %s", job.spec.request_id, exc)
        self._jobs.fail(job)

    # --- in a thread ------------------------------------------------------------------------------------------------

    def _gather(
        self, client: Client, granted: Sequence[tuple[StoreJob, Reserved]], layer: int | None = None, fence: Any = None
    ) -> None:
        """Blocks → slots: of one *layer*, which is behind *fence*, or of all."""
        if fence is not None:
            fence.synchronize()
        for job, reserved in granted:
            spec, kv, half = job.spec, job.kv, None
            if layer is None:
                if job.fence is not None:
                    job.fence.synchronize()
                half = self._probed(spec)
            index, width = kv.check(spec.block_ids), spec.chunk_blocks
            for position, slot in zip(unpack_positions(reserved.positions), client.slots(reserved), strict=True):
                blocks = index[position * width : (position + 1) * width]
                kv.gather(blocks, np.frombuffer(slot, dtype=np.uint8), layer=layer, half=half)
                half = None
            if self._probe is not None:
                self._probe("before commit" if layer is None else f"layer {layer}", spec)

    def _scatter(self, client: Client, pinned: Sequence[tuple[LoadJob, Pinned]]) -> None:
        """Slots → blocks: all of each job, or layer by layer if they have gates."""
        jobs = [job for job, _ in pinned]
        layers = range(len(jobs[0].gates))
        by_layer: list[Callable[..., None]] = []
        for job, pin in pinned:
            spec, kv, half = job.spec, job.kv, None
            if job.fence is not None:  # what the engine has still to do with these blocks comes first
                job.fence.synchronize()
            if not layers:
                half = self._probed(spec)
            for chunk in spec.targets(client.slots(pin)):
                slot, blocks = np.frombuffer(chunk.slot, dtype=np.uint8), kv.check(chunk.block_ids)
                copy: Callable[..., None] = partial(kv.scatter, slot, spec.chunk_blocks, chunk.skip, blocks)
                if layers:
                    by_layer.append(copy)
                else:
                    copy(half=half)
                half = None
            if not layers and self._probe is not None:
                self._probe("before valid", spec)
        for layer in layers:
            for scatter in by_layer:
                scatter(layer=layer)
            self._jobs.reached(jobs, layer + 1)
            if self._probe is not None:
                for job in jobs:
                    self._probe(f"layer {layer}", job.spec)

    def _probed(self, spec: StoreSpec | LoadSpec) -> Callable[[], None] | None:
        """A copy of *spec* begins; what a test wants to have called in the middle of its first chunk."""
        if self._probe is None:
            return None
        self._probe("slots known", spec)
        return partial(self._probe, "half copied", spec)
