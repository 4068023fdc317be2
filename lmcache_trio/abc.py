"""What a plugin implements: `Memory`, `Tier`, `Device`.

All three share one life. An entry point (`lmcache_trio.memory`, `lmcache_trio.tiers`, `lmcache_trio.devices`) names a
class; its `Config` is an attrs class into which the class's own table of the configuration file is structured, unknown
keys refused; the class is made with that config, `open()` is entered, used, left; `statistics()` tells what it holds.

Buffers: whoever hands a buffer in gets it back when the call returns *and not before*. A cancelled call that has given
its buffer to a thread keeps it until the thread is done (see `lmcache_trio.threads.offload`).

`Arena` is the allocator of the server's own memory, for a tier that gives out ranges of its space too.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from typing import Any, ClassVar, Protocol

import attrs

from lmcache_trio._core.index.arena import Arena
from lmcache_trio._core.keys import ChunkKey
from lmcache_trio._core.transfer.exports import CudaMemory, Export, Piece, SharedMemory
from lmcache_trio._core.transfer.transfers import Direction

__all__ = [
    "Arena",
    "ArenaDevice",
    "Attached",
    "ByteIO",
    "ChunkKey",
    "Copy",
    "CudaMemory",
    "Device",
    "Direction",
    "EventDevice",
    "Export",
    "Load",
    "LocalTier",
    "Memory",
    "ObservedTier",
    "Piece",
    "Record",
    "SharedMemory",
    "Ticket",
    "Tier",
    "TierObserver",
]


class Memory(ABC):
    """Host memory that slots live in: one anonymous file, whose descriptor clients are given and which they map (L1).

    The server alone grows it, and touches its pages only in tier and device I/O.
    """

    Config: ClassVar[type[Any]]

    def __init__(self, config: Any) -> None:
        self.config = config

    @property
    @abstractmethod
    def descriptor(self) -> int:
        """The file that a client maps, `size` bytes long from the start and sealed: no client can shorten or lengthen
        it, or add a seal. The memory's own to close; it is there while the memory is open.
        """

    @property
    @abstractmethod
    def size(self) -> int:
        """Bytes that `grow` will take in the end, if there is room."""

    @abstractmethod
    def open(self) -> AbstractAsyncContextManager[None]:
        """Make the file, which has no name and goes with its last descriptor and mapping."""

    @abstractmethod
    async def grow(self) -> int:
        """Take the next piece, in a thread. Returns the bytes taken so far; the same number again: no more to come."""

    @abstractmethod
    def view(self, offset: int, length: int) -> memoryview:
        """The bytes of one slot, for a tier's I/O. Must lie inside what was taken."""

    @abstractmethod
    def statistics(self) -> dict[str, int | str]:
        """What is held: at least `bytes_taken` and `bytes_size`."""


@attrs.frozen
class Record:
    """A chunk to be stored: its bytes, one buffer a shard, and its *parent*'s digest (empty: the chain's first)."""

    key: ChunkKey
    parent: bytes
    shards: Sequence[memoryview]


@attrs.frozen
class Load:
    """A chunk that is wanted, and where its bytes go: one writable buffer a shard, of the exact length."""

    key: ChunkKey
    shards: Sequence[memoryview]


class Tier(ABC):
    """A slower place below memory (L2 and down): disk, a shared store.

    Absent is never an error. A call that fails raises `Unavailable`, and the server fences the tier; so does every call
    but `statistics` outside of `open()`. After any cancellation the tier is as usable as before and owns no buffer.
    """

    Config: ClassVar[type[Any]]
    figures: ClassVar[Mapping[str, tuple[str, str]]] = {
        "chunks": ("chunks", "Chunks that it holds."),
        "bytes_used": ("bytes", "Bytes that they take."),
        "bytes_capacity": ("bytes", "Bytes that its chunks may take."),
    }
    """Unit and meaning of each figure that `statistics` tells, for `lmcache-trio status --all`."""

    def __init__(self, config: Any) -> None:
        self.config = config

    @abstractmethod
    def open(self) -> AbstractAsyncContextManager[None]:
        """Make ready; what was stored before is there again. Entered once more after a fence, on the same object."""

    @abstractmethod
    async def contains(self, keys: Sequence[ChunkKey]) -> Sequence[bool]:
        """Which of *keys* a load would find, in order. A hint: the load may still miss."""

    @abstractmethod
    async def load(self, loads: Sequence[Load]) -> Sequence[bool]:
        """Fill the buffers; False for a chunk that is absent or failed verification: its buffers then hold garbage."""

    @abstractmethod
    async def store(self, records: Sequence[Record]) -> Sequence[bool]:
        """Keep the chunks; False for one that was not taken (no space, not admitted, known already is True)."""

    @abstractmethod
    async def delete(self, namespace: bytes) -> None:
        """Forget every chunk of *namespace*, before returning."""

    @abstractmethod
    def statistics(self) -> dict[str, int | str]:
        """What is held and counted: at least `chunks`, `bytes_used` and `bytes_capacity`."""


class ByteIO(Protocol):
    """Where a tier's bytes come from and go to, below its checksums. Both calls block and run in threads of the tier.

    Fault injection stands in here: see `lmcache_trio.testing.faulty_tier`.
    """

    def read(self, offset: int, view: memoryview) -> int:
        """Fill *view* from *offset*; the bytes read, fewer than asked for when there are no more."""
        ...

    def write(self, offset: int, view: memoryview) -> None:
        """Write all of *view* at *offset*."""
        ...


class LocalTier(Tier):
    """A tier whose `open` waits for this machine alone, and does not read there what takes long.

    A server is not ready before it was opened once, or could not be, however long that takes: so a `ConfigError` of
    its `open` always ends the start.
    """


class TierObserver(Protocol):
    """Whom an `ObservedTier` tells which chunks it has. Both calls return at once, and never raise."""

    def came(self, keys: Sequence[ChunkKey]) -> None:
        """A load of *keys* would find them from now on: they were stored, or `contains` found them."""
        ...

    def left(self, keys: Sequence[ChunkKey]) -> None:
        """A load of *keys* would miss from now on: they were evicted, or failed verification."""
        ...


class ObservedTier(Tier):
    """A tier that knows at any time which chunks it has, and says what came and what left while it has an `observer`.

    It says so in the loop's thread, when it happens and in that order. It says nothing of the chunks of a namespace
    that `delete` forgets, and nothing at the end of `open`: the observer knows of both. It need not tell that a chunk
    came, but a chunk of which it told so never leaves in silence.
    """

    observer: TierObserver | None = None
    """Set and taken away by the server, at any time: schedulers watch, or none does any more."""


class Attached:
    """An engine's KV, opened by a device. A device subclasses it; to everyone else it is only a name.

    *export* says where the pieces lie.
    """

    def __init__(self, export: Export) -> None:
        self.export = export


@attrs.frozen(eq=False)
class Copy:
    """Parts of chunks, all of one KV *group*, to be moved between an engine's blocks and slots, in the order of both.

    *slots* are arena offsets, one per chunk, each of *chunk_blocks* blocks of the group: those of the chunk's part.
    *blocks* has one entry for each of them, chunk after chunk: the engine's block number, or -1 for a block that is not
    to be touched (in a load alone). What the copy has to wait for has ended when it is started.
    """

    attached: Attached
    direction: Direction
    slots: Sequence[int]
    blocks: Sequence[int]
    chunk_blocks: int
    group: int = 0


class Ticket:
    """A copy that was started. A device subclasses it; to everyone else it is only a name."""


class Device(ABC):
    """Where an engine's KV lives, seen from the server: opens it, and moves blocks to slots and back.

    Who owns what: from `start` until `wait_ended` has returned for its ticket, the slots and blocks of a copy belong to
    the device, whoever gives up waiting: a copy is never cancelled. What was attached stays open until `detach`, which
    is only called when no copy of it runs. The caller checked every block number and slot; the device need not.
    """

    Config: ClassVar[type[Any]]

    def __init__(self, config: Any) -> None:
        self.config = config

    @abstractmethod
    def open(self, memory: Memory) -> AbstractAsyncContextManager[None]:
        """Make ready to copy to and from slots of *memory*. Left when no copy runs any more."""

    @abstractmethod
    async def attach(self, export: Export) -> Attached:
        """Open what an engine exported. Cancelled, nothing stays open.

        The descriptors of shared memory are this process' own; they are closed when this has returned or raised.
        `Unavailable`: this device cannot reach such memory. `Misuse`: it is not what *export* says.
        """

    @abstractmethod
    def start(self, copy: Copy) -> Ticket:
        """Begin *copy*, behind those of its engine and direction that were started before it, and return at once.

        What it raises, it raises before anything moves.
        """

    @abstractmethod
    async def wait_ended(self, ticket: Ticket) -> None:
        """Return when the copy has ended. `Unavailable`, then too, if it failed: what it wrote to holds anything.

        Cancelled, only the wait ends; it may be waited for again. Anything else that it raises says that nobody knows
        whether the copy still runs: slots and blocks are then never used again.
        """

    @abstractmethod
    def detach(self, attached: Attached) -> None:
        """Let go of the engine's memory; its process may be gone by now. Idempotent."""

    @abstractmethod
    def statistics(self) -> dict[str, int | str]:
        """What is held and counted: at least `attached`, `copies` and `bytes_copied`."""


class EventDevice(Device):
    """A device whose engines work asynchronously themselves, and say what a copy must follow."""

    @abstractmethod
    async def wait_event(self, attached: Attached, event: bytes) -> None:
        """Return when what the engine named by *event* (64 bytes, a CUDA IPC event) has ended. It may never end.

        No copy of another engine's, and none that was started, waits for it. Cancelled, only the wait ends.
        """


class ArenaDevice(Device):
    """A device that has something to do for every byte of the arena, before a copy comes to it."""

    @abstractmethod
    async def arena_grew(self) -> None:
        """The memory has grown while something is attached. Return when all of it is ready. One call at a time."""
