"""The `auto` device: takes for each engine the device that its memory needs. CUDA is imported when one needs it.

Copies of engines on different devices do not wait for each other here; who may start what, and when, is the server's
transfer worker's decision.
"""

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager

import attrs
import trio

from lmcache_trio.abc import ArenaDevice, Attached, Copy, CudaMemory, Device, EventDevice, Export, Memory, Ticket
from lmcache_trio.errors import Misuse, Unavailable
from lmcache_trio_backends.host_device import HostConfig, HostDevice

__all__ = ["AutoConfig", "AutoDevice"]


@attrs.frozen
class AutoConfig:
    """The `auto` device has no settings; choose `host` or `cuda` by name to set theirs."""


@attrs.frozen(eq=False)
class _AnyTicket(Ticket):
    device: Device
    ticket: Ticket


class AutoDevice(EventDevice, ArenaDevice):
    """A host device, and a CUDA device once an engine needs one."""

    Config = AutoConfig

    def __init__(self, config: AutoConfig) -> None:
        super().__init__(config)
        self._host = HostDevice(HostConfig())
        self._cuda: Device | None = None
        self._making = trio.Lock()
        self._memory: Memory | None = None
        self._opened = AsyncExitStack()
        self._owner: dict[Attached, Device] = {}

    @asynccontextmanager
    async def open(self, memory: Memory) -> AsyncIterator[None]:
        async with AsyncExitStack() as self._opened:
            await self._opened.enter_async_context(self._host.open(memory))
            self._memory = memory
            try:
                yield
            finally:
                self._memory = None
        self._cuda = None

    async def attach(self, export: Export) -> Attached:
        device = await self._cuda_device() if isinstance(export.memory[0], CudaMemory) else self._host
        attached = await device.attach(export)
        self._owner[attached] = device
        return attached

    def start(self, copy: Copy) -> Ticket:
        device = self._owner[copy.attached]
        return _AnyTicket(device, device.start(copy))

    async def wait_ended(self, ticket: Ticket) -> None:
        if not isinstance(ticket, _AnyTicket):
            raise Misuse("this ticket is another device's")
        await ticket.device.wait_ended(ticket.ticket)

    async def wait_event(self, attached: Attached, event: bytes) -> None:
        device = self._owner.get(attached)
        if not isinstance(device, EventDevice):
            raise Misuse("the host's memory knows no events")
        await device.wait_event(attached, event)

    async def arena_grew(self) -> None:
        try:
            await self._host.arena_grew()
        finally:  # what one of them cannot use, the other may
            if isinstance(self._cuda, ArenaDevice):
                await self._cuda.arena_grew()

    def detach(self, attached: Attached) -> None:
        device = self._owner.pop(attached, None)
        if device is not None:
            device.detach(attached)

    def statistics(self) -> dict[str, int | str]:
        found = [device.statistics() for device in (self._host, self._cuda) if device is not None]
        return {name: sum(int(each[name]) for each in found) for name in ("attached", "copies", "bytes_copied")}

    async def _cuda_device(self) -> Device:
        async with self._making:  # engines come at the same time, as the ranks of one do: one device for all
            if self._cuda is None:
                if self._memory is None:
                    raise Unavailable("the device is not open")
                from lmcache_trio_backends.cuda_device import CudaConfig, CudaDevice

                cuda = CudaDevice(CudaConfig())
                await self._opened.enter_async_context(cuda.open(self._memory))
                self._cuda = cuda
            return self._cuda
