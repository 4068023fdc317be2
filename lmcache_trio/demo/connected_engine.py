"""An engine of `lmcache_trio.demo.engine`, connected to a server: scheduler's side, worker's side and their end.

Apart from the engine, which runs without any server too.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import attrs
import torch

from lmcache_trio.adapters import PollingSchedulerAdapter, SchedulerAdapter, WorkerAdapter
from lmcache_trio.adapters.shared_kv import shared_tensor
from lmcache_trio.adapters.worker.adapter import Path
from lmcache_trio.demo.engine import EngineConfig, SmallEngine

__all__ = ["ConnectedEngine", "connect"]


@attrs.frozen(eq=False)
class ConnectedEngine:
    """The three parts, for tests that reach past the engine."""

    engine: SmallEngine
    scheduler: SchedulerAdapter
    worker: WorkerAdapter


@contextmanager
def connect(
    address: str,
    config: EngineConfig,
    *,
    engine_id: str,
    scheduler_class: type[SchedulerAdapter] = PollingSchedulerAdapter,
    path: Path = "shm",
) -> Iterator[ConnectedEngine]:
    """An engine with one worker, both sides at *address*. *engine_id* must be new for each engine that ever connects.

    The adapters are shut down at the end, whatever happened in between. Its KV is in shared memory unless *path*, the
    worker's, is "shm".
    """
    one_token = config.model.kv_shape(num_blocks=1, block_tokens=1)
    token_bytes = one_token.numel * getattr(torch, one_token.dtype).itemsize
    with ExitStack() as stack:
        scheduler = scheduler_class(
            address,
            engine_id=engine_id,
            identity=config.model.identity,
            block_tokens=config.block_tokens,
            groups=config.groups,
            token_bytes=token_bytes,
        )
        stack.callback(scheduler.shutdown)
        worker = WorkerAdapter(
            address,
            engine_id=engine_id,
            block_tokens=config.block_tokens,
            fingerprint_extra=("lmcache-trio testing engine",),
            groups=config.groups,
            token_bytes=token_bytes,
            path=path,
        )
        stack.callback(worker.shutdown)
        storage = None if path == "shm" else shared_storage(config)
        yield ConnectedEngine(
            SmallEngine(config, scheduler=scheduler, worker=worker, storage=storage), scheduler, worker
        )


def shared_storage(config: EngineConfig) -> torch.Tensor:
    """Room for the KV of such an engine, which the server can open."""
    shape = config.model.kv_shape(num_blocks=config.num_blocks, block_tokens=config.block_tokens)
    dtype: torch.dtype = getattr(torch, shape.dtype)
    return shared_tensor(shape.numel * dtype.itemsize).view(dtype)
