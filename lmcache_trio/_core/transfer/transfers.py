"""The queue of the device's transfer worker: which copies start next, and when all copies of a request have ended.

    QUEUED --first copy started--> RUNNING --last copy ended--> ENDED
       |                              `--abort, or a copy failed--> ENDING --copies that run have ended--> ENDED
       `--abort--> ENDED                                              `--the end of one is lost--> stays ENDING

A *transfer* is the copies of one request, between an engine's blocks and slots: a list of *units*, one per chunk. The
units start in order once the transfer is *allowed*, when its copies have no event to wait for. Until then it waits
outside the queue, where it keeps no other transfer waiting. A *batch* is given to the device at once: units of one
transfer, or of neighbours in the queue that move the same engine's memory in one KV group.

Rule 1: only the device ends a copy. An abort only keeps units from starting. Until ENDED, a transfer owns its slots and
blocks: for good, if the device can't tell when a copy ends. Rule 2: loads go ahead of stores, because an engine waits
for them. After *most_loads* batches of loads in a row one batch of stores goes, if there is one, so neither starves.
Rule 3: no more than *in_flight* bytes are with the device, so a load never queues behind more than that. A unit that is
larger goes alone. Rule 4: no I/O and no clock here; a method that raises has changed nothing.
"""

from collections import deque
from collections.abc import Hashable, Iterator, Sequence
from enum import Enum
from itertools import takewhile

import attrs

from lmcache_trio.errors import Misuse
from lmcache_trio.statistics import QueueHeld

__all__ = ["Batch", "Direction", "Part", "Transfer", "TransferState", "Transfers"]


class Direction(Enum):
    """Seen from the cache: a LOAD goes from slots to blocks, a STORE from blocks to slots."""

    LOAD = "load"
    STORE = "store"


class TransferState(Enum):
    """A transfer that is ENDING will not succeed, and some of its copies still run."""

    QUEUED = "queued"
    RUNNING = "running"
    ENDING = "ending"
    ENDED = "ended"


def _has_bytes(transfer: object, attribute: "attrs.Attribute[Sequence[int]]", units: Sequence[int]) -> None:
    if not units or min(units) < 1:
        raise Misuse("a transfer has one unit or more, each of one byte or more")


@attrs.define(eq=False)
class Transfer:
    """One request's copies. *units* are their sizes in bytes; *owner* is the memory that they move, and its KV group.

    *allowed*: the units may start.
    """

    direction: Direction
    owner: Hashable
    units: Sequence[int] = attrs.field(validator=_has_bytes)
    allowed: bool = True
    state: TransferState = attrs.field(default=TransferState.QUEUED, init=False)
    submitted: bool = attrs.field(default=False, init=False)
    started: int = attrs.field(default=0, init=False)
    """Units that were given to the device."""
    running: int = attrs.field(default=0, init=False)
    """Batches with units of this transfer that have not ended."""
    succeeded: bool = attrs.field(default=False, init=False)


@attrs.frozen
class Part:
    """Units [first, end) of a transfer."""

    transfer: Transfer
    first: int
    end: int


@attrs.frozen(eq=False)
class Batch:
    """The copies that the device is given at once."""

    direction: Direction
    parts: tuple[Part, ...]
    size: int


class Transfers:
    """All transfers that have not ended. Sizes in bytes: *in_flight* with the device, *batch* at once.

    Two batches fit, so that the second is with the device when the first ends. Between two batches the host's device
    waits 0.3 ms for the loop, and 32 MiB take it 4.5 ms. A new load waits for 128 MiB at most: 18 ms. While transfers
    of the other direction wait, a batch has half as many bytes.
    """

    def __init__(self, *, in_flight: int = 128 << 20, batch: int = 64 << 20, most_loads: int = 4) -> None:
        if in_flight < 1 or batch < 1 or most_loads < 1:
            raise Misuse("in_flight, batch and most_loads must be 1 or more")
        self._in_flight = in_flight
        self._batch = batch
        self._most_loads = most_loads
        self._queues: dict[Direction, deque[Transfer]] = {direction: deque() for direction in Direction}
        self._running: set[Batch] = set()
        self._bytes_running = 0
        self._loads_in_a_row = 0

    def submit(self, transfer: Transfer) -> None:
        """Queue *transfer*, behind the others of its direction."""
        if transfer.state is not TransferState.QUEUED or transfer.submitted:
            raise Misuse("a transfer is submitted once")
        transfer.submitted = True
        if transfer.allowed:
            self._queues[transfer.direction].append(transfer)

    def allow(self, transfer: Transfer) -> None:
        """The event of *transfer* has happened: it is queued behind the others that wait now. Idempotent."""
        if not transfer.submitted:
            raise Misuse("only a transfer that was submitted can be allowed")
        if transfer.state is TransferState.QUEUED and not transfer.allowed:
            transfer.allowed = True
            self._queues[transfer.direction].append(transfer)

    def next(self) -> Batch | None:
        """The batch to start now, which counts as running. None: no transfer waits, or there is no room."""
        direction = self._next_direction()
        if direction is None:
            return None
        queue = self._queues[direction]
        parts: list[Part] = []
        size = 0
        for transfer in self._candidates(queue):
            if not parts and self._running and self._bytes_running + transfer.units[transfer.started] > self._in_flight:
                return None
            part, more = self._cut(transfer, size)
            if part.end > part.first:
                parts.append(part)
                size += more
            if part.end < len(transfer.units):
                break
        for part in parts:
            if part.end == len(part.transfer.units):
                queue.remove(part.transfer)
        batch = Batch(direction, tuple(parts), size)
        for part in parts:
            part.transfer.started = part.end
            part.transfer.running += 1
            part.transfer.state = TransferState.RUNNING
        self._running.add(batch)
        self._bytes_running += size
        self._loads_in_a_row = self._loads_in_a_row + 1 if direction is Direction.LOAD else 0
        return batch

    def ended(self, batch: Batch, *, failed: bool = False) -> list[Transfer]:
        """The device is done with *batch*. Returns the transfers that ended with it, in order."""
        self._leave(batch)
        ended = []
        for part in batch.parts:
            transfer = part.transfer
            transfer.running -= 1
            if failed:
                self._drop_rest(transfer)
            whole = transfer.started == len(transfer.units)
            if not transfer.running and (whole or transfer.state is TransferState.ENDING):
                transfer.succeeded = transfer.state is TransferState.RUNNING
                transfer.state = TransferState.ENDED
                ended.append(transfer)
        return ended

    def lost(self, batch: Batch) -> None:
        """The device can't tell when *batch* ends: its transfers never end, but its bytes keep no other waiting."""
        self._leave(batch)
        for part in batch.parts:
            self._drop_rest(part.transfer)

    def coming(self) -> Iterator[Transfer]:
        """The transfers that the next batch may consist of. The caller may abort them while it iterates."""
        for queue in self._queues.values():
            size = 0
            for transfer in self._candidates(queue):
                yield transfer
                size += sum(transfer.units[transfer.started :])
                if size >= self._batch:
                    break

    def abort(self, transfer: Transfer) -> bool:
        """*transfer* is not wanted any more. True: it has ended now. False: `ended` will name it. Idempotent.

        A transfer that was not submitted has ended too, and must not be submitted.
        """
        if transfer.state is TransferState.QUEUED:
            self._unqueue(transfer)
            transfer.state = TransferState.ENDED
            return True
        if transfer.state is not TransferState.ENDED:
            self._drop_rest(transfer)
            if not transfer.running:  # between two of its batches
                transfer.state = TransferState.ENDED
                return True
        return False

    def statistics(self) -> QueueHeld:
        queued = sum(len(queue) for queue in self._queues.values())
        return QueueHeld(queued, copies_running=len(self._running), copy_bytes_running=self._bytes_running)

    def _next_direction(self) -> Direction | None:
        loads, stores = self._queues[Direction.LOAD], self._queues[Direction.STORE]
        if loads and not (stores and self._loads_in_a_row >= self._most_loads):
            return Direction.LOAD
        return Direction.STORE if stores else None

    @property
    def _batch_now(self) -> int:
        return self._batch // 2 if all(self._queues.values()) else self._batch

    def _cut(self, transfer: Transfer, size: int) -> tuple[Part, int]:
        """The units of *transfer* that still fit into a batch of *size* bytes, and their bytes."""
        at, more = transfer.started, 0
        while at < len(transfer.units):
            unit = transfer.units[at]
            alone = not size and not more
            room = min(self._batch_now, self._in_flight - self._bytes_running)
            if not alone and size + more + unit > room:
                break
            more += unit
            at += 1
        return Part(transfer, transfer.started, at), more

    def _leave(self, batch: Batch) -> None:
        if batch not in self._running:
            raise Misuse("this batch is not running")
        self._running.remove(batch)
        self._bytes_running -= batch.size

    def _drop_rest(self, transfer: Transfer) -> None:
        transfer.state = TransferState.ENDING
        self._unqueue(transfer)

    def _unqueue(self, transfer: Transfer) -> None:
        queue = self._queues[transfer.direction]
        if transfer in queue:
            queue.remove(transfer)

    def _candidates(self, queue: deque[Transfer]) -> Iterator[Transfer]:
        """The transfers that may go next, in one batch: neighbours that move one owner's memory."""
        return takewhile(lambda each: each.owner == queue[0].owner, queue)
