"""Our connector, with a gate at each named point of a copy. Loaded into vLLM's workers by `kv_connector_module_path`.

The points are those of a `Probe`; at each, the copying thread reports where it is and waits for an answer.
"""

import json
import os
import socket
from typing import Any

from lmcache_trio.adapters import LoadSpec, StoreSpec, WorkerAdapter
from lmcache_trio.adapters.vllm.connector import LMCacheTrioConnector

__all__ = ["FaultyConnector"]

GATE = "LMCACHE_TRIO_E2E_GATE"


class FaultyWorkerAdapter(WorkerAdapter):
    """Stops at the gate that the environment names."""

    def __init__(self, *args: Any, shard: int = 0, **settings: Any) -> None:
        self._rank = shard
        super().__init__(*args, shard=shard, probe=self._stop, **settings)

    def _stop(self, point: str, spec: StoreSpec | LoadSpec) -> None:
        where = {
            "point": point,
            "copy": "store" if isinstance(spec, StoreSpec) else "load",
            "rank": self._rank,
            "pid": os.getpid(),
        }
        with socket.socket(socket.AF_UNIX) as gate:
            gate.connect(os.environ[GATE])
            with gate.makefile("rw") as lines:
                lines.write(json.dumps(where) + "\n")
                lines.flush()
                lines.readline()


class FaultyConnector(LMCacheTrioConnector):
    """What the end-to-end tests put in place of the connector, to break things at a place of their choice."""

    worker_adapter_class = FaultyWorkerAdapter
