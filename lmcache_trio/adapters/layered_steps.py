"""What one step of an engine moves layer by layer: who waits for which layer, and which are written.

Values that `layered` shares with the host's threads; nothing here asks a server or copies.
"""

import logging
from collections.abc import Callable, Sequence
from typing import Any

import trio

from lmcache_trio._wire.codec import pack_offsets
from lmcache_trio._wire.messages import LayersWritten, Message, Withdraw
from lmcache_trio.adapters.jobs import Job
from lmcache_trio.threads import Handoff, Latch

__all__ = ["StepLoads", "StepStores", "event_of"]

logger = logging.getLogger("lmcache_trio")


class StepLoads:
    """The retrieves of one step: how many leading layers each has, and who waits for which."""

    def __init__(self, jobs: Sequence[Job], layers: int) -> None:
        self.jobs = jobs
        self.gates: list[Handoff[bool]] = [Handoff() for _ in range(layers)]
        self._there = dict.fromkeys(jobs, 0)
        self._open = 0
        self._latch = Latch()

    def reached(self, jobs: Sequence[Job], layers: int) -> None:
        """The first *layers* layers of *jobs* are in their blocks, or never will be. From any thread."""
        with self._latch:
            for job in jobs:
                self._there[job] = max(self._there[job], layers)
            while self._open < len(self.gates) and self._open < min(self._there.values()):
                self.gates[self._open].set(True)
                self._open += 1

    def over(self, job: Job) -> None:
        self.reached([job], len(self.gates))


class StepStores:
    """The stores of one step. *written* has one event a layer; all of them are set at the end, whatever that is.

    A server that copies is told of each layer by `say`, once for all requests. The last layer is kept back until the
    step is `finished`, since the server commits after it: only then is it known that what the step computed is right.
    """

    def __init__(self, jobs: Sequence[Job], layers: int) -> None:
        self.jobs = jobs
        self.written = [trio.Event() for _ in range(layers)]
        self.fences: list[Any] = [None] * layers
        """Of KV on a GPU, for each layer: the event behind what wrote it. A server may wait for it until the end."""
        self._order: list[int] = []
        """Layers, as they were written: each one's fence is behind those of all before it here."""
        self.finished = trio.Event()
        """No more will be written, or wanted: `dropped` says which."""
        self.dropped = False
        self.say: Callable[[Message], None] = lambda message: None
        self._told: dict[int, int] = {}  # by request: how many layers the server knows of

    def layer_written(self, layer: int, fence: Any) -> None:
        """In the loop."""
        self._write(layer, fence)
        self._tell()

    def finish(self, fence: Any = None, *, drop: bool) -> None:
        """In the loop. *fence* is behind whatever layer was not named."""
        self.dropped = self.dropped or drop
        for layer, event in enumerate(self.written):
            if not event.is_set():
                self._write(layer, fence)
        self.finished.set()
        self._tell()

    def _write(self, layer: int, fence: Any) -> None:
        self.fences[layer] = fence
        self._order.append(layer)
        self.written[layer].set()

    # --- requests of a server that copies -----------------------------------------------------------------------------

    def begun(self, request: int) -> None:
        """The server was asked to store, and has to be told what is written already."""
        self._told[request] = 0
        self._tell()

    def over(self, request: int) -> None:
        """The server has answered it."""
        self._told.pop(request, None)

    def _tell(self) -> None:
        """Called by the loop itself, which a failure would end: of a GPU, say, that gives no event any more."""
        layers = self._layers
        behind = [request for request, told in self._told.items() if told < layers]
        if behind and not self.dropped:
            try:
                self.say(LayersWritten(pack_offsets(behind), layers, event_of(self._fence_of(layers))))
                self._told.update(dict.fromkeys(behind, layers))
            except Exception:
                logger.exception("bug in a step that is stored by layers: nothing of it is published")
                self.dropped = True
        if self.dropped:
            for request in self._told:
                self.say(Withdraw(request))
            self._told.clear()

    def _fence_of(self, layers: int) -> Any:
        """What is behind all of the first *layers*, in whatever order they were written."""
        return self.fences[next(layer for layer in reversed(self._order) if layer < layers)]

    @property
    def _layers(self) -> int:
        """How many leading layers the server may copy."""
        if self.finished.is_set():
            return len(self.written)
        return next((i for i, event in enumerate(self.written[:-1]) if not event.is_set()), len(self.written) - 1)


def event_of(fence: Any) -> bytes:
    """What the server must wait for: of KV on a GPU, what its engine had submitted when it made *fence*."""
    event: bytes = fence.ipc_handle() if fence is not None else b""
    return event
