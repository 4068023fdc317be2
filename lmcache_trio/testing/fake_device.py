"""A device with controllable timing: a copy moves when the test says so, unit by unit, and ends when the test says so.

    device = FakeDevice()                 # nothing moves by itself; FakeDevice(FakeConfig(patient=False)): all at once
    copy = device.running[0]
    copy.move(1)                          # one block of one layer
    copy.end()                            # the rest, and its end;   copy.fail(): no more, and its end, as a failure

An engine's memory is a `bytearray` that stands for what a descriptor names: `engine_memory` makes one, in the shape of
an export, and `gpu_memory` one as if it lay on a GPU, whose engine orders copies by events: `event` makes one, and
`happened` is set by the test. Everything happens in the caller's own task; there are no threads, so a clock may jump.
It keeps the contract of `Device`, and notes what a device must never be asked to do in `broken_rules`.
"""

import os
import secrets
import weakref
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager

import attrs
import trio

from lmcache_trio.abc import Attached, Copy, CudaMemory, Direction, EventDevice, Export, Memory, SharedMemory, Ticket
from lmcache_trio.errors import Misuse, Unavailable

__all__ = ["FakeAttached", "FakeConfig", "FakeCopy", "FakeDevice"]


@attrs.frozen
class FakeConfig:
    """*patient*: a copy waits to be moved."""

    patient: bool = True


class FakeAttached(Attached):
    """An engine's memory, open."""

    def __init__(self, export: Export, memory: list[bytearray]) -> None:
        super().__init__(export)
        self.memory = memory
        self.open = True


class FakeCopy(Ticket):
    """A copy that was started. *moved* units of `units` have been moved; one is one block's bytes of one piece."""

    def __init__(self, device: "FakeDevice", copy: Copy) -> None:
        self.copy = copy
        self.moved = 0
        self.ended = trio.Event()
        self.error = ""
        self._device = device
        self._units = list(self._plan())

    @property
    def units(self) -> int:
        return len(self._units)

    def move(self, count: int) -> None:
        """Move the next *count* units."""
        if self.ended.is_set():
            raise Misuse("this copy has ended")
        memory = self._device.memory
        assert memory is not None
        for slot, at, allocation, block_at, length in self._units[self.moved : self.moved + count]:
            engine = memoryview(self._attached.memory[allocation])[block_at : block_at + length]
            view = memory.view(slot + at, length)
            if self.copy.direction is Direction.STORE:
                view[:] = engine
            else:
                engine[:] = view
            self._device.bytes_copied += length
        self.moved = min(len(self._units), self.moved + count)

    def end(self) -> None:
        """Move the rest, and say that the copy has ended."""
        self.move(len(self._units) - self.moved)
        self._finish()

    def fail(self, error: str = "a fault that the test asked for") -> None:
        """Move nothing more, and say that the copy has ended and failed."""
        self.error = error
        self._finish()

    @property
    def _attached(self) -> FakeAttached:
        assert isinstance(self.copy.attached, FakeAttached)
        return self.copy.attached

    def _finish(self) -> None:
        if not self._attached.open:
            self._device.broken_rules.append("a copy ran on memory that was detached")
        self._device.running.remove(self)
        self._device.copies += 1
        self.ended.set()

    def _plan(self) -> Iterator[tuple[int, int, int, int, int]]:
        """(slot, offset in it, allocation, offset in it, length), layer after layer."""
        copy, at = self.copy, 0
        for piece in copy.attached.export.pieces[copy.group]:
            for i, block in enumerate(copy.blocks):
                if block >= 0:
                    chunk, place = divmod(i, copy.chunk_blocks)
                    source = piece.offset + block * piece.stride
                    yield copy.slots[chunk], at + place * piece.length, piece.allocation, source, piece.length
            at += copy.chunk_blocks * piece.length


def _name_of(descriptor: int) -> bytes:
    return os.fstat(descriptor).st_ino.to_bytes(8, "little")


class FakeDevice(EventDevice):
    """Keeps every copy in `running` until the test ends it."""

    Config = FakeConfig

    def __init__(self, config: FakeConfig | None = None) -> None:
        super().__init__(config or FakeConfig())
        self.memory: Memory | None = None
        self.running: list[FakeCopy] = []
        self.broken_rules: list[str] = []
        self.copies = 0
        self.bytes_copied = 0
        self.attached: list[FakeAttached] = []
        self.may_attach = trio.Event()
        """Set by default; a test that clears it (`hold_attach`) makes `attach` wait."""
        self.may_attach.set()
        self.happened: dict[bytes, trio.Event] = {}
        """Of each event that `event` made: set it when what it stands for is to have ended."""
        self._engines: dict[bytes, bytearray] = {}  # by what stands in a handle, or is the inode of a descriptor

    def engine_memory(self, size: int) -> tuple[SharedMemory, bytearray]:
        """*size* bytes of an engine, and what it would be called in an export."""
        descriptor = os.memfd_create("lmcache-trio fake engine", os.MFD_CLOEXEC)
        weakref.finalize(self, os.close, descriptor)
        name = _name_of(descriptor)
        self._engines[name] = bytearray(size)
        return SharedMemory(size, descriptor), self._engines[name]

    def gpu_memory(self, size: int) -> tuple[CudaMemory, bytearray]:
        """As `engine_memory`, named as an allocation of a GPU."""
        handle, made = secrets.token_bytes(64), bytearray(size)
        self._engines[handle] = made
        return CudaMemory(size, handle, bytes(16)), made

    def event(self) -> bytes:
        """What an engine would say that a copy must follow."""
        event = secrets.token_bytes(64)
        self.happened[event] = trio.Event()
        return event

    def hold_attach(self) -> None:
        """From now on `attach` waits until `may_attach` is set."""
        self.may_attach = trio.Event()

    @asynccontextmanager
    async def open(self, memory: Memory) -> AsyncIterator[None]:
        self.memory = memory
        try:
            yield
        finally:
            if self.running:
                self.broken_rules.append("the device was left while a copy ran")
            for attached in list(self.attached):
                self.detach(attached)
            self.memory = None

    async def attach(self, export: Export) -> Attached:
        await trio.lowlevel.checkpoint()
        await self.may_attach.wait()
        if self.memory is None:
            raise Unavailable("the device is not open")
        memory = []
        for each in export.memory:
            found = self._engines.get(_name_of(each.descriptor) if isinstance(each, SharedMemory) else each.handle)
            if found is None or len(found) < each.size:
                raise Misuse("this is not the memory that was exported")
            memory.append(found)
        self.attached.append(FakeAttached(export, memory))
        return self.attached[-1]

    def start(self, copy: Copy) -> Ticket:
        if self.memory is None:
            raise Unavailable("the device is not open")
        if not isinstance(copy.attached, FakeAttached) or not copy.attached.open:
            self.broken_rules.append("a copy was started on memory that was detached")
            raise Misuse("this memory is not attached")
        started = FakeCopy(self, copy)
        self.running.append(started)
        if not self.config.patient:
            started.end()
        return started

    async def wait_ended(self, ticket: Ticket) -> None:
        assert isinstance(ticket, FakeCopy)
        await ticket.ended.wait()
        if ticket.error:
            raise Unavailable(ticket.error)

    async def wait_event(self, attached: Attached, event: bytes) -> None:
        if event not in self.happened:
            raise Unavailable("this event is not known")
        await self.happened[event].wait()

    def detach(self, attached: Attached) -> None:
        if attached in self.attached and isinstance(attached, FakeAttached):
            if any(copy.copy.attached is attached for copy in self.running):
                self.broken_rules.append("memory was detached while a copy ran on it")
            self.attached.remove(attached)
            attached.open = False

    def statistics(self) -> dict[str, int | str]:
        return {"attached": len(self.attached), "copies": self.copies, "bytes_copied": self.bytes_copied}
