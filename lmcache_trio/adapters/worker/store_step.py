"""The stores of one step of an engine, layer by layer: which layers are written, and what a server is told of them.

Nothing here asks a server or copies.
"""

import logging
from collections.abc import Callable
from typing import Any

import trio

from lmcache_trio._wire.codec import pack_offsets
from lmcache_trio._wire.messages import LayersWritten, Message, Withdraw

__all__ = ["StoreStep", "event_of"]

logger = logging.getLogger("lmcache_trio")


class StoreStep:
    """The stores of one step. *written* has one event per layer; all of them are set at the end, however it ends.

    A server that copies is told of each layer, once for all requests. It is told of the last layer when the step is
    `finished`, since it commits after that: only then is it known that what the step computed is right.
    """

    def __init__(self, layers: int) -> None:
        self.written = [trio.Event() for _ in range(layers)]
        self.fences: list[Any] = [None] * layers
        """For KV on a GPU, per layer: the event behind what wrote it. A server may wait for it until the end."""
        self._order: list[int] = []
        """Layers in the order in which they were written: the fence of each is behind those of all before it here."""
        self.finished = trio.Event()
        """No more layers will be written; or none are wanted, if `dropped` is set."""
        self.dropped = False
        self._told: dict[int, int] = {}
        """By request of a server that copies: how many layers it knows of."""
        self._notice: Callable[[Message], None] | None = None
        """Sends a notice to that server, once it has a request."""

    def layer_written(self, layer: int, fence: Any) -> None:
        """In the loop."""
        self._write(layer, fence)
        self._tell()

    def finish(self, fence: Any = None, *, drop: bool) -> None:
        """In the loop. *fence* is behind all layers that were not named."""
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

    def begun(self, request: int, notice: Callable[[Message], None]) -> None:
        """A server was asked to store, and is told by *notice* which layers are written: those until now at once."""
        self._told[request] = 0
        self._notice = notice
        self._tell()

    def over(self, request: int) -> None:
        """The server has answered it."""
        self._told.pop(request, None)

    def _tell(self) -> None:
        """Called by the loop itself, which a failure would end: that of a GPU, say, that gives no event any more."""
        layers = self._layers
        behind = [request for request, told in self._told.items() if told < layers]
        if self._notice is None:
            return
        if behind and not self.dropped:
            try:
                self._notice(LayersWritten(pack_offsets(behind), layers, event_of(self._fence_of(layers))))
                self._told.update(dict.fromkeys(behind, layers))
            except Exception:
                logger.exception("bug in a step that is stored by layers: nothing of it is published")
                self.dropped = True
        if self.dropped:
            for request in self._told:
                self._notice(Withdraw(request))
            self._told.clear()

    def _fence_of(self, layers: int) -> Any:
        """The event behind all of the first *layers* layers, in whatever order they were written."""
        return self.fences[next(layer for layer in reversed(self._order) if layer < layers)]

    @property
    def _layers(self) -> int:
        """How many leading layers the server may copy."""
        if self.finished.is_set():
            return len(self.written)
        return next((i for i, event in enumerate(self.written[:-1]) if not event.is_set()), len(self.written) - 1)


def event_of(fence: Any) -> bytes:
    """The event that the server must wait for: for KV on a GPU, that of what its engine submitted before *fence*."""
    event: bytes = fence.ipc_handle() if fence is not None else b""
    return event
