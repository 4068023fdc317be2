"""The `shm` path of a worker: this process copies between its blocks and slots of the arena, in threads.

A store is reserve → copy → commit, a retrieve is pin → copy → "still valid?". It is the half of a `WorkerAdapter` that
touches bytes; which path a job takes, and what a failure means, is decided there.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from lmcache_trio._core.keys import split_digests
from lmcache_trio._wire.codec import unpack_positions
from lmcache_trio._wire.messages import Pinned, Reserved
from lmcache_trio.adapters.jobs import Job
from lmcache_trio.adapters.specs import LoadSpec, StoreSpec
from lmcache_trio.client import Client

if TYPE_CHECKING:
    from lmcache_trio.adapters.worker import WorkerAdapter

__all__ = ["ShmPath"]


class ShmPath:
    """The copying half of a `WorkerAdapter`, which it belongs to."""

    def __init__(self, worker: "WorkerAdapter") -> None:
        self._worker = worker

    async def store(self, client: Client, job: Job) -> None:
        """Store what *job* says; it ends here if it ends well."""
        spec = job.spec
        assert isinstance(spec, StoreSpec)
        reserved = await self._worker._reply(self.reserve, client, job)
        try:
            if reserved.reservation:
                await self._worker._copiers.run(self._gather, client, job, spec, reserved)
            self._worker._jobs.copied(job)
        except BaseException:
            client.abort_nowait(reserved.reservation)
            raise
        await self.commit(client, job, reserved)

    async def commit(self, client: Client, job: Job, reserved: Reserved) -> None:
        """The copy of *job* has ended: publish it, and count what was stored and dropped."""
        for reason, number in reserved.dropped.items():
            self._worker._jobs.count(f"dropped_{reason}", number)
        if reserved.reservation:
            kept = (await self._worker._reply(client.commit, reserved.reservation)).kept
            self._worker._jobs.count("stored_chunks", kept)
            self._worker._jobs.count("dropped_aborted", len(unpack_positions(reserved.positions)) - kept)
        self._worker._jobs.end(job, failed=False)

    async def retrieve(self, client: Client, job: Job) -> None:
        """Fill *job*'s blocks; it ends here if they are valid."""
        spec = job.spec
        assert isinstance(spec, LoadSpec)
        if not spec.lease:
            return  # used up before the engine allocated: a miss
        self._worker._check_layout(client, job)
        pinned = await self._worker._reply(client.retrieve, spec.lease, spec.start, spec.count)
        try:
            await self._worker._copiers.run(self._scatter, client, job, spec, pinned)
            self._worker._jobs.copied(job)
        except BaseException:
            client.done_nowait(pinned.pin)
            raise
        if await self._worker._reply(client.done, pinned.pin):
            self._worker._loaded(job)

    async def reserve(self, client: Client, job: Job) -> Reserved:
        """Slots for *job*, in the order in which stores were submitted."""
        spec = job.spec
        assert isinstance(spec, StoreSpec)
        await job.turn()
        self._worker._check_layout(client, job)
        reserved = await client.reserve(spec.session, spec.parent, split_digests(spec.digests))
        job.asked.set()
        return reserved

    # --- in a thread ------------------------------------------------------------------------------------------------

    def _gather(self, client: Client, job: Job, spec: StoreSpec, reserved: Reserved) -> None:
        """Blocks → slots."""
        if job.fence is not None:
            job.fence.synchronize()
        self._worker._slots_known(spec)
        index, width = job.kv.check(spec.block_ids), spec.chunk_blocks
        half: Callable[[], None] | None = lambda: self._worker._half_copied(spec)  # noqa: E731
        for position, slot in zip(unpack_positions(reserved.positions), client.slots(reserved), strict=True):
            blocks = index[position * width : (position + 1) * width]
            job.kv.gather(blocks, np.frombuffer(slot, dtype=np.uint8), half)
            half = None
        self._worker._before_commit(spec)

    def _scatter(self, client: Client, job: Job, spec: LoadSpec, pinned: Pinned) -> None:
        """Slots → blocks."""
        if job.fence is not None:  # what the engine has still to do with these blocks comes first
            job.fence.synchronize()
        self._worker._slots_known(spec)
        half: Callable[[], None] | None = lambda: self._worker._half_copied(spec)  # noqa: E731
        for place in spec.places(client.slots(pinned)):
            slot, blocks = np.frombuffer(place.slot, dtype=np.uint8), job.kv.check(place.block_ids)
            job.kv.scatter(slot, spec.chunk_blocks, place.skip, blocks, half)
            half = None
        self._worker._before_valid(spec)
