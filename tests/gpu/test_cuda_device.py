"""The cuda device, where there is a GPU: its contract, bytes, events, memory; the engine is a process of its own."""

import gc
import os
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager

import numpy as np
import pytest
import torch
import trio
from lmcache_trio_backends.cpu import CpuConfig, CpuMemory
from lmcache_trio_backends.cuda_device import CudaConfig, CudaDevice
from support.gpu_engine import BLOCK, BLOCKS, ChildMemory

from lmcache_trio._core.transfer.exports import DType, TensorView
from lmcache_trio.abc import Copy, Device, Direction, Export
from lmcache_trio.errors import Unavailable
from lmcache_trio.testing.device_contract import DeviceContract, EngineMemory, MakeDevice, MakeEngineMemory

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch.cuda.is_available() is False: there is no GPU"),
]


class TestCudaDevice(DeviceContract):
    @pytest.fixture
    def make_device(self) -> MakeDevice:
        return lambda: CudaDevice(CudaConfig())

    @pytest.fixture
    def engine_memory(self) -> Iterator[MakeEngineMemory]:
        made: list[ChildMemory] = []

        def make(device: Device, size: int) -> EngineMemory:
            made.append(ChildMemory(device, size))
            return made[-1]

        yield make
        for memory in made:
            memory.close()


@pytest.fixture
def child() -> Iterator[ChildMemory]:
    made = ChildMemory(None, BLOCKS * BLOCK)
    yield made
    made.close()


def export(child: ChildMemory) -> Export:
    view = TensorView(0, child.start(), DType.uint8, (BLOCKS, BLOCK), (BLOCK, 1))
    return Export((child.named,), (view,), BLOCKS)


@asynccontextmanager
async def opened(size: int = 64 << 20) -> AsyncIterator[tuple[CudaDevice, CpuMemory]]:
    memory, device = CpuMemory(CpuConfig(size=size)), CudaDevice(CudaConfig())
    async with memory.open():
        while await memory.grow() < memory.size:
            pass
        async with device.open(memory):
            yield device, memory


async def test_a_store_behind_its_event_has_what_the_engine_wrote(child: ChildMemory) -> None:
    async with opened() as (device, memory):
        attached = await device.attach(export(child))
        for byte in range(1, 6):
            event = child.fill_later(byte)
            with trio.fail_after(60):
                await device.wait_event(attached, event)
                await device.wait_ended(device.start(Copy(attached, Direction.STORE, [4096], [3, 9], 2)))
            assert bytes(memory.view(4096, 2 * BLOCK)) == bytes([byte]) * 2 * BLOCK
        device.detach(attached)


async def test_an_event_that_is_waited_for_holds_no_copy(child: ChildMemory) -> None:
    async with opened() as (device, _):
        attached = await device.attach(export(child))
        event, order = child.fill_later(7), list[str]()

        async def wait() -> None:
            await device.wait_event(attached, event)
            order.append("event")

        with trio.fail_after(60):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(wait)
                await device.wait_ended(device.start(Copy(attached, Direction.STORE, [4096], [0, 1], 2)))
                order.append("copy")
        assert order == ["copy", "event"]
        device.detach(attached)


async def test_attaching_again_and_again_keeps_nothing(child: ChildMemory) -> None:
    def used() -> int:
        free, total = torch.cuda.mem_get_info()
        return int(total - free)

    async with opened() as (device, _):
        seen = []
        for _ in range(30):
            attached = await device.attach(export(child))
            with trio.fail_after(60):
                await device.wait_event(attached, child.fill_later(1))
                await device.wait_ended(device.start(Copy(attached, Direction.LOAD, [4096], [0, 1], 2)))
            device.detach(attached)
            gc.collect()
            seen.append((used(), len(os.listdir("/proc/self/fd"))))
    assert max(used for used, _ in seen[10:]) <= seen[9][0] + (4 << 20)
    assert max(files for _, files in seen[10:]) <= seen[9][1] + 4


async def test_memory_of_this_very_process_is_refused() -> None:
    from lmcache_trio.adapters.worker.cuda_kv import cuda_memory_of

    tensor = torch.zeros(BLOCKS * BLOCK, dtype=torch.uint8, device="cuda")
    memory, base = cuda_memory_of(tensor)
    view = TensorView(0, tensor.data_ptr() - base, DType.uint8, (BLOCKS, BLOCK), (BLOCK, 1))
    async with opened() as (device, _):
        with pytest.raises(Unavailable):
            await device.attach(Export((memory,), (view,), BLOCKS))


EXPANDABLE = """
import torch
from lmcache_trio.adapters.worker.cuda_kv import cuda_memory_of
from lmcache_trio.errors import Unavailable
tensor = torch.zeros(1 << 20, dtype=torch.uint8, device="cuda")
try:
    cuda_memory_of(tensor)
except Unavailable as exc:
    print("Unavailable", exc)
"""


def test_expandable_segments_are_not_exported() -> None:
    environment = os.environ | {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}
    found = subprocess.run(
        [sys.executable, "-c", EXPANDABLE], env=environment, capture_output=True, text=True, timeout=120
    )
    assert found.stdout.startswith("Unavailable"), found.stdout + found.stderr


def test_plain_copies_of_kv_on_a_gpu_are_those_of_kv_on_the_host() -> None:
    """What takes shm because it cannot be exported: every layout."""
    from lmcache_trio.adapters.worker.cuda_kv import make_paged_kv

    made = torch.Generator().manual_seed(1)
    for shape in ((2, BLOCKS, 16, 2, 8), (BLOCKS, 2, 16, 2, 8)):
        host = {f"layer {i}": torch.randn(shape, generator=made) for i in range(3)}
        gpu = {name: tensor.cuda() for name, tensor in host.items()}
        one, other = make_paged_kv(host, num_blocks=BLOCKS), make_paged_kv(gpu, num_blocks=BLOCKS)
        blocks = one.check([5, 9, 1, 33])
        slots = [np.zeros(one.groups[0].block_bytes * 4, dtype=np.uint8) for _ in range(2)]
        one.groups[0].gather(blocks, slots[0])
        fence = other.fence()
        fence.synchronize()
        other.groups[0].gather(blocks, slots[1])
        assert (slots[0] == slots[1]).all()
        into = one.check([40, 2, 7])
        one.groups[0].scatter(slots[0], 4, slice(1, 4), into)
        other.groups[0].scatter(slots[0], 4, slice(1, 4), into)
        assert all(torch.equal(host[name], gpu[name].cpu()) for name in host)
