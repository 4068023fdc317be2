"""`lmcache-trio bench` and its subcommands."""

from pathlib import Path
from typing import Annotated

from cyclopts import App, Parameter

from lmcache_trio.cli.ending import end_with, interrupt_by_exception

__all__ = ["bench"]

bench = App(
    name="bench",
    help="Measure lookups and copies beside the limits of this machine: one memcpy, one bare round trip.",
)


@bench.command(name="rows")
@bench.default
def bench_rows(  # noqa: PLR0913  (flags)
    *,
    address: str | None = None,
    clients: int = 1,
    kv: str = "llama3-8b",
    operation: str = "128MiB",
    rounds: int = 7,
    lookups: int = 200,
    rows: Annotated[tuple[str, ...], Parameter(consume_multiple=True, negative=())] = (),
    disk: Path | None = None,
    json: Path | None = None,
) -> None:
    """Measure every row of the table and print it; this is what `bench` without a subcommand does.

    Parameters
    ----------
    address
        Measure a server that runs already, with its own chunk_tokens and without the rows of a disk; by default the
        benchmark starts its own.
    clients
        Engines, each a process, that do the same at the same time.
    kv
        The KV's shape: a name (llama3-8b, llama3-70b, qwen2.5-7b, qwen2.5-0.5b), or numbers, as in
        layers=32,kv_heads=8,head_dim=128,dtype=bfloat16,block_tokens=16,chunk_tokens=256. Numbers that are left out are
        those of llama3-8b.
    operation
        Bytes of one store or retrieve, rounded up to whole chunks. With less, caches help the copies.
    rounds
        How often every row is measured. A row's figures are medians over its rounds.
    lookups
        Lookups of one client in one round.
    rows
        Only these rows, the two limits, direct_read with load_disk_cold, and direct_write with writeback_disk; by
        default all.
    disk
        Folder for the disk tier's files, on the disk to be measured; by default where temporary files lie.
    json
        Also write the rows to this file: a list of objects with name, clients, n, p50_us, p99_us, ops_s, gb_s,
        cpu_client_us, cpu_server_us and ratio. A figure that does not apply is null.
    """
    from lmcache_trio.bench import command
    from lmcache_trio.bench.settings import ROWS, BenchSettings, KVShape, size_of

    shape, size = KVShape.parse(kv), size_of("--operation", operation)
    settings = BenchSettings(shape, clients, rounds, size, lookups=lookups, rows=rows or ROWS)
    interrupt_by_exception()
    end_with(command.run(settings, address=address, disk=disk, json=json))


@bench.command(name="compare")
def bench_compare(before: Path, after: Path) -> None:
    """Print two files that `bench --json` wrote, side by side; nothing is measured.

    Parameters
    ----------
    before
        The file of the first run.
    after
        The file of the second run.
    """
    from lmcache_trio.bench import command

    end_with(command.compare(before, after))


@bench.command(name="grow")
def bench_grow(folder: Path) -> None:
    """Measure how lookups grow with prompts, index and clients, and draw the plots.

    Parameters
    ----------
    folder
        Where the figures and the plots are written.
    """
    from lmcache_trio.bench import command

    interrupt_by_exception()
    end_with(command.grow(folder))


@bench.command(name="parked")
def bench_parked(count: int = 1000, *, rounds: int = 3) -> None:
    """Measure what other clients notice while lookups wait for a disk that hangs.

    Parameters
    ----------
    count
        How many lookups wait at the same time.
    rounds
        How often it is measured. The table shows medians.
    """
    from lmcache_trio.bench import command

    interrupt_by_exception()
    end_with(command.parked(count, rounds))


@bench.command(name="records")
def bench_records(count: int = 1_000_000, *, disk: Path | None = None) -> None:
    """Measure how a server starts whose disk tier holds many chunks.

    Parameters
    ----------
    count
        How many chunks the tier holds; a million take 5 GiB of disk.
    disk
        Folder for the disk tier's files, on the disk to be measured; by default where temporary files lie.
    """
    from lmcache_trio.bench import command

    interrupt_by_exception()
    end_with(command.records(count, disk))
