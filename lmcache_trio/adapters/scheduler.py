"""A synchronous scheduler's side: how much of this prompt does the cache have, and under which lease.

Two steps and no waiting: `maybe_submit_lookup_request` sends the question from the calling thread, the answer is read
by a Trio loop in a thread of its own, and `check_lookup_result` looks whether it came. Nothing here raises into the
engine because of a server: late, unhealthy or gone is 0 tokens. One host thread at a time may use an adapter.

Every change of a lookup's state happens under the latch; each is decided by `_core.lookup`.
"""

import os
from collections.abc import Sequence
from contextlib import suppress

import attrs

from lmcache_trio._core.keys import join_digests
from lmcache_trio._core.lookup import LookupState
from lmcache_trio._transport.conversation import Reply
from lmcache_trio._wire.messages import (
    MAX_DIGESTS,
    PROTOCOL_VERSION,
    Ack,
    Answer,
    Ended,
    Hello,
    Identify,
    Lookup,
    Release,
    Role,
    Taken,
)
from lmcache_trio.adapters.link import logger
from lmcache_trio.adapters.lookups import Lookups
from lmcache_trio.adapters.prompts import Extras
from lmcache_trio.adapters.request import Pending, Request
from lmcache_trio.adapters.specs import LoadSpec, StoreSpec, check_seconds, check_whole
from lmcache_trio.client import sentence
from lmcache_trio.client_config import check_interval, load_client_config
from lmcache_trio.errors import Misuse, Unavailable
from lmcache_trio.threads import Handoff

__all__ = ["SchedulerAdapter"]

_BUDGET_SHARE = 0.8
"""Of `lookup_timeout`, what tiers may take: a slow disk is to give a smaller hit, and not a timeout."""
_OPENING = 0.1
"""Seconds to wait for a session to be opened, before a store; 500 round trips."""


class SchedulerAdapter(Lookups):
    """Lookups for one engine. Its workers, joined by *engine_id*, move the bytes.

    *identity* names the model and all else that changes what a token's KV is; it seeds every digest. *shards*: the
    workers that hold different bytes. *lookup_timeout*: seconds until a lookup without an answer counts
    as 0 tokens. *poll_interval*: seconds of silence between questions for its status. Either is taken from
    `load_client_config` when it is not given. *lease_timeout*: no answer is offered for longer. *weights_version*: as
    `set_weights_version` says, from the start.
    `Misuse` names a setting that is wrong, or that the server refuses.

    A subclass may use what is public, and read `_requests`, `_pending`, `_poll_interval`, `_clock`, `_link`,
    `_take_answer` and `_too_late`.
    """

    def __init__(  # noqa: PLR0913  (keywords, each a setting of its own)
        self,
        address: str,
        *,
        engine_id: str,
        identity: Sequence[str | bytes],
        block_tokens: int,
        shards: int = 1,
        chunk_tokens: int | None = None,
        lookup_timeout: float | None = None,
        poll_interval: float | None = None,
        lease_timeout: float | None = None,
        connect_timeout: float = 5.0,
        weights_version: str | None = None,
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
        super().__init__(identity, block_tokens, chunk_tokens, lookup_timeout)
        self._poll_interval = poll_interval
        if lease_timeout is not None:
            self._lease_timeout = lease_timeout
        check_whole("shards", shards, 1)
        self._own = os.urandom(16)
        """What tells weights of its own from any other engine's."""
        if weights_version is not None:
            named = _version(weights_version)
            self._rename(named, named)
        name, token = f"scheduler {os.getpid()}", os.urandom(16)
        hello = sentence(Hello, PROTOCOL_VERSION, name, token, Role.SCHEDULER, engine_id, 0, shards, self._model)
        self._connect(address, hello, connect_timeout)

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
        are offered, nor more chunks than one message can name (65,536). The prompt may grow from call to call; any
        other or shorter one under the same id is another request, as if the former had been ended.
        """
        _check_tokens(token_ids)
        if max_tokens is not None and not isinstance(max_tokens, int):
            raise Misuse(f"max_tokens is {max_tokens!r}: it must be a whole number")
        former = self._request(request_id)
        if former.outdated or len(token_ids) < len(former.tokens):
            self.end_session(request_id)  # begun anew; or what was found for a longer prompt is no answer for this one
        request = self._request_of(request_id, token_ids, extras)
        with self._latch:
            self._expire(request)
            if request.machine.state in (LookupState.PENDING, LookupState.ANSWERED):
                return
        self._extend(request, token_ids, extras)
        tokens = len(token_ids) if max_tokens is None else max_tokens
        upto = request.machine.limit(min(len(request.digests), max(0, tokens) // self.chunk_tokens, MAX_DIGESTS))
        client = self._usable()
        if client is None or upto == 0 or request.given_up == upto:
            return
        asked = client.new_id()
        start = request.sent if request.known_to(client) else 0
        budget_ms = int(self._lookup_timeout * _BUDGET_SHARE * 1000)
        ask = Lookup(asked, request.session, start, join_digests(request.digests[start:upto]), upto, budget_ms)
        pending = Pending(request, client, asked, self._clock() + self._lookup_timeout, client.heard)
        with self._latch:  # which whoever reads the reply waits for
            try:
                client.request_nowait(ask, lambda reply: self._on_reply(pending, reply))
            except Unavailable:
                return  # the server knows nothing of it, and what it knew before holds
            request.machine.submit(asked)
            request.pending = pending
            request.told(client, max(start, upto))
            request.upto = upto
            request.lease_taken = False  # the server lets go of it for this lookup

    def check_lookup_result(self, request_id: str) -> int | None:
        """How many leading tokens may be loaded, a multiple of `chunk_tokens`; None while unknown. No round trip.

        The same answer as often as it is asked, until it is used up; 0 for a request that nothing is known of.
        """
        request = self._requests.get(request_id)
        if request is None:
            return 0
        pending = self._pending(request)
        if pending is not None:
            silence = self._clock() - (pending.deadline - self._lookup_timeout)
            if silence < self._lookup_timeout:
                if silence > self._poll_interval:
                    self._watch_soon(pending)
                return None
            self._too_late(pending)
        with self._latch:
            self._expire(request)
            return request.machine.chunks * self.chunk_tokens

    def wait_lookups(self, request_ids: Sequence[str], seconds: float) -> None:
        """Block until one of the answers has come, at most *seconds*: for a host with nothing else to do."""
        answered: Handoff[bool] = Handoff()
        with self._latch:
            requests = [self._requests.get(request_id) for request_id in request_ids]
            if any(request is None or request.pending is None for request in requests):
                return
            self._awaited = answered
        answered.wait(seconds)

    def update_after_alloc(
        self, request_id: str, external_tokens: int, *, local_tokens: int = 0, block_ids: Sequence[int] = ()
    ) -> LoadSpec | None:
        """The engine allocated *block_ids* for tokens [local_tokens, local_tokens + external_tokens) of the answer.

        None when *external_tokens* is 0: the answer is then released. Otherwise always a spec: if the answer is used up
        by now, its lease is empty and the worker reports the blocks as failed, so that the engine computes them.
        """
        request = self._request(request_id)
        if external_tokens == 0:
            self._let_go(request)
            request.given_up = None
            return None
        lease = b""
        with self._latch:  # under which the server's chunk_tokens are taken over, too
            count = self._check_span(external_tokens, local_tokens, block_ids)
            self._expire(request)
            request.given_up = None
            machine = request.machine
            if machine.state is LookupState.ANSWERED:
                if local_tokens + external_tokens <= machine.chunks * self.chunk_tokens:
                    lease = machine.taken()
                    request.lease_taken = True
                    self._notify(request, Taken(request.session, lease))
                else:
                    machine.release()
                    self._notify(request, Release(request.session))
            chunk_tokens, block_tokens = self.chunk_tokens, self.block_tokens
        first, skip = divmod(local_tokens, chunk_tokens)
        blocks = tuple(block_ids)
        return LoadSpec(
            request_id, request.session, lease, first, count, skip // block_tokens, blocks, chunk_tokens, block_tokens
        )

    # --- digests and sessions ---------------------------------------------------------------------------------------

    def extend(self, request_id: str, token_ids: Sequence[int], *, extras: Extras | None = None) -> list[bytes]:
        """Digests of all full chunks of *token_ids*, hashed once.

        These are the request's first tokens, fewer or more than before; any others make it another request.
        """
        _check_tokens(token_ids)
        request = self._request_of(request_id, token_ids, extras)
        self._extend(request, token_ids, extras)
        return request.digests[: len(token_ids) // self.chunk_tokens]

    def store_spec(self, request_id: str, first_chunk: int, block_ids: Sequence[int]) -> StoreSpec:
        """What a worker needs to store the chunks from *first_chunk* on, whose blocks are *block_ids* in order.

        Their digests are known from a submit or `extend`. A session that the server does not know (its request was not
        looked up, or before the server restarted) is opened: the one case that waits for a reply, bounded.
        """
        check_whole("first_chunk", first_chunk)
        request = self._request(request_id)
        with self._latch:  # under which the server's chunk_tokens are taken over, and digests in others forgotten
            chunk_tokens, block_tokens, known = self.chunk_tokens, self.block_tokens, len(request.digests)
            chunks, rest = divmod(len(block_ids), chunk_tokens // block_tokens)
            parent = request.digests[first_chunk - 1] if 0 < first_chunk <= known else b""
            digests = join_digests(request.digests[max(0, first_chunk) : first_chunk + chunks])
        if rest or not chunks or first_chunk < 0 or first_chunk + chunks > known:
            raise Misuse(
                f"block_ids has {len(block_ids)} blocks from chunk {first_chunk} on: give whole chunks of"
                f" {chunk_tokens // block_tokens} blocks, up to the {known} chunks that were hashed"
            )
        self._open_session(request)
        return StoreSpec(request_id, request.session, parent, digests, tuple(block_ids), chunk_tokens, block_tokens)

    def mark_failed(self, request_id: str, first_failed_token: int) -> None:
        """A load of the chunk that holds *first_failed_token* failed: it and all behind it are not offered again."""
        check_whole("first_failed_token", first_failed_token)
        request = self._request(request_id)
        with self._latch:
            request.machine.failed(first_failed_token // self.chunk_tokens)

    def free_lookup_locks(self, request_id: str) -> None:
        """The lookup is not wanted any more, or its load has ended: its lease goes, the request stays."""
        request = self._requests.get(request_id)
        if request is not None:
            self._let_go(request)
            if request.lease_taken:
                request.lease_taken = False
                self._notify(request, Release(request.session))

    def cleanup_lookup_result(self, request_id: str) -> None:
        """Forget the answer: the next submit asks anew. A lease that was taken for a load is left to it."""
        request = self._requests.get(request_id)
        if request is not None:
            self._let_go(request)
            with self._latch:
                request.machine.forget()
            request.given_up = None

    def end_session(self, request_id: str) -> None:
        """The request is over. Stores of it that were submitted are finished; the same id again is another request."""
        request = self._requests.get(request_id)
        if request is not None:
            with self._latch:
                self._drop_lookup(request)  # the end of the session releases it: one notice for both
                del self._requests[request_id], self._sessions[request.session]
            self._notify(request, Ended(request.session))

    def is_healthy(self) -> bool:
        """Is a server there that answers, and does it know the layout of all of the engine's workers?"""
        client = self._usable()
        return client is not None and client.namespace != b""

    def reset_cache(self) -> bool:
        """Drop all that the cache holds for this engine's model and layout, here and in tiers. True: it is done.

        For whoever has changed the weights, too. What was computed before is not stored any more: counted `reset`. What
        is computed from now on has names of its own, which no other engine shares, until `set_weights_version`.

        Without a server there is nothing to drop, and the next one is told before it is asked anything: True. False:
        the server did not confirm it within *lookup_timeout*, or a tier could not delete; why is logged.
        """
        if not self._link.alive:
            return False
        with self._latch:
            client, former = self._told, self._model
            self._resets_owed[former] = None
            replied = None
            if client is not None:
                with suppress(Unavailable):  # it is lost, or reads nothing: the next connection begins with it
                    replied = self._send_reset(client, former)
            own = ("weights of its own", self._own)
            self._use_weights((*own, os.urandom(16)), own)
            if client is not None:
                client.request_unheard(Identify(client.new_id(), self._model))
        if client is None or client.lost:
            return True
        reply = None if replied is None else replied.wait(self._lookup_timeout)
        if reply is None:
            logger.warning("the cache was not reset: the server did not confirm it in %g s", self._lookup_timeout)
        return isinstance(reply, Ack) or client.lost

    def set_weights_version(self, version: str) -> None:
        """The weights are *version* of this model from now on: engines that say the same share what they compute.

        Say it after the weights have changed, behind `reset_cache`. Requests that live go on without the cache until
        they are looked up again. The version that is in use already changes nothing, and is no round trip.
        """
        named = _version(version)
        confirmed: Handoff[Reply] = Handoff()

        def on_reply(reply: Reply) -> None:
            confirmed.set(reply)

        with self._latch:
            if named == self._weights:
                return
            self._use_weights(named, named)
            client = self._told
            if client is None:
                return  # the next server's first word
            with suppress(Unavailable):
                ask = Identify(client.new_id(), self._model)
                client.request_nowait(ask, on_reply)
        if not client.lost and not confirmed.wait(self._lookup_timeout):
            logger.warning("the server did not confirm the weights' version in %g s", self._lookup_timeout)

    def shutdown(self) -> None:
        """Leave the server, which forgets every session of this engine. Idempotent."""
        self._link.stop(5.0)

    # --- inside -----------------------------------------------------------------------------------------------------

    def _use_weights(self, weights: tuple[str | bytes, ...], namespace: tuple[str | bytes, ...]) -> None:
        """Name chunks for *weights* from now on, and the model to the server for *namespace*. Under the latch."""
        for request in self._requests.values():
            self._drop_lookup(request)
        self._rename(weights, namespace)
        self._link.hello = attrs.evolve(self._link.hello, identity=self._model)

    def _request_of(self, request_id: str, token_ids: Sequence[int], extras: Extras | None) -> Request:
        """The request with this id: a fresh one, with nothing of the former, if its prompt is another now."""
        request = self._request(request_id)
        if self._goes_on(request, token_ids, extras):
            return request
        self.end_session(request_id)
        return self._request(request_id)

    def _open_session(self, request: Request) -> None:
        """The worker's connection may be faster than ours, and slots are given to known sessions only: so wait."""
        client = self._usable()
        if client is None or request.known_to(client) or request.outdated:
            return
        opened: Handoff[bool] = Handoff()
        opening = Lookup(client.new_id(), request.session, 0, b"", 0)

        def on_reply(reply: Reply) -> None:
            if not isinstance(reply, Answer):
                with self._latch:
                    request.refused(client)
            opened.set(True)

        with self._latch:
            try:
                client.request_nowait(opening, on_reply)
            except Unavailable:
                return  # the store will be dropped and counted
            request.told(client, 0)
        opened.wait(min(self._lookup_timeout, _OPENING))


def _check_tokens(token_ids: object) -> None:
    if not hasattr(token_ids, "__len__") or not hasattr(token_ids, "__getitem__"):
        raise Misuse(f"token_ids is {token_ids!r:.80}: it must be a sequence of token ids")


def _version(version: str) -> tuple[str, str]:
    if not isinstance(version, str) or not version:
        raise Misuse(f"the weights' version is {version!r}: give a str that is not empty")
    return ("weights version", version)
