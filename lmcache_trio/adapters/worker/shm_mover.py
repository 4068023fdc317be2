"""The mover of the path `shm`: this process copies between its blocks and slots of the arena, in threads.

    store    reserve --> copy --> commit          load    pin --> copy --> is it still valid?

A copy that began is never abandoned. At most cores - 1 copies run at one time: with more, the event loops lag by 4.6 ms
instead of 0.3. Each thread has a queue of its own, because a hop through it costs half of one through a thread pool.
"""

import os
from collections.abc import Callable
from functools import partial

import numpy as np
import trio

from lmcache_trio._transport.arena_map import ArenaMap
from lmcache_trio._wire.codec import POSITIONS
from lmcache_trio._wire.messages import Commit, Committed, Pinned, Reserve, Reserved
from lmcache_trio.adapters.specs import LoadSpec, StoreSpec
from lmcache_trio.adapters.worker.jobs import LoadJob, Moved, RegisteredKV, StoreJob, reply_within
from lmcache_trio.client import Client
from lmcache_trio.errors import Misuse, Unavailable
from lmcache_trio.threads import DedicatedThread

__all__ = ["Probe", "ShmMover", "no_probe"]

Probe = Callable[[str, StoreSpec | LoadSpec], None]
"""Where a test breaks or holds up a copy of this process: called in the copying thread with the point it has reached.

    slots known      the slots are named, nothing is copied yet
    half copied      half of the first chunk is copied
    before commit    all of a store is copied, and not yet committed
    before valid     all of a load is copied, and not yet known to be valid
"""


def no_probe(point: str, spec: StoreSpec | LoadSpec) -> None:
    """The probe of a mover that is not under test."""


class ShmMover:
    """Copies in threads whose names begin with *name*. *reply_timeout*: seconds that it waits for one reply."""

    def __init__(self, name: str, registered: RegisteredKV, reply_timeout: float, probe: Probe = no_probe) -> None:
        self._registered = registered
        self._reply_timeout = reply_timeout
        self._probe = probe
        cores = len(os.sched_getaffinity(0))
        self._threads = [DedicatedThread(f"{name} {i}") for i in range(max(1, cores - 1))]
        self._waiting = [0] * len(self._threads)

    async def store(self, client: Client, job: StoreJob) -> Moved:
        """See `Mover.store`."""
        spec = job.spec
        await self._turn(client, job)
        with reply_within(self._reply_timeout):
            self._registered.check(client, job, alike=True)
            ask = Reserve(client.new_id(), spec.session, spec.parent, spec.digests, spec.group)
            reserved = await client.request(ask, Reserved, lambda late: client.abort_nowait(late.reservation))
        job.asked.set()
        kept, dropped = 0, dict(reserved.dropped)
        if reserved.reservation:
            try:
                await self._copy(self._gather, client.arena, job, reserved)
            except BaseException:
                client.abort_nowait(reserved.reservation)
                raise
        job.copied.set(True)
        if reserved.reservation:
            with reply_within(self._reply_timeout):
                kept = (await client.request(Commit(client.new_id(), reserved.reservation), Committed)).kept
            aborted = len(POSITIONS.unpack(reserved.positions)) - kept
            dropped["aborted"] = dropped.get("aborted", 0) + aborted
        return Moved(kept, dropped)

    async def _turn(self, client: Client, job: StoreJob) -> None:
        """Wait until the store before *job* has asked, for as long as the server says anything."""
        heard = -1
        while job.before is not None and not job.before.asked.is_set() and client.heard != heard:
            heard = client.heard
            with trio.move_on_after(self._reply_timeout):
                await job.before.asked.wait()
        if job.before is not None and not job.before.asked.is_set():
            raise Unavailable(f"the server said nothing for {self._reply_timeout} s")

    async def load(self, client: Client, job: LoadJob) -> Moved | None:
        """See `Mover.load`."""
        spec = job.spec
        self._registered.check(client, job, alike=False)
        with reply_within(self._reply_timeout):
            pinned = await client.retrieve(spec.lease, spec.start, spec.count, group=spec.group)
        try:
            await self._copy(self._scatter, client.arena, job, pinned)
        except BaseException:
            client.done_nowait(pinned.pin)
            raise
        job.copied.set(True)
        with reply_within(self._reply_timeout):
            valid = await client.done(pinned.pin)
        return Moved(spec.count) if valid and job.kv is self._registered.latest else None

    def close(self) -> None:
        """Take no more copies. Idempotent; does not wait."""
        for thread in self._threads:
            thread.close()

    async def _copy(self, copy: Callable[..., None], *args: object) -> None:
        """Run *copy* in the thread with the least to do. Cancelled before it begins or after it returned."""
        chosen = self._waiting.index(min(self._waiting))
        self._waiting[chosen] += 1
        try:
            await self._threads[chosen].run(copy, *args)
        finally:
            self._waiting[chosen] -= 1

    # --- in a thread ------------------------------------------------------------------------------------------------

    def _gather(self, arena: ArenaMap, job: StoreJob, reserved: Reserved) -> None:
        """Blocks → slots."""
        if job.fence is not None:
            job.fence.synchronize()
        self._probe("slots known", job.spec)
        half: Callable[[], None] | None = partial(self._probe, "half copied", job.spec)
        paged = job.kv.groups[job.spec.group]
        for position, slot in zip(POSITIONS.unpack(reserved.positions), arena.slots(reserved), strict=True):
            paged.gather(job.blocks[position], np.frombuffer(slot, dtype=np.uint8), half=half)
            half = None
        self._probe("before commit", job.spec)

    def _scatter(self, arena: ArenaMap, job: LoadJob, pinned: Pinned) -> None:
        """Slots → blocks."""
        if job.fence is not None:  # what the engine has still to do with these blocks comes first
            job.fence.synchronize()
        self._probe("slots known", job.spec)
        half: Callable[[], None] | None = partial(self._probe, "half copied", job.spec)
        paged, slots = job.kv.groups[job.spec.group], arena.slots(pinned)
        width, at, skip = job.spec.chunk_blocks, 0, job.spec.skip_blocks
        if len(job.blocks) > len(slots) * width - skip:
            raise Misuse(f"{len(job.blocks)} blocks do not lie within {len(slots)} chunks of {width} blocks")
        for slot in slots:
            end = at + width - skip
            blocks = job.blocks[at:end]
            places = slice(skip, skip + len(blocks))
            paged.scatter(np.frombuffer(slot, dtype=np.uint8), width, places, blocks, half=half)
            at, skip, half = end, 0, None
        self._probe("before valid", job.spec)
