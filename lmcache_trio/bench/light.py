"""A client without KV, for measuring how lookups grow: `python -m lmcache_trio.bench.light ADDRESS RANK RUN`.

A scheduler's adapter, and in its loop a worker that only reserves and commits: its chunks are one byte long, so that a
million of them fit into 4 GiB. Lines of JSON as in `host`, one method of `Light` each. It imports no torch.
"""

import gc
import hashlib
import json
import sys
import time
from collections.abc import Sequence

import trio

from lmcache_trio._wire.messages import MAX_RESERVED, Role
from lmcache_trio.adapters import PollingSchedulerAdapter
from lmcache_trio.bench import lookups
from lmcache_trio.client import Client, open_client
from lmcache_trio.errors import LMCacheTrioError, Unavailable
from lmcache_trio.threads import Handoff

__all__ = ["CHUNK_TOKENS", "DOCUMENT_CHUNKS", "Light", "keep_worker", "main"]

CHUNK_TOKENS = 256
DOCUMENT_CHUNKS = 512
"""128 k tokens, the longest prompt that is looked up; the index is filled document by document."""
_SECONDS = 300.0


class Light:
    """One engine. The hot document is the first that `fill` stores."""

    def __init__(self, address: str, rank: int, run: str) -> None:
        engine = f"light {run} {rank}"
        self._run = run
        self.scheduler = PollingSchedulerAdapter(
            address,
            engine_id=engine,
            identity=["light", run],
            block_tokens=16,
            chunk_tokens=CHUNK_TOKENS,
            lookup_timeout=30.0,
        )
        registered: Handoff[Client] = Handoff()
        self.scheduler._link.spawn(keep_worker, address, engine, 16, registered)
        worker = registered.wait(30.0)
        if worker is None or self.scheduler._link.client is None:
            raise Unavailable(f"no server answers at {address}")
        self._worker = worker
        self.client: Client = self.scheduler._link.client
        self.scheduler._link.call(self.client.ping, timeout=10)  # news of the namespace came before its reply
        self.hot = [(i * 7919) % 50_000 for i in range(DOCUMENT_CHUNKS * CHUNK_TOKENS)]
        self._digests = self.scheduler.extend("hot", self.hot)
        self._documents = 0
        self._names = 0

    # Each of these answers one line.

    def fill(self, documents: int) -> dict[str, object]:
        """Have the server index so many *documents* in all."""
        self.scheduler._link.call(self._fill, documents, timeout=_SECONDS)
        return {"chunks": documents * DOCUMENT_CHUNKS}

    def open(self, sessions: int) -> dict[str, object]:
        """Look up 8,192 tokens in so many sessions, over all documents, and let them stay."""
        self.scheduler._link.call(self._open, sessions, timeout=_SECONDS)
        return {"sessions": sessions}

    def lookup(self, tokens: int, n: int) -> dict[str, object]:
        """Of the hot document's first *tokens*, in the loop, hashed already."""
        digests = self._digests[: tokens // CHUNK_TOKENS]
        return _timed(lambda: lookups.in_loop(self.scheduler, lambda client: lookups.lookups(client, digests, n)))

    def sync(self, tokens: int, n: int) -> dict[str, object]:
        """The same, tokens in and count out."""
        self._names += n
        names = [f"{self._names - i}" for i in range(n)]
        return _timed(lambda: lookups.sync_lookups(self.scheduler, names, self.hot[:tokens]))

    async def _fill(self, documents: int) -> None:
        for number in range(self._documents, documents):
            digests = self._digests if number == 0 else self._document(number)
            session = 1 << 40 | number
            await self.client.lookup(session, [])
            parent = b""
            for start in range(0, DOCUMENT_CHUNKS, MAX_RESERVED):
                lot = digests[start : start + MAX_RESERVED]
                await self._store(session, parent, lot, hot=number == 0)
                parent = lot[-1]
            self.client.end(session)
        self._documents = documents

    async def _store(self, session: int, parent: bytes, digests: list[bytes], *, hot: bool) -> None:
        made = await self._worker.reserve(session, parent, digests)
        if not made.reservation and hot:
            return  # another client of the run stored it
        if made.dropped or (await self._worker.commit(made.reservation)).published != len(digests):
            raise Unavailable(f"the server did not take a document: {dict(made.dropped)}")

    async def _open(self, sessions: int) -> None:
        chunks = 8192 // CHUNK_TOKENS
        for i in range(sessions):
            digests = self._document(1 + i % (self._documents - 1))[:chunks]
            if (await self.client.lookup(1 << 41 | i, digests)).chunks != chunks:
                raise Unavailable("a lookup of what was stored missed")

    def _document(self, number: int) -> list[bytes]:
        seed = hashlib.sha256(f"{self._run} {number}".encode()).digest()
        return [hashlib.sha256(seed + i.to_bytes(2, "little")).digest() for i in range(DOCUMENT_CHUNKS)]


async def keep_worker(
    client: Client | None, address: str, engine: str, block_tokens: int, registered: Handoff[Client]
) -> None:
    """The engine's worker, for as long as its scheduler's connection."""
    async with open_client(address, role=Role.WORKER, engine=engine) as worker:
        await worker.register(b"light".ljust(32), 1, block_tokens)
        registered.set(worker)
        await trio.sleep_forever()


def _timed(run: "lookups.Run") -> dict[str, object]:
    cpu, began = time.process_time(), time.perf_counter()
    times = run()
    return {"times": times, "began": began, "ended": time.perf_counter(), "cpu": time.process_time() - cpu}


def main(arguments: Sequence[str]) -> None:
    try:
        light = Light(arguments[0], int(arguments[1]), arguments[2])
        gc.collect()
        gc.freeze()  # as engines do
        print(json.dumps({"ready": True}), flush=True)
        for line in sys.stdin:
            asked = json.loads(line)
            print(json.dumps(getattr(light, asked.pop("do"))(**asked)), flush=True)
        light.scheduler.shutdown()
    except LMCacheTrioError as exc:
        print(json.dumps({"error": str(exc)}), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
