"""One server of the soak on a small disk, and what happens to it, to its disk and to its engines.

Two scenes run side by side. The *steady* server lives as long as the soak, so that what it loses little by little
shows. The *restarted* one is killed now and then, and its disk tier is `faulty`: bits flip and writes are torn beneath
its checksums. `Bad` ends the soak: a wrong byte, a bug that an engine or a server tells of, an end that nobody asked
for, or something that a server still holds when all its engines have left.
"""

import json
import signal
import subprocess
import sys
from collections import Counter
from contextlib import suppress
from pathlib import Path
from random import Random
from typing import Any

import trio

from lmcache_trio import open_client
from lmcache_trio.errors import LMCacheTrioError
from support.soak.engine import owner_of
from support.soak.figures import process_figures, unreturned

__all__ = ["DISK_FILE_SYSTEM", "MEMORY", "Bad", "Scene"]

ENGINE = Path(__file__).with_name("engine.py")
MEMORY = 4 << 20
DISK, DISK_FILE_SYSTEM = 8 << 20, 12 << 20
"""Some 120 chunks in memory and 240 on disk. The prompts have 300 chunks, for each of 2 models, 2 versions of their
weights and 3 layouts, and for models that engines have for themselves."""
SETTINGS = {
    "memory.size": str(MEMORY),
    "chunk_tokens": "64",
    "grace": "0.5",
    "lease_timeout": "2.0",
    "reservation_timeout": "3.0",
    "prefetch_budget": "0.5",
}
FAULTS = (
    '{kind="bit_flip", on="load", rate=0.02}, {kind="bit_flip", on="store", rate=0.02},'
    ' {kind="torn_write", on="store", rate=0.02}, {kind="short_read", on="load", rate=0.02},'
    ' {kind="delay", on="load", rate=0.01, seconds=0.3}'
)
LOG_TAIL = 6000
"""Characters of a log that go with what was found."""


class Bad(Exception):
    """What a soak found. Everything that is known of it is in the message."""


class Scene:
    """A server in *folder*, with *engines* engines at a time, whose KV goes by *path* (shm, device or any).

    *restarted*: it is killed now and then, and its disk is faulty. *filler*: the file with which others fill its disk.
    """

    def __init__(  # noqa: PLR0913  (keywords, each a setting of its own)
        self,
        name: str,
        folder: Path,
        seed: int,
        *,
        engines: int,
        restarted: bool = False,
        filler: Path | None = None,
        path: str = "any",
    ) -> None:
        self.name, self.folder, self.restarted, self.filler = name, folder, restarted, filler
        self.address = f"unix://{folder}/s"
        self.samples: list[dict[str, Any]] = []
        """What `look` saw, once a second and at the end."""
        self.counts: Counter[str] = Counter()
        """What the scene did."""
        self.server: trio.Process | None = None
        self._random = Random(f"{seed} {name}")
        self._engines, self._path = engines, path
        self._of_engines: dict[int, Counter[str]] = {}
        self._lives = 0
        self._began = 0.0
        self._over = trio.Event()

    def done(self) -> Counter[str]:
        """What the scene did and what its engines did, killed ones up to their last word."""
        return sum(self._of_engines.values(), Counter(self.counts))

    def finish(self) -> None:
        """Enough: engines leave, and `run` looks at what is left."""
        self._over.set()

    async def run(self) -> None:
        """Until `finish`, and until all engines have left after it."""
        self._began = trio.current_time()
        try:
            await self._start_server()
            before = await self._left()
            async with trio.open_nursery() as looking:
                looking.start_soon(self._sample)
                async with trio.open_nursery() as acting:
                    for _ in range(self._engines):
                        acting.start_soon(self._employ)
                    if self.restarted:
                        acting.start_soon(self._restart)
                    if self.filler is not None:
                        acting.start_soon(self._fill, self.filler)
                    await self._over.wait()
                looking.cancel_scope.cancel()
            self.samples.append(await self._left(before))
            await self._end_server(signal.SIGTERM)
        finally:
            if self.server is not None:
                self.server.kill()
                with trio.CancelScope(shield=True):
                    await self.server.wait()

    async def _lasts(self, seconds: float) -> bool:
        """Is it still going on after *seconds*?"""
        with trio.move_on_after(seconds):
            await self._over.wait()
        return not self._over.is_set()

    # --- the server and its disk ------------------------------------------------------------------------------------

    async def _start_server(self) -> None:
        disk = f'backend="disk", path="{self.folder}/disk/kv", size={DISK}, slab_size={1 << 20}'
        tier = f'backend="faulty", inner={{{disk}}}, faults=[{FAULTS}], seed={self._lives}' if self.restarted else disk
        sets = [*(f"{key}={value}" for key, value in SETTINGS.items()), f"tiers=[{{{tier}}}]"]
        command = [sys.executable, "-m", "lmcache_trio", "serve", "--address", self.address]
        command += [word for setting in sets for word in ("--set", setting)]
        with (self.folder / "server.log").open("ab") as log:
            server = await trio.lowlevel.open_process(command, stdout=subprocess.PIPE, stderr=log)
        said = b""
        assert server.stdout is not None
        try:
            with trio.move_on_after(60):
                said = bytes(await server.stdout.receive_some())
            if b"ready" not in said:
                raise Bad(f"the {self.name} server did not start: {self._log('server')}")
        except BaseException:
            server.kill()
            raise
        self._lives += 1
        self.server = server

    async def _end_server(self, how: int) -> None:
        server, self.server = self.server, None
        assert server is not None
        if server.poll() is not None:
            raise Bad(f"the {self.name} server ended by itself with {server.returncode}: {self._log('server')}")
        server.send_signal(how)
        with trio.fail_after(60):
            ended = await server.wait()
        if ended != (-signal.SIGKILL if how == signal.SIGKILL else 0):
            raise Bad(f"the {self.name} server ended with {ended}: {self._log('server')}")
        if server.stdout is not None:
            await server.stdout.aclose()

    def _log(self, whose: str) -> str:
        return (self.folder / f"{whose}.log").read_text(errors="replace")[-LOG_TAIL:]

    async def _restart(self) -> None:
        """Kill it at any moment, and start it again on what its disk holds."""
        while await self._lasts(self._random.uniform(8, 30)):
            await self._end_server(signal.SIGKILL)
            self.counts["server kills"] += 1
            await self._lasts(self._random.uniform(0, 1))
            await self._start_server()

    async def _fill(self, filler: Path) -> None:
        """Others take what its disk has, all or nearly, and give it back."""
        while await self._lasts(self._random.uniform(2, 8)):
            with filler.open("wb", buffering=0) as file, suppress(OSError):
                while True:
                    file.write(b"\1" * 65536)
            with filler.open("r+b") as file:
                left = self._random.choice((0, self._random.randrange(1 << 20)))
                file.truncate(max(0, filler.stat().st_size - left))
            self.counts["disk fills"] += 1
            await self._lasts(self._random.uniform(2, 8))
            filler.unlink()

    # --- engines ----------------------------------------------------------------------------------------------------

    async def _employ(self) -> None:
        """One engine process after the other."""
        while not self._over.is_set():
            seed = self._random.randrange(1 << 40)
            command = [sys.executable, str(ENGINE), self.address, str(seed), self._path]
            with (self.folder / "engines.log").open("ab") as log:
                process = await trio.lowlevel.open_process(
                    command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log
                )
            self.counts["engine processes"] += 1
            try:
                async with trio.open_nursery() as nursery:
                    at_work = trio.Event()
                    nursery.start_soon(self._hear, process, seed, at_work)
                    killed = await self._fate(process, at_work)
                if process.returncode != (-signal.SIGKILL if killed else 0):
                    why = f"the {self.name} engine of seed {seed} ended with {process.returncode}"
                    raise Bad(f"{why}: {self._log('engines')}")
            finally:
                process.kill()
                with trio.CancelScope(shield=True):
                    await process.wait()

    async def _fate(self, process: trio.Process, at_work: trio.Event) -> bool:
        """At work, it is stopped and continued, and then told to leave or killed. Was it killed?"""
        with trio.move_on_after(120):  # without a word by then: it has not come up, or has ended
            await at_work.wait()
        for _ in range(self._random.randrange(3)):
            await self._lasts(self._random.uniform(1, 4))
            process.send_signal(signal.SIGSTOP)
            self.counts["engine stops"] += 1
            await self._lasts(self._random.uniform(0, 4))  # up to more than a lease or a reservation lives
            process.send_signal(signal.SIGCONT)
        await self._lasts(self._random.uniform(3, 20))
        if not self._over.is_set() and self._random.random() < 0.5:
            process.kill()
            self.counts["engine kills"] += 1
            return True
        assert process.stdin is not None
        with suppress(trio.BrokenResourceError):
            await process.stdin.send_all(b"leave\n")
        with trio.move_on_after(120) as patience:
            await process.wait()
        if patience.cancelled_caught:
            raise Bad(f"the {self.name} engine {process.pid} did not leave in 120 s: {self._log('engines')}")
        return False

    async def _hear(self, process: trio.Process, seed: int, at_work: trio.Event) -> None:
        """What it counts, and what is wrong."""
        assert process.stdout is not None
        said = b""
        async with process.stdout:
            async for more in process.stdout:
                *lines, said = (said + more).split(b"\n")
                for words in map(json.loads, lines):
                    if "wrong" in words:
                        found = {"scene": self.name, "life of the server": self._lives, **words["wrong"]}
                        found["whose"] = owner_of(bytes.fromhex(found["found"]), found["first wrong byte"])
                        raise Bad(f"a wrong byte was loaded: {json.dumps(found, indent=1)}")
                    self._of_engines[seed] = Counter(words["counts"])
                    at_work.set()
        await process.wait()
        at_work.set()

    # --- what is seen -----------------------------------------------------------------------------------------------

    async def look(self) -> dict[str, Any] | None:
        """What the server is and holds now; None while there is none."""
        server = self.server
        if server is None:
            return None
        try:
            with trio.fail_after(60):
                async with open_client(self.address) as client:
                    seen = await client.statistics()
                    seen |= process_figures(server.pid, self.folder / "disk")  # with one client, always
        except (LMCacheTrioError, OSError):
            with trio.move_on_after(10):  # it may be about to end
                await server.wait()
            if self.server is not server:
                return None
            if server.returncode is not None:
                raise Bad(
                    f"the {self.name} server ended by itself with {server.returncode}: {self._log('server')}"
                ) from None
            raise
        if bugs := [tier for tier in seen["tiers"] if tier["bugs"]]:
            raise Bad(f"the {self.name} server met bugs in its tier: {bugs}: {self._log('server')}")
        return {"time": trio.current_time() - self._began, "life": self._lives, "done": dict(self.done()), **seen}

    async def _sample(self) -> None:
        """Once a second."""
        for second in range(1, sys.maxsize):
            if seen := await self.look():
                self.samples.append(seen)
            await trio.sleep_until(self._began + second)

    async def _left(self, before: dict[str, Any] | None = None) -> dict[str, Any]:
        """What is seen as soon as nothing is held for a client, and no more than *before*; `Bad` if that takes 60 s."""
        problems = ["nothing was seen"]
        with trio.move_on_after(60):
            while True:
                if seen := await self.look():
                    problems = _kept(seen, before or seen)
                    if not problems:
                        return seen
                await trio.sleep(1)  # by then it has closed what was ours
        raise Bad(f"the {self.name} server, left by all, is not as it was: {'; '.join(problems)}")


def _kept(seen: dict[str, Any], before: dict[str, Any]) -> list[str]:
    """What is held for clients that have left, and of what there is more than *before*."""
    kept = [f"{name} is {value}" for name, value in unreturned(seen["held"]).items()]
    for tier in seen["tiers"]:
        if tier["state"] != "open" or tier["bytes_queued"] or tier["calls"] or tier["loads_held"]:
            kept.append(f"its tier is not at rest: {tier}")
    for name, now, then in (
        ("descriptors", seen["descriptors"], before["descriptors"]),
        ("tasks", seen["held"]["tasks"], before["held"]["tasks"]),
    ):
        if now > then:
            kept.append(f"there are {now} {name}, and were {then} at its start")
    return kept
