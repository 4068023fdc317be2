"""A synchronous worker's side: moves whole blocks between the engine's paged KV and slots of the arena.

A store is reserve → copy → commit, a retrieve is pin → copy → "still valid?"; the copy runs in a thread, and nothing is
believed before the last step. Whatever fails is dropped and counted (a store) or comes back as failed blocks (a
retrieve): nothing is raised into the engine because of a server. A copy that began is never abandoned: its job ends
after it, and a connection is closed after its jobs. KV in GPU memory that the server cannot open is copied likewise,
each copy behind what the engine had submitted: `paged` says how, and what it refuses.
"""

import logging
import math
import os
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, TypeVar

import trio

from lmcache_trio._core.keys import seed_of
from lmcache_trio._wire.messages import MAX_DIGESTS, MAX_RESERVED, PROTOCOL_VERSION, Hello, Role
from lmcache_trio.adapters.copiers import Copiers
from lmcache_trio.adapters.device_path import ATTACH_TIMEOUT, DevicePath, Path
from lmcache_trio.adapters.jobs import Job, Jobs, wait_for
from lmcache_trio.adapters.layered import LayeredMoves
from lmcache_trio.adapters.layered_steps import StepStores
from lmcache_trio.adapters.link import Link
from lmcache_trio.adapters.shm_path import ShmPath
from lmcache_trio.adapters.specs import LoadSpec, StoreSpec, check_seconds, check_whole
from lmcache_trio.client import Client, sentence
from lmcache_trio.config import format_size
from lmcache_trio.errors import Gone, LMCacheTrioError, Misuse, ProtocolError, Unavailable

if TYPE_CHECKING:
    import torch

    from lmcache_trio.adapters.paged import PagedKV

__all__ = ["WorkerAdapter"]

logger = logging.getLogger("lmcache_trio")
_T = TypeVar("_T")


_LAST_REPLIES = 3
"""Replies that a store takes at most, which `shutdown` waits for."""


class WorkerAdapter:
    """Shard *shard* of *shards* of the engine *engine_id*.

    *reply_timeout*: seconds that one reply of the server is waited for. *fingerprint_extra*: what else decides the
    bytes of a block (attention backend, CPU instruction set). `Misuse` names a setting that is wrong or refused.
    """

    def __init__(  # noqa: PLR0913  (keywords, each a setting of its own)
        self,
        address: str,
        *,
        engine_id: str,
        block_tokens: int,
        shard: int = 0,
        shards: int = 1,
        chunk_tokens: int | None = None,
        fingerprint_extra: Sequence[str | bytes] = (),
        reply_timeout: float = 5.0,
        connect_timeout: float = 5.0,
        path: Path = "auto",
    ) -> None:
        check_whole("block_tokens", block_tokens, 1)
        check_whole("shards", shards, 1)
        check_whole("shard", shard)
        if chunk_tokens is not None:
            check_whole("chunk_tokens", chunk_tokens, 1)
        if shard >= shards:
            raise Misuse(f"shard is {shard} of {shards}: shards count from 0")
        check_seconds("reply_timeout", reply_timeout)
        check_seconds("connect_timeout", connect_timeout)
        if isinstance(fingerprint_extra, str | bytes):
            raise Misuse(f"fingerprint_extra is {fingerprint_extra!r}: give a list, as [{fingerprint_extra!r}]")
        self._block_tokens = block_tokens
        self._wanted_chunk_tokens = chunk_tokens
        self._extra = tuple(fingerprint_extra)
        self._reply_timeout = reply_timeout
        self._kv: PagedKV | None = None
        self._known: PagedKV | None = None
        """In the loop: the KV whose layout the server of this connection was told last."""
        self._jobs = Jobs()
        self._chunk_tokens = chunk_tokens or 0
        """The tokens of a chunk, 0 before that is known."""
        self.layered = LayeredMoves(self)
        """Moves that go layer by layer beside the forward pass."""
        self._shm = ShmPath(self)
        self._copiers = Copiers(f"lmcache-trio copies {shard}")
        self._token = os.urandom(16)
        self._connected_before = False
        self._arena_note = ""
        self._room_note = ""
        hello = sentence(
            Hello, PROTOCOL_VERSION, f"worker {shard} {os.getpid()}", self._token, Role.WORKER, engine_id, shard, shards
        )
        self._device = DevicePath(path, address, hello, reply_timeout, self._check_layout)
        self._link = Link(address, hello, connected=self._on_connected, lost=lambda: None)
        self._link.start(connect_timeout)

    def register_kv_caches(self, kv_caches: "Mapping[str, torch.Tensor]", *, num_blocks: int | None = None) -> None:
        """The engine's KV, one tensor a layer; *num_blocks* where the shapes leave it open. Comes before all moves.

        `Misuse` names a layer that cannot be moved, or chunks that are no whole number of blocks.
        """
        from lmcache_trio.adapters.paged import make_paged_kv  # the only import of torch

        kv = make_paged_kv(kv_caches, num_blocks=num_blocks)
        self.layered.register(list(kv_caches))  # before `_kv`: a step that goes by layers ends with the former ones
        self._kv = kv
        try:
            self._link.call(self._register_now, timeout=self._reply_timeout + ATTACH_TIMEOUT)
        except (Unavailable, Gone, ProtocolError) as exc:
            logger.warning("the layout was not registered, and will be when the server is there again: %s", exc)
            self._link.spawn(self._register_later)

    # --- in the background ------------------------------------------------------------------------------------------

    def submit_store(self, spec: StoreSpec) -> None:
        """Store *spec*'s blocks, which must not change until `take_finished` names it or `wait_stores` returns."""
        self._submit(spec, reported=True)

    def submit_retrieve(self, spec: LoadSpec) -> None:
        """Fill *spec*'s blocks, which belong to this adapter until `take_finished` names the request."""
        self._submit(spec, reported=True)

    def take_finished(self) -> tuple[set[str], set[str]]:
        """Request ids whose stores, and whose retrieves, are all over since the last call; failed ones included."""
        return self._jobs.take_finished()

    def take_failed_blocks(self) -> set[int]:
        """Blocks that a retrieve did not fill, since the last call: to be computed."""
        return self._jobs.take_failed_blocks()

    def wait_retrieve(self, seconds: float) -> None:
        """Block until one is to be reported, at most *seconds*: for a host with nothing else to do, whose turning
        around would only take the interpreter from the threads that it waits for.
        """
        self._jobs.wait_retrieve(seconds)

    def wait_stores(self, request_ids: Iterable[str] | None = None) -> None:
        """Block until no store of *request_ids* (default: of any) reads its blocks any more: see `wait_published`."""
        wait_for([job.copied for job in self._jobs.stores(request_ids)], lambda: self._link.alive)

    def wait_published(self, request_ids: Iterable[str] | None = None) -> None:
        """Block until every store of *request_ids* (default: of any) is over: published, or dropped and counted.

        Published is what any engine may load from then on; with several shards, once all of them have stored it. Of a
        layered store it is waited for from `finish_stores` on. A server that does not reply is given *reply_timeout*.
        """
        wait_for([job.ended for job in self._jobs.stores(request_ids)], lambda: self._link.alive)

    # --- while the host waits ---------------------------------------------------------------------------------------

    def store_now(self, specs: Sequence[StoreSpec]) -> None:
        """Store, and return when all is over: each reply has *reply_timeout* to come, each copy ends."""
        self._wait([job for spec in specs for job in self._submit(spec, reported=False)])

    def retrieve_now(self, specs: Sequence[LoadSpec]) -> None:
        """Fill the blocks, and return when all is over, bounded likewise; `take_failed_blocks` has the failed."""
        self._wait([job for spec in specs for job in self._submit(spec, reported=False)])

    # --- state ------------------------------------------------------------------------------------------------------

    def is_healthy(self) -> bool:
        """Is a server there, with an arena that this process can map?"""
        client = self._link.client
        return client is not None and client.arena is not None

    @property
    def path(self) -> str:
        """Who moves the KV now: "device", the server; "shm", this process."""
        return self._device.taken

    @property
    def path_reason(self) -> str:
        """Why `path` is what it is."""
        return self._device.reason

    def statistics(self) -> dict[str, int]:
        """`running` jobs; chunks: `stored_chunks`, `retrieved_chunks`, `dropped_REASON`, `failed_chunks`.

        Reasons are the server's, and `unavailable` (no server, or none that was of use) and `layout` (the store was
        planned for another length of chunks, or for KV caches that were registered anew before it began).
        `copy_bugs`: moves that failed for a reason that nobody thought of, each in the log with its traceback.
        """
        return self._jobs.statistics()

    def shutdown(self) -> None:
        """Finish what is under way, bounded, and leave the server. Idempotent.

        Blocks that the server may still touch after that, because it is stopped or lost sight of a copy, stay its own
        until this process ends: they must not be used again.
        """
        self.layered.drop_stores()
        jobs = self._jobs.running() if self._link.alive else []
        if wait_for([job.ended for job in jobs], lambda: self._link.alive, _LAST_REPLIES * self._reply_timeout):
            for job in jobs:
                self._fail(job)  # nothing, unless the loop died
        else:
            logger.warning("some of %d copies did not end: their blocks stay the server's", len(jobs))
        if self._link.stop(2 * self._reply_timeout):
            self._device.close()
        self._copiers.close()

    # --- where a test places a fault: called in the copying thread --------------------------------------------------

    def _slots_known(self, spec: StoreSpec | LoadSpec) -> None:
        """The slots are named, nothing is copied yet."""

    def _half_copied(self, spec: StoreSpec | LoadSpec) -> None:
        """Half of the first chunk is copied."""

    def _before_commit(self, spec: StoreSpec) -> None:
        """All is copied, and not yet committed."""

    def _before_valid(self, spec: LoadSpec) -> None:
        """All is copied, and not yet known to be valid."""

    def _layer_copied(self, spec: StoreSpec | LoadSpec, layer: int) -> None:
        """Of a layer-wise move: *layer* is copied, for all its chunks."""

    # --- inside -----------------------------------------------------------------------------------------------------

    def _registered(self) -> "PagedKV":
        if self._kv is None:
            raise Misuse("register_kv_caches comes before stores and retrieves")
        return self._kv

    def _begin(self, spec: StoreSpec | LoadSpec, *, reported: bool) -> list[Job]:
        """One job, or several where a message cannot name all of it: 65,536 tokens to be stored in chunks of 256."""
        kv = self._registered()
        spec = spec.planned_for(self._chunk_tokens, self._block_tokens)
        kv.check(spec.block_ids)
        fence = kv.fence()
        parts = spec.parts(MAX_RESERVED, MAX_DIGESTS) if isinstance(spec, StoreSpec) else spec.parts(MAX_DIGESTS)
        return [self._jobs.begin(part, reported=reported, fence=fence, kv=kv) for part in parts]

    def _submit(self, spec: StoreSpec | LoadSpec, *, reported: bool) -> list[Job]:
        jobs = self._begin(spec, reported=reported)
        for job in jobs:
            self._start(job)
        return jobs

    def _start(self, job: Job) -> None:
        if not self._link.spawn(self._run, job, refused=partial(self._fail, job)):
            self._fail(job)

    def _wait(self, jobs: Sequence[Job]) -> None:
        wait_for([job.ended for job in jobs], lambda: self._link.alive)
        for job in jobs:
            self._fail(job)  # nothing, unless the loop died

    def _fail(self, job: Job) -> None:
        if not job.ended.done:
            spec = job.spec
            if isinstance(spec, StoreSpec):
                self._jobs.count(f"dropped_{job.reason}", spec.chunks)
            else:
                self._jobs.count("failed_chunks", spec.count)
            self._jobs.end(job, failed=True)

    def _check_layout(self, client: Client, job: Job) -> None:
        """In the loop, as *job*'s question goes out: `Gone` if the layout is another than the one it was planned for.

        A store from KV that was registered anew since is still good where both lie alike, and this process copies.
        """
        spec, known = job.spec, self._known
        if spec.chunk_tokens != client.chunk_tokens:
            why = f"its chunks have {spec.chunk_tokens} tokens, and the server's {client.chunk_tokens}"
        elif known is None:
            raise Unavailable("the layout is not registered")
        elif job.kv is not known and (
            isinstance(spec, LoadSpec) or self.path == "device" or job.kv.layout != known.layout
        ):
            why = "other KV caches were registered"
        else:
            return
        job.reason = "layout"
        raise Gone(f"the layout changed after it was planned: {why}")

    def _loaded(self, job: Job) -> None:
        """What *job* loaded is valid: it ends well, unless the engine has registered other KV in the meantime."""
        if isinstance(job.spec, LoadSpec) and job.kv is self._kv:
            self._jobs.count("retrieved_chunks", job.spec.count)
            self._jobs.end(job, failed=False)

    async def _run(self, client: Client | None, job: Job) -> None:
        try:
            if client is None or client.arena is None or not self._device.usable:
                return
            if self.path == "device":
                await self._move(client, job)
            elif isinstance(job.spec, StoreSpec):
                await self._shm.store(client, job)
            else:
                await self._shm.retrieve(client, job)
        except LMCacheTrioError as exc:
            logger.info("a %s of %s failed: %s", type(job.spec).__name__, job.spec.request_id, exc)
        except Exception:  # a bug: it costs this one move
            self._jobs.count("copy_bugs", 1)
            logger.exception("bug in a %s of %s, which failed", type(job.spec).__name__, job.spec.request_id)
        finally:
            job.asked.set()
            self._fail(job)  # nothing, if it ended well

    async def _move(self, client: Client, job: Job, step: StepStores | None = None) -> None:
        """Have the server do it; a store of *step*, layer by layer."""
        spec = job.spec
        if isinstance(spec, StoreSpec):
            stored = await self._device.store(client, job, step)
            for reason, number in stored.dropped.items():
                self._jobs.count(f"dropped_{reason}", number)
            self._jobs.count("stored_chunks", stored.copied)
            self._jobs.end(job, failed=False)
        elif spec.lease and await self._device.retrieve(client, job):
            self._loaded(job)

    async def _reply(self, ask: Callable[..., Awaitable[_T]], *args: object, seconds: float | None = None) -> _T:
        limit = self._reply_timeout if seconds is None else seconds
        with trio.move_on_after(limit):
            return await ask(*args)
        raise Unavailable(f"the server did not reply within {limit} s")

    async def _on_connected(self, client: Client) -> None:
        if self._connected_before:
            await self._reply(client.copies_ended, self._token)
        self._connected_before = True
        self._known = None
        self._chunk_tokens = client.chunk_tokens
        if self._wanted_chunk_tokens not in (None, client.chunk_tokens):
            raise Misuse(
                f"the server's chunk_tokens is {client.chunk_tokens} and this engine's {self._wanted_chunk_tokens}:"
                " set them alike, or leave the engine's out"
            )
        if client.chunk_tokens % self._block_tokens:
            raise Misuse(
                f"the server's chunk_tokens ({client.chunk_tokens}) is no multiple of the engine's block_tokens"
                f" ({self._block_tokens}): set the server's chunk_tokens to one that is"
            )
        if client.arena is None and client.arena_note != self._arena_note:
            self._arena_note = client.arena_note
            logger.warning("working without a cache: %s", client.arena_note or "the server gave this worker no arena")
        await self._register(client, self._reply_timeout)

    async def _register_now(self) -> None:
        """In the loop, where a connection is either usable by now, or still to be looked after by `_on_connected`."""
        if self._link.client is not None:
            await self._register(self._link.client, self._reply_timeout)

    def _see_room(self, client: Client) -> None:
        """Say once that no chunk fits, if so. The worker that completed the layout knows."""
        note = ""
        if client.chunk_bytes > client.arena_bytes:
            note = (
                f"a chunk of {client.chunk_tokens} tokens takes {format_size(client.chunk_bytes)}, and the server's"
                f" memory holds {format_size(client.arena_bytes)}"
            )
        if note and note != self._room_note:
            logger.warning(
                "nothing can be cached: %s: raise the server's memory.size, or set a smaller chunk_tokens", note
            )
        self._room_note = note

    async def _register_later(self, client: Client | None) -> None:
        """The server was late to answer: it may be slow, and still there. A new connection registers by itself."""
        try:
            if client is not None and self._known is not self._kv:
                await self._register(client, math.inf)
        except LMCacheTrioError as exc:
            logger.warning("the layout was not registered: %s", exc)
        except Exception:
            self._jobs.count("copy_bugs", 1)
            logger.exception("bug in a registration: nothing is moved until the next one")

    async def _register(self, client: Client, seconds: float) -> None:
        """A worker without an arena stays unregistered: its engine has no namespace then, and no hits it can't read."""
        while (kv := self._kv) is not None and client.arena is not None:
            parts = ("fingerprint 1", kv.layout, str(self._block_tokens), str(client.chunk_tokens), *self._extra)
            shard_bytes = kv.block_bytes * (client.chunk_tokens // self._block_tokens)
            # A worker that only the server can move for has no layout, and is offered nothing, before that can.
            attaching = self._device.wanted == "device"
            register = partial(client.register, seed_of(*parts), shard_bytes, self._block_tokens, attaching=attaching)
            self._known = kv  # before the question: what is asked behind it is asked of this layout
            try:
                await self._reply(register, seconds=seconds)
                await self._device.settle(client, kv.tensors, kv.num_blocks)
                if not self._device.usable:
                    await self._reply(register, seconds=seconds)  # an Attach that was given up must not succeed later
                elif attaching:
                    await self._reply(client.ping)  # what the server said behind its Ack is known then
            except BaseException:
                if self._known is kv:
                    self._known = None  # nobody knows which one the server goes by
                raise
            self._see_room(client)
            if kv is self._kv:
                return
