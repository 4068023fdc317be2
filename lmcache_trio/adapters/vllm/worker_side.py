"""The connector in one of vLLM's workers: moves what the plan of a step says, and reports what became of it.

    let_go()     copies out of blocks that the step will write have ended       handle_preemptions
    begin()      the step's plan                                                bind_connector_metadata
    load()       loads are copied now, or submitted                             start_load_kv
    store()      what the step completed is submitted                           wait_for_save
    report()     what has ended, and how                                        get_finished, get_block_ids_…

A synchronous load that failed taints its step: the KV computed in it, by any request that shares the blocks, comes from
garbage. vLLM recomputes; the cache must not learn of it. So this worker stores nothing from that step on, until a plan
says that it was made after the scheduler had heard (`StepPlan.settled`). An asynchronous load has ended, well or badly,
before any step computes with its blocks, and taints nothing.

Blocks are never held for a store. vLLM frees them when their request has finished or was preempted, and a copy that
still reads them ends before their next owner writes the first byte: so vLLM may reset its cache at any moment.

If the model's weights are others than at the last reset, nothing is stored until the next one: what they compute must
not get the names of what the files say. A step is looked at before it is stored (`weights`).

Layer by layer, both go on beside the forward pass: `wait_layer` returns when one layer is loaded, `layer_written` lets
one be stored. Whether a load was valid is known at the step's end, and before any of its stores is committed.
"""

from collections.abc import Iterable, Sequence
from typing import Protocol

import attrs

from lmcache_trio.adapters.specs import LoadSpec, StoreSpec
from lmcache_trio.adapters.vllm.metadata import IDLE_SECONDS, StepPlan

__all__ = ["LayeredMover", "Report", "WorkerSide", "WorkerVerbs"]


class LayeredMover(Protocol):
    """The part of `LayeredMoves` that is used here."""

    def start_retrieves(self, specs: Sequence[LoadSpec]) -> None: ...
    def wait_layer(self, name: str) -> None: ...
    def wait_retrieves(self) -> None: ...
    def start_stores(self, specs: Sequence[StoreSpec]) -> None: ...
    def layer_written(self, name: str) -> None: ...
    def finish_stores(self) -> None: ...
    def drop_stores(self) -> None: ...


class Weights(Protocol):
    """The part of `WeightsWatch` that is used here."""

    def take(self) -> None: ...
    def begin(self) -> None: ...
    def changed(self) -> bool: ...


class WorkerVerbs(Protocol):
    """The part of `WorkerAdapter` that is used here."""

    def submit_store(self, spec: StoreSpec) -> None: ...
    def submit_retrieve(self, spec: LoadSpec) -> None: ...
    def retrieve_now(self, specs: Sequence[LoadSpec]) -> None: ...
    def wait_stores(self, request_ids: Iterable[str] | None = None) -> None: ...
    def wait_retrieve(self, seconds: float) -> None: ...
    def take_finished(self) -> tuple[set[str], set[str]]: ...
    def take_failed_blocks(self) -> set[int]: ...


@attrs.frozen
class Report:
    """Requests that were closing and of which nothing is copied any more, and those whose load has ended."""

    closed: set[str]
    loaded: set[str]


class WorkerSide:
    """State of one worker. *asynchronous*: loads are submitted, and end between steps. *layered*: moves by layers.

    *weights*: tells whether they have changed; None where nobody can tell.
    """

    def __init__(
        self,
        mover: WorkerVerbs,
        *,
        asynchronous: bool,
        layered: LayeredMover | None = None,
        weights: Weights | None = None,
    ) -> None:
        self._mover = mover
        self._weights = weights
        self._resets = 0
        self.changed = False
        """Are the weights others than at the last reset?"""
        self._asynchronous = asynchronous
        self._layered = layered
        self._loading = False
        self._plan = StepPlan(step=0)
        self._planned: set[str] = set()  # this step's plan stores them, and nothing was submitted yet
        self._reading: dict[str, set[int]] = {}  # blocks by request: a copy out of them has not been named as ended
        self._closing: set[str] = set()
        self._tainted = 0  # the latest step in which a synchronous load failed
        self._failed_now = 0
        self._failed_blocks: set[int] = set()

    def let_go(self, plan: StepPlan) -> None:
        """Return when nothing reads the blocks that the step of *plan* will write."""
        if plan.resets != self._resets:
            self._resets, self.changed = plan.resets, False
            if self._weights is not None:
                self._weights.take()
        if plan.last_stores and self._may_store(plan):
            for spec in plan.last_stores:
                self._submit(spec)
        busy = [request_id for request_id, blocks in self._reading.items() if not blocks.isdisjoint(plan.written)]
        if busy:
            if self._layered is not None:
                self._layered.drop_stores()  # of a step that was never stored; nothing otherwise
            self._mover.wait_stores(busy)

    def _may_store(self, plan: StepPlan) -> bool:
        if not self.changed and self._weights is not None:
            self.changed = self._weights.changed()
        return not self.changed and self._tainted <= plan.settled

    def _submit(self, spec: StoreSpec) -> None:
        self._reading.setdefault(spec.request_id, set()).update(spec.block_ids)
        self._mover.submit_store(spec)

    def begin(self, plan: StepPlan) -> None:
        """vLLM may ask what has ended before it says that this step can be stored: what is planned counts as busy."""
        if self._weights is not None:
            self._weights.begin()
        self._plan = plan
        self._failed_now = 0
        self._planned = {spec.request_id for spec in plan.stores}
        self._closing.update(plan.closing)

    def load(self) -> None:
        if self._layered is not None:
            self._layered.start_retrieves(self._plan.loads)
            self._loading = bool(self._plan.loads)
            self._start_stores(self._layered)
        elif self._asynchronous:
            for spec in self._plan.loads:
                self._mover.submit_retrieve(spec)
        elif self._plan.loads:
            self._mover.retrieve_now(self._plan.loads)
            self._see_failures()

    def _see_failures(self) -> None:
        failed = self._mover.take_failed_blocks()
        if failed:
            self._failed_blocks |= failed
            self._tainted = self._failed_now = self._plan.step

    def _start_stores(self, layered: LayeredMover) -> None:
        if self._plan.stores and self._may_store(self._plan):
            for spec in self._plan.stores:
                self._reading.setdefault(spec.request_id, set()).update(spec.block_ids)
            layered.start_stores(self._plan.stores)

    def wait_layer(self, name: str) -> None:
        if self._layered is not None and self._loading:
            self._layered.wait_layer(name)

    def layer_written(self, name: str) -> None:
        if self._layered is not None:
            self._layered.layer_written(name)

    def _end_layers(self, layered: LayeredMover) -> None:
        """The step is computed: what it was loaded from is known to be valid, or nothing of it is stored."""
        if self._loading:
            self._loading = False
            layered.wait_retrieves()
            self._see_failures()
        if not self.changed and self._tainted <= self._plan.settled:
            layered.finish_stores()
        else:
            layered.drop_stores()

    def store(self) -> None:
        if self._layered is not None:
            self._end_layers(self._layered)
        elif self._plan.stores and self._may_store(self._plan):
            for spec in self._plan.stores:
                self._submit(spec)
        self._planned = set()

    def report(self) -> Report:
        if self._plan.idle and self._asynchronous:
            self._mover.wait_retrieve(IDLE_SECONDS)
        stored, loaded = self._mover.take_finished()
        for request_id in stored:
            self._reading.pop(request_id, None)
        closed = self._closing - self._reading.keys() - self._planned
        self._closing -= closed
        return Report(closed, loaded)

    def take_failed_blocks(self) -> set[int]:
        if self._layered is not None and self._loading:  # a step that was not stored
            self._end_layers(self._layered)
        failed = self._failed_blocks | self._mover.take_failed_blocks()
        self._failed_blocks = set()
        return failed

    @property
    def step(self) -> int:
        """The number of the plan that is carried out."""
        return self._plan.step

    @property
    def failed_step(self) -> int:
        """This step's number if a synchronous load failed in it, else 0."""
        return self._failed_now
