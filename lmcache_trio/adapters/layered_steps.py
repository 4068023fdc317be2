"""What one step of an engine moves layer by layer: who waits for which layer, and which are written.

Values that `layered` shares with the host's threads; nothing here asks a server or copies.
"""

from collections.abc import Sequence
from typing import Any

import trio

from lmcache_trio.adapters.jobs import Job
from lmcache_trio.threads import Handoff, Latch

__all__ = ["StepLoads", "StepStores"]


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

    *at_once*: the layers are not copied one by one; all of it begins when the last is written.
    """

    def __init__(self, jobs: Sequence[Job], layers: int, *, at_once: bool) -> None:
        self.jobs = jobs
        self.at_once = at_once
        self.written = [trio.Event() for _ in range(layers)]
        self.fences: list[Any] = [None] * layers
        """Of KV on a GPU, for each layer: the event behind what wrote it."""
        self.dropped = False

    def layer_written(self, layer: int, fence: Any) -> None:
        """In the loop."""
        self.fences[layer] = fence
        self.written[layer].set()

    def finish(self, *, drop: bool) -> None:
        """In the loop."""
        self.dropped = self.dropped or drop
        for event in self.written:
            event.set()
