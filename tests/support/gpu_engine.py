"""An engine with KV on a GPU, in a process of its own: a process cannot open its own exports.

It reads and writes its memory on request, and exports from a thread that has no CUDA context, as an adapter does.
"""

import multiprocessing
from multiprocessing.connection import Connection
from typing import Any

import torch
import trio

from lmcache_trio.abc import CudaMemory, Device
from lmcache_trio.testing.device_contract import EngineMemory

BLOCK, BLOCKS = 32 << 10, 64


def engine(link: Connection, size: int) -> None:
    """In the child: holds *size* bytes of GPU memory; writes to it behind a long computation when it is told to."""
    from lmcache_trio.adapters.worker.cuda_kv import cuda_memory_of
    from lmcache_trio.threads import Portal

    tensor = torch.zeros(size, dtype=torch.uint8, device="cuda")

    async def export(*, task_status: trio.TaskStatus[Any]) -> None:
        task_status.started(cuda_memory_of(tensor))

    memory, base = Portal("a thread without a context").start(export, timeout=60)
    link.send((memory.size, memory.handle, memory.uuid, tensor.data_ptr() - base))
    while (asked := link.recv()) is not None:
        offset, data, length = asked
        if offset < 0:  # all bytes become *length*, some time later
            event = torch.cuda.Event(blocking=True, interprocess=True)  # type: ignore[no-untyped-call]
            torch.cuda._sleep(100_000_000)  # type: ignore[no-untyped-call]
            tensor.fill_(length)
            event.record()
            link.send(event.ipc_handle())  # type: ignore[no-untyped-call]
            continue
        if data is not None:
            tensor[offset : offset + len(data)] = torch.frombuffer(bytearray(data), dtype=torch.uint8).cuda()
        torch.cuda.synchronize()
        link.send(tensor[offset : offset + length].cpu().numpy().tobytes())


class ChildMemory(EngineMemory):
    def __init__(self, device: Device | None, size: int) -> None:
        spawn = multiprocessing.get_context("spawn")
        self.link, other = spawn.Pipe()
        self.process = spawn.Process(target=engine, args=(other, size), daemon=True)
        self.process.start()
        *named, self.offset = self.link.recv()
        self.named = CudaMemory(*named)

    def memory(self) -> CudaMemory:
        return self.named

    def start(self) -> int:
        return int(self.offset)

    def _ask(self, *asked: Any) -> bytes:
        self.link.send(asked)
        found: bytes = self.link.recv()
        return found

    def read(self, offset: int, length: int) -> bytes:
        return self._ask(offset, None, length)

    def write(self, offset: int, data: bytes) -> None:
        self._ask(offset, data, 0)

    def fill_later(self, byte: int) -> bytes:
        """The event behind it."""
        return self._ask(-1, None, byte)

    def close(self) -> None:
        self.link.send(None)
        self.process.join(20)
