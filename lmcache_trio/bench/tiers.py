"""The disk rows: an engine at a second server, whose arena holds half of what is written, and whose tier holds it all.

A writeback is timed from the moment at which the worker's copy ended until the tier counts the chunks; a load from the
lookup until its answer: tier to slots, hit by hit, through the prefetch of the server. Warm is read from the page
cache, cold after it was told to drop the tier's files.
"""

import os
import time
from pathlib import Path

from lmcache_trio.bench.host import Host, Job, Site
from lmcache_trio.errors import Unavailable
from lmcache_trio.threads import Handoff

__all__ = ["load_cold", "load_warm", "writeback"]

_SECONDS = 60.0
_PAUSE = 0.004
"""Seconds between two looks at the tier's counter: nothing tells of a writeback's end."""


def writeback(host: Host, n: int) -> Job:
    """One operation after the other, each waited for."""
    site = host.sites[1]
    prompts = host.fresh_prompts(n)
    specs = site.store_specs(prompts, host.blocks)

    def run() -> list[float]:
        times = []
        for spec in specs:
            before = _written(site)
            site.worker.store_now([spec])
            _wait_written(site, before + spec.chunks)
            times.append(time.perf_counter() - site.worker.copied_at)
        return times

    def finish() -> None:
        host.written = prompts
        site.end(list(prompts))

    return Job(run, n * host.settings.operation_bytes, finish)


def load_warm(host: Host, n: int) -> Job:
    """What the last writeback left, oldest first: it is not in memory any more when its turn comes."""
    site = host.sites[1]
    prompts = {host.name(): tokens for tokens in list(host.written.values())[:n]}
    if len(prompts) != n:
        raise Unavailable("a load from disk needs what writeback_disk left: measure that too")
    before = _loaded(site)

    def run() -> list[float]:
        times = []
        for name, tokens in prompts.items():
            began = time.perf_counter()
            site.lookup(name, tokens)
            times.append(time.perf_counter() - began)
            site.scheduler.end_session(name)
        return times

    def finish() -> None:
        loaded = _loaded(site) - before
        if loaded < n * host.settings.operation_chunks and host.settings.clients == 1:
            raise Unavailable(f"only {loaded} chunks came from disk: the rest was in memory")

    return Job(run, n * host.settings.operation_bytes, finish)


def load_cold(host: Host, n: int) -> Job:
    """The same, after the page cache was told to forget the tier's files."""
    if host.rank == 0:
        for path in Path(host.directory).rglob("*"):
            if path.is_file():
                _forget(path)
    return load_warm(host, n)


def _forget(path: Path) -> None:
    try:
        file = os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        return
    try:
        os.fsync(file)  # pages that are not on the disk yet stay
        os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(file)


def _written(site: Site) -> int:
    return int(_tier(site)["stores"])


def _loaded(site: Site) -> int:
    return int(_tier(site)["loads"])


def _wait_written(site: Site, chunks: int) -> None:
    """With several clients the tier counts all of theirs: then it is an average over them."""
    never: Handoff[bool] = Handoff()
    deadline = time.perf_counter() + _SECONDS
    while (tier := _tier(site))["stores"] < chunks:
        if tier["fenced"] or tier["stores_refused"] or tier["dropped"] or time.perf_counter() > deadline:
            raise Unavailable(f"the disk tier did not take what was stored: {tier}")
        never.wait(_PAUSE)


def _tier(site: Site) -> dict[str, int]:
    found: dict[str, int] = site.scheduler._link.call(site.client.statistics, timeout=_SECONDS)["tiers"][0]
    return found
