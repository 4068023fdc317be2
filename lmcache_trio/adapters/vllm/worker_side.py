"""The connector in one of vLLM's workers: it carries out the plan of each step, and reports the outcome.

    let_go()     copies out of blocks that the step will write have ended       handle_preemptions
    begin()      the step's plan                                                bind_connector_metadata
    load()       loads are copied now, or submitted                             start_load_kv
    store()      what the step completed is submitted                           wait_for_save
    report()     what has ended, and how                                        get_finished, get_block_ids_…

A synchronous load that failed taints its step: KV that the step computed from its blocks, in any request that shares
them, is garbage. vLLM recomputes it, and the cache must not store it. So this worker stores nothing from that step on,
until a plan was made after the scheduler knew (`StepPlan.settled`). An asynchronous load has ended, well or badly,
before any step computes with its blocks, and taints nothing.

Blocks are never held for a store. vLLM frees them when their request has finished or was preempted, and a copy that
still reads them ends before their next owner writes the first byte: so vLLM may reset its cache at any moment.

If the model's weights are not those of the last reset, nothing is stored until the next one: their KV must not get the
names of other weights. The worker looks at them before it stores a step (`weights`).
"""

from collections.abc import Iterable, Sequence
from typing import Protocol

import attrs

from lmcache_trio.adapters.specs import LoadSpec, StoreSpec
from lmcache_trio.adapters.vllm.metadata import IDLE_SECONDS, StepPlan

__all__ = ["Report", "WorkerSide", "WorkerVerbs"]


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
    def take_failed_requests(self) -> set[str]: ...


@attrs.frozen
class Report:
    """*closed*: requests that were closing and have no copy any more. *loaded*: requests whose loads have ended.

    *failed* are those of *loaded* whose KV is not valid, where vLLM asks for requests and not for blocks.
    """

    closed: set[str]
    loaded: set[str]
    failed: set[str]


class WorkerSide:
    """State of one worker. *asynchronous*: loads are submitted, and end between steps. *by_request*: of a request whose
    load failed no token is valid, which no failed block could tell. Such loads are asynchronous.

    *weights* tells whether they have changed; None if that cannot be told.
    """

    def __init__(
        self,
        mover: WorkerVerbs,
        *,
        asynchronous: bool,
        by_request: bool = False,
        weights: Weights | None = None,
    ) -> None:
        self._mover = mover
        self._by_request = by_request
        self._weights = weights
        self._resets = 0
        self.changed = False
        """Are the weights others than at the last reset?"""
        self._asynchronous = asynchronous
        self._plan = StepPlan(step=0)
        self._planned: set[str] = set()  # this step's plan stores them, and nothing was submitted yet
        self._reading: dict[str, set[int]] = {}  # blocks by request: a copy out of them has not been named as ended
        self._closing: set[str] = set()
        self._tainted = 0  # the latest step in which a synchronous load failed
        self._failed_now = 0
        self._failed_blocks: set[int] = set()
        self._failed_requests: set[str] = set()

    def replace_mover(self, mover: WorkerVerbs) -> None:
        """Copies go through *mover* from now on. Those of the mover before it have ended, and its loads were reported.

        What the steps have told stays known: requests that are closing are reported by this worker as before.
        """
        self._mover = mover
        self._reading = {}

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
            self._mover.wait_stores(busy)
            for request_id in busy:
                self._reading[request_id] = set()

    def _may_store(self, plan: StepPlan) -> bool:
        if not self.changed and self._weights is not None:
            self.changed = self._weights.changed()
        return not self.changed and self._tainted <= plan.settled

    def _submit(self, spec: StoreSpec) -> None:
        self._reading.setdefault(spec.request_id, set()).update(spec.block_ids)
        self._mover.submit_store(spec)

    def begin(self, plan: StepPlan) -> None:
        """Take the plan. Its stores count as busy from now on, because vLLM may ask for reports before they begin."""
        if self._weights is not None:
            self._weights.begin()
        self._plan = plan
        self._failed_now = 0
        self._planned = {spec.request_id for spec in plan.stores}
        self._closing.update(plan.closing)

    def load(self) -> None:
        if self._asynchronous:
            for spec in self._plan.loads:
                self._mover.submit_retrieve(spec)
        elif self._plan.loads:
            self._mover.retrieve_now(self._plan.loads)
            failed = self._mover.take_failed_blocks()
            if failed:
                self._failed_blocks |= failed
                self._tainted = self._failed_now = self._plan.step

    def store(self) -> None:
        if self._plan.stores and self._may_store(self._plan):
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
        if self._by_request:
            self._failed_requests |= self._mover.take_failed_requests()
        failed = self._failed_requests & loaded
        self._failed_requests -= failed
        return Report(closed, loaded, failed)

    def take_failed_blocks(self) -> set[int]:
        """Blocks whose load failed. None where failures are told by request: vLLM would end the engine."""
        failed = self._failed_blocks | self._mover.take_failed_blocks()
        self._failed_blocks = set()
        return set() if self._by_request else failed

    @property
    def step(self) -> int:
        """The number of the plan that is carried out."""
        return self._plan.step

    @property
    def failed_step(self) -> int:
        """This step's number if a synchronous load failed in it, else 0."""
        return self._failed_now
