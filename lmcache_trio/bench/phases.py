"""Row by row: what a client prepares, what is timed, and what is checked afterwards. Rows of lookups are
`lookup_phases`', those of a disk `tiers`'."""

import time
from collections.abc import Callable

import torch

from lmcache_trio.bench import tiers
from lmcache_trio.bench.host import Host
from lmcache_trio.bench.lookup_phases import LOOKUP_PHASES, Timed
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


def _timed(do: Callable[..., object], *args: object) -> float:
    began = time.perf_counter()
    do(*args)
    return time.perf_counter() - began


PHASES: dict[str, Callable[[Host, int], Timed]] = {
    "memcpy": memcpy,
    "memcpy_shm": memcpy_shm,
    **LOOKUP_PHASES,
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
