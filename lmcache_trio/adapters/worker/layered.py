"""Moves that go layer by layer beside the engine's forward pass: it need not wait for what it does not use yet.

    start_retrieves --> a layer is there --> wait_layer(it) returns --> ... --> wait_retrieves: is all of it valid?
    start_stores    --> layer_written(it) --> it is copied          --> ... --> finish_stores: commit / drop_stores

All loads of a step share the order of its layers: layer 0 of each comes before layer 1 of any. Whether a load is valid
is known at its end only, so the host calls `wait_retrieves` before it believes what it computed. No copy into or out of
blocks is left behind: a load is over when its job is, however it ended.

Stores are committed after `finish_stores`, not after the last layer: a host that computed with a load that was not
valid calls `drop_stores` instead, and nothing of the step is published. On the path `device` the server copies, and is
told of each layer (`StoreStep`).
"""

from collections.abc import Sequence
from functools import partial

from lmcache_trio.adapters.link import Link
from lmcache_trio.adapters.specs import LoadSpec, StoreSpec
from lmcache_trio.adapters.worker.dispatcher import Dispatcher
from lmcache_trio.adapters.worker.jobs import Jobs, LoadJob, StoreJob, wait_for
from lmcache_trio.adapters.worker.store_step import StoreStep
from lmcache_trio.errors import Misuse

__all__ = ["LayeredMoves"]


class LayeredMoves:
    """The stores and the loads of an engine's step, which its forward pass goes along with."""

    def __init__(self, link: Link, jobs: Jobs, dispatcher: Dispatcher) -> None:
        self._link = link
        self._jobs = jobs
        self._dispatcher = dispatcher
        self._layers: dict[str, int] = {}
        self._loads: list[LoadJob] = []
        self._stores: list[StoreJob] = []
        self._step: StoreStep | None = None
        """That of `_stores`, until it is finished or dropped."""

    def register(self, names: Sequence[str]) -> None:
        """The layers, in the order of the slots. Nothing of a step that began with others is copied by this process
        any more, or published.
        """
        self.wait_retrieves()
        jobs = self._stores
        self.drop_stores()
        if self._dispatcher.path == "shm":
            wait_for([job.copied for job in jobs], lambda: self._link.alive)
        self._layers = {name: i for i, name in enumerate(names)}

    # --- loads, called by the host ----------------------------------------------------------------------------------

    def start_retrieves(self, specs: Sequence[LoadSpec]) -> None:
        """Begin to load *specs*, layer by layer; waits for those of the former step."""
        self.wait_retrieves()
        if specs:
            self._loads = self._dispatcher.load(specs, reported=False, layers=len(self._layers))

    def wait_layer(self, name: str) -> None:
        """Block until the layer *name* of all loads is in its blocks, or never will be."""
        if name not in self._layers:
            raise Misuse(f"layer {name!r} was not registered")
        wait_for([job.gates[self._layers[name]] for job in self._loads], lambda: self._link.alive)

    def wait_retrieves(self) -> None:
        """Block until all loads are over; `take_failed_blocks` has those that were not valid."""
        jobs, self._loads = self._loads, []
        self._dispatcher.wait(jobs)

    # --- stores, called by the host ---------------------------------------------------------------------------------

    def start_stores(self, specs: Sequence[StoreSpec]) -> None:
        """Begin to store *specs*: each layer once `layer_written` names it. A former step that is not finished is
        dropped.
        """
        self.drop_stores()
        if specs:
            step = StoreStep(len(self._layers))
            self._stores = self._dispatcher.store(specs, reported=True, step=step)
            self._step = step

    def layer_written(self, name: str) -> None:
        """The engine has submitted all that writes the layer *name* in this step."""
        if name not in self._layers:
            raise Misuse(f"layer {name!r} was not registered")
        if self._step is not None:
            self._link.post(self._step.layer_written, self._layers[name], self._dispatcher.kv.fence())

    def finish_stores(self) -> None:
        """The step is computed, and right: what it stores is published."""
        step, self._step, self._stores = self._step, None, []
        if step is not None:
            self._link.post(partial(step.finish, self._dispatcher.kv.fence(), drop=False))

    def drop_stores(self) -> None:
        """Nothing of the step is published."""
        step, jobs, self._step, self._stores = self._step, self._stores, None, []
        if step is not None and not self._link.post(partial(step.finish, drop=True)):
            for job in jobs:  # there is no loop any more, nor a copy
                self._jobs.fail(job)
