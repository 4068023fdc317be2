"""A synchronous worker's side: moves whole blocks between the engine's paged KV and slots of the arena.

A store is reserve → copy → commit, and a retrieve is pin → copy → "still valid?". The copy runs in a thread, and the
last step decides. A store that fails is dropped and counted; a retrieve that fails comes back as failed blocks. A
server never makes the adapter raise into the engine. A copy that began is never abandoned: its job ends after it, and a
connection is closed after its jobs. KV in GPU memory that the server cannot open is copied likewise, each copy behind
what the engine had submitted: see `cuda_kv`.
"""

import logging
import math
import os
from collections.abc import Collection, Iterable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Literal, TypeVar, get_args

import trio

from lmcache_trio._core.groups import Group
from lmcache_trio._core.keys import check_chunk_tokens, seed_of
from lmcache_trio._wire.messages import MAX_DIGESTS, MAX_RESERVED, PROTOCOL_VERSION, Hello, Role
from lmcache_trio.adapters.link import Link
from lmcache_trio.adapters.specs import LoadSpec, StoreSpec, check_seconds, check_whole, checked_groups
from lmcache_trio.adapters.worker.device_mover import ATTACH_TIMEOUT, DeviceMover
from lmcache_trio.adapters.worker.jobs import Jobs, LoadJob, RegisteredKV, StoreJob, reply_within, wait_for
from lmcache_trio.adapters.worker.shm_mover import Probe, ShmMover, no_probe
from lmcache_trio.client import Client, message_of
from lmcache_trio.config import format_size
from lmcache_trio.errors import Gone, LMCacheTrioError, Misuse, ProtocolError, Unavailable

if TYPE_CHECKING:
    import torch

    from lmcache_trio.adapters.worker.paged import PagedKV
    from lmcache_trio.host_memory import BlockIndex

__all__ = ["Path", "WorkerAdapter"]

logger = logging.getLogger("lmcache_trio")
Path = Literal["auto", "device", "shm"]
_Spec = TypeVar("_Spec", StoreSpec, LoadSpec)

_LAST_REPLIES = 3
"""Most replies that one store takes: `shutdown` waits as long as these may take."""


class WorkerAdapter:
    """Shard *shard* of *shards* of the engine *engine_id*.

    Workers that hold the same bytes are the *replicas* of one shard, and this one is the *replica*-th of them, from 0.
    The first of them that asks stores a chunk, and each of them loads it. So no replica may store KV of a step before
    the loads that this step computed from are known to have ended well at all workers.

    *groups*, *chunk_tokens* and *token_bytes*: as the engine's scheduler's side has them.
    *reply_timeout*: seconds that one reply of the server is waited for. *fingerprint_extra*: what else decides the
    bytes of a block (attention backend, CPU instruction set). *server_uids*: uids whose server it trusts, beside its
    own and root; taken from `load_client_config` if not given. *probe*: for tests, see `Probe`. `Misuse` names a
    setting that is wrong or refused.
    """

    def __init__(  # noqa: PLR0913  (keywords, each a setting of its own)
        self,
        address: str,
        *,
        engine_id: str,
        block_tokens: int,
        shard: int = 0,
        shards: int = 1,
        replica: int = 0,
        replicas: int = 1,
        groups: Sequence[Group] = (),
        chunk_tokens: int | None = None,
        token_bytes: int = 0,
        fingerprint_extra: Sequence[str | bytes] = (),
        reply_timeout: float = 5.0,
        connect_timeout: float = 5.0,
        path: Path = "auto",
        server_uids: Collection[int] | None = None,
        probe: Probe = no_probe,
    ) -> None:
        check_whole("block_tokens", block_tokens, 1)
        check_whole("shards", shards, 1)
        check_whole("shard", shard)
        if chunk_tokens is not None:
            check_whole("chunk_tokens", chunk_tokens, 1)
            check_chunk_tokens(chunk_tokens, block_tokens)
        if shard >= shards:
            raise Misuse(f"shard is {shard} of {shards}: shards count from 0")
        check_whole("replicas", replicas, 1)
        check_whole("replica", replica)
        if replica >= replicas:
            raise Misuse(f"replica is {replica} of {replicas}: replicas count from 0")
        check_seconds("reply_timeout", reply_timeout)
        check_seconds("connect_timeout", connect_timeout)
        if isinstance(fingerprint_extra, str | bytes) or not isinstance(fingerprint_extra, Sequence):
            raise Misuse(f"fingerprint_extra is {fingerprint_extra!r}: give a list, as [{fingerprint_extra!r}]")
        if not all(isinstance(part, str | bytes) and part for part in fingerprint_extra):
            raise Misuse(f"fingerprint_extra is {fingerprint_extra!r}: give parts that are str or bytes and not empty")
        if path not in get_args(Path):
            raise Misuse(f"path is {path!r}: it must be one of {', '.join(get_args(Path))}")
        self._block_tokens = block_tokens
        self._extra = tuple(fingerprint_extra)
        self._reply_timeout = reply_timeout
        self._token = os.urandom(16)
        self._connected_before = False
        self._arena_note = self._room_note = ""
        self._groups = checked_groups(groups, block_tokens)
        said = f"worker {shard} {os.getpid()}", self._token, Role.WORKER, engine_id, shard, shards, b"", block_tokens
        more = {"groups": self._groups, "replica": replica, "replicas": replicas, "token_bytes": token_bytes}
        hello = message_of(Hello, PROTOCOL_VERSION, *said, chunk_tokens or 0, **more)
        self._link = Link(address, hello, connected=self._on_connected, lost=lambda: None, server_uids=server_uids)
        self._registered = RegisteredKV(chunk_tokens=chunk_tokens or 0)
        self._shm = ShmMover(f"lmcache-trio copies {shard}", self._registered, reply_timeout, probe)
        self._device = DeviceMover(address, hello, self._registered, reply_timeout, server_uids)
        self._jobs = Jobs(None if path == "device" else self._shm)
        self._wanted = path
        self._path: Literal["device", "shm"] = "shm"
        self._path_reason = "no KV is registered yet"
        self._choices = 0
        self._link.start(connect_timeout)

    def register_kv_caches(
        self,
        kv_caches: "Mapping[str, torch.Tensor]",
        *,
        num_blocks: int | None = None,
        groups: Sequence[Sequence[str]] | None = None,
    ) -> None:
        """The engine's KV, one tensor per layer; *num_blocks* where the shapes leave it open. Comes before all moves.

        *groups*: with several groups, the names of the layers of each. All tensors have the same number of blocks, and
        layers of several groups may share a storage.

        `Misuse` names a layer that cannot be moved or is not in just one group, or chunks that are not a whole number
        of blocks.
        """
        from lmcache_trio.adapters.worker.cuda_kv import make_paged_kv  # the only import of torch

        named = len(self._groups) or 1
        if (len(groups) if groups is not None else 1) != named:
            raise Misuse(f"groups names layers of {len(groups or [()])} groups: give those of each of {named}")
        kv = make_paged_kv(kv_caches, num_blocks=num_blocks, groups=groups)
        self._registered.latest = kv
        try:
            self._link.call(self._register_now, timeout=self._reply_timeout + ATTACH_TIMEOUT)
        except (Unavailable, Gone, ProtocolError) as exc:
            logger.warning("the layout was not registered, and will be when the server is there again: %s", exc)
            self._link.spawn(self._register_later)

    # --- in the background ------------------------------------------------------------------------------------------

    def submit_store(self, spec: StoreSpec) -> None:
        """Store *spec*'s blocks, which must not change until `take_finished` names it or `wait_stores` returns."""
        self._begin_stores([spec], reported=True)

    def submit_retrieve(self, spec: LoadSpec) -> None:
        """Fill *spec*'s blocks, which belong to this adapter until `take_finished` names the request."""
        self._begin_loads([spec], reported=True)

    def take_finished(self) -> tuple[set[str], set[str]]:
        """Request ids whose stores, and whose retrieves, are all over since the last call; failed ones included."""
        return self._jobs.take_finished()

    def take_failed_blocks(self) -> set[int]:
        """Blocks that a retrieve did not fill, since the last call: to be computed."""
        return self._jobs.take_failed_blocks()

    def take_failed_requests(self) -> set[str]:
        """Request ids with a retrieve that failed, and none under way any more, since the last call.

        For engines of several groups, in which a hit is of no use without all of its parts. Call it after
        `take_finished`: those that it named are among them.
        """
        return self._jobs.take_failed_requests()

    def wait_retrieve(self, seconds: float) -> None:
        """Block until a retrieve is to be reported, at most *seconds*. It is for a host with nothing else to do: asking
        again and again would only take the interpreter from the threads that it waits for.
        """
        self._jobs.wait_retrieve(seconds)

    def wait_stores(self, request_ids: Iterable[str] | None = None) -> None:
        """Block until no store of *request_ids* (default: of any) reads its blocks any more: see `wait_published`."""
        wait_for([job.copied for job in self._jobs.stores(request_ids)], lambda: self._link.alive)

    def wait_published(self, request_ids: Iterable[str] | None = None) -> None:
        """Block until every store of *request_ids* (default: of any) is over: published, or dropped and counted.

        Published is what any engine may load from then on; with several shards, once all of them have stored it. A
        server that does not reply is given *reply_timeout*.
        """
        wait_for([job.ended for job in self._jobs.stores(request_ids)], lambda: self._link.alive)

    # --- while the host waits ---------------------------------------------------------------------------------------

    def store_now(self, specs: Sequence[StoreSpec]) -> None:
        """Store, and return when all stores are over. Each reply has *reply_timeout* to come, and each copy ends."""
        self._wait_ended(self._begin_stores(specs, reported=False))

    def retrieve_now(self, specs: Sequence[LoadSpec]) -> None:
        """Fill the blocks, and return when all loads are over, as `store_now`. See `take_failed_blocks`."""
        self._wait_ended(self._begin_loads(specs, reported=False))

    # --- jobs -------------------------------------------------------------------------------------------------------

    def _begin_stores(self, specs: Sequence[StoreSpec], *, reported: bool) -> list[StoreJob]:
        """Submit *specs*. A spec makes several jobs if one message cannot name all of it: 65,536 tokens at a time in
        chunks of 256.
        """
        jobs = []
        for spec, blocks, kv in self._planned(specs, StoreSpec):
            at, fence = 0, kv.fence()
            for part in spec.parts(MAX_RESERVED, MAX_DIGESTS):
                end = at + len(part.block_ids)
                jobs.append(
                    StoreJob(part, blocks[at:end].reshape(part.chunks, -1), kv=kv, fence=fence, reported=reported)
                )
                at = end
        self._begin(jobs)
        return jobs

    def _begin_loads(self, specs: Sequence[LoadSpec], *, reported: bool) -> list[LoadJob]:
        """Submit *specs*, as `_begin_stores` does."""
        jobs = []
        for spec, blocks, kv in self._planned(specs, LoadSpec):
            at, fence = 0, kv.fence()
            for part in spec.parts(MAX_DIGESTS):
                end = at + len(part.block_ids)
                jobs.append(LoadJob(part, blocks[at:end], kv=kv, fence=fence, reported=reported))
                at = end
        self._begin(jobs)
        return jobs

    def _planned(self, specs: Sequence[_Spec], kind: type[_Spec]) -> "list[tuple[_Spec, BlockIndex, PagedKV]]":
        """*specs*, each a *kind*, with this worker's values, the blocks of each, and the KV that has them. `Misuse`: a
        spec is of another kind, or does not fit the KV.
        """
        if wrong := [spec for spec in specs if not isinstance(spec, kind)]:
            raise Misuse(f"{wrong[0]!r:.80} is not a {kind.__name__}")
        if (kv := self._registered.latest) is None:
            raise Misuse("register_kv_caches comes before stores and retrieves")
        units = self._registered.chunk_tokens, self._block_tokens, self._groups
        planned = [spec.planned_for(*units) for spec in specs]
        return [(spec, kv.check(spec.block_ids), kv) for spec in planned]

    def _begin(self, jobs: Sequence[StoreJob | LoadJob]) -> None:
        for job in jobs:
            self._jobs.begin(job)
        for job in jobs:
            if not self._link.spawn(self._jobs.run, job, refused=partial(self._jobs.end, job)):
                self._jobs.end(job)

    def _wait_ended(self, jobs: Sequence[StoreJob | LoadJob]) -> None:
        """Block until *jobs* are over. Those that a dead loop left behind fail."""
        wait_for([job.ended for job in jobs], lambda: self._link.alive)
        for job in jobs:
            self._jobs.end(job)

    # --- state ------------------------------------------------------------------------------------------------------

    def is_healthy(self) -> bool:
        """Is a server connected, with an arena that this process can map?"""
        client = self._link.client
        return client is not None and client.arena is not None

    @property
    def path(self) -> str:
        """Who moves the KV now: "device", the server; "shm", this process."""
        return self._path

    @property
    def path_reason(self) -> str:
        """Why `path` is what it is."""
        return self._path_reason

    @property
    def bytes_stored(self) -> int:
        """Bytes of the chunks that `statistics` counts as stored."""
        return self._jobs.bytes_stored

    @property
    def bytes_loaded(self) -> int:
        """Bytes of the blocks that were filled."""
        return self._jobs.bytes_loaded

    def statistics(self) -> dict[str, int]:
        """`running` jobs; chunks: `stored_chunks`, `retrieved_chunks`, `dropped_REASON`, `failed_chunks`.

        Reasons are the server's, and two more. `unavailable`: no server could be used. `layout`: the store was planned
        for another length of chunks, or for KV caches that were replaced by others before it began. `copy_bugs`: moves
        that failed by a bug, each in the log with its traceback.
        """
        return self._jobs.statistics()

    def shutdown(self) -> None:
        """Finish the jobs that are under way, within bounds, and leave the server. Idempotent.

        The server may still touch blocks after that, if it is stopped or lost sight of a copy. They stay its own until
        this process ends, and must not be used again.
        """
        jobs = self._jobs.running() if self._link.alive else []
        if wait_for([job.ended for job in jobs], lambda: self._link.alive, _LAST_REPLIES * self._reply_timeout):
            for job in jobs:
                self._jobs.end(job)  # nothing, unless the loop died
        else:
            logger.warning("some of %d copies did not end: their blocks stay the server's", len(jobs))
        if self._link.stop(2 * self._reply_timeout):
            self._device.close()
        self._shm.close()

    # --- in the loop: connections and the registration ---------------------------------------------------------------

    async def _on_connected(self, client: Client) -> None:
        if self._connected_before:
            with reply_within(self._reply_timeout):
                await client.copies_ended(self._token)
        self._connected_before = True
        self._registered.known = None
        check_chunk_tokens(client.chunk_tokens, self._block_tokens)
        self._registered.chunk_tokens = client.chunk_tokens
        if client.arena is None and client.arena_note != self._arena_note:
            self._arena_note = client.arena_note
            logger.warning("working without a cache: %s", client.arena_note or "the server gave this worker no arena")
        await self._register(client, self._reply_timeout)

    async def _register_now(self) -> None:
        """In the loop. A connection that is not usable yet is left to `_on_connected`."""
        if self._link.client is not None:
            await self._register(self._link.client, self._reply_timeout)

    async def _choose(self, client: Client, kv: "PagedKV") -> None:
        """Choose the path for *client*'s connection, where the layout of *kv* is registered."""
        path: Literal["device", "shm"] = "shm"
        reason = "it was asked for"
        if self._wanted != "shm":
            self._choices = mine = self._choices + 1
            try:
                await self._device.attach(client, kv)
                path, reason = "device", "the server has opened this engine's KV"
            except (Unavailable, Misuse, trio.TooSlowError) as exc:
                if client.lost:
                    raise
                if mine != self._choices:  # the layout was registered anew meanwhile: that registration chooses
                    return
                reason = str(exc) or "the server took too long to open the KV"
        if (path, reason) == (self._path, self._path_reason):
            return
        self._path, self._path_reason = path, reason
        if path == "shm" and self._wanted == "device":
            self._jobs.mover = None
            logger.warning("working without a cache: the path 'device' was asked for, but %s", reason)
        else:
            self._jobs.mover = self._device if path == "device" else self._shm
            logger.info("KV takes the path %r: %s", path, reason)

    def _see_room(self, client: Client) -> None:
        """Log once that no chunk fits, if so. The worker that completed the layout knows."""
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
        """For a server that was late to answer, and may be slow. A new connection registers by itself."""
        try:
            if client is not None and self._registered.known is not self._registered.latest:
                await self._register(client, math.inf)
        except LMCacheTrioError as exc:
            logger.warning("the layout was not registered: %s", exc)
        except Exception:
            self._jobs.count("copy_bugs")
            logger.exception("bug in a registration: nothing is moved until the next one")

    async def _register(self, client: Client, seconds: float) -> None:
        """Register the KV of the host. A worker without an arena does not: so its engine has no namespace, and gets no
        hits that the worker could not read.
        """
        registered = self._registered
        while (kv := registered.latest) is not None and client.arena is not None:
            tokens, named = client.chunk_tokens, [f"{g.need:d} {g.tokens} {g.block_tokens}" for g in self._groups]
            parts = ("fingerprint 1", kv.layout, str(self._block_tokens), str(tokens), *named, *self._extra)
            widths = [group.part_blocks(tokens) for group in self._groups] or [tokens // self._block_tokens]
            part_bytes = [paged.block_bytes * width for paged, width in zip(kv.groups, widths, strict=True)]
            # A worker that only the server can move for has no layout, and is offered nothing, before that can.
            attaching = self._wanted == "device"
            layout = seed_of(*parts), sum(part_bytes), self._block_tokens
            by_group = part_bytes if self._groups else ()
            register = partial(client.register, *layout, attaching=attaching, part_bytes=by_group)
            registered.known = kv  # before the request: those behind it are of this layout
            try:
                with reply_within(seconds):
                    await register()
                await self._choose(client, kv)
                if self._jobs.mover is None:
                    with reply_within(seconds):
                        await register()  # an Attach that was given up must not succeed later
                elif attaching:
                    with reply_within(self._reply_timeout):
                        await client.ping()  # what the server said behind its Ack is known then
            except BaseException:
                if registered.known is kv:
                    registered.known = None  # the server may go by either
                raise
            self._see_room(client)
            if kv is registered.latest:
                return
