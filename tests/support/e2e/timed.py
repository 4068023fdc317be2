"""Our connector, with a clock on everything that vLLM's engine thread calls of it. For engines of one process.

A step begins when its plan is made (`build_connector_meta`); what is called until the next one counts as its own. One
that computes nothing is left out: it waits for a load on purpose.
"""

import functools
import time
from collections.abc import Callable
from typing import Any

from lmcache_trio.adapters.vllm.connector import LMCacheTrioConnector

__all__ = ["TimedConnector", "take_steps"]

CALLED = (
    *("get_num_new_matched_tokens", "update_state_after_alloc", "build_connector_meta", "update_connector_output"),
    *(
        "request_finished_all_groups",
        "handle_preemptions",
        "bind_connector_metadata",
        "start_load_kv",
        "wait_for_layer_load",
    ),
    *("save_kv_layer", "wait_for_save", "get_transfer_results", "get_block_ids_with_load_errors"),
    "build_connector_worker_meta",
)
_steps: list[float] = [0.0]
_idle: set[int] = {0}  # the first began before somebody looked


def take_steps() -> list[float]:
    """Seconds in the connector, a computing step each, since the last call."""
    taken = [seconds for i, seconds in enumerate(_steps) if i not in _idle]
    _steps[:] = [0.0]
    _idle.intersection_update({0})
    return taken


def _timed(name: str) -> Callable[..., Any]:
    called: Callable[..., Any] = getattr(LMCacheTrioConnector, name)

    @functools.wraps(called)
    def timed(*args: Any, **kwargs: Any) -> Any:
        if name == "build_connector_meta":
            if not args[1].total_num_scheduled_tokens:
                _idle.add(len(_steps))
            _steps.append(0.0)
        began = time.perf_counter()
        try:
            return called(*args, **kwargs)
        finally:
            _steps[-1] += time.perf_counter() - began

    return timed


TimedConnector: type[LMCacheTrioConnector] = type(
    "TimedConnector", (LMCacheTrioConnector,), {name: _timed(name) for name in CALLED}
)
