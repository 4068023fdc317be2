"""What a synchronous scheduler calls: how much of a prompt the cache has, and under which lease.

There are two steps, and neither waits. `maybe_submit_lookup_request` sends the lookup from the calling thread. A Trio
loop in a thread of its own reads the answer, and `check_lookup_result` looks whether it has come. A server that is
late, unhealthy or gone never makes the adapter raise into the engine: the answer is 0 tokens then. One host thread at a
time may use an adapter.
"""

import math
import os
import time
from collections.abc import Collection, Sequence
from contextlib import suppress
from typing import Any

import attrs

from lmcache_trio._core.groups import EVERY, Group, Need
from lmcache_trio._core.keys import join_digests
from lmcache_trio._transport.conversation import Reply
from lmcache_trio._wire.messages import (
    MAX_DIGESTS,
    MAX_LAYOUTS,
    PROTOCOL_VERSION,
    Ack,
    Changed,
    Hello,
    Identify,
    Message,
    NamespaceKnown,
    Reset,
    Role,
    Watch,
)
from lmcache_trio.adapters.link import Link, logger
from lmcache_trio.adapters.scheduler.changes import CacheChange, CacheChanges
from lmcache_trio.adapters.scheduler.lookup_table import LookupTable, Request
from lmcache_trio.adapters.scheduler.parts import PartRun, loaded_runs, stored_runs
from lmcache_trio.adapters.scheduler.prompts import Extras, Prompt, Prompts
from lmcache_trio.adapters.specs import LoadSpec, StoreSpec, check_seconds, check_whole, checked_groups
from lmcache_trio.client import Client, message_of
from lmcache_trio.config import check_interval, load_client_config
from lmcache_trio.errors import Misuse, Unavailable
from lmcache_trio.threads import Handoff, Lock

__all__ = ["SchedulerAdapter"]


@attrs.frozen(eq=False)
class _OwedReset:
    """A reset that no server has confirmed: of *identity*, in the *layouts* that the engine had had by then."""

    identity: bytes
    layouts: bytes


class SchedulerAdapter:
    """Lookups for one engine. Its workers, joined by *engine_id*, move the bytes.

    *identity* names the model and all else that changes what a token's KV is; it seeds every digest. *shards*: the
    workers that hold different bytes; *replicas*: the workers of each shard, which hold the same bytes. *groups*: the
    KV groups of a model whose layers do not all keep the KV of every token; *block_tokens* is a multiple of the tokens
    of all groups' blocks then. Such an engine calls `loads_after_alloc`, `store_specs` and `state_spec`.
    *chunk_tokens*: the length of its chunks, a multiple of *block_tokens*. If not given, the server chooses it, by
    *token_bytes*: the bytes of KV that one worker keeps per token, in all layers together (0: not known). Until a
    server is met, the rule of the setting "auto" chooses.
    *lookup_timeout*: seconds until a lookup without an answer counts as 0 tokens. *poll_interval*: seconds of silence
    between questions for its status. *server_uids*: uids whose server it trusts, beside its own and root. These three
    are taken from `load_client_config` if not given. *lease_timeout*: no answer is offered for longer.
    *weights_version*: as `set_weights_version` says, from the start. *watch*: `take_changes` tells what comes into the
    server's memory and to its tiers, and what leaves them. *model*: the model's name, for people: `lmcache-trio ls`
    prints it.
    `Misuse` names a setting that is wrong, or that the server refuses.

    A subclass may use what is public.
    """

    def __init__(  # noqa: PLR0913  (keywords, each a setting of its own)
        self,
        address: str,
        *,
        engine_id: str,
        identity: Sequence[str | bytes],
        block_tokens: int,
        shards: int = 1,
        replicas: int = 1,
        groups: Sequence[Group] = (),
        chunk_tokens: int | None = None,
        token_bytes: int = 0,
        lookup_timeout: float | None = None,
        poll_interval: float | None = None,
        lease_timeout: float | None = None,
        connect_timeout: float = 5.0,
        weights_version: str | None = None,
        server_uids: Collection[int] | None = None,
        watch: bool = False,
        model: str = "",
    ) -> None:
        if lookup_timeout is None or poll_interval is None:
            configured = load_client_config()
            lookup_timeout = configured.lookup_timeout if lookup_timeout is None else lookup_timeout
            poll_interval = configured.poll_interval if poll_interval is None else poll_interval
        check_seconds("lookup_timeout", lookup_timeout)
        check_seconds("poll_interval", poll_interval)
        check_seconds("connect_timeout", connect_timeout)
        check_interval(poll_interval, lookup_timeout)
        if lease_timeout is not None:
            check_seconds("lease_timeout", lease_timeout)
        self._lock = Lock()
        self._prompts = Prompts(identity, block_tokens, chunk_tokens, token_bytes, self._lock)
        check_whole("shards", shards, 1)
        check_whole("replicas", replicas, 1)
        self._own = os.urandom(16)
        """Random bytes that tell weights of this engine alone from those of any other."""
        if weights_version is not None:
            named = _version(weights_version)
            self._prompts.rename(named, named)
        name, token = f"scheduler {os.getpid()}", os.urandom(16)
        said = (0, shards, self._prompts.model, block_tokens, chunk_tokens or 0, checked_groups(groups, block_tokens))
        more = {"replicas": replicas, "token_bytes": token_bytes, "model": model}
        hello = message_of(Hello, PROTOCOL_VERSION, name, token, Role.SCHEDULER, engine_id, *said, **more)
        self._named = bool(hello.groups)
        """Does the engine name its groups?"""
        self._groups = hello.groups or (attrs.evolve(EVERY, block_tokens=block_tokens),)
        self._exact = any(group.need is not Need.EVERY for group in self._groups)
        """Does a lease have what its own boundary needs, and not what a shorter hit needs?"""
        self._told: Client | None = None
        """The client whose server was told of the model and of all resets; None while no server was."""
        self._layouts: dict[bytes, None] = {}
        """The layouts that the engine has had, as servers named them, the latest last; `MAX_LAYOUTS` at most."""
        self._resets_owed: dict[bytes, _OwedReset] = {}
        """The latest reset of each identity, until a server has confirmed it. The next server is told of them first."""
        self._changes = CacheChanges() if watch else None
        self._link = Link(address, hello, connected=self._on_connected, lost=self._on_lost, server_uids=server_uids)
        self._lookups = LookupTable(
            self._link,
            self._lock,
            lookup_timeout=lookup_timeout,
            poll_interval=poll_interval,
            lease_timeout=math.inf if lease_timeout is None else lease_timeout,
        )
        self._link.start(connect_timeout)

    @property
    def block_tokens(self) -> int:
        """Tokens of one of the engine's blocks."""
        return self._prompts.block_tokens

    @property
    def chunk_tokens(self) -> int:
        """Tokens of one chunk, as the first server said, once one was connected."""
        return self._prompts.chunk_tokens

    @property
    def poll_interval(self) -> float:
        """Seconds of silence between questions for a lookup's status."""
        return self._lookups.poll_interval

    @property
    def lookup_timeout(self) -> float:
        """Seconds until a lookup without an answer counts as 0 tokens."""
        return self._lookups.lookup_timeout

    # --- the two steps ----------------------------------------------------------------------------------------------

    def maybe_submit_lookup_request(
        self,
        request_id: str,
        token_ids: Sequence[int],
        *,
        extras: Extras | None = None,
        max_tokens: int | None = None,
    ) -> None:
        """Ask how many leading tokens of *token_ids* are cached, unless that is asked or answered already.

        *extras(first, end)* gives the identity of one chunk's tokens that their ids don't carry. At most *max_tokens*
        are offered, and at most the 65,536 chunks that one message can name. The prompt may grow from call to call.
        Any other prompt under the same id, or a shorter one, is another request, as if the former had ended.
        """
        _check_tokens(token_ids)
        if max_tokens is not None and not isinstance(max_tokens, int):
            raise Misuse(f"max_tokens is {max_tokens!r}: it must be a whole number")
        former = self._lookups.open(request_id)
        if former.outdated or len(token_ids) < len(former.prompt.tokens):
            self.end_session(request_id)  # begun anew; or what was found for a longer prompt is no answer for this one
        request = self._request_of(request_id, token_ids, extras)
        tokens = len(token_ids) if max_tokens is None else max(0, max_tokens)
        if self._lookups.is_asked(request, tokens // self.chunk_tokens):
            return
        self._prompts.extend(request.prompt, token_ids, extras)
        self._lookups.submit(request, min(len(request.prompt.digests), tokens // self.chunk_tokens, MAX_DIGESTS))

    def check_lookup_result(self, request_id: str) -> int | None:
        """How many leading tokens may be loaded, a multiple of `chunk_tokens`; None while unknown. No round trip.

        The answer stays the same until it is used up. It is 0 for an unknown request.
        """
        request = self._lookups.requests.get(request_id)
        chunks = 0 if request is None else self._lookups.check(request)
        return None if chunks is None else chunks * self.chunk_tokens

    def loaded_tokens(self, request_id: str) -> int:
        """How many of the tokens that may be loaded a tier brought for this lookup. 0 for an unknown request.

        They are taken for the last ones: memory gives up the end of a prompt before its beginning. Ask before the
        answer is used up.
        """
        request = self._lookups.requests.get(request_id)
        if request is None:
            return 0
        with self._lock:
            return max(0, request.lookup.chunks - request.lookup.in_memory) * self.chunk_tokens

    def wait_lookups(self, request_ids: Sequence[str], seconds: float) -> None:
        """Block until one of the answers has come or is late, at most *seconds*. For a host with nothing else to do."""
        self._lookups.wait(request_ids, seconds)

    def ask_lookup_status(self, request_id: str) -> None:
        """Ask the server again for an answer that is awaited, whose message may have been lost. Does not wait."""
        request = self._lookups.requests.get(request_id)
        if request is not None:
            self._lookups.ask_status(request)

    def update_after_alloc(
        self, request_id: str, external_tokens: int, *, local_tokens: int = 0, block_ids: Sequence[int] = ()
    ) -> LoadSpec | None:
        """The engine allocated *block_ids* for tokens [local_tokens, local_tokens + external_tokens) of the answer.

        None when *external_tokens* is 0: the answer is then released. Otherwise always a spec: if the answer is used up
        by now, its lease is empty and the worker reports the blocks as failed, so that the engine computes them. An
        engine that names its groups calls `loads_after_alloc`.
        """
        self._check_one_group("loads_after_alloc")
        request = self._lookups.open(request_id)
        if external_tokens == 0:
            self._lookups.forget(request)
            return None
        self._prompts.check_span(external_tokens, local_tokens)
        if len(block_ids) * self.block_tokens != external_tokens:
            raise Misuse(f"block_ids has {len(block_ids)} blocks for {external_tokens} external_tokens")
        chunk_tokens, block_tokens = self.chunk_tokens, self.block_tokens  # final before any lookup is answered
        first, skip = divmod(local_tokens, chunk_tokens)
        end = -(-(local_tokens + external_tokens) // chunk_tokens)
        lease = self._lookups.take(request, end, exact=False)
        skipped, count = skip // block_tokens, end - first
        return LoadSpec(
            request_id, request.session, lease, first, count, skipped, block_ids, chunk_tokens, block_tokens
        )

    def loads_after_alloc(
        self, request_id: str, external_tokens: int, *, local_tokens: int = 0, blocks: Sequence[Sequence[int]]
    ) -> tuple[LoadSpec, ...]:
        """As `update_after_alloc`, for any groups: the loads that fill what the answer needs of each group.

        *blocks*: by group, all blocks of the request, from its first token on; -1 is a hole. A group of states has
        one block per state, and the state goes into the block of the last token of the answer; with `block_tokens` 0,
        into the last block of the list. What the engine has in its first *local_tokens* tokens is not loaded again,
        and neither is what falls into a hole.

        The result is empty when *external_tokens* is 0: the answer is then released. It is also empty if no group
        needs anything. Unless all groups keep every token, the two counts of tokens make the whole answer. If it is
        used up by now, or is another one, the specs' lease is empty, and the loads fail. `Misuse`: *blocks* do not fit
        the groups, or end before the answer does.
        """
        request, groups = self._lookups.open(request_id), self._groups
        if external_tokens == 0:
            self._lookups.forget(request)
            return ()
        self._prompts.check_span(external_tokens, local_tokens)
        self._check_blocks(blocks)
        chunk_tokens, tokens = self.chunk_tokens, local_tokens + external_tokens
        if self._exact and tokens % chunk_tokens:
            raise Misuse(
                f"local_tokens and external_tokens make {tokens}: with these groups give a whole number of chunks of"
                f" {chunk_tokens} tokens"
            )
        runs = [loaded_runs(group, chunk_tokens, blocks[i], local_tokens, tokens) for i, group in enumerate(groups)]
        lease = self._lookups.take(request, -(-tokens // chunk_tokens), exact=self._exact)
        planned = request_id, request.session, lease
        return tuple(
            LoadSpec(*planned, run.first, run.count, run.skip, run.block_ids, *self._units(chunk_tokens, group))
            for group in range(len(groups))
            for run in runs[group]
        )

    # --- digests and sessions ---------------------------------------------------------------------------------------

    def extend(self, request_id: str, token_ids: Sequence[int], *, extras: Extras | None = None) -> list[bytes]:
        """Digests of all full chunks of *token_ids*, hashed once.

        These are the request's first tokens, fewer or more than before; any others make it another request.
        """
        _check_tokens(token_ids)
        prompt = self._request_of(request_id, token_ids, extras).prompt
        self._prompts.extend(prompt, token_ids, extras)
        return prompt.digests[: len(token_ids) // self.chunk_tokens]

    def session_spec(self, request_id: str) -> int:
        """The number of the request's session. A new request gets one."""
        return self._lookups.open(request_id).session

    def num_blocks_per_chunk(self) -> int:
        """The engine's blocks in one chunk, if it names no groups."""
        return self.chunk_tokens // self.block_tokens

    def store_spec(self, request_id: str, first_chunk: int, block_ids: Sequence[int]) -> StoreSpec:
        """The spec by which a worker stores the chunks from *first_chunk* on, whose blocks are *block_ids* in order.

        Their digests are known from a submit or `extend`. A session that the server does not know (its request was not
        looked up, or before the server restarted) is opened: the one case that waits for a reply, bounded. An engine
        that names its groups calls `store_specs`.
        """
        self._check_one_group("store_specs")
        check_whole("first_chunk", first_chunk)
        request = self._lookups.open(request_id)
        with self._lock:  # under which the server's chunk_tokens are taken over, and digests of others forgotten
            chunk_tokens, block_tokens, known = self.chunk_tokens, self.block_tokens, request.prompt.digests
            chunks, rest = divmod(len(block_ids), chunk_tokens // block_tokens)
            parent = known[first_chunk - 1] if 0 < first_chunk <= len(known) else b""
            digests = join_digests(known[max(0, first_chunk) : first_chunk + chunks])
        if rest or not chunks or first_chunk < 0 or first_chunk + chunks > len(known):
            raise Misuse(
                f"block_ids has {len(block_ids)} blocks from chunk {first_chunk} on: give whole chunks of"
                f" {chunk_tokens // block_tokens} blocks, up to the {len(known)} chunks that were hashed"
            )
        self._lookups.open_session(request)
        return StoreSpec(request_id, request.session, parent, digests, block_ids, chunk_tokens, block_tokens)

    def store_specs(
        self, request_id: str, first_chunk: int, end_chunk: int, blocks: Sequence[Sequence[int]]
    ) -> tuple[StoreSpec, ...]:
        """As `store_spec`, for any groups: the stores of the chunks from *first_chunk* until *end_chunk*.

        *blocks*: by group, all blocks of the request, from its first token on; -1 is a hole. A chunk whose part has a
        hole is left out in that group. So are the groups of states: see `state_spec`. `Misuse`: *blocks* do not fit
        the groups or end before the chunks do, or the chunks were not hashed.
        """
        check_whole("first_chunk", first_chunk)
        check_whole("end_chunk", end_chunk)
        self._check_blocks(blocks)
        request = self._lookups.open(request_id)
        with self._lock:  # under which the server's chunk_tokens are taken over, and digests of others forgotten
            chunk_tokens, known = self.chunk_tokens, request.prompt.digests[:end_chunk]
        if end_chunk > len(known):
            raise Misuse(f"chunk {end_chunk - 1} is to be stored, and {len(known)} chunks were hashed: `extend` first")
        runs = [
            (i, run)
            for i, group in enumerate(self._groups)
            if group.need is not Need.STATE
            for run in stored_runs(group, chunk_tokens, blocks[i], first_chunk, end_chunk)
        ]
        made = [
            _store_spec(request_id, request.session, known, run, self._units(chunk_tokens, group))
            for group, run in runs
        ]
        self._lookups.open_session(request)
        return tuple(made)

    def state_spec(self, request_id: str, group: int, boundary_tokens: int, block_id: int) -> StoreSpec | None:
        """The store of a state of *group*, as it is in block *block_id* behind the request's first *boundary_tokens*.

        None if no hit can end there: it is not the end of a chunk that was hashed. `Misuse`: *group* keeps no states.
        """
        check_whole("group", group)
        check_whole("boundary_tokens", boundary_tokens)
        if group >= len(self._groups) or self._groups[group].need is not Need.STATE:
            raise Misuse(f"group {group} is not a group of states")
        request = self._lookups.open(request_id)
        with self._lock:
            chunk_tokens = self.chunk_tokens
            boundary, rest = divmod(boundary_tokens, chunk_tokens)
            known = request.prompt.digests[:boundary]
        if rest or not boundary or boundary > len(known):
            return None
        run = PartRun(boundary - 1, 1, 0, (block_id,))
        made = _store_spec(request_id, request.session, known, run, self._units(chunk_tokens, group))
        self._lookups.open_session(request)
        return made

    def mark_failed(self, request_id: str, first_failed_token: int) -> None:
        """A load of the chunk of *first_failed_token* failed: that chunk and all behind it are not offered again."""
        check_whole("first_failed_token", first_failed_token)
        request = self._lookups.open(request_id)
        with self._lock:
            request.lookup.fail(first_failed_token // self.chunk_tokens)
        if self._exact:  # an answer of more chunks has not what a shorter hit needs
            self._lookups.forget(request)

    def free_lookup_locks(self, request_id: str) -> None:
        """The lookup is not wanted any more, or its load has ended: its lease goes, the request stays."""
        request = self._lookups.requests.get(request_id)
        if request is not None:
            self._lookups.release(request)

    def cleanup_lookup_result(self, request_id: str) -> None:
        """Forget the answer: the next submit asks anew. A load keeps the lease that it has taken."""
        request = self._lookups.requests.get(request_id)
        if request is not None:
            self._lookups.forget(request)

    def end_session(self, request_id: str) -> None:
        """The request is over. Stores of it that were submitted are finished; the same id again is another request."""
        self._lookups.end(request_id)

    def is_healthy(self) -> bool:
        """Is a server connected that answers, and does it know the layouts of all the engine's workers?"""
        client = self._lookups.client
        return client is not None and client.namespace != b""

    def reset_cache(self) -> bool:
        """Drop all chunks of this engine's model and layouts, in memory and in tiers. True: it is done.

        A change of the weights needs it, too. KV that was computed before is not stored any more, and is counted as
        `reset`. KV that is computed from now on has names of its own, which no other engine shares, until
        `set_weights_version`.

        Without a server there is nothing to drop, so the result is True, and the next server is told first of all.
        False: the server did not confirm it within *lookup_timeout*, or a tier could not delete; the log says why.
        """
        if not self._link.alive:
            return False
        with self._lock:
            client = self._told
            self._resets_owed[self._prompts.model] = _OwedReset(self._prompts.model, join_digests(self._layouts))
            replied: list[Handoff[Reply]] = []
            if client is not None:
                with suppress(Unavailable):  # it is lost, or reads nothing: the next connection begins with it
                    replied = [self._send_reset(client, owed) for owed in self._resets_owed.values()]
            own = ("weights of its own", self._own)
            self._use_weights((*own, os.urandom(16)), own)
            if client is not None:
                client.request_unheard(Identify(client.new_id(), self._prompts.model))
        if client is None or client.lost:
            return True
        until = time.monotonic() + self.lookup_timeout
        replies = [each.wait(until - time.monotonic()) for each in replied]
        if not replies or None in replies:
            logger.warning("the cache was not reset: the server did not confirm it in %g s", self.lookup_timeout)
        return (bool(replies) and all(isinstance(reply, Ack) for reply in replies)) or client.lost

    def set_weights_version(self, version: str) -> None:
        """The weights are *version* of this model from now on. Engines that name the same version share their KV.

        Call it after the weights have changed, behind `reset_cache`. Open requests go on without the cache until they
        are looked up again. The version that is in use already changes nothing, and costs no round trip.
        """
        named = _version(version)
        confirmed: Handoff[Reply] = Handoff()

        def on_reply(reply: Reply) -> None:
            confirmed.set(reply)

        with self._lock:
            if named == self._prompts.weights:
                return
            self._use_weights(named, named)
            client = self._told
            if client is None:
                return  # the next server's first word
            with suppress(Unavailable):
                ask = Identify(client.new_id(), self._prompts.model)
                client.request_nowait(ask, on_reply)
        if not client.lost and not confirmed.wait(self.lookup_timeout):
            logger.warning("the server did not confirm the weights' version in %g s", self.lookup_timeout)

    def take_changes(self) -> Sequence[CacheChange]:
        """What has come into the server's memory and to its tiers, and left them, since the last call, in order.

        Each engine of the same namespace is told the same, whichever of them stored a chunk. A part that came may have
        left by now, until that is told. Does not wait, and is always empty without *watch*.
        """
        return () if self._changes is None else self._changes.take()

    def shutdown(self) -> None:
        """Leave the server, which forgets every session of this engine. Idempotent."""
        self._link.stop(5.0)

    # --- inside -----------------------------------------------------------------------------------------------------

    def _request_of(self, request_id: str, token_ids: Sequence[int], extras: Extras | None) -> Request:
        """The request with this id. If its prompt is another one now, it is a new request."""
        request = self._lookups.open(request_id)
        if self._prompts.continues(request.prompt, token_ids, extras):
            return request
        self.end_session(request_id)
        return self._lookups.open(request_id)

    def _check_one_group(self, instead: str) -> None:
        if self._named:
            raise Misuse(f"this engine names its groups: call {instead}")

    def _check_blocks(self, blocks: Sequence[Sequence[int]]) -> None:
        if not isinstance(blocks, Sequence) or len(blocks) != len(self._groups):
            raise Misuse(f"blocks is {blocks!r:.80}: give the blocks of each of {len(self._groups)} groups")

    def _units(self, chunk_tokens: int, group: int) -> tuple[int, int, int, int]:
        """The last fields of a spec for *group*."""
        width = self._groups[group].part_blocks(chunk_tokens) if self._named else 0
        return chunk_tokens, self.block_tokens, group, width

    def _use_weights(self, weights: tuple[str | bytes, ...], namespace: tuple[str | bytes, ...]) -> None:
        """Name chunks for *weights* from now on, and the model to the server for *namespace*. Under the lock.

        The answers of open requests are forgotten, because they are for the former weights.
        """
        for request in self._lookups.requests.values():
            request.lookup.forget()
            request.outdated = True
        self._prompts.rename(weights, namespace)
        self._link.hello = attrs.evolve(self._link.hello, identity=self._prompts.model)

    async def _on_connected(self, client: Client) -> None:
        with self._lock:  # before anything is asked: what the server has of before a reset is not offered
            self._adopt_chunk_tokens(client.chunk_tokens)
            client.on_push = self._on_push
            if self._changes is not None:
                self._changes.clear()
                client.notice_nowait(Watch())
            self._see_layout(client.layout)
            for owed in self._resets_owed.values():
                self._send_reset(client, owed)
            if self._link.said.identity != self._prompts.model:
                client.request_unheard(Identify(client.new_id(), self._prompts.model))
            self._told = client

    def _adopt_chunk_tokens(self, chunk_tokens: int) -> None:
        """Take the first server's *chunk_tokens*; where they differ, prompts are hashed anew. Under the lock."""
        self._link.hello = attrs.evolve(self._link.hello, chunk_tokens=chunk_tokens)
        if self._prompts.adopt_chunk_tokens(chunk_tokens):
            for request in self._lookups.requests.values():
                request.prompt = Prompt()

    def _on_lost(self) -> None:
        with self._lock:
            self._told = None
        if self._changes is not None:
            self._changes.clear()
        self._lookups.lose()

    def _on_push(self, message: Message) -> None:
        if isinstance(message, NamespaceKnown):
            with self._lock:
                self._see_layout(message.layout)
        if self._changes is not None and isinstance(message, Changed):
            self._changes.add(message)
        elif self._changes is not None and isinstance(message, NamespaceKnown):
            self._changes.clear()
        self._lookups.on_push(message)

    def _see_layout(self, layout: bytes) -> None:
        """The engine's *layout*, as the server knows it; b"" if it does not. Under the lock."""
        if layout:
            self._layouts.pop(layout, None)
            self._layouts[layout] = None
            if len(self._layouts) > MAX_LAYOUTS:
                del self._layouts[next(iter(self._layouts))]

    def _send_reset(self, client: Client, owed: _OwedReset) -> Handoff[Reply]:
        """Have the server drop the chunks that *owed* names. `Unavailable`: the server is gone. Under the lock."""
        replied: Handoff[Reply] = Handoff()

        def on_reply(reply: Reply) -> None:
            if isinstance(reply, Ack):
                with self._lock:
                    if self._resets_owed.get(owed.identity) is owed:
                        del self._resets_owed[owed.identity]
            elif not client.lost:
                logger.warning("the cache was not reset: %s", reply)
            replied.set(reply)

        client.request_nowait(Reset(client.new_id(), owed.identity, owed.layouts), on_reply)
        return replied


def _store_spec(
    request_id: str, session: int, known: Sequence[bytes], run: PartRun, units: tuple[int, int, int, int]
) -> StoreSpec:
    """The store of *run*, of chunks whose digests are *known* with all before them."""
    parent, digests = known[run.first - 1] if run.first else b"", known[run.first : run.first + run.count]
    return StoreSpec(request_id, session, parent, join_digests(digests), run.block_ids, *units)


def _check_tokens(token_ids: Any) -> None:
    if not hasattr(token_ids, "__len__") or not hasattr(token_ids, "__getitem__"):
        raise Misuse(f"token_ids is {token_ids!r:.80}: it must be a sequence of token ids")
    if getattr(token_ids, "ndim", 1) != 1:
        raise Misuse(f"token_ids has {token_ids.ndim} dimensions: give those of one prompt, in one dimension")


def _version(version: str) -> tuple[str, str]:
    if not isinstance(version, str) or not version:
        raise Misuse(f"the weights' version is {version!r}: give a str that is not empty")
    return ("weights version", version)
