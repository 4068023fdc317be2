"""A small real engine: a transformer over a paged KV cache, with requests, chunked prefill and greedy decoding.

    WAITING --lookup known, blocks free--> LOADING --loaded, or failed--> PREFILLING --first token--> DECODING
                                             `--nothing to load--^                                       |
                                                       FINISHED <--all copies ended-- SAVING <--last token

It uses the adapters as any engine would: look up, allocate blocks, retrieve into them, compute the rest (one token at
least), store full chunks (those completed by decoding too), end the session. Layers that attend to a window are a KV
group of their own: a hit brings their last chunks alone. Two requests share nothing but the cache. Without adapters it
is the reference. It refuses what a test does not need: batching across requests, preemption,
sampling, a tokeniser.

**Equal ids.** Prefill is cut at fixed positions, multiples of `prefill_tokens`. While that is the chunk length (the
default of both), a request that begins after a hit does the same arithmetic, shape by shape, as one that computed the
prefix itself, so ids are equal bit by bit and not merely with luck. A prefix stored while decoding was computed in
other shapes: in float32 its logits differ by 2e-6 where the two best are 0.3 apart.
"""

from collections.abc import Sequence
from enum import Enum
from time import perf_counter
from typing import TYPE_CHECKING

import attrs
import torch

from lmcache_trio._core.groups import Group, Need
from lmcache_trio.demo.model import Model, ModelConfig
from lmcache_trio.demo.model_kv import BlockPool, KVLayout, ModelKV, layer_name
from lmcache_trio.errors import Misuse

if TYPE_CHECKING:
    from lmcache_trio.adapters import SchedulerAdapter, WorkerAdapter

__all__ = ["Completion", "EngineConfig", "Phase", "RetrieveMode", "SmallEngine"]

_IDLE_SECONDS = 0.001
"""The pause of a step that found nothing to compute, and vLLM's own."""


class RetrieveMode(Enum):
    """Whether the engine's thread copies a hit itself, or goes on with other requests meanwhile."""

    SYNC = "sync"
    ASYNC = "async"


class Phase(Enum):
    """Where a request stands; the module's picture says what leads where."""

    WAITING = "waiting"
    LOADING = "loading"
    PREFILLING = "prefilling"
    DECODING = "decoding"
    SAVING = "saving"
    FINISHED = "finished"


@attrs.frozen
class EngineConfig:
    """Sizes in tokens and blocks."""

    model: ModelConfig = attrs.field(factory=ModelConfig)
    num_blocks: int = 256
    block_tokens: int = 16
    prefill_tokens: int = attrs.field(default=256, validator=attrs.validators.ge(1))
    layout: KVLayout = KVLayout.KV_FIRST
    load: RetrieveMode = RetrieveMode.SYNC

    @property
    def groups(self) -> tuple[Group, ...]:
        """The model's KV groups; empty: one, of which a hit needs all."""
        if not self.model.window:
            return ()
        every, window = (
            Group(Need.EVERY, 0, self.block_tokens),
            Group(Need.WINDOW, self.model.window, self.block_tokens),
        )
        return (every, window)

    @property
    def layers_by_group(self) -> list[list[str]] | None:
        """The names of each group's layers; None: there is one group."""
        if not self.model.window:
            return None
        names = [(layer_name(i), self.model.has_window(i)) for i in range(self.model.layers)]
        return [[name for name, has_window in names if has_window is wanted] for wanted in (False, True)]


@attrs.frozen
class Completion:
    """What became of a request. *first_token_seconds* counts from `submit`; *reused_tokens* were not computed."""

    request_id: str
    output_ids: tuple[int, ...]
    reused_tokens: int
    first_token_seconds: float


@attrs.define(eq=False)
class _Generation:
    id: str
    tokens: list[int]  # the prompt, then what was generated
    prompt_tokens: int
    max_new_tokens: int
    submitted: float
    phase: Phase = Phase.WAITING
    blocks: list[int] = attrs.field(factory=list)
    table: torch.Tensor = attrs.field(factory=lambda: torch.empty(0, dtype=torch.int64))
    computed: int = 0  # leading tokens whose KV is in the blocks
    reused: int = 0
    stored_chunks: int = 0  # leading chunks that are in the cache, or were offered to it
    storing: bool = False  # one store at a time is in flight
    first_token_seconds: float = 0.0

    @property
    def generated(self) -> int:
        return len(self.tokens) - self.prompt_tokens


class SmallEngine:
    """One model, one paged KV cache, any number of requests. Drive it with `step()`, or `run()` to the end.

    *scheduler* and *worker* are both given, or neither (a reference run). The engine registers its tensors with
    *worker*; it shuts neither down.
    """

    def __init__(
        self,
        config: EngineConfig,
        *,
        scheduler: "SchedulerAdapter | None" = None,
        worker: "WorkerAdapter | None" = None,
        storage: torch.Tensor | None = None,
    ) -> None:
        if (scheduler is None) != (worker is None):
            raise Misuse("give both scheduler and worker, or neither")
        self.config = config
        self.model = Model(config.model)
        self.kv = ModelKV(
            config.model.kv_shape(num_blocks=config.num_blocks, block_tokens=config.block_tokens),
            layout=config.layout,
            storage=storage,
        )
        self.pool = BlockPool(config.num_blocks)
        self._scheduler = scheduler
        self._worker = worker
        self._requests: dict[str, _Generation] = {}  # in the order of submission
        self._failed_blocks: set[int] = set()
        if worker is not None:
            worker.register_kv_caches(self.kv.layers, num_blocks=config.num_blocks, groups=config.layers_by_group)

    def submit(self, request_id: str, prompt_ids: Sequence[int], max_new_tokens: int) -> None:
        """Queue a request. `Misuse` if the id is in use or the request can never fit."""
        total = len(prompt_ids) + max_new_tokens
        if request_id in self._requests:
            raise Misuse(f"request_id {request_id!r} is in use: wait for its completion or take another")
        if not prompt_ids or max_new_tokens < 1:
            raise Misuse("a request needs 1 or more prompt tokens and 1 or more new tokens")
        if self._blocks_for(total) > self.config.num_blocks:
            raise Misuse(f"{total} tokens need more than num_blocks={self.config.num_blocks}: raise it")
        self._requests[request_id] = _Generation(
            request_id, list(prompt_ids), len(prompt_ids), max_new_tokens, perf_counter()
        )

    def abort(self, request_id: str) -> None:
        """Forget a request, wherever it stands. Its blocks are free again once no copy touches them."""
        request = self._requests[request_id]
        if request.phase is Phase.LOADING:
            raise Misuse("a load in flight cannot be aborted: step until it ended")
        if self._worker is not None and request.storing:
            self._worker.wait_stores([request_id])
            self._collect()  # or the news of this store would be taken for that of a later request of the same id
        self._end(request)

    def run(self) -> dict[str, Completion]:
        """Step until every request is finished; completions by request id."""
        completions: dict[str, Completion] = {}
        while self._requests:
            completions.update((c.request_id, c) for c in self.step())
        return completions

    def step(self) -> list[Completion]:
        """Admit what can be admitted, then compute one prefill piece and one token of every decoding request."""
        self._admit()
        self._collect()
        progress = False
        prefilling = [r for r in self._requests.values() if r.phase is Phase.PREFILLING]
        for request in prefilling[:1]:
            self._prefill(request)
            progress = True
        for request in [r for r in self._requests.values() if r.phase is Phase.DECODING]:
            self._decode(request)
            progress = True
        self._collect()  # before storing: a request whose copies have ended may have more chunks to offer
        self._store_full_chunks()
        saved = [r for r in self._requests.values() if r.phase is Phase.SAVING and not r.storing]
        for request in saved:
            self._end(request)
        if self._requests and not progress and not saved:
            _idle()
        return [Completion(r.id, tuple(r.tokens[r.prompt_tokens :]), r.reused, r.first_token_seconds) for r in saved]

    # --- admission and loads ----------------------------------------------------------------------------------------

    def _admit(self) -> None:
        for request in [r for r in self._requests.values() if r.phase is Phase.WAITING]:
            hit = self._look_up(request)
            if hit is None:
                continue  # others need not wait for this one's answer
            blocks = self.pool.allocate(self._blocks_for(request.prompt_tokens + request.max_new_tokens))
            if blocks is None:
                break  # first come, first served: a small request does not overtake for ever
            request.blocks, request.table = blocks, torch.tensor(blocks)
            request.phase = Phase.PREFILLING
            if self._scheduler is not None:
                self._start_load(self._scheduler, request, hit)

    def _look_up(self, request: _Generation) -> int | None:
        if self._scheduler is None:
            return 0
        # One token at least is left to compute: there are no logits without it
        self._scheduler.maybe_submit_lookup_request(request.id, request.tokens, max_tokens=request.prompt_tokens - 1)
        return self._scheduler.check_lookup_result(request.id)

    def _start_load(self, scheduler: "SchedulerAdapter", request: _Generation, hit: int) -> None:
        specs = scheduler.loads_after_alloc(request.id, hit, blocks=self._blocks_by_group(request))
        if not specs or self._worker is None:
            return
        request.computed = request.reused = hit
        request.stored_chunks = hit // scheduler.chunk_tokens
        if self.config.load is RetrieveMode.SYNC:
            self._worker.retrieve_now(specs)
            self._loaded(scheduler, request)
        else:
            request.phase = Phase.LOADING
            for spec in specs:
                self._worker.submit_retrieve(spec)

    def _collect(self) -> None:
        """Hear from the worker which background copies have ended."""
        if self._worker is None or self._scheduler is None:
            return
        stored, retrieved = self._worker.take_finished()
        for request_id in stored & self._requests.keys():
            self._requests[request_id].storing = False
        for request_id in retrieved & self._requests.keys():
            self._loaded(self._scheduler, self._requests[request_id])

    def _loaded(self, scheduler: "SchedulerAdapter", request: _Generation) -> None:
        """Go on with what was loaded. A failed load is cut to the whole chunks before its first failed block; with a
        window, of which no shorter hit has its chunks, to nothing.
        """
        request.phase = Phase.PREFILLING
        if self._worker is not None:
            self._failed_blocks |= self._worker.take_failed_blocks()
        bad = [i for i, block in enumerate(request.blocks) if block in self._failed_blocks]
        if not bad:
            return
        self._failed_blocks.difference_update(request.blocks)
        good = 0 if self.config.groups else bad[0] * self.config.block_tokens
        scheduler.mark_failed(request.id, good)
        request.stored_chunks = good // scheduler.chunk_tokens
        request.computed = request.reused = request.stored_chunks * scheduler.chunk_tokens

    # --- computing --------------------------------------------------------------------------------------------------

    def _prefill(self, request: _Generation) -> None:
        start, piece = request.computed, self.config.prefill_tokens
        stop = min((start // piece + 1) * piece, request.prompt_tokens)
        logits = self._forward(request, start, stop)
        if stop == request.prompt_tokens:
            request.first_token_seconds = perf_counter() - request.submitted
            request.phase = Phase.DECODING
            self._accept(request, logits)

    def _decode(self, request: _Generation) -> None:
        self._accept(request, self._forward(request, len(request.tokens) - 1, len(request.tokens)))

    def _forward(self, request: _Generation, start: int, stop: int) -> torch.Tensor:
        logits = self.model.forward(torch.tensor(request.tokens[start:stop]), start, self.kv, request.table)
        request.computed = stop
        return logits

    def _accept(self, request: _Generation, logits: torch.Tensor) -> None:
        request.tokens.append(int(logits.argmax()))
        if request.generated == request.max_new_tokens:
            request.phase = Phase.SAVING

    # --- stores and the end -----------------------------------------------------------------------------------------

    def _store_full_chunks(self) -> None:
        if self._scheduler is None or self._worker is None:
            return
        chunk = self._scheduler.chunk_tokens
        for request in self._requests.values():
            full = request.computed // chunk
            if request.storing or request.phase is Phase.LOADING or full <= request.stored_chunks:
                continue
            blocks = self._blocks_by_group(request)
            try:
                self._scheduler.extend(request.id, request.tokens[: request.computed])
                specs = self._scheduler.store_specs(request.id, request.stored_chunks, full, blocks)
            except Misuse:
                if self._scheduler.chunk_tokens == chunk:
                    raise
                return  # the first server came just now, with chunks of another length: *full* does not count those
            if any(spec.chunk_tokens != chunk for spec in specs):
                return
            request.stored_chunks = full
            request.storing = True
            for spec in specs:
                self._worker.submit_store(spec)

    def _end(self, request: _Generation) -> None:
        del self._requests[request.id]
        request.phase = Phase.FINISHED
        if request.blocks:
            self.pool.free(request.blocks)
        if self._scheduler is not None:
            self._scheduler.end_session(request.id)

    def _blocks_by_group(self, request: _Generation) -> list[list[int]]:
        """Its layers keep a token in the block of the same number, whatever their group is."""
        return [request.blocks] * max(1, len(self.config.groups))

    def _blocks_for(self, tokens: int) -> int:
        return -(-tokens // self.config.block_tokens)


def _idle() -> None:
    from lmcache_trio.threads import Handoff  # only an engine with adapters ever has to wait

    Handoff[None]().wait(_IDLE_SECONDS)
