"""The loads from one tier: which chunks are being loaded, which lookups want them, and which load comes next.

    WANTED --next--> LOADING --landed--> LANDED --no wisher left--> (gone)
      |                 |-----missed---> MISSED                             (gone)
      |                 `--no wisher left, given up--> UNWANTED --missed: its call returned--> (gone)
      |--no wisher left--> UNWANTED                                         (gone)
      `--given up, missed--> MISSED                                         (gone)

Lookups that want the same chunk share one load, and are its *wishers*. An UNWANTED load whose call still runs keeps its
bytes in flight until the call has returned. If its chunk is wanted anew meanwhile, the new load waits for the old one.
A load also waits while the load of the chunk that it extends has not begun: a chunk gets no slot before its parent.

The load with the nearest deadline comes first; of equal ones, the one that was wanted first. The loads in flight are
bounded in bytes and number, but one load alone is always allowed. No load overtakes the first one that does not fit, so
none starves.

Rule 1: every transition of a load lives in this file. Rule 2: no I/O and no clock here.
"""

from collections.abc import Callable, Iterator
from enum import Enum
from heapq import heappop, heappush

import attrs

from lmcache_trio._core.keys import ChunkKey
from lmcache_trio._core.misses import InTiers
from lmcache_trio.errors import Misuse

__all__ = ["LoadState", "Loads", "TierLoad"]


class LoadState(Enum):
    """A load that is WANTED or LOADING is still waited for."""

    WANTED = "wanted"
    LOADING = "loading"
    LANDED = "landed"
    MISSED = "missed"
    UNWANTED = "unwanted"


Wisher = Callable[[], None]
"""A lookup's callback. It is called when a load has LANDED or MISSED, or was given up. A load has it once at most."""


@attrs.define(eq=False)
class TierLoad:
    """One chunk's load from a tier, *size* bytes in memory. *parent* is the digest before the chunk's (b"": none)."""

    key: ChunkKey
    parent: bytes
    size: int
    number: int
    state: LoadState = LoadState.WANTED
    deadline: float = 0.0
    wishers: dict[Wisher, float] = attrs.field(factory=dict)
    refused: InTiers = InTiers.NONE
    """Why memory did not take the chunk: NO_SHARE or NO_ROOM."""

    @property
    def settled(self) -> bool:
        """Whether the load is over, so no wisher waits for it."""
        return self.state is not LoadState.WANTED and self.state is not LoadState.LOADING


class Loads:
    """One tier's loads. *most_bytes* and *most* bound the loads in flight: those whose calls have not returned."""

    def __init__(self, *, most_bytes: int, most: int) -> None:
        self._most_bytes = most_bytes
        self._most = most
        self._numbers = 0
        self._current: dict[ChunkKey, TierLoad] = {}  # WANTED, LOADING, LANDED
        self._ending: dict[ChunkKey, TierLoad] = {}  # UNWANTED, its call has not returned
        self._queue: list[tuple[float, int, TierLoad]] = []  # a heap; some entries are outdated
        self._parked: dict[ChunkKey, list[TierLoad]] = {}  # by the chunk whose load they wait for
        self.in_flight = 0
        self.bytes_in_flight = 0
        self.bytes_landed = 0
        """Of loads that are LANDED and still wanted."""

    def __len__(self) -> int:
        return len(self._current) + len(self._ending)

    def want(self, key: ChunkKey, parent: bytes, size: int, deadline: float, wisher: Wisher) -> TierLoad:
        """*wisher* wants *key* until *deadline*. The load may have other wishers, or be LANDED already."""
        load = self._current.get(key)
        if load is None:
            self._numbers += 1
            load = self._current[key] = TierLoad(key, parent, size, self._numbers)
        load.wishers[wisher] = min(deadline, load.wishers.get(wisher, deadline))
        self._set_deadline(load)
        return load

    def unwant(self, load: TierLoad, wisher: Wisher) -> bool:
        """*wisher* does not want *load* any more. True: it was the last wisher, and the caller ends the load's call."""
        if load.wishers.pop(wisher, None) is None:
            return False
        if load.wishers:
            self._set_deadline(load)
            return False
        if load.state is LoadState.WANTED:
            self._leave(load, LoadState.UNWANTED)
        elif load.state is LoadState.LANDED:
            self.bytes_landed -= load.size
            del self._current[load.key]
        elif load.state is LoadState.LOADING:
            self._give_up(load)
        return True

    def next(self) -> TierLoad | None:
        """The load whose call begins now. None: no load is WANTED, or a call in flight must return first."""
        while self._queue:
            deadline, _, load = self._queue[0]
            if load.state is not LoadState.WANTED or load.deadline != deadline:
                heappop(self._queue)
            elif (wait_for := self._waits_for(load)) is not None:
                heappop(self._queue)
                self._parked.setdefault(wait_for, []).append(load)
            elif self.in_flight and (
                self.in_flight >= self._most or self.bytes_in_flight + load.size > self._most_bytes
            ):
                return None
            else:
                heappop(self._queue)
                load.state = LoadState.LOADING
                self.in_flight += 1
                self.bytes_in_flight += load.size
                self._unpark(load.key)
                return load
        return None

    def landed(self, load: TierLoad) -> None:
        """The load's bytes are in memory, and its call has returned."""
        if load.state is not LoadState.LOADING:
            raise Misuse(f"a load that is {load.state.value} cannot land")
        self._returned(load)
        load.state = LoadState.LANDED
        self.bytes_landed += load.size

    def missed(self, load: TierLoad) -> None:
        """The load's call has returned without the chunk. Of an UNWANTED load: with or without it."""
        if load.state is LoadState.LOADING:
            self._returned(load)
            self._leave(load, LoadState.MISSED)
        elif self._ending.get(load.key) is load:
            del self._ending[load.key]
            self._returned(load)
            self._unpark(load.key)
        else:
            raise Misuse(f"a load that is {load.state.value} cannot miss")

    def give_up(self, namespace: bytes | None = None) -> list[TierLoad]:
        """Give up all loads that are not LANDED, or all such loads of *namespace*.

        Returns those that wishers waited for; the caller ends their calls.
        """
        given_up = [
            load
            for load in self._current.values()
            if not load.settled and (namespace is None or load.key.namespace == namespace)
        ]
        for load in given_up:
            if load.state is LoadState.WANTED:
                self._leave(load, LoadState.MISSED)
            else:
                self._give_up(load)
        return given_up

    def _set_deadline(self, load: TierLoad) -> None:
        deadline = min(load.wishers.values())
        if load.state is LoadState.WANTED and (deadline != load.deadline or len(load.wishers) == 1):
            load.deadline = deadline
            heappush(self._queue, (deadline, load.number, load))

    def _waits_for(self, load: TierLoad) -> ChunkKey | None:
        if load.key in self._ending:
            return load.key
        if load.parent:
            above = ChunkKey(load.key.namespace, load.parent)
            before = self._current.get(above)
            if before is not None and before.state is LoadState.WANTED:
                return above
        return None

    def _give_up(self, load: TierLoad) -> None:
        load.state = LoadState.UNWANTED
        del self._current[load.key]
        self._ending[load.key] = load

    def _leave(self, load: TierLoad, state: LoadState) -> None:
        load.state = state
        del self._current[load.key]
        self._unpark(load.key)

    def _returned(self, load: TierLoad) -> None:
        self.in_flight -= 1
        self.bytes_in_flight -= load.size

    def _unpark(self, key: ChunkKey) -> None:
        for load in self._parked.pop(key, ()):
            if load.state is LoadState.WANTED:
                heappush(self._queue, (load.deadline, load.number, load))

    def waiting(self) -> Iterator[TierLoad]:
        """The loads that are WANTED, in no order. For tests."""
        return (load for load in self._current.values() if load.state is LoadState.WANTED)
