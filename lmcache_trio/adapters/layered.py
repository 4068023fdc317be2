"""Moves that go layer by layer beside the engine's forward pass: it need not wait for what it does not use yet.

    start_retrieves --> a layer is there --> wait_layer(it) returns --> ... --> wait_retrieves: is all of it valid?
    start_stores    --> layer_written(it) --> it is copied          --> ... --> finish_stores: commit / drop_stores

All retrieves of a step share their layers' order: layer 0 of every one comes before layer 1 of any. Whether what was
loaded is valid is known at the end only, so the host asks `wait_retrieves` before it believes what it computed. A copy
into or out of blocks is never left behind: a retrieve is over when its job is, however it ended.

Stores are committed after `finish_stores`, not after the last layer: a host that computed with a load that was not
valid calls `drop_stores` instead, and nothing of the step is published. On the device path the server copies, and is
told of each layer (`StepStores`).
"""

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import trio

from lmcache_trio._wire.codec import unpack_positions
from lmcache_trio._wire.messages import Pinned, Reserved
from lmcache_trio.adapters.jobs import Job, wait_for
from lmcache_trio.adapters.layered_steps import StepLoads, StepStores
from lmcache_trio.adapters.specs import LoadSpec, StoreSpec
from lmcache_trio.client import Client
from lmcache_trio.errors import LMCacheTrioError, Misuse

if TYPE_CHECKING:
    from lmcache_trio.adapters.worker import WorkerAdapter

__all__ = ["LayeredMoves"]

logger = logging.getLogger("lmcache_trio")


class LayeredMoves:
    """The layer-wise half of a `WorkerAdapter`, which it belongs to."""

    def __init__(self, worker: "WorkerAdapter") -> None:
        self._worker = worker
        self._layers: dict[str, int] = {}
        self._loads: StepLoads | None = None
        self._stores: StepStores | None = None

    def register(self, names: Sequence[str]) -> None:
        """The layers, in the order of the slots. Nothing of a step that began with others is copied by this process any
        more, or published.
        """
        self.wait_retrieves()
        jobs = self._stores.jobs if self._stores is not None else ()
        self.drop_stores()
        if self._worker.path == "shm":
            wait_for([job.copied for job in jobs], lambda: self._worker._link.alive)
        self._layers = {name: i for i, name in enumerate(names)}

    # --- retrieves, called by the host ------------------------------------------------------------------------------

    def start_retrieves(self, specs: Sequence[LoadSpec]) -> None:
        self.wait_retrieves()
        jobs = [job for spec in specs for job in self._worker._begin(spec, reported=False)]
        if jobs:
            loads = self._loads = StepLoads(jobs, len(self._layers))
            if not self._worker._link.spawn(self._load, loads, refused=lambda: self._give_up(jobs)):
                self._give_up(jobs)

    def wait_layer(self, name: str) -> None:
        if name not in self._layers:
            raise Misuse(f"layer {name!r} was not registered")
        if self._loads is not None:
            wait_for([self._loads.gates[self._layers[name]]], lambda: self._worker._link.alive)

    def wait_retrieves(self) -> None:
        loads, self._loads = self._loads, None
        if loads is not None:
            self._worker._wait(loads.jobs)

    # --- stores, called by the host ---------------------------------------------------------------------------------

    def start_stores(self, specs: Sequence[StoreSpec]) -> None:
        self.drop_stores()
        if not specs:
            return
        jobs = [job for spec in specs for job in self._worker._begin(spec, reported=True)]
        stores = self._stores = StepStores(jobs, len(self._layers))
        if not self._worker._link.spawn(self._store, stores, refused=lambda: self._give_up(jobs)):
            self._give_up(jobs)

    def layer_written(self, name: str) -> None:
        if name not in self._layers:
            raise Misuse(f"layer {name!r} was not registered")
        stores = self._stores
        if stores is not None:
            self._worker._link.post(stores.layer_written, self._layers[name], self._worker._registered().fence())

    def finish_stores(self) -> None:
        stores, self._stores = self._stores, None
        if stores is not None:
            fence = self._worker._registered().fence()
            self._worker._link.post(lambda: stores.finish(fence, drop=False))

    def drop_stores(self) -> None:
        stores, self._stores = self._stores, None
        if stores is not None and not self._worker._link.post(lambda: stores.finish(drop=True)):
            self._give_up(stores.jobs)  # there is no loop any more, nor a copy

    # --- in the loop ------------------------------------------------------------------------------------------------

    def _give_up(self, jobs: Sequence[Job]) -> None:
        for job in jobs:
            self._worker._fail(job)

    async def _load(self, client: Client | None, loads: StepLoads) -> None:
        worker = self._worker
        try:
            if client is None or client.arena is None or not worker._device.usable:
                return
            if worker.path == "device":
                async with trio.open_nursery() as each:
                    for job in loads.jobs:
                        each.start_soon(self._load_by_server, client, loads, job)
            else:
                await self._load_by_copying(client, loads)
        except LMCacheTrioError as exc:
            logger.info("%d retrieves failed: %s", len(loads.jobs), exc)
        except Exception:  # a bug: it costs this one step
            worker._jobs.count("copy_bugs", 1)
            logger.exception("bug in %d retrieves by layers, which failed", len(loads.jobs))
        finally:
            self._end(loads, loads.jobs)

    async def _load_by_copying(self, client: Client, loads: StepLoads) -> None:
        pinned: list[tuple[Job, Pinned]] = []
        try:
            for job in loads.jobs:
                found = await self._pin(client, job)
                if found is None:
                    loads.over(job)
                else:
                    pinned.append((job, found))
            if pinned:
                await self._worker._copiers.run(self._scatter, client, pinned, loads)
            while pinned:  # is what was copied still valid?
                job, pin = pinned.pop(0)
                assert isinstance(job.spec, LoadSpec)
                if await self._is_valid(client, job.spec, pin):
                    self._worker._loaded(job)
        except BaseException:
            for _, pin in pinned:
                client.done_nowait(pin.pin)
            raise

    async def _is_valid(self, client: Client, spec: LoadSpec, pin: Pinned) -> bool:
        """Contained: a reply that does not come costs its own retrieve, and keeps no other's pin."""
        try:
            return await self._worker._reply(client.done, pin.pin)
        except LMCacheTrioError as exc:
            logger.info("a retrieve of %s failed: %s", spec.request_id, exc)
            return False

    async def _pin(self, client: Client, job: Job) -> Pinned | None:
        spec = job.spec
        assert isinstance(spec, LoadSpec)
        try:
            if spec.lease:
                self._worker._check_layout(client, job)
                return await self._worker._reply(client.retrieve, spec.lease, spec.start, spec.count)
        except LMCacheTrioError as exc:
            logger.info("a retrieve of %s failed: %s", spec.request_id, exc)
        return None

    def _end(self, loads: StepLoads, jobs: Sequence[Job]) -> None:
        self._give_up(jobs)  # nothing for those that ended well
        for job in jobs:
            loads.over(job)

    async def _load_by_server(self, client: Client, loads: StepLoads, job: Job) -> None:
        spec, worker = job.spec, self._worker
        assert isinstance(spec, LoadSpec)
        with self._contained(job):
            if spec.lease and await worker._device.retrieve(client, job, lambda n: loads.reached([job], n)):
                worker._loaded(job)
        loads.over(job)

    async def _store_by_server(self, client: Client, stores: StepStores, job: Job) -> None:
        with self._contained(job):
            await self._worker._move(client, job, stores)

    @contextmanager
    def _contained(self, job: Job) -> Iterator[None]:
        """What fails costs *job*, and no other of its step."""
        try:
            yield
        except LMCacheTrioError as exc:
            logger.info("a %s of %s failed: %s", type(job.spec).__name__, job.spec.request_id, exc)
        except Exception:
            self._worker._jobs.count("copy_bugs", 1)
            logger.exception("bug in a %s of %s by layers, which failed", type(job.spec).__name__, job.spec.request_id)
        finally:
            job.asked.set()
            self._give_up([job])

    async def _store(self, client: Client | None, stores: StepStores) -> None:
        try:
            if client is None or client.arena is None or not self._worker._device.usable:
                return
            if self._worker.path == "device":
                stores.say = client.notice_nowait
                async with trio.open_nursery() as each:
                    for job in stores.jobs:
                        each.start_soon(self._store_by_server, client, stores, job)
            else:
                await self._store_by_copying(client, stores)
        except LMCacheTrioError as exc:
            logger.info("%d stores failed: %s", len(stores.jobs), exc)
        except Exception:
            self._worker._jobs.count("copy_bugs", 1)
            logger.exception("bug in %d stores by layers, which failed", len(stores.jobs))
        finally:
            for job in stores.jobs:
                job.asked.set()
            self._give_up(stores.jobs)

    async def _store_by_copying(self, client: Client, stores: StepStores) -> None:
        granted: list[tuple[Job, Reserved]] = []
        try:
            for job in stores.jobs:
                await job.turn()  # before its own time for a reply begins
                granted.append((job, await self._worker._reply(self._worker._shm.reserve, client, job)))
            await self._copy_layers(client, stores, granted)
            await stores.finished.wait()
            if not stores.dropped:
                for job, reserved in granted:
                    await self._worker._shm.commit(client, job, reserved)
        finally:
            for job, reserved in granted:
                if not job.ended.done:
                    client.abort_nowait(reserved.reservation)

    async def _copy_layers(self, client: Client, stores: StepStores, granted: Sequence[tuple[Job, Reserved]]) -> None:
        for layer, written in enumerate(stores.written):
            await written.wait()
            if stores.dropped:
                break
            await self._worker._copiers.run(self._gather, client, granted, layer, stores.fences[layer])
        for job in stores.jobs:
            self._worker._jobs.copied(job)

    # --- in a thread ------------------------------------------------------------------------------------------------

    def _scatter(self, client: Client, pinned: Sequence[tuple[Job, Pinned]], loads: StepLoads) -> None:
        moves: list[Callable[[int], None]] = []
        for job, pin in pinned:
            assert isinstance(job.spec, LoadSpec)
            if job.fence is not None:  # what the engine has still to do with these blocks comes first
                job.fence.synchronize()
            kv, width = job.kv, job.spec.chunk_blocks
            for place in job.spec.places(client.slots(pin)):
                slot, blocks = np.frombuffer(place.slot, dtype=np.uint8), kv.check(place.block_ids)
                moves.append(
                    partial(kv.scatter_layer, slot=slot, chunk_blocks=width, skip=place.skip, block_ids=blocks)
                )
        for layer in range(len(self._layers)):
            for move in moves:
                move(layer)
            loads.reached([job for job, _ in pinned], layer + 1)
            for job, _ in pinned:
                self._worker._layer_copied(job.spec, layer)

    def _gather(self, client: Client, granted: Sequence[tuple[Job, Reserved]], layer: int, fence: Any) -> None:
        if fence is not None:
            fence.synchronize()
        for job, reserved in granted:
            index, width = job.kv.check(job.spec.block_ids), job.spec.chunk_blocks
            for position, slot in zip(unpack_positions(reserved.positions), client.slots(reserved), strict=True):
                blocks = index[position * width : (position + 1) * width]
                job.kv.gather_layer(layer, blocks, np.frombuffer(slot, dtype=np.uint8))
            self._worker._layer_copied(job.spec, layer)
