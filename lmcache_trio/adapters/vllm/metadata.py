"""What vLLM carries from the scheduler's side of the connector to its workers' side, and back.

vLLM serialises these itself; they are frozen classes of ints, bytes, strings and tuples, so that whatever it uses will
do.
"""

import attrs

from lmcache_trio.adapters.specs import LoadSpec, StoreSpec

__all__ = ["IDLE_SECONDS", "StepPlan"]

IDLE_SECONDS = 0.005
"""How long an engine with nothing to compute waits for an answer or a load before it looks again for new requests.

An engine that only turns around keeps the interpreter for 5 ms at a time (`sys.getswitchinterval`): the answer, and
each step of a load, would come that much later.
"""


@attrs.frozen
class StepPlan:
    """What the workers do in one engine step.

    *step* numbers the plans of an engine from 1. *settled* is the latest step whose failed loads the scheduler has
    dealt with: a worker stores nothing that was planned before it knew (see `WorkerSide`).
    *preempted* requests lost their blocks: copies out of them end before the step writes anything.
    *held* requests have finished, and vLLM keeps their blocks until each worker has named them.
    *idle*: the step computes nothing.
    """

    step: int
    settled: int = 0
    loads: tuple[LoadSpec, ...] = ()
    stores: tuple[StoreSpec, ...] = ()
    preempted: tuple[str, ...] = ()
    held: tuple[str, ...] = ()
    idle: bool = False
