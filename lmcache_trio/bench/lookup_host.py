"""One client of the benchmark without KV, for a machine without torch: it looks up, and copies nothing."""

import numpy as np

from lmcache_trio.adapters import PollingSchedulerAdapter
from lmcache_trio.bench.light import keep_worker
from lmcache_trio.bench.settings import BenchSettings
from lmcache_trio.client import Client
from lmcache_trio.errors import Unavailable
from lmcache_trio.threads import Handoff

__all__ = ["LookupHost"]

_SECONDS = 60.0


class LookupHost:
    """An engine's scheduler, and a worker that reserves and commits chunks of a byte. It is its own *site*."""

    disk_site = None

    def __init__(self, settings: BenchSettings, rank: int, run: str, address: str) -> None:
        kv, engine = settings.kv, f"bench {run} {rank}"
        self.settings = settings
        self.left_out: dict[str, str] = {}
        self.scheduler = PollingSchedulerAdapter(
            address,
            engine_id=engine,
            identity=["lmcache-trio bench", run],
            block_tokens=kv.block_tokens,
            chunk_tokens=kv.chunk_tokens,
            lookup_timeout=30.0,
        )
        registered: Handoff[Client] = Handoff()
        self.scheduler._link.spawn(keep_worker, address, engine, kv.block_tokens, registered)
        worker = registered.wait(30.0)
        if worker is None:
            raise Unavailable(f"no server answers at {address}")
        self._worker = worker
        self.scheduler._link.call(self.client.ping, timeout=10)  # news of the namespace came before its reply
        shared = np.random.default_rng(int.from_bytes(run.encode()[:8], "little"))
        self.hot: list[int] = shared.integers(0, 1 << 30, settings.prompt_chunks * kv.chunk_tokens).tolist()
        self._rank, self._names = rank, 0

    @property
    def site(self) -> "LookupHost":
        return self

    @property
    def client(self) -> Client:
        client = self.scheduler._link.client
        if client is None:
            raise Unavailable("the server is gone")
        return client

    def name(self) -> str:
        self._names += 1
        return f"{self._rank}-{self._names}"

    def keep_hot(self) -> None:
        """See that the hot prompt is in memory: looked up, and stored if it is not all there."""
        name = self.name()
        self.scheduler.maybe_submit_lookup_request(name, self.hot)
        if self.scheduler.check_lookup_result(name) != len(self.hot):
            digests, session = self.scheduler.extend(name, self.hot), self.scheduler.session_spec(name)
            self.scheduler._link.call(self._store, session, digests, timeout=_SECONDS)
        self.scheduler.end_session(name)
        self.scheduler._link.call(self.client.ping, timeout=_SECONDS)  # in order: it has ended now

    async def _store(self, session: int, digests: list[bytes]) -> None:
        async with self._worker.storing(session, b"", digests):
            pass  # a chunk that another client of the run is writing is dropped

    def close(self) -> None:
        self.scheduler.shutdown()
