"""The command line: `lmcache-trio serve | status | demo | bench`.

It reads flags, calls what does the work, and turns what that raises into one line on standard error and an exit status:
0; 1, it did not work out; 2, the flags or the settings are wrong; 128 + n, ended by signal n. Each command imports
what it needs when it runs, so that `serve` and `status` start in a fraction of a second and import no torch.
"""

import errno
import logging
import os
import signal
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from cyclopts import App, CycloptsError, Parameter

from lmcache_trio._log_handler import GatheringHandler
from lmcache_trio.errors import ConfigError, LMCacheTrioError, Misuse, Unavailable

if TYPE_CHECKING:
    from rich.table import Table

    from lmcache_trio._server.supervise import Server
    from lmcache_trio.config import Config

__all__ = ["app", "main"]

_NAME = "lmcache-trio"
_LEVELS = ("debug", "info", "warning", "error")
_OTHER_LEVELS = {"warn": "warning", "critical": "error", "fatal": "error"}
"""Names that others have for them; nothing of ours is worse than an error."""
_NO_OUTPUT = (
    *(errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO),
    *(errno.EBADF, errno.EINVAL, errno.EAGAIN, errno.ECONNRESET),
)
"""What a write to standard output can fail with, beside a pipe that nobody reads: a disk, a limit (`ulimit -f`), a
descriptor that takes no output (`1</dev/null`), one that does not block, a socket."""

Sets = Annotated[tuple[str, ...], Parameter(name="--set", consume_multiple=True, negative=())]
ConfigFile = Annotated[Path | None, Parameter(name="--config")]


def _version() -> str:
    from lmcache_trio import __version__

    return f"{_NAME} {__version__}"


app = App(name=_NAME, help="A KV-cache server for LLM engines.", version=_version)


@app.command
def serve(*, config: ConfigFile = None, sets: Sets = (), address: str | None = None) -> None:
    """Run a server until SIGINT, SIGTERM or SIGHUP; a second one, 0.5 s later or more, ends it at once.

    Parameters
    ----------
    config
        A TOML file with settings; by default the one that LMCACHE_TRIO_CONFIG names. ~ and $NAME are expanded in
        both.
    sets
        Settings as key=value, as in --set memory.size=4GiB. They win over the file and the environment.
    address
        Short for --set address=….
    """
    settings = _settings(config, sets, address)
    _log_to_stderr()
    from lmcache_trio._server.supervise import serve as run

    run(settings, _say_ready)


@app.command
def status(
    *,
    config: ConfigFile = None,
    sets: Sets = (),
    address: str | None = None,
    json: Annotated[bool, Parameter(negative=())] = False,
    timeout: float = 5.0,
) -> None:
    """Print what a running server holds, and what it has counted since it started.

    Parameters
    ----------
    config
        The server's own TOML file, which has its address; by default the one that LMCACHE_TRIO_CONFIG names.
    sets
        Settings as key=value, as for serve.
    address
        The server's address; short for --set address=….
    json
        Print one JSON object with the keys "held", "counted" and "tiers".
    timeout
        Seconds to wait for the server at most.
    """
    import trio

    if not 0 < timeout <= 3600:
        raise ConfigError("--timeout", f"{timeout:g} is out of range; give more than 0 and at most 3600 seconds")
    where = _settings(config, sets, address).address
    statistics = trio.run(_statistics, where, timeout)
    if json:
        from json import dumps

        print(dumps(statistics, indent=2))
        return
    from rich.console import Console

    console = Console()
    with console.capture() as tables:  # rich itself would end with another status where nobody reads
        for part in ("held", "counted"):
            console.print(_table(part, statistics[part]))
    print(tables.get(), end="")


@app.command
def demo(  # noqa: PLR0913  (flags)
    *,
    prompts: int = 4,
    longest: int = 2000,
    new_tokens: int = 16,
    window: int = 256,
    threads: int | None = None,
    seed: int = 0,
    path: Literal["auto", "device", "shm"] = "auto",
    deadline: float | None = None,
) -> None:
    """Store the KV of one engine, end it, start another and get it back. Takes less than a minute.

    Parameters
    ----------
    prompts
        How many prompts to serve.
    longest
        Tokens of the longest prompt; the shortest has half as many.
    new_tokens
        Tokens to generate for each prompt.
    window
        Tokens that every second layer of the model attends to; a hit brings their last chunks alone. 0: all tokens.
    threads
        Threads that the engine computes with; by default one for two cores, 4 at most.
    seed
        Seed of the model's weights and of the prompts.
    path
        Which process copies the KV: the server (device), the engine (shm), or the server if it can (auto).
    deadline
        Seconds after which the demo gives up, with exit status 1; by default never.
    """
    from lmcache_trio.demo import command as job

    _interrupt_by_exception()
    given = {} if threads is None else {"threads": threads}
    sizes = {"prompts": prompts, "longest": longest, "new_tokens": new_tokens, "window": window}
    _exit(job.main(job.DemoSettings(**sizes, seed=seed, path=path, deadline=deadline, **given)))


bench = App(
    name="bench",
    help="Measure lookups and copies beside the limits of this machine: one memcpy, one bare round trip.",
)
app.command(bench)


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
    _interrupt_by_exception()
    _exit(command.run(settings, address=address, disk=disk, json=json))


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

    _exit(command.compare(before, after))


@bench.command(name="grow")
def bench_grow(folder: Path) -> None:
    """Measure how lookups grow with prompts, index and clients, and draw the plots.

    Parameters
    ----------
    folder
        Where the figures and the plots are written.
    """
    from lmcache_trio.bench import command

    _interrupt_by_exception()
    _exit(command.grow(folder))


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

    _interrupt_by_exception()
    _exit(command.parked(count, rounds))


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

    _interrupt_by_exception()
    _exit(command.records(count, disk))


def _exit(code: int) -> None:
    """End with *code* where it is not 0."""
    if code:
        raise SystemExit(code)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    try:
        code = _run(arguments)
        if sys.stdout is not None:
            sys.stdout.flush()
    except BrokenPipeError:  # whoever read the output has enough of it: end as any program would, without a word
        code = 128 + signal.SIGPIPE
    except OSError as exc:
        if exc.errno not in _NO_OUTPUT:
            raise
        code = _fail(f"{exc.filename or 'the output'} could not be written: {exc.strerror}", 1)
    else:
        return code
    _discard_output()
    return code


def _run(arguments: Sequence[str] | None) -> int:
    try:
        command, bound, _ = app.parse_args(arguments, print_error=False, exit_on_error=False)
        command(*bound.args, **bound.kwargs)
    except CycloptsError as exc:
        return _fail(f"{' '.join(str(exc).split())} (see {_NAME} --help)", 2)
    except KeyboardInterrupt:
        return 130
    except LMCacheTrioError as exc:
        return _report(exc)
    except BaseExceptionGroup as group:
        return _report_group(group)
    except SystemExit as exc:
        return exc.code if isinstance(exc.code, int) else int(exc.code is not None)
    return 0


def _discard_output() -> None:
    """Let what is still to be written go nowhere: the interpreter would try it again at its end, with a traceback."""
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, sys.stdout.fileno())
    os.close(null)


def _report(exc: LMCacheTrioError) -> int:
    return _fail(str(exc), 2 if isinstance(exc, Misuse) else 1)


def _report_group(group: BaseExceptionGroup[BaseException]) -> int:
    """A nursery wraps what a task raised. What we raise on purpose needs no traceback; anything else is a bug."""
    if group.split((LMCacheTrioError, KeyboardInterrupt))[1] is not None:
        raise group
    if group.subgroup(KeyboardInterrupt) is not None:
        return 130
    leaf: BaseException = group
    while isinstance(leaf, BaseExceptionGroup):
        leaf = leaf.exceptions[0]
    assert isinstance(leaf, LMCacheTrioError)
    return _report(leaf)


def _fail(message: str, code: int) -> int:
    if sys.stderr is not None:
        with suppress(OSError):  # the status says it too
            print(f"{_NAME}: {message}", file=sys.stderr, flush=True)
    return code


def _settings(config: Path | None, sets: Sequence[str], address: str | None) -> "Config":
    from lmcache_trio.config import load_config

    named_by = "--config"
    if config is None and os.environ.get("LMCACHE_TRIO_CONFIG"):
        named_by = "LMCACHE_TRIO_CONFIG"
        config = Path(os.environ[named_by])
    try:
        return load_config(config, sets if address is None else (*sets, f"address={address}"))
    except ConfigError as exc:
        if exc.key == "--config":
            raise ConfigError(named_by, exc.problem) from exc
        raise


def _interrupt_by_exception() -> None:
    """Let Ctrl-C raise KeyboardInterrupt from now on, in a command that has processes and files to remove."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _log_to_stderr() -> None:
    given = os.environ.get("LMCACHE_TRIO_LOG") or "info"
    level = given.strip().lower()
    level = _OTHER_LEVELS.get(level, level)
    if level not in _LEVELS:
        raise ConfigError("LMCACHE_TRIO_LOG", f"{given!r} is no level; give one of {', '.join(_LEVELS)}")
    logging.basicConfig(level=level.upper(), handlers=[GatheringHandler()])


def _say_ready(server: "Server") -> None:
    from lmcache_trio.config import format_size

    size = format_size(server.statistics()["held"]["bytes_size"])
    try:
        print(f"{_NAME} is ready: address {server.address}, arena {size}, pid {os.getpid()}", flush=True)
    except OSError as exc:  # whoever waits for this line waits in vain
        _discard_output()
        raise Unavailable(f"standard output does not take the line that says it is ready: {exc.strerror}") from exc


async def _statistics(address: str, seconds: float) -> dict[str, dict[str, Any]]:
    import trio

    from lmcache_trio.client import open_client

    try:
        with trio.fail_after(seconds):
            async with open_client(address, name=f"{_NAME} status") as client:
                return await client.statistics()
    except trio.TooSlowError:
        raise Unavailable(
            f"no answer from {address} within {seconds:g} s; is a server running there, and is it stopped?"
        ) from None


def _table(title: str, part: Mapping[str, Any]) -> "Table":
    from rich.table import Table

    table = Table(title=title, title_justify="left", show_header=False)
    for name, value in _flat(part):
        table.add_row(name, f"{value:,}" if isinstance(value, int) else str(value))
    return table


def _flat(part: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    rows: list[tuple[str, Any]] = []
    for name, value in part.items():
        rows += _flat(value, f"{prefix}{name}.") if isinstance(value, Mapping) else [(prefix + name, value)]
    return rows
