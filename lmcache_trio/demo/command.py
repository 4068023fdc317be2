"""`lmcache-trio demo`: the whole job on one machine, without vLLM, in five processes.

    server -----------------------------------------------------------> ends    server, on the same disk ------> ends
    engine, cold: every prompt is     another, warm: every prompt               a third: every prompt comes
    computed and stored -> ends       comes back from memory -> ends            back from the disk -> ends

It shows that the KV outlives the engine that computed it, and the server that kept it, and checks what it shows: the
same ids, something reused.
This module runs the processes and prints; it imports no torch, and knows the engine by its lines of JSON only.
"""

import json
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from functools import partial
from pathlib import Path

import attrs
import trio
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from lmcache_trio.errors import ConfigError, Unavailable
from lmcache_trio.signals import run_until_signal

__all__ = ["DemoSettings", "PromptComparison", "Served", "demo", "main", "verdict"]

_READY_SECONDS = 30.0
"""For the server to say that it is ready, which takes it 0.3 s on an idle machine."""
_ENGINE_SECONDS = 240.0
"""For one engine to serve all prompts. The default ones take about 5 s, most of them `import torch`."""

_MAX_PARENT = 50
_TITLES = (
    ("cold: an engine computes, stores, and ends", "warm: another engine, same prompts"),
    ("disk: a new server on the same disk, a third engine",),
)
"""One line a server, one title an engine."""


def _at_least(low: int) -> Callable[[object, "attrs.Attribute[int]", int], None]:
    def check(instance: object, attribute: "attrs.Attribute[int]", value: int) -> None:
        if value < low:
            raise ConfigError(f"--{attribute.name.replace('_', '-')}", f"{value} is too few; give {low} or more")

    return check


def _none_or_two(instance: object, attribute: "attrs.Attribute[int]", value: int) -> None:
    if value < 0 or value == 1:
        raise ConfigError("--window", f"is {value}; give 2 tokens or more, or 0 for none")


def _positive(instance: object, attribute: "attrs.Attribute[float]", value: float) -> None:
    if not value > 0:  # NaN is not either
        raise ConfigError(f"--{attribute.name}", f"is {value:g}; give a number of seconds above 0")


def _one_of(*names: str) -> Callable[[object, "attrs.Attribute[str]", str], None]:
    def check(instance: object, attribute: "attrs.Attribute[str]", value: str) -> None:
        if value not in names:
            raise ConfigError(f"--{attribute.name}", f"is {value!r}; give {' or '.join(names)}")

    return check


def _default_threads() -> int:
    """Half the cores, 4 at most: torch's threads spin while they wait for each other, and others need a core too."""
    return max(1, min(4, len(os.sched_getaffinity(0)) // 2))


@attrs.frozen
class DemoSettings:
    """What the demo runs. The default ones fit into the 64 MiB of shared memory that a container has."""

    prompts: int = attrs.field(default=4, validator=_at_least(1))
    longest: int = attrs.field(default=2000, validator=_at_least(600))
    new_tokens: int = attrs.field(default=16, validator=_at_least(1))
    window: int = attrs.field(default=256, validator=_none_or_two)
    threads: int = attrs.field(factory=_default_threads, validator=_at_least(1))
    seed: int = 0
    path: str = attrs.field(default="auto", validator=_one_of("auto", "device", "shm"))
    deadline: float | None = attrs.field(default=None, validator=attrs.validators.optional(_positive))

    @property
    def lengths(self) -> list[int]:
        """Tokens of each prompt: from half of *longest* up to it, so always more than one chunk."""
        steps = max(1, self.prompts - 1)
        return [self.longest - (self.longest // 2) * (steps - i) // steps for i in range(self.prompts)]

    @property
    def disk_bytes(self) -> int:
        """Room for all of it on the disk, beside the index."""
        return 2 * self.arena_bytes + (16 << 20)

    @property
    def arena_bytes(self) -> int:
        """What all prompts need: the default model has 6 KiB of KV a token; a quarter more, and no less than 16 MiB."""
        tokens = sum(self.lengths) + self.prompts * self.new_tokens
        return max(16 << 20, tokens * 6144 * 5 // 4)


@attrs.frozen
class Served:
    """One prompt, served by one engine: a line of its output."""

    request_id: str
    tokens: int
    output_ids: Sequence[int]
    reused_tokens: int
    first_token_seconds: float


@attrs.frozen
class PromptComparison:
    """One prompt, served cold, warm from memory, and warm from the disk."""

    cold: Served
    warm: Served
    disk: Served

    @property
    def same_ids(self) -> bool:
        return list(self.cold.output_ids) == list(self.warm.output_ids) == list(self.disk.output_ids)


def main(settings: DemoSettings) -> int:
    """Run the demo and print it. Returns the exit status: 1 if any id differs or a prompt was not reused.

    `Unavailable` when it is not done by the deadline, or a process of it fails (then in a group).
    """
    began = time.monotonic()
    notes = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=notes) as progress:
        rows = trio.run(run_until_signal, partial(_until_deadline, settings, progress))
    Console().print(_table(rows))
    problems = verdict(rows)
    for problem in problems:
        notes.print(problem, style="red")
    notes.print(f"done in {time.monotonic() - began:.0f} s")
    return 1 if problems else 0


def verdict(rows: Sequence[PromptComparison]) -> list[str]:
    """What is wrong with *rows*, one sentence a prompt; empty if the job was done."""
    problems = []
    for row in rows:
        if not row.same_ids:
            ids = " and ".join(str(served.output_ids) for served in (row.cold, row.warm, row.disk))
            problems.append(f"{row.cold.request_id}: the ids differ: {ids}")
        elif not row.warm.reused_tokens:
            problems.append(f"{row.cold.request_id}: nothing was reused")
        elif not row.disk.reused_tokens:
            problems.append(f"{row.cold.request_id}: nothing was reused after the server had been started again")
    return problems


async def demo(settings: DemoSettings, progress: Progress) -> list[PromptComparison]:
    """Run the five processes, telling *progress*. All have ended, and left no file, when this returns or raises.

    `Unavailable` (in a group) when one of them fails; it ends with what that one last wrote to its standard error.
    """
    # A socket's path has 107 bytes at most: where temporary files lie deep, ours lie elsewhere
    parent = tempfile.gettempdir() if len(os.fsencode(tempfile.gettempdir())) <= _MAX_PARENT else "/tmp"
    with tempfile.TemporaryDirectory(prefix="lmcache-trio-demo-", dir=parent) as directory:
        logs = Path(directory)
        address = f"unix://{directory}/server.sock"
        arguments = ["-m", "lmcache_trio", "serve", "--address", address]
        arguments += ["--set", f"memory.size={settings.arena_bytes}", "--set", "grace=3"]
        disk = f'backend = "disk", path = "{directory}/disk", size = {settings.disk_bytes}, slab_size = {16 << 20}'
        arguments += ["--set", f"tiers=[{{ {disk} }}]"]
        engine = ["-m", "lmcache_trio.demo.engine_process", address, json.dumps(attrs.asdict(settings))]
        served = []
        for titles in _TITLES:
            async with trio.open_nursery() as processes:
                server = await processes.start(_run_server, arguments, logs / "server.log")
                progress.console.print(f"server: process {server.pid}, {address}")
                await _wait_ready(server)
                for title in titles:
                    served.append(await _serve_prompts(title, engine, settings, progress, logs))
                processes.cancel_scope.cancel()  # SIGTERM; the server writes to the disk what it still owes, and ends
    return [PromptComparison(*three) for three in zip(*served, strict=True)]


async def _wait_ready(server: trio.Process) -> None:
    with trio.move_on_after(_READY_SECONDS):
        async with aclosing(_lines(server)) as lines:
            async for _ in lines:
                return
        await trio.sleep_forever()  # it ended: the task that runs it knows why, and cancels this one
    raise Unavailable(f"the server was not ready within {_READY_SECONDS:g} s")


async def _serve_prompts(
    title: str, arguments: Sequence[str], settings: DemoSettings, progress: Progress, logs: Path
) -> list[Served]:
    """One engine's whole life."""
    served = []
    bar = progress.add_task(title, total=settings.prompts)
    with trio.move_on_after(_ENGINE_SECONDS) as deadline:
        async with trio.open_nursery() as nursery:
            process = await nursery.start(_run_engine, arguments, logs / "engine.log")
            progress.console.print(f"engine: process {process.pid}")
            async with aclosing(_lines(process)) as lines:
                async for line in lines:
                    said = json.loads(line)
                    if "request_id" in said:
                        served.append(Served(**said))
                        progress.advance(bar)
                    elif not said["healthy"]:
                        raise Unavailable("the engine did not get through to the server")
                    else:
                        progress.console.print(f"path {said['path']}: {said['reason']}")
    if deadline.cancelled_caught:
        raise Unavailable(f"the engine did not finish within {_ENGINE_SECONDS:g} s; give fewer --prompts")
    if len(served) != settings.prompts:
        raise Unavailable(f"the engine ended after {len(served)} of {settings.prompts} prompts")
    return served


async def _run_server(
    arguments: Sequence[str], log: Path, *, task_status: trio.TaskStatus[trio.Process] = trio.TASK_STATUS_IGNORED
) -> None:
    """Ends by being cancelled only."""
    status = await _run(arguments, log, task_status)
    raise Unavailable(f"the server ended with status {status}{_last_words(log)}")


async def _run_engine(
    arguments: Sequence[str], log: Path, *, task_status: trio.TaskStatus[trio.Process] = trio.TASK_STATUS_IGNORED
) -> None:
    status = await _run(arguments, log, task_status)
    if status:
        raise Unavailable(f"the engine ended with status {status}{_last_words(log)}")


async def _run(arguments: Sequence[str], log: Path, task_status: trio.TaskStatus[trio.Process]) -> int:
    with log.open("wb") as stderr:
        done = await trio.run_process(
            [sys.executable, *arguments],
            stdout=subprocess.PIPE,
            stderr=stderr,
            check=False,
            start_new_session=True,  # Ctrl-C in a terminal is ours alone; the children are ended in order, by SIGTERM
            task_status=task_status,
        )
    return done.returncode


def _last_words(log: Path) -> str:
    lines = log.read_text(errors="replace").split("\n")
    words = [line for line in lines if line.strip()]
    return f": {words[-1]}" if words else ""


async def _lines(process: trio.Process) -> AsyncGenerator[bytes, None]:
    assert process.stdout is not None
    rest = b""
    async for some in process.stdout:
        *whole, rest = (rest + some).split(b"\n")
        for line in whole:
            yield line


async def _until_deadline(settings: DemoSettings, progress: Progress) -> list[PromptComparison]:
    with trio.move_on_after(math.inf if settings.deadline is None else settings.deadline):
        return await demo(settings, progress)
    raise Unavailable(f"the demo was not done within {settings.deadline:g} s; all it started has ended")


def _table(rows: Sequence[PromptComparison]) -> Table:
    table = Table(title="Time to first token, in milliseconds")
    for name in ("#", "tokens", "cold", "warm", "reused", "from disk", "reused", "ids"):
        table.add_column(name, justify="left" if name == "ids" else "right")
    for i, row in enumerate(rows):
        cold, warm, disk = (served.first_token_seconds for served in (row.cold, row.warm, row.disk))
        table.add_row(
            str(i),
            str(row.cold.tokens),
            f"{cold * 1e3:.0f}",
            f"{warm * 1e3:.0f} ({cold / warm:.1f} x)",
            str(row.warm.reused_tokens),
            f"{disk * 1e3:.0f} ({cold / disk:.1f} x)",
            str(row.disk.reused_tokens),
            "[green]equal[/green]" if row.same_ids else "[red]DIFFERENT[/red]",
        )
    return table
