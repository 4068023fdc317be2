"""Counts of what an operation makes, for the tests of both paths: messages, and bytes held at one time."""

import gc
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch

from lmcache_trio._wire.codec import decode
from lmcache_trio._wire.messages import Message
from lmcache_trio.client import Client
from lmcache_trio.testing.sides import CHUNK, ServerProcess, Side, wait_until

__all__ = ["BLOCKS", "TOKENS", "Tap", "counted_side", "tap", "tracing"]

TOKENS = list(range(3 * CHUNK))
BLOCKS = [5, 9, 1, 33, 34, 35, 36, 60, 2, 7, 8, 3]


@contextmanager
def counted_side(tmp_path: Path, kv: dict[str, torch.Tensor]) -> Iterator[Side]:
    """Both sides of one engine, beside a server that says nothing unasked any more, however slow all of it is."""
    with ExitStack() as stack:
        server = ServerProcess(f"unix://{tmp_path}/s.sock")
        stack.callback(server.kill)
        server.start()
        wait_until(lambda: server.held["bytes_taken"] == server.held["bytes_size"])  # growth is told, too
        made = Side(server.address, kv, lookup_timeout=60.0, poll_interval=30.0)
        stack.callback(made.close)
        yield made


class Tap:
    """What one client says, and how many messages it hears."""

    def __init__(self, client: Client) -> None:
        self._client = client
        self.said: list[Message] = []
        self._heard = client.heard
        self._send = client._connection.send_nowait
        client._connection.send_nowait = self._note  # type: ignore[method-assign,assignment]

    def _note(self, frame: bytes) -> None:
        self._send(frame)
        self.said.append(decode(frame))

    def take(self) -> tuple[list[type[Message]], int]:
        """Kinds of what was said, and how many were heard, since the last call."""
        said, self.said = self.said, []
        heard, self._heard = self._client.heard - self._heard, self._client.heard
        return [type(message) for message in said], heard


def tap(link: Any) -> Tap:
    assert link.client is not None
    return Tap(link.client)


@contextmanager
def tracing() -> Iterator[Callable[[], int]]:
    """The largest number of bytes that Python and numpy held at one time, in all threads, more than at the start."""
    gc.collect()
    tracemalloc.start()
    held = tracemalloc.get_traced_memory()[0]
    try:
        yield lambda: tracemalloc.get_traced_memory()[1] - held
    finally:
        tracemalloc.stop()
