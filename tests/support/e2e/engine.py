"""Engines and servers as processes of their own, and the gate at which a test stops one to break the other.

A fault is placed, not raced: the engine's worker reaches a named point, says so over the gate's socket and waits; the
test does what it wants (kills or restarts the server, ends the worker) and lets it go on.
"""

import json
import os
import selectors
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import attrs
import trio

from lmcache_trio.client import open_client
from support.e2e.start import Forker, fresh_process, with_offline

__all__ = ["Engine", "Gate", "Generated", "Server", "tail"]

ENGINE_SECONDS = 400.0
"""Within the faulthandler's 600 s. An engine in spawned processes took 180 s to start where two cores ran fifteen."""


@attrs.frozen
class Generated:
    """*ids* of each prompt's continuation; *cached*: leading tokens that were not computed.

    *margins*, if they were asked for: how much likelier each token of an answer was than the next one, at least.
    """

    ids: list[list[int]]
    cached: list[int]
    seconds: float
    margins: list[float]


class Gate:
    """Where an engine's workers report the points that they reach. Each waits there until it was answered."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(path))
        self._listener.listen()
        self.action: Callable[[dict[str, Any]], None] | None = None
        self.reached: list[dict[str, Any]] = []

    def fileno(self) -> int:
        return self._listener.fileno()

    def answer(self) -> None:
        """Take one report, carry out what is placed there, and let the worker go on."""
        connection, _ = self._listener.accept()
        with connection, connection.makefile("rw") as lines:
            point = json.loads(lines.readline())
            self.reached.append(point)
            if self.action is not None:
                self.action(point)
            try:
                lines.write("go on\n")
                lines.flush()
            except BrokenPipeError:
                pass  # the worker was what the action ended

    def close(self) -> None:
        self._listener.close()
        self.path.unlink(missing_ok=True)


class Engine:
    """One vLLM engine. *gate* names the socket of a `Gate` to its workers; *forker* saves importing vLLM anew."""

    def __init__(
        self,
        log: Path,
        arguments: Mapping[str, Any],
        *,
        environment: Mapping[str, str] | None = None,
        gate: Gate | None = None,
        forker: Forker | None = None,
    ) -> None:
        self.log = log
        self._gate = gate
        self._closed = False
        ours, theirs = socket.socketpair()
        self._channel = ours
        self._lines = ours.makefile("r")
        variables = with_offline(environment or {})
        if gate is not None:
            variables["LMCACHE_TRIO_E2E_GATE"] = str(gate.path)
        with theirs:
            start = fresh_process if forker is None else forker.fork
            self.process = start(variables, theirs, log)
        try:
            self.seconds_to_start = float(self._say(dict(arguments))["ready"])
        except BaseException:
            self.kill()
            raise

    def generate(
        self, prompts: Sequence[Sequence[int]], *, tokens: int = 16, batch: bool = False, margins: bool = False
    ) -> Generated:
        """Continue *prompts* greedily: together when *batch*, else one after another."""
        asked = [list(prompt) for prompt in prompts]
        said = self._ask("generate", prompts=asked, tokens=tokens, batch=batch, margins=margins)
        return Generated(**said)

    def forget(self, *, connector: bool = False) -> None:
        """Drop vLLM's own prefix cache (and, with *connector*, ours). It returns when every store has ended."""
        assert self._ask("forget", connector=connector)["forgotten"], (
            f"vLLM's blocks were not let go of: see {self.log}"
        )

    def reset_at_once(self) -> None:
        """Drop vLLM's own prefix cache, right after whatever was asked before."""
        assert self._ask("reset_at_once")["reset"], f"vLLM's blocks were not let go of: see {self.log}"

    def sleep(self) -> None:
        """Sleep and wake again, right after whatever was asked before."""
        self._ask("sleep")

    def remap(self) -> None:
        """Sleep and wake again; what the KV memory held is lost meanwhile, and the connector is told before and after.

        vLLM's CPU workers ignore a sleep, so this does what its GPU workers do from 0.33 on.
        """
        self._ask("remap")

    def reload(self, path: Path, *, reset: bool) -> bool:
        """Compute with the weights at *path* from now on. *reset* vLLM's cache and ours: the result says if it was."""
        return bool(self._ask("reload", path=str(path), reset=reset)["reset"])

    def beside(self, prompt: list[int], other: list[int], *, tokens: int, lead: int) -> tuple[list[float], float]:
        """Seconds between *prompt*'s tokens after *lead* of them, when *other* came; and what *other* waited."""
        said = self._ask("beside", prompt=prompt, other=other, tokens=tokens, lead=lead)
        return said["gaps"], said["delay"]

    def abort(self, prompt: list[int], *, steps: int) -> int:
        """Ask for *prompt* and take it back after *steps* steps: how many tokens had been said?"""
        return int(self._ask("abort", prompt=prompt, steps=steps)["said"])

    def connector_times(self) -> list[float]:
        """Seconds in the connector, a step each, since the last question."""
        found: list[float] = self._ask("connector_times")["steps"]
        return found

    def preemptions(self) -> int:
        return int(self._ask("preemptions")["preemptions"])

    def metrics(self) -> dict[str, float]:
        """vLLM's own counters; those with labels also as NAME VALUE, of the last label."""
        found: dict[str, float] = self._ask("metrics")["metrics"]
        return found

    def blocks(self) -> int:
        """Blocks of KV that vLLM found room for."""
        return int(self._ask("blocks")["blocks"])

    def stop(self) -> None:
        if self.alive():
            with suppress(AssertionError, OSError):
                self._ask("stop")
                self.process.wait(30)
        self.kill()

    def kill(self) -> None:
        """End the engine and its workers at once. Idempotent."""
        if not self._closed:
            if self.alive():
                os.killpg(self.process.pid, signal.SIGKILL)
                assert self.process.wait(30)
            self._closed = True
            self.process.close()
            self._lines.close()
            self._channel.close()

    def alive(self) -> bool:
        return not self._closed and self.process.alive()

    def _ask(self, command: str, **values: Any) -> dict[str, Any]:
        return self._say({"command": command, **values})

    def _say(self, message: dict[str, Any]) -> dict[str, Any]:
        self._channel.sendall(json.dumps(message).encode() + b"\n")
        with selectors.DefaultSelector() as selector:
            selector.register(self._channel, selectors.EVENT_READ)
            if self._gate is not None:
                selector.register(self._gate, selectors.EVENT_READ)
            while True:
                ready = selector.select(ENGINE_SECONDS)
                assert ready, f"the engine said nothing for {ENGINE_SECONDS:g} s: see {self.log}"
                if any(key.fileobj is self._channel for key, _ in ready):
                    line = self._lines.readline()
                    assert line, f"the engine ended: see {self.log}\n{tail(self.log)}"
                    said: dict[str, Any] = json.loads(line)
                    return said
                if self._gate is not None:
                    self._gate.answer()


class Server:
    """One `lmcache-trio serve`, at an address that outlives it."""

    def __init__(
        self, where: Path, *, chunk_tokens: int = 256, size: str = "256MiB", settings: Sequence[str] = ()
    ) -> None:
        self.where = where
        where.mkdir(parents=True, exist_ok=True)
        self.address = f"unix://{where}/server.sock"
        self._settings = [f"address={self.address}", f"chunk_tokens={chunk_tokens}", f"memory.size={size}", *settings]
        self.process: subprocess.Popen[bytes] | None = None

    def start(self, *more: str) -> None:
        """Returns when it takes connections. *more*: settings of this time alone."""
        log = (self.where / "server.log").open("ab")
        sets = [part for setting in (*self._settings, *more) for part in ("--set", setting)]
        with log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "lmcache_trio", "serve", *sets],
                stdout=subprocess.PIPE,
                stderr=log,
                stdin=subprocess.DEVNULL,
            )
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            self.kill()
        assert line, f"the server ended: see {self.where}/server.log\n{tail(self.where / 'server.log')}"

    def kill(self) -> None:
        """SIGKILL, and gone when this returns."""
        assert self.process is not None
        self.process.kill()
        self.process.wait()
        assert self.process.stdout is not None
        self.process.stdout.close()

    def stop(self) -> None:
        if self.process is not None and self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(70)  # longer than any server's grace here
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
        if self.process is not None and self.process.stdout is not None:
            self.process.stdout.close()

    def restart(self) -> None:
        self.kill()
        self.start()

    def status(self) -> dict[str, Any]:
        """What `lmcache-trio status --json` prints."""
        done = subprocess.run(
            [sys.executable, "-m", "lmcache_trio", "status", "--json", "--address", self.address],
            capture_output=True,
            timeout=30,
            check=True,
        )
        found: dict[str, Any] = json.loads(done.stdout)
        return found

    def statistics(self) -> dict[str, Any]:
        """The same, without another process to wait for."""

        async def ask() -> dict[str, Any]:
            with trio.fail_after(60):
                async with open_client(self.address) as client:
                    return await client.statistics()

        return trio.run(ask)

    @property
    def pid(self) -> int:
        assert self.process is not None
        return self.process.pid


def tail(log: Path) -> str:
    """The last 40 lines of *log*."""
    return "\n".join(log.read_text(errors="replace").splitlines()[-40:])
