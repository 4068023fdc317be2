"""What a scheduler pays: round trips, lookups of one hot prompt, a miss, an extension, an end. Imports no torch.

Those in the loop go through the asynchronous client on the adapter's own connection, with digests that are hashed
already; `sync_lookup_8k_hit` is what an engine calls: tokens in, count out. Every lookup is on a session of its own.
"""

import itertools
import secrets
import time
from collections.abc import Awaitable, Callable

from lmcache_trio._core.keys import DIGEST_BYTES
from lmcache_trio.adapters import PollingSchedulerAdapter
from lmcache_trio.client import Client
from lmcache_trio.errors import Unavailable
from lmcache_trio.threads import Handoff

__all__ = [
    "bare_round_trips",
    "ends",
    "extensions",
    "in_loop",
    "lookups",
    "misses",
    "opened",
    "pings",
    "sync_lookups",
    "unknown_prompts",
]

ECHO_BYTES = 256
_SECONDS = 120.0

_sessions = itertools.count(1)
"""Of no adapter: those count from a random number."""
Run = Callable[[], list[float]]
Times = Awaitable[list[float]]


def in_loop(scheduler: PollingSchedulerAdapter, timed: Callable[[Client], Times]) -> list[float]:
    """Run *timed* in the loop of *scheduler*, on its connection."""
    client = scheduler._link.client
    if client is None:
        raise Unavailable("the server is gone")
    return scheduler._link.call(timed, client, timeout=_SECONDS)


def bare_round_trips(client: Client, n: int) -> list[float]:
    """Host thread → server → loop → host thread, 256 bytes, undecoded: the way of `sync_lookups`, nothing said."""
    payload, times = bytes(ECHO_BYTES - 1), []
    waiting: list[Handoff[bool]] = []

    def came(frame: bytes) -> None:
        waiting.pop().set(len(frame) == ECHO_BYTES)

    client.on_echo = came
    for _ in range(n):
        back: Handoff[bool] = Handoff()
        began = time.perf_counter()
        waiting.append(back)
        client.echo_nowait(payload)
        if not back.wait(10):
            raise Unavailable("the server did not send back what it was sent")
        times.append(time.perf_counter() - began)
    return times


def sync_lookups(scheduler: PollingSchedulerAdapter, names: list[str], tokens: list[int]) -> list[float]:
    """Tokens in, count out; the request's end is not in its time, but between it and the next."""
    times = []
    for name in names:
        began = time.perf_counter()
        scheduler.maybe_submit_lookup_request(name, tokens)
        found = scheduler.check_lookup_result(name)
        times.append(time.perf_counter() - began)
        _check(found, len(tokens))
        scheduler.end_session(name)
    return times


async def pings(client: Client, n: int) -> list[float]:
    times = []
    for _ in range(n):
        began = time.perf_counter()
        await client.ping()
        times.append(time.perf_counter() - began)
    return times


async def lookups(client: Client, digests: list[bytes], n: int) -> list[float]:
    """A lookup of *digests*, all there, and between two of them the first one's end."""
    times = []
    for session in itertools.islice(_sessions, n):
        began = time.perf_counter()
        answer = await client.lookup(session, digests)
        times.append(time.perf_counter() - began)
        _check(answer.chunks, len(digests))
        client.end(session)
    return times


def unknown_prompts(chunks: int, n: int) -> list[list[bytes]]:
    """Digests that nobody has."""
    return [[secrets.token_bytes(DIGEST_BYTES) for _ in range(chunks)] for _ in range(n)]


async def misses(client: Client, prompts: list[list[bytes]]) -> list[float]:
    """As `lookups`, of prompts that nobody has."""
    times = []
    for session, digests in zip(_sessions, prompts, strict=False):
        began = time.perf_counter()
        answer = await client.lookup(session, digests)
        times.append(time.perf_counter() - began)
        _check(answer.chunks, 0)
        client.end(session)
    return times


async def extensions(client: Client, digests: list[bytes], sessions: list[int]) -> list[float]:
    """One chunk more on sessions that were looked up for all but the last of *digests*; and their ends."""
    times = []
    known = len(digests) - 1
    for session in sessions:
        began = time.perf_counter()
        answer = await client.lookup(session, digests[known:], start=known)
        times.append(time.perf_counter() - began)
        _check(answer.chunks, len(digests))
        client.end(session)
    return times


async def ends(client: Client, sessions: list[int]) -> list[float]:
    """Until the server has done it: an end is a notice, and the ping behind it is answered after it."""
    times = []
    for session in sessions:
        began = time.perf_counter()
        client.end(session)
        await client.ping()
        times.append(time.perf_counter() - began)
    return times


async def opened(client: Client, digests: list[bytes], n: int) -> list[int]:
    """*n* sessions that have just looked *digests* up."""
    sessions = list(itertools.islice(_sessions, n))
    for session in sessions:
        _check((await client.lookup(session, digests)).chunks, len(digests))
    return sessions


def _check(found: int | None, wanted: int) -> None:
    if found != wanted:
        raise Unavailable(f"a lookup found {found} where {wanted} are: something was evicted or dropped")
