"""The disk rows: an engine at a second server, whose arena holds half of what is written, and whose tier holds it all.

A writeback is timed from the moment at which the worker's copy ended until the tier counts the chunks; a load from the
lookup until its answer: tier to slots, hit by hit, through the prefetch of the server. Warm is read from the page
cache, cold after it was told to drop the tier's files. Each stands beside a limit without index, checksums or slots: a
cold load beside a plain direct read of as many of the tier's bytes, a writeback beside plain writes of as many bytes.
"""

import mmap
import os
import time
from contextlib import ExitStack
from pathlib import Path

from lmcache_trio.bench import files
from lmcache_trio.bench.host import Host
from lmcache_trio.bench.lookup_phases import Timed
from lmcache_trio.bench.settings import ROTATION
from lmcache_trio.bench.site import Site
from lmcache_trio.errors import Unavailable
from lmcache_trio.threads import Handoff

__all__ = ["direct_read", "direct_write", "load_cold", "load_warm", "writeback"]

_SECONDS = 60.0
_PAUSE = 0.002
"""Seconds between two looks at the tier's note of its last change: nothing tells of a writeback's end."""
_SETTLED = 0.002
"""Seconds after a change until the server has counted its chunks. Only then is the server asked for the counter."""
_ASK_AGAIN = 0.1
"""Seconds after which the server is asked without a change. It spends 0.7 ms on an answer, and a client 0.3 ms: asked
every 4 ms by four clients, it had a third of two cores less for the writeback itself."""
DIRECT_PIECE = 32 << 20
"""Bytes of one direct read: a chunk of the default shape, as a load asks for them in a row. The kernel splits it
anyway: 8, 32 and 128 MiB read alike here, within what the disk varied by of itself."""
WRITE_PIECE = 1 << 20


def writeback(host: Host, n: int) -> Timed:
    """One operation after the other, each waited for."""
    site = _disk(host)
    prompts = host.fresh_prompts(n)
    specs = site.store_specs(prompts, host.blocks)
    mark = files.index_mark(Path(host.directory))

    def run() -> list[float]:
        times = []
        for spec in specs:
            site.worker.store_now([spec])
            _wait_written(site, mark, host.settings.kv.chunk_bytes)
            times.append(time.perf_counter() - site.copied_at)
        return times

    def finish() -> None:
        host.written = prompts
        site.end(list(prompts))

    return Timed(run, n * host.settings.operation_bytes, finish)


def load_warm(host: Host, n: int) -> Timed:
    """What the last writeback left, oldest first: it is not in memory any more when its turn comes."""
    site = _disk(host)
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

    return Timed(run, n * host.settings.operation_bytes, finish)


def load_cold(host: Host, n: int) -> Timed:
    """The same, after the page cache was told to forget the tier's files."""
    _forget(host)
    return load_warm(host, n)


def direct_read(host: Host, n: int) -> Timed:
    """As many bytes of the slabs as a load of this round moves: one thread, in order, into one warm buffer.

    Each round, and each client, goes on where the one before it ended.
    """
    _forget(host)
    extents = [extent for path in sorted(Path(host.directory).rglob("*slab-*")) for extent in files.written(path)]
    size = max(files.PAGE, host.settings.operation_bytes // files.PAGE * files.PAGE)
    buffer = memoryview(mmap.mmap(-1, min(DIRECT_PIECE, size)))
    buffer[:] = bytes(len(buffer))
    first = host.directly_read * host.settings.clients + host.rank * n
    host.directly_read += n

    def run() -> list[float]:
        times = []
        with ExitStack() as stack:
            opened: dict[Path, int] = {}
            for path in {extent.path for extent in extents}:
                opened[path] = os.open(path, os.O_RDONLY | os.O_DIRECT)
                stack.callback(os.close, opened[path])
            for number in range(first, first + n):
                began = time.perf_counter()
                for piece in files.pieces(extents, number * size, size, len(buffer)):
                    files.read_direct(opened[piece.path], piece, buffer)
                times.append(time.perf_counter() - began)
        return times

    return Timed(run, n * size)


def direct_write(host: Host, n: int) -> Timed:
    """As many bytes as a writeback of this round, into a file beside the tier's: one thread per client, no checksum.

    The bytes go through the page cache, into room that was set aside, in pieces of 1 MiB: as the tier's do by default.
    """
    _forget(host)
    size = host.settings.operation_bytes
    path = Path(host.directory) / f"direct-write-{host.rank}"
    file = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    os.posix_fallocate(file, 0, n * size)
    sources = [memoryview(buffer.numpy().data) for buffer in host.buffers[:ROTATION]]

    def run() -> list[float]:
        times = []
        for number in range(n):
            began = time.perf_counter()
            source, start = sources[number % ROTATION], number * size
            for at in range(0, size, WRITE_PIECE):
                piece = source[at : at + WRITE_PIECE]
                if os.pwrite(file, piece, start + at) != len(piece):
                    raise Unavailable(f"a write into {path} was cut short: is the disk full?")
            times.append(time.perf_counter() - began)
        return times

    def finish() -> None:
        os.close(file)
        path.unlink()

    return Timed(run, n * size, finish)


def _forget(host: Host) -> None:
    """The first of several clients does it for all: they begin when all have said that they are ready."""
    if host.rank == 0:
        files.forget(Path(host.directory))


def _disk(host: Host) -> Site:
    if host.disk_site is None:
        raise Unavailable("there is no server with a disk tier")
    return host.disk_site


def _loaded(site: Site) -> int:
    return int(_tier(site)["loads"])


def _wait_written(site: Site, mark: Path, chunk_bytes: int) -> None:
    """Until the tier has counted all that is queued now. It writes in this order, so no client waits for a later store.

    If it did, several clients would wait for each other in turn, and the tier for them.
    """
    never: Handoff[bool] = Handoff()
    tier = _tier(site)
    target = tier["stores"] + -(-tier["bytes_queued"] // chunk_bytes)
    asked = changed = began = time.perf_counter()
    noted = b""
    while tier["stores"] < target and tier["bytes_queued"]:
        never.wait(_PAUSE)
        now = time.perf_counter()
        if (note := mark.read_bytes()) != noted:
            noted, changed = note, now
        if asked < changed + _SETTLED <= now or now > asked + _ASK_AGAIN:
            asked = now
            tier = _tier(site)
            if tier["fenced"] or tier["stores_refused"] or tier["dropped"] or now > began + _SECONDS:
                raise Unavailable(f"the disk tier did not take what was stored: {tier}")


def _tier(site: Site) -> dict[str, int]:
    found: dict[str, int] = site.scheduler._link.call(site.client.statistics, timeout=_SECONDS)["tiers"][0]
    return found
