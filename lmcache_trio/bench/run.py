"""The processes of a benchmark, and its rounds: every row once a round, so that a machine that drifts drifts for all.

    server, and one with a disk tier ------------------------------> ended by SIGTERM
    hosts, one a client: prepare, go, prepare, go … ---------------> end when their input does

It prints nothing and imports no torch. What a host could not do ends the run with its reason.
"""

import json
import os
import secrets
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import attrs
import trio

from lmcache_trio.bench.files import why_no_direct
from lmcache_trio.bench.machine import Meter, cpu_seconds
from lmcache_trio.bench.rows import HostPart, Round
from lmcache_trio.bench.settings import COPIES, DISK, LOOKUPS, BenchSettings
from lmcache_trio.client import Client, open_client
from lmcache_trio.errors import Unavailable

__all__ = [
    "BenchProcess",
    "Measured",
    "ask",
    "child",
    "look_until",
    "measure",
    "play",
    "scratch",
    "serving",
    "wait_open",
]

NO_TORCH = "it copies an engine's KV, which needs torch: pip install 'lmcache-trio[demo]'"

_READY_SECONDS = 60.0
_PHASE_SECONDS = 300.0
_LOOK_SECONDS = 0.02
"""Between two looks at what a server says: each costs it as much as a page of an index that it reads."""
_MAX_PARENT = 50
"""Longest path of a folder for sockets: a socket's path has 107 bytes at most."""


@attrs.frozen
class Measured:
    """All rounds of all rows, the share of the machine that others used meanwhile, and why a row is not there."""

    rounds: dict[str, list[Round]]
    others: float
    left_out: dict[str, str]


class BenchProcess:
    """A process that answers lines of JSON with lines of JSON."""

    def __init__(self, process: trio.Process, log: Path) -> None:
        self.process = process
        self._log = log
        self._rest = b""

    async def hear(self) -> dict[str, Any]:
        """The next object. `Unavailable`: it said why it cannot go on, or ended."""
        said: dict[str, Any] = json.loads(await self.line())
        if "error" in said:
            raise Unavailable(str(said["error"]))
        return said

    async def line(self) -> bytes:
        assert self.process.stdout is not None
        with trio.move_on_after(_PHASE_SECONDS):
            while b"\n" not in self._rest:
                some = await self.process.stdout.receive_some()
                if not some:
                    raise Unavailable(f"process {self.process.pid} ended: {self._last_words()}")
                self._rest += some
            line, _, self._rest = self._rest.partition(b"\n")
            return line
        raise Unavailable(f"process {self.process.pid} said nothing for {_PHASE_SECONDS:g} s")

    async def say(self, **what: object) -> None:
        assert self.process.stdin is not None
        try:
            await self.process.stdin.send_all(json.dumps(what).encode() + b"\n")
        except trio.BrokenResourceError as exc:
            raise Unavailable(f"process {self.process.pid} ended: {self._last_words()}") from exc

    def _last_words(self) -> str:
        lines = [line for line in self._log.read_text(errors="replace").split("\n") if line.strip()]
        return lines[-1] if lines else "it said nothing"


@asynccontextmanager
async def child(arguments: Sequence[str], log: Path) -> AsyncIterator[BenchProcess]:
    """A Python process of our own; ended by SIGTERM with the block, killed 5 s later."""
    with log.open("ab") as stderr:
        async with trio.open_nursery() as nursery:

            async def run(*, task_status: trio.TaskStatus[trio.Process]) -> None:
                await trio.run_process(
                    [sys.executable, *arguments],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=stderr,
                    check=False,
                    start_new_session=True,  # Ctrl-C in a terminal is ours alone; the children are ended in order
                    env=os.environ | {"OMP_NUM_THREADS": "1"},
                    task_status=task_status,
                )

            process: trio.Process = await nursery.start(run)
            yield BenchProcess(process, log)
            nursery.cancel_scope.cancel()


@asynccontextmanager
async def serving(
    address: str, sets: Sequence[str], folder: Path, module: str = "lmcache_trio", verb: Sequence[str] = ("serve",)
) -> AsyncIterator[BenchProcess]:
    """A server at *address* with the settings *sets*, ready."""
    arguments = ["-m", module, *verb, "--address", address]
    for item in ("grace=0", *sets):
        arguments += ["--set", item]
    async with child(arguments, folder / "server.log") as server:
        with trio.fail_after(_READY_SECONDS):
            await server.line()
        yield server


async def wait_open(address: str) -> None:
    """Until all tiers of the server at *address* are open: it is ready before, where that takes longer."""
    async with open_client(address, name="lmcache-trio bench") as client:
        await look_until(client, lambda said: not any(tier["fenced"] for tier in said["tiers"]), _READY_SECONDS)


async def look_until(client: Client, there: Callable[[dict[str, Any]], bool], seconds: float) -> dict[str, Any]:
    """What the server says of itself once *there* is true of it. Nothing tells, so it is asked again and again."""
    with trio.fail_after(seconds):
        while not there(said := await client.statistics()):
            with trio.move_on_after(_LOOK_SECONDS):
                await client.wait_closed()
    return said


@asynccontextmanager
async def scratch(near: Path | None = None) -> AsyncIterator[Path]:
    """A folder for sockets and logs, or for a disk tier *near* another; removed at the end."""
    parent = str(near) if near is not None else tempfile.gettempdir()
    if near is None and len(os.fsencode(parent)) > _MAX_PARENT:
        parent = "/tmp"
    with tempfile.TemporaryDirectory(prefix="lmcache-trio-bench-", dir=parent) as folder:
        yield Path(folder).absolute()


async def measure(
    settings: BenchSettings, *, address: str | None, disk: Path | None, tell: Callable[[str, int, int], None]
) -> Measured:
    """Run it all. *address*: of a server that runs already; disk rows, which need one of our own, are then left out.

    *disk* is where the tier's folder is made; *tell* is told what is done now, how much was done, and of how much.
    """
    wanted = settings.wanted if address is None else tuple(row for row in settings.wanted if row not in DISK)
    left_out = {row: "it needs a server of the benchmark's own" for row in settings.wanted if row not in wanted}
    if find_spec("torch") is None:
        left_out |= dict.fromkeys((row for row in wanted if row not in LOOKUPS), NO_TORCH)
        wanted = tuple(row for row in wanted if row in LOOKUPS)
    if address is not None:
        async with open_client(address, name="lmcache-trio bench"):
            pass  # `Unavailable` at once if nobody is there: an adapter would wait for somebody
    async with AsyncExitStack() as stack:
        folder = await stack.enter_async_context(scratch())
        tell("servers", 0, 0)
        addresses, tier_folder = [address or f"unix://{folder}/server.sock"], ""
        if address is None:
            await stack.enter_async_context(serving(addresses[0], _main_sets(settings), folder))
            if any(row in DISK for row in wanted):
                tier_folder = str(await stack.enter_async_context(scratch(disk)))
                addresses.append(f"unix://{folder}/disk.sock")
                await stack.enter_async_context(serving(addresses[1], _disk_sets(settings, tier_folder), folder))
                await wait_open(addresses[1])
                if "direct_read" in wanted and (why := why_no_direct(Path(tier_folder))):
                    left_out["direct_read"] = why
        tell("clients", 0, 0)
        run = secrets.token_hex(8)
        hosts = []
        for rank in range(settings.clients):
            arguments = ["-m", "lmcache_trio.bench.host_process", settings.as_json(), str(rank), run, *addresses]
            arguments += [tier_folder] if tier_folder else []
            hosts.append(await stack.enter_async_context(child(arguments, folder / "host.log")))
        said = [await host.hear() for host in hosts]
        for one in said:
            left_out |= {row: why for row, why in one["left_out"].items() if row in wanted}
        wanted = tuple(row for row in wanted if row not in left_out)
        rounds, others = await _rounds(settings, wanted, hosts, said[0]["pids"], tell)
    return Measured(rounds, others, left_out)


async def _rounds(
    settings: BenchSettings,
    wanted: Sequence[str],
    hosts: Sequence[BenchProcess],
    servers: Sequence[int | None],
    tell: Callable[[str, int, int], None],
) -> tuple[dict[str, list[Round]], float]:
    rounds: dict[str, list[Round]] = {name: [] for name in wanted}
    everyone = [os.getpid(), *(host.process.pid for host in hosts), *(pid for pid in servers if pid)]
    before = Meter.read(everyone)
    for number in range(settings.rounds + 1):  # the first is a rehearsal
        for i, name in enumerate(wanted):
            tell(name, number * len(wanted) + i, (settings.rounds + 1) * len(wanted))
            await ask(hosts[:1], hot=True)
            n = settings.disk_copies if name in DISK else settings.copies if name in COPIES else settings.lookups
            measured = await play(name, n, hosts, servers[1] if name in DISK else servers[0])
            if number:
                rounds[name].append(measured)
            else:
                before = Meter.read(everyone)
    return rounds, Meter.read(everyone).others_since(before)


async def play(name: str, n: int, hosts: Sequence[BenchProcess], server: int | None) -> Round:
    """*n* operations of row *name* by each of *hosts*, all at the same time."""
    await ask(hosts, prepare=name, n=n)
    before = cpu_seconds(server) if server else None
    parts = [HostPart(**said) for said in await ask(hosts, go=True)]
    after = cpu_seconds(server) if server else None
    return Round(parts, None if before is None or after is None else after - before)


async def ask(hosts: Sequence[BenchProcess], **what: object) -> list[dict[str, Any]]:
    """Say it to all of *hosts*, and hear their answers."""
    for host in hosts:
        await host.say(**what)
    return [await host.hear() for host in hosts]


def _main_sets(settings: BenchSettings) -> list[str]:
    return [f"memory.size={settings.arena_bytes}", f"chunk_tokens={settings.kv.chunk_tokens}"]


def _disk_sets(settings: BenchSettings, folder: str) -> list[str]:
    """A load is to be waited for: this measures it, and does not bound it. Each client may have an operation queued."""
    table = {"backend": "disk", "path": f"{folder}/tier", "size": settings.disk_bytes}
    return [
        f"memory.size={settings.disk_arena_bytes}",
        f"chunk_tokens={settings.kv.chunk_tokens}",
        *(f"tiers.0.{key}={json.dumps(value)}" for key, value in table.items()),
        f"writeback_bytes={2 * settings.clients * settings.operation_bytes}",
        "prefetch_budget=25",
        "tier_timeout=30",
    ]
