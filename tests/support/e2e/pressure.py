"""Pressure on a real server's memory: another model's chunks come until all but the last used ones of others are gone.

Nothing reaches into the server. It evicts by its own order, and its statistics say how many chunks are left.
"""

from typing import Any

import torch

from lmcache_trio.testing.sides import Side, wait_until
from support.e2e.bench import CHUNK
from support.e2e.engine import Server

__all__ = ["Pressure"]

BLOCK = 128
AT_ONCE = 16
"""Chunks of a store."""
CHUNK_BYTES = 128 << 10
"""Less than any part that another model stores, so that a chunk takes the place of one of them at most."""


class Pressure:
    """Another model's engine on *server*. When it leaves, its chunks are dropped.

    It is small: both of its sides live in this process, and its blocks hold nothing.
    """

    def __init__(self, server: Server) -> None:
        self._server = server
        blocks = AT_ONCE * CHUNK // BLOCK
        kv = {"layer": torch.zeros(blocks, CHUNK_BYTES * BLOCK // CHUNK, dtype=torch.uint8)}
        self._side = Side(server.address, kv, block_tokens=BLOCK, identity=["pressure"])
        self._stored = 0

    def __enter__(self) -> "Pressure":
        self._side.wait_healthy()
        return self

    def __exit__(self, *error: object) -> None:
        assert self._side.scheduler.reset_cache()
        self._side.close()

    def keep(self, chunks: int) -> int:
        """Of what others stored, all but *chunks* parts are evicted, the last used ones. Returns those parts' bytes.

        It must be found in use by nobody: what is leased would stay.
        """
        wait_until(lambda: not any(self._held()[name] for name in ("leases", "pins", "reservations")))
        assert self.others() >= chunks
        while more := self.others() - chunks:
            assert more > 0, f"{-more} parts more were evicted"
            self._store(min(more, AT_ONCE))
        held = self._held()
        return int(held["bytes_ready"]) - self._stored * CHUNK_BYTES

    def others(self) -> int:
        """Chunks in memory that others stored; a part counts as a chunk."""
        return int(self._held()["chunks_ready"]) - self._stored

    def _store(self, chunks: int) -> None:
        name = f"pressure {self._stored}"
        tokens = [token % 32_000 for token in range(self._stored, self._stored + chunks * CHUNK)]
        self._side.store(name, [self._stored, *tokens[1:]], list(range(chunks * CHUNK // BLOCK)))
        self._side.scheduler.end_session(name)
        self._stored += chunks

    def _held(self) -> dict[str, Any]:
        held: dict[str, Any] = self._server.statistics()["held"]
        return held
