"""The connector in vLLM's scheduler: which tokens are offered, and which chunks are stored.

It decides and never waits. Its input comes as arguments, its output is a `StepPlan`, and it reaches the cache through a
`SchedulerAdapter` alone. vLLM is not imported here.

    offer()      how many more tokens the cache has          get_num_new_matched_tokens
    allocated()  blocks are there: load into them, or not    update_state_after_alloc
    plan()       chunks completed by this step are stored    build_connector_meta
    output()     what the workers reported                   update_connector_output
    finished()   its blocks are vLLM's again                 request_finished

A chunk is stored when the KV of all its tokens is computed at the end of the step, and all its token ids are known.
vLLM counts ahead: with asynchronous scheduling and speculative tokens `num_computed_tokens` includes positions whose
ids nobody knows yet, or which may be rejected. The ids that a request has are the accepted ones, and each of them but
the newest has gone through a step that is ordered before this one.

Beside another connector a request may begin with KV that came from there. If that was loaded in the step itself, only
the step's output tells whether it is valid, and any request of the step may share it. So from such a step on nothing is
stored until its output has come; if it names blocks that failed, vLLM recomputes them and they were never stored.

Block lists are by KV group, each from the request's first token on, with -1 for a hole. What has left a window is a
hole, and its blocks are written again while their request runs: also by itself. A state is stored from the block that
vLLM names for it, and from no other: a list of blocks does not say which state a block holds.
"""

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from types import MappingProxyType
from typing import Protocol

import attrs

from lmcache_trio.adapters import Group, LoadSpec, Need, StoreSpec
from lmcache_trio.adapters.vllm.events import BlockEvents
from lmcache_trio.adapters.vllm.figures import LookupTimes
from lmcache_trio.adapters.vllm.metadata import IDLE_SECONDS, StepPlan
from lmcache_trio.errors import Misuse, Unavailable

__all__ = ["Cache", "EngineRequest", "Identify", "SchedulerSide", "StepOutput"]

logger = logging.getLogger(__name__)

Extras = Callable[[int, int], bytes]
BlockLists = Sequence[Sequence[int]]
"""All blocks of one request, by group."""
States = Mapping[str, Sequence[tuple[int, int, int]]]
"""By request: (group, block, tokens), the block that holds the group's state behind these tokens."""


class EngineRequest(Protocol):
    """The part of vLLM's Request that is read here."""

    @property
    def request_id(self) -> str: ...
    @property
    def num_tokens(self) -> int: ...
    @property
    def all_token_ids(self) -> Sequence[int]: ...
    @property
    def num_computed_tokens(self) -> int: ...
    @property
    def num_in_flight_tokens(self) -> int: ...
    @property
    def skip_reading_prefix_cache(self) -> bool: ...
    @property
    def block_hashes(self) -> Sequence[bytes]: ...


class Cache(Protocol):
    """The part of `SchedulerAdapter` that is used here."""

    @property
    def chunk_tokens(self) -> int: ...
    def maybe_submit_lookup_request(
        self,
        request_id: str,
        token_ids: Sequence[int],
        *,
        extras: Extras | None = None,
        max_tokens: int | None = None,
    ) -> None: ...
    def check_lookup_result(self, request_id: str) -> int | None: ...
    def loaded_tokens(self, request_id: str) -> int: ...
    def wait_lookups(self, request_ids: Sequence[str], seconds: float) -> None: ...
    def loads_after_alloc(
        self, request_id: str, external_tokens: int, *, local_tokens: int = 0, blocks: BlockLists
    ) -> tuple[LoadSpec, ...]: ...
    def extend(self, request_id: str, token_ids: Sequence[int], *, extras: Extras | None = None) -> list[bytes]: ...
    def store_specs(
        self, request_id: str, first_chunk: int, end_chunk: int, blocks: BlockLists
    ) -> tuple[StoreSpec, ...]: ...
    def state_spec(self, request_id: str, group: int, boundary_tokens: int, block_id: int) -> StoreSpec | None: ...
    def mark_failed(self, request_id: str, first_failed_token: int) -> None: ...
    def free_lookup_locks(self, request_id: str) -> None: ...
    def end_session(self, request_id: str) -> None: ...


Identify = Callable[[EngineRequest], Extras | None]
"""The extras of a request; None if its token ids say it all. `Unavailable`: they are not known, so it is not cached."""


@attrs.frozen
class StepOutput:
    """What the workers reported after *step*.

    *failed_step* is the latest step in which a synchronous load failed (0: none), *closed* says by how many workers a
    finished request was named, *changed* that the model's weights are others than at the last reset. *failed*: requests
    of *loaded* that are to be computed from their first token on, where a failed block does not tell what is valid.
    """

    step: int = 0
    loaded: frozenset[str] = frozenset()
    closed: Mapping[str, int] = attrs.Factory(dict)
    failed_blocks: frozenset[int] = frozenset()
    failed: frozenset[str] = frozenset()
    failed_step: int = 0
    changed: bool = False


@attrs.define(eq=False)
class _Tracked:
    """One request of the engine. *stored* leading chunks are in the cache or on their way there."""

    request: EngineRequest
    extras: Extras | None
    stored: int = 0
    asked: bool = False  # a lookup is open: its answer was not used up yet
    local_tokens: int = 0  # what the engine had itself when the answer was given
    loaded_tokens: int = 0  # of the answer, what a tier brought
    load_first: int = 0  # token at which load_blocks begin
    load_blocks: tuple[int, ...] = ()
    loading: bool = False  # an asynchronous load is under way
    failed_at: int | None = None  # the first token whose load failed: never offered again
    storing: int = 0  # workers that may be copying out of its blocks
    over: bool = False  # finished; its session ends when loads and stores have
    closing: bool = False  # the workers were told so


@attrs.frozen
class _AllocatedRequest:
    """A request whose blocks were allocated and which was in no step since: *known* tokens are ours or vLLM's own."""

    request: EngineRequest
    known: int


@attrs.frozen
class _Last:
    """What a finished request has computed: its blocks are free, and hold this until the next step writes them."""

    tracked: _Tracked
    computed: int
    blocks: BlockLists


class SchedulerSide:
    """State of one engine's scheduler, which has *workers* ranks and the KV groups *groups*.

    *loads* and *stores* say which way vLLM's `kv_role` lets it move KV. *events* is told what is stored and found.
    """

    def __init__(  # noqa: PLR0913
        self,
        cache: Cache,
        *,
        groups: Sequence[Group],
        asynchronous: bool,
        identify: Identify,
        loads: bool = True,
        stores: bool = True,
        workers: int = 1,
        events: BlockEvents | None = None,
    ) -> None:
        self._cache = cache
        self._events = events
        self._workers = workers
        self._groups = groups
        self._whole = len(groups) == 1 and groups[0].need is Need.EVERY  # what fails is computed from there on
        self._asynchronous = asynchronous
        self._identify = identify
        self._loads = loads
        self._stores = stores
        self._tracked: dict[str, _Tracked] = {}
        self._load_specs: list[LoadSpec] = []
        self._read_in_step: list[str] = []  # loaded before the step computes: over when it is
        self._store_specs: list[StoreSpec] = []
        self._written: list[int] = []  # blocks that were allocated since the last plan
        self._closing: list[str] = []
        self._last: list[_Last] = []
        self._local: dict[str, int] = {}  # what the engine had itself, by request, until its blocks are allocated
        self._started: dict[str, _AllocatedRequest] = {}
        self._step = 0
        self._settled = 0
        self._borrowed = 0  # the latest step that began with KV of another connector
        self._reported = 0  # the latest step whose output has come
        self._resets = 0
        self._reset_at = 0  # the step before the last reset
        self._strange = False  # the weights have changed, and nobody has reset the cache
        self._unanswered: list[str] = []  # offered in this step, and the answer is not there yet
        self._chunk_tokens = cache.chunk_tokens
        self.lookup_times = LookupTimes()

    def offer(self, request: EngineRequest, local_tokens: int) -> tuple[int | None, bool]:
        """(tokens beyond *local_tokens* that can be loaded, whether between steps). None: ask again."""
        self._local[request.request_id] = local_tokens
        if not self._loads or self._strange or request.skip_reading_prefix_cache:
            return 0, False
        tracked = self._track(request)
        if tracked is None:
            return 0, False
        if not tracked.asked:
            self.lookup_times.ask(request.request_id)
        # One token has to be computed, or there is nothing to sample from.
        self._cache.maybe_submit_lookup_request(
            request.request_id, request.all_token_ids, extras=tracked.extras, max_tokens=request.num_tokens - 1
        )
        tokens = self._cache.check_lookup_result(request.request_id)
        if tokens is None and not tracked.asked and not self._unanswered:
            # Memory answers in less than a millisecond; asked again in the next step, it would cost a whole step. Where
            # one lookup was not answered in time, the others of this step are not waited for.
            self._cache.wait_lookups([request.request_id], IDLE_SECONDS)
            tokens = self._cache.check_lookup_result(request.request_id)
        tracked.asked = True
        if tokens is None:
            self._unanswered.append(request.request_id)
            return None, False
        if self.lookup_times.answer(request.request_id) and tokens and self._events is not None:
            chunk_tokens, found = self._cache.chunk_tokens, request.all_token_ids[:tokens]
            digests = self._cache.extend(request.request_id, found, extras=tracked.extras)
            self._events.found(request, digests, chunk_tokens)
        tracked.stored = tokens // self._cache.chunk_tokens
        tracked.local_tokens = local_tokens
        tracked.loaded_tokens = self._cache.loaded_tokens(request.request_id)
        if tokens <= local_tokens:
            return 0, False
        return tokens - local_tokens, self._asynchronous

    def allocated(self, request: EngineRequest, blocks: BlockLists, external_tokens: int) -> None:
        """*blocks* are all blocks of the request; *external_tokens* are to be loaded from the cache.

        Called again, with 0, when a load has ended.
        """
        local = self._local.pop(request.request_id, None)
        if local is None:
            local = request.num_computed_tokens
        else:
            self._started[request.request_id] = _AllocatedRequest(request, local + external_tokens)
        for group, ids in zip(self._groups, blocks, strict=True):
            self._written += ids[local // group.block_tokens :]
        tracked = self._track(request)
        if tracked is None:
            return
        if external_tokens == 0:
            if tracked.asked:
                tracked.asked = False
                self._cache.loads_after_alloc(request.request_id, 0, blocks=blocks)
            return
        local = tracked.local_tokens
        specs = self._cache.loads_after_alloc(request.request_id, external_tokens, local_tokens=local, blocks=blocks)
        if not specs:
            raise Misuse(f"the adapter gave no load for {external_tokens} tokens of {request.request_id}")
        tracked.asked = False
        if self._whole:
            first, end = (tokens // self._groups[0].block_tokens for tokens in (local, local + external_tokens))
            tracked.load_first, tracked.load_blocks = local, tuple(blocks[0][first:end])
        tracked.loading = self._asynchronous
        self._load_specs += specs
        if not self._asynchronous:
            self._read_in_step.append(request.request_id)

    def from_tiers(self, request_id: str, external_tokens: int) -> int:
        """How many of the *external_tokens* that were just allocated for came from tiers, and not from memory."""
        tracked = self._tracked.get(request_id)
        return 0 if tracked is None else min(tracked.loaded_tokens, external_tokens)

    def plan(
        self,
        scheduled: Mapping[str, int],
        preempted: Sequence[str],
        blocks_of: Callable[[str], BlockLists],
        grown: Iterable[int] = (),
        states: States = MappingProxyType({}),
    ) -> StepPlan:
        """The plan of the step that computes *scheduled* tokens (by request); *blocks_of* gives a request's blocks.

        *grown* are the blocks that running requests were given for this step. *states* are there at the step's end.
        """
        self._step += 1
        if not scheduled and self._unanswered:
            # A pipeline plans idle steps too, while another batch runs. It cannot be told apart: that batch is late by
            # IDLE_SECONDS at most.
            self._cache.wait_lookups(self._unanswered, IDLE_SECONDS)
        self._unanswered = []
        for request_id in preempted:
            if tracked := self._tracked.get(request_id):
                tracked.load_blocks = ()  # they belong to others now
        last_stores = self._plan_last()
        self._see_borrowed(scheduled)
        if self._stores and not self._strange and not self._unsure():
            for request_id, tokens in scheduled.items():
                tracked = self._tracked.get(request_id)
                if tracked is not None:
                    computed = tracked.request.num_computed_tokens + tokens
                    self._store_specs += self._store(tracked, computed, partial(blocks_of, request_id))
                    self._store_specs += self._store_states(tracked, states.get(request_id, ()))
        plan = StepPlan(
            step=self._step,
            settled=self._settled,
            loads=tuple(self._load_specs),
            stores=tuple(self._store_specs),
            last_stores=last_stores,
            written=(*self._written, *grown),
            closing=tuple(self._closing),
            resets=self._resets,
            idle=not scheduled,
        )
        self._load_specs, self._store_specs, self._closing, self._written = [], [], [], []
        return plan

    def _see_borrowed(self, scheduled: Mapping[str, int]) -> None:
        """Does this step begin with KV that is neither ours nor vLLM's own? It is loaded before, or in, this step."""
        for request_id in self._started.keys() & scheduled.keys():
            started = self._started.pop(request_id)
            if started.request.num_computed_tokens > started.known:
                self._borrowed = self._step

    def _unsure(self) -> bool:
        return self._borrowed > self._reported

    def _plan_last(self) -> tuple[StoreSpec, ...]:
        """Stores of requests that have finished. A doubtful one is dropped, because the step may take its blocks."""
        last, self._last = self._last, []
        specs: list[StoreSpec] = []
        for each in last:
            if not self._strange and not self._unsure():
                specs += self._store(each.tracked, each.computed, each.blocks)
            self._end_if_over(each.tracked)
        return tuple(specs)

    def output(self, output: StepOutput) -> None:
        """Failures come first, because vLLM offers the failed requests again right after this call."""
        self._reported = max(self._reported, output.step)
        if output.changed and output.step > self._reset_at and not self._strange:
            self._strange = True
            logger.warning(
                "the model's weights have changed and its caches were not reset: nothing is cached any more; call "
                "reset_prefix_cache(reset_connector=True) after such a change, vLLM's own cache needs it too"
            )
        if output.failed_blocks:
            self._failed(output.failed_blocks)
            self._last = [each for each in self._last if output.failed_blocks.isdisjoint(each.blocks[0])]
        for request_id in output.failed:
            tracked = self._tracked.get(request_id)
            if tracked is not None and tracked.loading:
                self._fail(tracked, 0)
        if output.failed_step:
            self._settle(output.failed_step)
        for request_id in self._read_in_step:
            self._cache.free_lookup_locks(request_id)
        self._read_in_step = []
        for request_id in output.loaded:
            if tracked := self._tracked.get(request_id):
                tracked.loading, tracked.load_blocks = False, ()
                self._cache.free_lookup_locks(request_id)
                self._end_if_over(tracked)
        for request_id, workers in output.closed.items():
            tracked = self._tracked.get(request_id)
            if tracked is not None and tracked.closing:
                tracked.storing -= workers
                self._end_if_over(tracked)

    def finished(self, request: EngineRequest, blocks: BlockLists) -> None:
        """*blocks* are those of its computed tokens. Its blocks are free when this returns, unless it is loading.

        vLLM counts what was offered as computed already. From 0.33 on `allocated` may come a step later, or never.
        """
        allocated = self._local.pop(request.request_id, None) is None
        self._started.pop(request.request_id, None)
        self.lookup_times.forget(request.request_id)
        tracked = self._tracked.get(request.request_id)
        if tracked is None:
            return
        tracked.over = True
        if allocated and not tracked.loading and self._stores:
            # Steps still in flight may have computed more, for tokens that are not wanted any more.
            computed = request.num_computed_tokens - request.num_in_flight_tokens
            self._last.append(_Last(tracked, computed, tuple(map(tuple, blocks))))
        self._end_if_over(tracked)

    def reset(self) -> None:
        """KV that vLLM's blocks hold now is not stored any more, and nothing that was stored is cached any more."""
        self._resets += 1
        self._reset_at = self._step
        self._strange = False
        self._last = []
        if self._events is not None:
            self._events.clear()
        for tracked in list(self._tracked.values()):
            tracked.stored = 0
            self._end_if_over(tracked)

    def statistics(self) -> dict[str, int]:
        return {"requests": len(self._tracked), "loading": sum(each.loading for each in self._tracked.values())}

    def _track(self, request: EngineRequest) -> _Tracked | None:
        tracked = self._tracked.get(request.request_id)
        if tracked is not None and tracked.over:  # the same id again, before its last copies were named as ended
            self._cache.end_session(request.request_id)
            tracked = None
        if tracked is None:
            try:
                extras = self._identify(request)
            except Unavailable:
                return None
            tracked = self._tracked[request.request_id] = _Tracked(request, extras)
        return tracked

    def _store(
        self, tracked: _Tracked, computed: int, blocks: BlockLists | Callable[[], BlockLists]
    ) -> tuple[StoreSpec, ...]:
        """Stores of the chunks that *computed* tokens complete, as far as their ids are known."""
        chunk = self._cache.chunk_tokens
        if chunk != self._chunk_tokens:  # the first server came: what was planned before is stored nowhere
            self._chunk_tokens = chunk
            for each in self._tracked.values():
                each.stored = 0
        ready = min(computed, tracked.request.num_tokens) // chunk
        if ready <= tracked.stored:
            return ()
        request_id, found = tracked.request.request_id, blocks() if callable(blocks) else blocks
        try:
            known = tracked.request.all_token_ids[: ready * chunk]
            digests = self._cache.extend(request_id, known, extras=tracked.extras)
            specs = self._cache.store_specs(request_id, tracked.stored, ready, found)
        except Misuse:
            if self._cache.chunk_tokens == chunk:
                raise
            return ()  # the first server appeared just now, with chunks of its own length: next step
        if any(spec.chunk_tokens not in (0, chunk) for spec in specs):
            return ()  # likewise: these are not the chunks that are ready
        if self._events is not None:
            self._events.expect(tracked.request, digests, tracked.stored, chunk)
        tracked.stored = ready
        if specs:
            tracked.storing = self._workers
        return specs

    def _store_states(self, tracked: _Tracked, states: Iterable[tuple[int, int, int]]) -> list[StoreSpec]:
        """Stores of *states*, as far as a chunk ends where they do."""
        request, specs = tracked.request, []
        for group, block, tokens in states:
            if tokens <= request.num_tokens:
                self._cache.extend(request.request_id, request.all_token_ids[:tokens], extras=tracked.extras)
                spec = self._cache.state_spec(request.request_id, group, tokens, block)
                specs += [spec] if spec is not None else []
        if specs:
            tracked.storing = self._workers
        return specs

    def _failed(self, failed: frozenset[int]) -> None:
        for tracked in self._tracked.values():
            for i, block in enumerate(tracked.load_blocks):
                if block in failed:
                    self._fail(tracked, tracked.load_first + i * self._groups[0].block_tokens)
                    break

    def _fail(self, tracked: _Tracked, first: int) -> None:
        """A load of the token *first* failed: it and what is behind it are not offered again, and stored anew."""
        tracked.failed_at = first if tracked.failed_at is None else min(first, tracked.failed_at)
        self._cache.mark_failed(tracked.request.request_id, first)
        tracked.stored = min(tracked.stored, first // self._cache.chunk_tokens)

    def _settle(self, step: int) -> None:
        """KV of the plans up to *step* may have been computed from blocks that failed, in any request that shares them.
        The rank that noticed has stored none of it, but others may have. So the sessions end, and
        the next ones store those chunks anew: shards of two sessions never make one chunk. An open lookup is asked
        again.
        """
        self._settled = max(self._settled, step)
        for request_id, tracked in self._tracked.items():
            tracked.stored = 0
            tracked.asked = False
            self._cache.end_session(request_id)
            if tracked.failed_at is not None:
                self._cache.mark_failed(request_id, tracked.failed_at)

    def _end_if_over(self, tracked: _Tracked) -> None:
        """End the session of a finished request once nothing of it is loaded, stored, or still to be planned."""
        if not tracked.over or tracked.loading or any(each.tracked is tracked for each in self._last):
            return
        if tracked.storing and not tracked.closing:
            tracked.closing = True
            self._closing.append(tracked.request.request_id)
        if tracked.storing <= 0 and self._tracked.get(tracked.request.request_id) is tracked:
            del self._tracked[tracked.request.request_id]
            self._cache.end_session(tracked.request.request_id)
