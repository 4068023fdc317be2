"""The connector in one of vLLM's workers: moves what the plan of a step says, and reports what became of it.

    let_go()     copies out of blocks of preempted requests end                 handle_preemptions
    begin()      the step's plan                                                bind_connector_metadata
    load()       loads are copied now, or submitted                             start_load_kv
    store()      what the step completed is submitted                           wait_for_save
    report()     what has ended, and how                                        get_finished, get_block_ids_…

A synchronous load that failed taints its step: the KV computed in it, by any request that shares the blocks, comes from
garbage. vLLM recomputes; the cache must not learn of it. So this worker stores nothing from that step on, until a plan
says that it was made after the scheduler had heard (`StepPlan.settled`). An asynchronous load has ended, well or badly,
before any step computes with its blocks, and taints nothing.
"""

from collections.abc import Iterable, Sequence
from typing import Protocol

import attrs

from lmcache_trio.adapters.specs import LoadSpec, StoreSpec
from lmcache_trio.adapters.vllm.metadata import StepPlan

__all__ = ["Mover", "Report", "WorkerSide"]


class Mover(Protocol):
    """The part of `WorkerAdapter` that is used here."""

    def submit_store(self, spec: StoreSpec) -> None: ...
    def submit_retrieve(self, spec: LoadSpec) -> None: ...
    def retrieve_now(self, specs: Sequence[LoadSpec]) -> None: ...
    def wait_stores(self, request_ids: Iterable[str] | None = None) -> None: ...
    def take_finished(self) -> tuple[set[str], set[str]]: ...
    def take_failed_blocks(self) -> set[int]: ...


@attrs.frozen
class Report:
    """Requests whose blocks may be reused, and those whose load has ended, well or badly."""

    released: set[str]
    loaded: set[str]


class WorkerSide:
    """State of one worker. *asynchronous*: loads are submitted, and end between steps."""

    def __init__(self, mover: Mover, *, asynchronous: bool) -> None:
        self._mover = mover
        self._asynchronous = asynchronous
        self._plan = StepPlan(step=0)
        self._planned: set[str] = set()  # this step's plan stores them, and nothing was submitted yet
        self._storing: set[str] = set()  # a copy out of their blocks was submitted, and has not been named as ended
        self._held: set[str] = set()  # vLLM keeps their blocks until we name them
        self._tainted = 0  # the latest step in which a synchronous load failed
        self._failed_now = 0
        self._failed_blocks: set[int] = set()

    def let_go(self, request_ids: Iterable[str]) -> None:
        """Return when nothing reads the blocks of *request_ids* any more: the step is about to overwrite them."""
        busy = self._storing.intersection(request_ids)
        if busy:
            self._mover.wait_stores(busy)

    def begin(self, plan: StepPlan) -> None:
        """vLLM may ask what has ended before it says that this step can be stored: what is planned counts as busy."""
        self._plan = plan
        self._failed_now = 0
        self._planned = {spec.request_id for spec in plan.stores}
        self._held.update(plan.held)

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
        if self._tainted <= self._plan.settled:
            for spec in self._plan.stores:
                self._storing.add(spec.request_id)
                self._mover.submit_store(spec)
        self._planned = set()

    def report(self) -> Report:
        stored, loaded = self._mover.take_finished()
        self._storing -= stored
        released = self._held - self._storing - self._planned
        self._held -= released
        return Report(released, loaded)

    def take_failed_blocks(self) -> set[int]:
        failed = self._failed_blocks | self._mover.take_failed_blocks()
        self._failed_blocks = set()
        return failed

    @property
    def failed_step(self) -> int:
        """This step's number if a synchronous load failed in it, else 0."""
        return self._failed_now
