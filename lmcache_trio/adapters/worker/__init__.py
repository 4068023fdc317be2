"""A synchronous worker's side: moves whole blocks between the engine's paged KV and slots of the arena.

WorkerAdapter (adapter)     the engine's verbs, the connection, the registration, the choice of the mover
Jobs, StoreJob, LoadJob     what is under way and what came of it (jobs)
ShmMover, DeviceMover       the two implementations of `Mover` (jobs): this process copies, or the server does
PagedKV, CudaPagedKV        the engine's blocks, in CPU memory (paged) and on a GPU (cuda_kv)
"""

from lmcache_trio.adapters.worker.adapter import WorkerAdapter

__all__ = ["WorkerAdapter"]
