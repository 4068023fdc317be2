"""Row by row: what a client prepares, what is timed, and what is checked afterwards. Disk rows are `tiers`'."""

import time
from collections.abc import Callable

import torch

from lmcache_trio._core.keys import chain_digests
from lmcache_trio.bench import lookups, tiers
from lmcache_trio.bench.host import Host, Timed
from lmcache_trio.bench.settings import ROTATION
from lmcache_trio.bench.site import Site
from lmcache_trio.errors import Unavailable

__all__ = ["PHASES"]

_SECONDS = 60.0


# --- copies -----------------------------------------------------------------------------------------------------------


def memcpy(host: Host, n: int) -> Timed:
    """torch's copy_, one thread, private memory to private memory, all of it warm."""
    pairs = [(host.buffers[ROTATION + i % ROTATION], host.buffers[i % ROTATION]) for i in range(n)]

    def run() -> list[float]:
        return [_timed(target.copy_, source) for target, source in pairs]

    return Timed(run, n * host.settings.operation_bytes)


def memcpy_shm(host: Host, n: int) -> Timed:
    """The same into slots of the arena: a reservation that is aborted afterwards. Rotates over its source alone."""
    client, worker = host.site.worker._link.client, host.site.worker
    if client is None or client.arena is None:
        raise Unavailable("the server is gone")
    name, tokens = next(iter(host.fresh_prompts(1).items()))
    digests = host.site.scheduler.extend(name, tokens)
    host.site.scheduler.store_spec(name, 0, host.blocks(0))  # opens the session
    session = host.site.scheduler.session_spec(name)
    made = worker._link.call(client.reserve, session, b"", digests, timeout=_SECONDS)
    size = host.settings.kv.chunk_bytes
    slots = [torch.frombuffer(slot, dtype=torch.uint8) for slot in client.slots(made)]
    if len(slots) != len(digests):
        raise Unavailable(f"the server gave {len(slots)} slots for {len(digests)} chunks: {dict(made.dropped)}")

    def copy(source: torch.Tensor) -> None:
        for i, slot in enumerate(slots):
            slot.copy_(source[i * size : (i + 1) * size])

    def finish() -> None:
        worker._link.call(client.abort, made.reservation, timeout=_SECONDS)
        host.site.end([name])

    def run() -> list[float]:
        return [_timed(copy, host.buffers[i % ROTATION]) for i in range(n)]

    return Timed(run, n * host.settings.operation_bytes, finish)


def store(host: Host, n: int) -> Timed:
    """Blocks to slots, from the call until the server has published them: prompts that are new to it."""
    return _store(host, host.site, n)


def retrieve(host: Host, n: int) -> Timed:
    """Slots to blocks, from the call until what was read is known to be valid: what the last `store` left."""
    return _retrieve(host, host.site, n)


def store_device(host: Host, n: int) -> Timed:
    """As `store`, by an engine that only names its blocks: the server moves them."""
    return _store(host, _device(host), n)


def retrieve_device(host: Host, n: int) -> Timed:
    """As `retrieve`, likewise: what the last `store_device` left."""
    return _retrieve(host, _device(host), n)


def _device(host: Host) -> Site:
    if host.device_site is None:
        raise Unavailable(host.left_out["store_device"])
    return host.device_site


def _store(host: Host, site: Site, n: int) -> Timed:
    prompts = host.fresh_prompts(n)
    specs = site.store_specs(prompts, host.blocks)
    before = site.count_stored()

    def finish() -> None:
        stored = site.count_stored() - before
        if stored != n * host.settings.operation_chunks:
            raise Unavailable(f"only {stored} chunks were stored: {site.worker.statistics()}")
        site.stored = prompts
        site.stored_hash = site.hash_of(host.blocks(n - 1))
        site.end(list(prompts))

    def run() -> list[float]:
        return [_timed(site.worker.store_now, [spec]) for spec in specs]

    return Timed(run, n * host.settings.operation_bytes, finish)


def _retrieve(host: Host, site: Site, n: int) -> Timed:
    prompts = {host.name(): tokens for tokens in list(site.stored.values())[-n:]}
    if len(prompts) != n:
        raise Unavailable("a retrieve needs what a store left: measure that too")
    specs = site.load_specs(prompts, lambda i: host.blocks(i + 1))

    def finish() -> None:
        if site.worker.take_failed_blocks():
            raise Unavailable("a retrieve failed")
        if site.hash_of(host.blocks(n)) != site.stored_hash:
            raise Unavailable("what was retrieved is not what was stored")
        site.end(list(prompts))

    def run() -> list[float]:
        return [_timed(site.worker.retrieve_now, [spec]) for spec in specs]

    return Timed(run, n * host.settings.operation_bytes, finish)


# --- lookups ----------------------------------------------------------------------------------------------------------


def bare_round_trip(host: Host, n: int) -> Timed:
    return Timed(lambda: lookups.bare_round_trips(host.site.client, n))


def ping(host: Host, n: int) -> Timed:
    return Timed(lambda: lookups.in_loop(host.site.scheduler, lambda client: lookups.pings(client, n)))


def lookup_hit(host: Host, n: int) -> Timed:
    digests = hot_digests(host)
    return Timed(lambda: lookups.in_loop(host.site.scheduler, lambda client: lookups.lookups(client, digests, n)))


def lookup_miss(host: Host, n: int) -> Timed:
    chunks = host.settings.prompt_chunks
    prompts = lookups.unknown_prompts(chunks, n)
    return Timed(lambda: lookups.in_loop(host.site.scheduler, lambda client: lookups.misses(client, prompts)))


def sync_lookup(host: Host, n: int) -> Timed:
    names = [host.name() for _ in range(n)]
    return Timed(lambda: lookups.sync_lookups(host.site.scheduler, names, host.hot))


def lookup_extend(host: Host, n: int) -> Timed:
    digests = hot_digests(host)
    sessions = _opened(host, digests[:-1], n)
    return Timed(
        lambda: lookups.in_loop(host.site.scheduler, lambda client: lookups.extensions(client, digests, sessions))
    )


def end_session(host: Host, n: int) -> Timed:
    sessions = _opened(host, hot_digests(host), n)
    return Timed(lambda: lookups.in_loop(host.site.scheduler, lambda client: lookups.ends(client, sessions)))


def hot_digests(host: Host) -> list[bytes]:
    """Of the hot prompt, as the adapter hashes it."""
    scheduler = host.site.scheduler
    return chain_digests(scheduler._prompts.seed, host.hot, scheduler.chunk_tokens)


def _opened(host: Host, digests: list[bytes], n: int) -> list[int]:
    client = host.site.client
    return host.site.scheduler._link.call(lookups.opened, client, digests, n, timeout=_SECONDS)


def _timed(do: Callable[..., object], *args: object) -> float:
    began = time.perf_counter()
    do(*args)
    return time.perf_counter() - began


PHASES: dict[str, Callable[[Host, int], Timed]] = {
    "memcpy": memcpy,
    "memcpy_shm": memcpy_shm,
    "bare_round_trip": bare_round_trip,
    "ping": ping,
    "lookup_8k_hit": lookup_hit,
    "lookup_8k_miss": lookup_miss,
    "sync_lookup_8k_hit": sync_lookup,
    "lookup_8k_extend": lookup_extend,
    "end_session_8k": end_session,
    "store": store,
    "retrieve": retrieve,
    "store_device": store_device,
    "retrieve_device": retrieve_device,
    "writeback_disk": tiers.writeback,
    "load_disk_warm": tiers.load_warm,
    "load_disk_cold": tiers.load_cold,
    "direct_read": tiers.direct_read,
    "direct_write": tiers.direct_write,
}
