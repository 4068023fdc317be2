"""What an engine exports of KV on a GPU, over a fake of the driver: in threads that have no context, or not at all."""

import os
from types import SimpleNamespace
from typing import Any

import pytest
import trio
from lmcache_trio_backends.cpu import CpuConfig, CpuMemory
from lmcache_trio_backends.cuda_device import CudaConfig, CudaDevice
from support.cuda_fake import Allocation, CUresult, FakeDriver

from lmcache_trio.abc import Copy, CudaMemory, Direction
from lmcache_trio.adapters import WorkerAdapter
from lmcache_trio.adapters.shared_kv import export_of
from lmcache_trio.adapters.worker.cuda_kv import cuda_memory_of
from lmcache_trio.errors import Unavailable
from lmcache_trio.threads import offload

BLOCKS, BLOCK = 8, 256


class Tensor:
    """A layer as torch would show it, on a GPU that is not there."""

    device = SimpleNamespace(type="cuda", index=0)
    dtype = "torch.uint8"
    shape = (BLOCKS, BLOCK)

    def __init__(self, allocation: Allocation, offset: int) -> None:
        self._address = allocation.base + offset

    def data_ptr(self) -> int:
        return self._address

    def stride(self) -> tuple[int, int]:
        return BLOCK, 1


def layers(allocation: Allocation) -> Any:
    return {f"layer {i}": Tensor(allocation, 1024 + i * BLOCKS * BLOCK) for i in range(2)}


async def test_a_thread_without_a_context_exports_and_leaves_none_behind(cuda: FakeDriver) -> None:
    tensor: Any = Tensor(cuda.allocate(8192), 1024)
    for _ in range(2):
        memory, base = await offload(cuda_memory_of, tensor)
        assert (memory.size, memory.uuid, base) == (8192, cuda.uuids[0], tensor.data_ptr() - 1024)
    assert cuda.leaked == {}
    assert await offload(lambda: cuda._stack) == []


@pytest.mark.parametrize("how", ["expandable segments or a sleep-mode allocator", "no driver"])
async def test_memory_that_cannot_be_exported_takes_shm_by_itself(cuda: FakeDriver, how: str) -> None:
    allocation = cuda.allocate(8192, exportable=how == "no driver")
    if how == "no driver":
        cuda.fails["cuDeviceGet"] = RuntimeError("Failed to dlopen libcuda.so.1")
    with pytest.raises(Unavailable, match="driver"):
        export_of(layers(allocation), BLOCKS)
    worker = WorkerAdapter("unix:///nowhere", engine_id="e", block_tokens=16, connect_timeout=0.01)
    try:
        client: Any = SimpleNamespace(lost=False)
        kv: Any = SimpleNamespace(tensors=layers(allocation), num_blocks=BLOCKS, group_of={})
        await worker._choose(client, kv)
        assert (worker.path, worker._jobs.mover) == ("shm", worker._shm)
        assert "driver" in worker.path_reason
    finally:
        worker.shutdown()
    assert cuda.leaked == {}


async def test_memory_of_the_servers_own_process_is_refused_by_the_driver(cuda: FakeDriver) -> None:
    cuda.fails["cuIpcOpenMemHandle"] = CUresult.CUDA_ERROR_INVALID_CONTEXT
    memory, device = CpuMemory(CpuConfig(size=1 << 20)), CudaDevice(CudaConfig())
    async with memory.open(), device.open(memory):
        with pytest.raises(Unavailable, match="INVALID_CONTEXT"):
            await device.attach(export_of(layers(cuda.allocate(8192)), BLOCKS))
    assert cuda.leaked == {}


async def test_what_an_engine_exported_is_what_the_device_stores(cuda: FakeDriver) -> None:
    allocation = cuda.allocate(8192)
    allocation.bytes[:] = os.urandom(8192)
    memory, device = CpuMemory(CpuConfig(size=1 << 20)), CudaDevice(CudaConfig())
    async with memory.open():
        while await memory.grow() < memory.size:
            pass
        async with device.open(memory):
            export = await offload(export_of, layers(allocation), BLOCKS)
            assert all(isinstance(each, CudaMemory) for each in export.memory)
            attached = await device.attach(export)
            with trio.fail_after(20):
                ticket = device.start(Copy(attached, Direction.STORE, [4096], [3, 1], 2))
                await device.wait_ended(ticket)
            starts = [1024 + layer * BLOCKS * BLOCK + block * BLOCK for layer in range(2) for block in (3, 1)]
            expected = b"".join(bytes(allocation.bytes[at : at + BLOCK]) for at in starts)
            assert bytes(memory.view(4096, len(expected))) == expected
            device.detach(attached)
    assert cuda.leaked == {}
