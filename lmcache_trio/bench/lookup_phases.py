"""The rows of lookups: what a client prepares, and what is timed. They need no KV, and import no torch."""

from collections.abc import Callable, Mapping
from typing import Protocol

import attrs

from lmcache_trio._core.keys import chain_digests
from lmcache_trio.adapters import PollingSchedulerAdapter
from lmcache_trio.bench import lookups
from lmcache_trio.bench.settings import BenchSettings
from lmcache_trio.client import Client

__all__ = ["LOOKUP_PHASES", "Asker", "Timed"]

_SECONDS = 60.0


@attrs.frozen
class Timed:
    """What is timed. *run* gives seconds an operation; *finish* checks what came of it, and is not timed."""

    run: Callable[[], list[float]]
    moved: int = 0
    finish: Callable[[], None] = lambda: None


class Schedulers(Protocol):
    """A scheduler's side at a server."""

    @property
    def scheduler(self) -> PollingSchedulerAdapter: ...

    @property
    def client(self) -> Client:
        """Its connection."""
        ...


class Asker(Protocol):
    """A client that looks up: a `Host` with KV, or a `LookupHost` without."""

    @property
    def settings(self) -> BenchSettings: ...

    @property
    def site(self) -> Schedulers: ...

    @property
    def hot(self) -> list[int]:
        """The tokens of the prompt that is in memory."""
        ...

    def name(self) -> str:
        """A request id that was never used."""
        ...


def bare_round_trip(host: Asker, n: int) -> Timed:
    return Timed(lambda: lookups.bare_round_trips(host.site.client, n))


def ping(host: Asker, n: int) -> Timed:
    return Timed(lambda: lookups.in_loop(host.site.scheduler, lambda client: lookups.pings(client, n)))


def lookup_hit(host: Asker, n: int) -> Timed:
    digests = _hot_digests(host)
    return Timed(lambda: lookups.in_loop(host.site.scheduler, lambda client: lookups.lookups(client, digests, n)))


def lookup_miss(host: Asker, n: int) -> Timed:
    chunks = host.settings.prompt_chunks
    prompts = lookups.unknown_prompts(chunks, n)
    return Timed(lambda: lookups.in_loop(host.site.scheduler, lambda client: lookups.misses(client, prompts)))


def sync_lookup(host: Asker, n: int) -> Timed:
    names = [host.name() for _ in range(n)]
    return Timed(lambda: lookups.sync_lookups(host.site.scheduler, names, host.hot))


def lookup_extend(host: Asker, n: int) -> Timed:
    digests = _hot_digests(host)
    sessions = _opened(host, digests[:-1], n)
    return Timed(
        lambda: lookups.in_loop(host.site.scheduler, lambda client: lookups.extensions(client, digests, sessions))
    )


def end_session(host: Asker, n: int) -> Timed:
    sessions = _opened(host, _hot_digests(host), n)
    return Timed(lambda: lookups.in_loop(host.site.scheduler, lambda client: lookups.ends(client, sessions)))


def _hot_digests(host: Asker) -> list[bytes]:
    """Of the hot prompt, as the adapter hashes it."""
    scheduler = host.site.scheduler
    return chain_digests(scheduler._prompts.seed, host.hot, scheduler.chunk_tokens)


def _opened(host: Asker, digests: list[bytes], n: int) -> list[int]:
    client = host.site.client
    return host.site.scheduler._link.call(lookups.opened, client, digests, n, timeout=_SECONDS)


LOOKUP_PHASES: Mapping[str, Callable[[Asker, int], Timed]] = {
    "bare_round_trip": bare_round_trip,
    "ping": ping,
    "lookup_8k_hit": lookup_hit,
    "lookup_8k_miss": lookup_miss,
    "sync_lookup_8k_hit": sync_lookup,
    "lookup_8k_extend": lookup_extend,
    "end_session_8k": end_session,
}
