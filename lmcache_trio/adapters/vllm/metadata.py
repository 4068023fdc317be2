"""Values that vLLM carries from the scheduler's side of the connector to its workers' side, and back.

vLLM serialises them. They are frozen classes of ints, bytes, strings and tuples, so that any serialiser will do.
"""

import attrs

from lmcache_trio.adapters.specs import LoadSpec, StoreSpec

__all__ = ["IDLE_SECONDS", "StepPlan"]

IDLE_SECONDS = 0.005
"""How long an engine with nothing to compute waits for an answer or a load before it looks again for new requests.

An engine in a busy loop keeps the interpreter for 5 ms at a time (`sys.getswitchinterval`): the answer, and each step
of a load, would come that much later.
"""


@attrs.frozen
class StepPlan:
    """The workers' part of one engine step.

    *step* numbers the plans of an engine from 1. *settled* is the latest step whose failed loads the scheduler has
    dealt with: a worker stores nothing that was planned before it knew (see `WorkerSide`).
    *last_stores* are of requests that have finished: their blocks are free, and are read before the step writes any.
    *written* blocks have a new owner. A copy that still reads one for its former owner ends before the step writes it.
    *resets* counts those of the cache so far. After each the weights of that moment are the right ones.
    *closing* requests have finished. A worker names each once it copies nothing more of it, and its session ends.
    *idle*: the step computes nothing.
    """

    step: int
    settled: int = 0
    loads: tuple[LoadSpec, ...] = ()
    stores: tuple[StoreSpec, ...] = ()
    last_stores: tuple[StoreSpec, ...] = ()
    written: tuple[int, ...] = ()
    closing: tuple[str, ...] = ()
    resets: int = 0
    idle: bool = False
