"""The `cuda` device: engines whose KV lies in GPU memory, opened by the driver's own handles (`cuda-bindings`).

    store:  blocks --a stream of this engine's stores--> pinned slots --the stream is empty--> ended
    load:   pinned slots --a stream of its loads--> blocks            --the same--> ended

Each engine has two streams, and a thread that waits on each: no engine waits for another's copies, nor loads for
stores. No event of an engine's is put into a stream, where one that never happens would hold all behind it: a thread of
this engine waits for it, before the copy is even queued (`wait_event`). Opening and closing, and registering the arena
as pinned memory, piece by piece as it grows, are done in a fourth place, one thread for all.

When the driver can't say whether a stream is empty, nobody knows whether a copy still runs: `wait_ended` raises what is
no `Unavailable` then, and that engine's memory is never closed. Not measured: no GPU was at hand when this was written,
`tests/gpu` holds it to the contract where there is one. The next copy of an engine in one direction is submitted only
after the one before has ended, so the GPU idles in between. Refused: memory of another device than those that this
process can see, and whatever the driver does not open.
"""

import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import attrs
import trio

from lmcache_trio.abc import ArenaDevice, Attached, Copy, CudaMemory, Direction, EventDevice, Export, Memory, Ticket
from lmcache_trio.errors import LMCacheTrioError, Misuse, Unavailable
from lmcache_trio.threads import DedicatedThread
from lmcache_trio_backends._cuda_driver import (
    Context,
    call,
    driver,
    make_context,
    open_memory,
    submit,
    wait_event,
)
from lmcache_trio_backends._cuda_moves import PIN, address_of, moves_of

__all__ = ["CudaConfig", "CudaDevice"]

log = logging.getLogger("lmcache_trio.device")

_PAGE = 4096


@attrs.frozen
class CudaConfig:
    """The `cuda` device has no settings."""


class _Lane:
    """One engine's copies in one direction."""

    def __init__(self, name: str) -> None:
        self.thread = DedicatedThread(f"lmcache-trio cuda {name}")
        self.stream = call(driver().cuStreamCreate, driver().CUstream_flags.CU_STREAM_NON_BLOCKING)


class AttachedCuda(Attached):
    """*bases*: where each allocation begins, in this process' view of the device."""

    def __init__(self, export: Export, context: Context) -> None:
        super().__init__(export)
        self.context = context
        self.bases: list[int] = []
        self.lanes: dict[Direction, _Lane] = {}
        self.events = DedicatedThread("lmcache-trio cuda events")
        self.lost = False
        """A copy of it may run for ever: nothing of it is closed."""


class _CudaTicket(Ticket):
    def __init__(self) -> None:
        self.ended = trio.Event()
        self.moved = 0
        self.error: Exception | None = None
        self.lost: Exception | None = None


class CudaDevice(EventDevice, ArenaDevice):
    """Moves blocks of GPU memory."""

    Config = CudaConfig

    def __init__(self, config: CudaConfig) -> None:
        super().__init__(config)
        self._memory: Memory | None = None
        self._thread: DedicatedThread | None = None
        self._attached: set[AttachedCuda] = set()
        self._contexts: dict[bytes, Context] = {}  # by UUID
        self._pinning = trio.Lock()
        self._pinned = _PAGE  # bytes of the arena that are registered
        self._registered: list[int] = []  # addresses
        self._pins = True
        self._copies = 0
        self._bytes = 0

    @asynccontextmanager
    async def open(self, memory: Memory) -> AsyncIterator[None]:
        thread = DedicatedThread("lmcache-trio cuda device")
        try:
            await thread.run(call, driver().cuInit, 0)
        except BaseException:
            thread.close()
            raise
        self._memory, self._thread, self._pinned, self._pins = memory, thread, _PAGE, True
        try:
            yield
        finally:
            lost = any(opened.lost for opened in self._attached)
            for opened in list(self._attached):
                self.detach(opened)
            with trio.CancelScope(shield=True):
                if not lost:
                    await thread.run(self._release)
            thread.close()
            self._memory = self._thread = None

    async def attach(self, export: Export) -> Attached:
        thread = self._thread
        if thread is None:
            raise Unavailable("the cuda device is not open")
        made: list[AttachedCuda] = []
        try:
            await thread.run(self._open, export, made)
            await self._pin_arena()
        except BaseException:
            for opened in made:  # opened, and then cancelled
                thread.post(_close, opened, on_return=lambda: None)
            raise
        self._attached.add(made[0])
        return made[0]

    def start(self, copy: Copy) -> Ticket:
        opened, memory = copy.attached, self._memory
        if not isinstance(opened, AttachedCuda) or opened not in self._attached or memory is None:
            raise Unavailable("this memory is not open")
        ticket = _CudaTicket()
        opened.lanes[copy.direction].thread.post(
            self._run, opened, copy, memory, ticket, on_return=lambda: self._ended(opened, ticket)
        )
        return ticket

    async def wait_ended(self, ticket: Ticket) -> None:
        if not isinstance(ticket, _CudaTicket):
            raise Misuse("this ticket is another device's")
        await ticket.ended.wait()
        if ticket.lost is not None:
            raise RuntimeError(f"nobody knows whether a copy has ended: {ticket.lost}") from ticket.lost
        if ticket.error is not None:
            raise Unavailable(f"a copy failed: {ticket.error}") from ticket.error

    async def wait_event(self, attached: Attached, event: bytes) -> None:
        if not isinstance(attached, AttachedCuda) or attached not in self._attached:
            raise Unavailable("this memory is not open")
        await attached.events.run_owned(_wait_event, attached.context, event, on_return=lambda: None)

    async def arena_grew(self) -> None:
        if self._attached:
            await self._pin_arena()

    def detach(self, attached: Attached) -> None:
        if isinstance(attached, AttachedCuda) and attached in self._attached and self._thread is not None:
            self._attached.remove(attached)
            if not attached.lost:
                self._thread.post(_close, attached, on_return=lambda: None)

    def statistics(self) -> dict[str, int | str]:
        return {"attached": len(self._attached), "copies": self._copies, "bytes_copied": self._bytes}

    def _ended(self, opened: AttachedCuda, ticket: _CudaTicket) -> None:
        opened.lost = opened.lost or ticket.lost is not None
        if ticket.error is None and ticket.lost is None:
            self._copies += 1
            self._bytes += ticket.moved
        ticket.ended.set()

    # --- pinned memory ----------------------------------------------------------------------------------------------

    async def _pin_arena(self) -> None:
        async with self._pinning:
            while (end := self._pin_next()) and self._thread is not None and self._memory is not None:
                await self._thread.run(self._register, self._memory, self._pinned, end)

    def _pin_next(self) -> int:
        """Where the piece ends that is to be registered now; 0 if none is, or if it is not whole yet."""
        if self._memory is None or not self._pins:
            return 0
        found = self._memory.statistics()
        taken, end = int(found["bytes_taken"]), self._pinned // PIN * PIN + PIN
        if taken < end and (taken == found["bytes_size"] or found.get("limit")):
            end = taken
        return end if self._pinned < end <= taken else 0

    # --- in the thread ----------------------------------------------------------------------------------------------

    def _register(self, memory: Memory, start: int, end: int) -> None:
        address = address_of(memory, start, end - start)
        try:
            next(iter(self._contexts.values())).enter()
            call(driver().cuMemHostRegister, address, end - start, driver().CU_MEMHOSTREGISTER_PORTABLE)
        except Unavailable as exc:
            self._pins = False
            log.warning("the arena is not pinned from byte %d on, copies there take longer: %s", start, exc)
        else:
            self._registered.append(address)
            self._pinned = end

    def _open(self, export: Export, made: list[AttachedCuda]) -> None:
        first = export.memory[0]
        if not isinstance(first, CudaMemory):
            raise Unavailable("the cuda device opens CUDA memory alone")
        if first.uuid not in self._contexts:
            self._contexts[first.uuid] = make_context(first.uuid)
        context = self._contexts[first.uuid]
        context.enter()
        opened = AttachedCuda(export, context)
        try:
            for memory in export.memory:
                if not isinstance(memory, CudaMemory) or memory.uuid != first.uuid:
                    raise Unavailable("one engine's KV lies on two devices")
                opened.bases.append(open_memory(memory))
            for direction in Direction:
                opened.lanes[direction] = _Lane(direction.value)
        except BaseException:
            _close(opened)
            raise
        made.append(opened)

    def _release(self) -> None:
        """Give back all that is no engine's."""
        for context in self._contexts.values():
            _try(context.enter)
        while self._registered:
            _try(call, driver().cuMemHostUnregister, self._registered.pop())
        while self._contexts:
            _try(self._contexts.popitem()[1].release)

    # --- in a lane's thread -----------------------------------------------------------------------------------------

    def _run(self, opened: AttachedCuda, copy: Copy, memory: Memory, ticket: _CudaTicket) -> None:
        stream, begun = opened.lanes[copy.direction].stream, False
        try:
            opened.context.enter()
            moves = list(moves_of(copy, opened.bases, memory))
            slot_bytes = opened.export.group_block_bytes[copy.group] * copy.chunk_blocks
            pinned = max(copy.slots) + slot_bytes <= self._pinned
            begun = True
            submit(opened.context, stream, moves, to_host=copy.direction is Direction.STORE, pinned=pinned)
        except Exception as exc:  # noqa: BLE001  (told to whoever waits for it)
            ticket.error = exc
        try:
            if begun:
                call(driver().cuStreamSynchronize, stream)
        except Exception as exc:  # noqa: BLE001  (as above)
            ticket.lost = exc
        if ticket.error is None:
            ticket.moved = sum(move.length for move in moves)


def _wait_event(context: Context, event: bytes) -> None:
    context.enter()
    wait_event(event)


def _close(opened: AttachedCuda) -> None:
    """Nothing of it runs. What fails is logged, and the rest closed nevertheless."""
    _try(opened.context.enter)
    opened.events.close()
    for lane in opened.lanes.values():
        lane.thread.close()
        _try(call, driver().cuStreamDestroy, lane.stream)
    opened.lanes.clear()
    while opened.bases:
        _try(call, driver().cuIpcCloseMemHandle, opened.bases.pop())


def _try(fn: Any, *args: Any) -> None:
    try:
        fn(*args)
    except LMCacheTrioError as exc:
        log.warning("something of an engine's GPU memory was not given back: %s", exc)
