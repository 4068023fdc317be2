"""A synchronous worker's side: moves whole blocks between the engine's paged KV and slots of the arena.

WorkerAdapter (adapter)     the engine's verbs, the connection, the registration
LayeredMoves (layered)      the same verbs, a layer at a time beside the forward pass
Dispatcher (dispatcher)     makes jobs of a spec, and hands them to the mover that this connection has
ShmMover, DeviceMover       the two implementations of `Mover` (mover): this process copies, or the server does
Jobs, StoreJob, LoadJob     what is under way and what came of it (jobs); `StoreStep`: which layers are written
PagedKV, CudaPagedKV        the engine's blocks, in CPU memory (paged) and on a GPU (cuda_kv)
"""

from lmcache_trio.adapters.worker.adapter import WorkerAdapter

__all__ = ["WorkerAdapter"]
