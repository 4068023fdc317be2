"""What a hit saves a real engine, and what a cache costs one that never hits: times, printed.

An engine alone, one with us and, where the variable `E2E_LMCACHE` names a virtual environment that has LMCache 0.5.6,
one with it (its server runs there, and its packages are put behind the engine's own). All of them live at the same
time, and only one is asked at a time: by turns, so that a machine that drifts drifts for all.

The times are printed, not judged: a test cannot know how busy a machine is. What is judged are the ids and what came
from the cache.
"""

import os
import signal
import socket
import subprocess
import sysconfig
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from statistics import median

import pytest
from support.e2e.bench import ARGUMENTS, KV_BYTES, ONE_PROCESS, Bench
from support.e2e.engine import Engine
from support.e2e.expected import Expected
from support.e2e.model import MID
from support.e2e.start import TESTS

LMCACHE = os.environ.get("E2E_LMCACHE", "")
TURNS = int(os.environ.get("E2E_TURNS", "1"))
"""One shows that it works; three are what docs/performance.md quotes."""
PATCH = """
# vLLM on the CPU asks everything in every module for its __dict__; llvmlite, which LMCache imports first, makes one up.
try:
    from llvmlite.binding.ffi import _lib_wrapper as library
except ImportError:
    pass
else:
    found = library.__getattr__
    def only_functions(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return found(self, name)
    library.__getattr__ = only_functions
"""
NEW = 32
"""Tokens of an answer, where tokens a second are measured."""
BESIDE = 64
LEAD = 8
"""Tokens of the answer beside which another request comes, and how many of them are there when it does."""

Times = dict[str, list[float]]


@pytest.fixture(scope="module")
def engines(bench: Bench) -> Iterator[dict[str, Engine]]:
    """By name: alone, ours and LMCache. Asked by turns."""
    bench.stop_engine()
    with ExitStack() as stack:
        made = {"alone": bench.start("mid, no connector"), "ours": bench.start("mid, timed")}
        for engine in made.values():
            stack.callback(engine.stop)
        port = stack.enter_context(lmcache_server())
        if port:
            made["LMCache"] = lmcache_engine(bench, port)
            stack.callback(made["LMCache"].stop)
        for engine in made.values():
            engine.generate([list(range(3, 2103))], tokens=4)  # the first request of a process picks its kernels
            engine.forget()
        yield made


def test_times_to_the_first_token_and_after(
    engines: dict[str, Engine], mid: Expected, capsys: pytest.CaptureFixture[str]
) -> None:
    times: Times = {}
    for turn in range(TURNS):
        prompt = [turn + 2, *mid["4,100 tokens"].tokens[1:]]  # cold in every turn: its first chunk is new
        for name, engine in engines.items():
            for what, seconds in measure(engine, prompt, expect_hit=name != "alone").items():
                times.setdefault(f"{name}: {what}", []).append(seconds)
    with capsys.disabled():
        print(f"\n4,100 tokens, {TURNS} turns, medians in seconds")
        show(times)
        for what in (f"cold and {NEW} tokens", f"{NEW} tokens after the first"):
            print(f"  {what}, ours by alone: {ratio(times, what):.3f}")
        print(f"  seconds of the engine's thread a step in our connector: {steps_of(engines['ours'])}")
        if not LMCACHE:
            print("  LMCache: not measured; E2E_LMCACHE names no environment that has it")


def test_tokens_of_one_request_while_another_stores_and_loads(
    engines: dict[str, Engine], mid: Expected, capsys: pytest.CaptureFixture[str]
) -> None:
    times: Times = {}
    for turn in range(TURNS):
        other = [turn + 12, *mid["4,100 tokens"].tokens[1:]]
        answering = [turn + 12, *mid["4,100 tokens"].tokens[1:65]]
        for name, engine in engines.items():
            for what, prompt in (("nobody beside", []), ("a cold one beside", other), ("it again", other)):
                engine.forget()
                gaps, delay = engine.beside(answering, prompt, tokens=BESIDE, lead=LEAD)
                times.setdefault(f"{name}, {what}: all gaps", []).append(sum(gaps))
                times.setdefault(f"{name}, {what}: median gap", []).append(median(gaps))
                if prompt:
                    times.setdefault(f"{name}, {what}: its first token", []).append(delay)
    with capsys.disabled():
        print(f"\n{BESIDE - LEAD} tokens of one request, one of 4,100 beside it, {TURNS} turns, medians in seconds")
        show(times)
        for what in ("a cold one beside: all gaps", "a cold one beside: median gap"):
            print(f"  {what}, ours by alone: {ratio(times, what, ','):.3f}")
        loading, nobody = times["ours, it again: median gap"], times["alone, nobody beside: median gap"]
        print(f"  median gap while it is loaded, by alone with nobody: {median(loading) / median(nobody):.3f}")


def measure(engine: Engine, prompt: list[int], *, expect_hit: bool) -> dict[str, float]:
    """Time to first token cold and with a hit; a hit is asked for once vLLM's own cache was dropped."""
    engine.forget()
    cold = engine.generate([prompt], tokens=1)
    engine.forget()
    more = engine.generate([[prompt[0] + 1000, *prompt[1:]]], tokens=NEW)
    assert cold.cached == more.cached == [0]
    found = {
        "cold": cold.seconds,
        f"cold and {NEW} tokens": more.seconds,
        f"{NEW} tokens after the first": more.seconds - cold.seconds,
    }
    hits = []
    for _ in range(3):  # the first one touches memory that nobody has touched
        engine.forget()
        again = engine.generate([prompt], tokens=1)
        assert again.ids == cold.ids
        assert (again.cached != [0]) == expect_hit
        hits.append(again.seconds)
        if not expect_hit:
            return found
    found["first hit"], found["hit"] = hits[0], median(hits[1:])
    return found


def show(times: Times) -> None:
    for what, found in times.items():
        print(f"  {what}: {median(found):.4f} ({', '.join(f'{t:.4f}' for t in found)})")


def ratio(times: Times, what: str, sign: str = ":") -> float:
    """Ours by the engine's alone: the median of the turns'."""
    return median(a / b for a, b in zip(times[f"ours{sign} {what}"], times[f"alone{sign} {what}"], strict=True))


def steps_of(engine: Engine) -> str:
    steps = sorted(engine.connector_times())
    half, most = steps[len(steps) // 2], steps[len(steps) * 99 // 100]
    return f"p50 {half * 1e6:.0f} µs, p99 {most * 1e6:.0f} µs, {len(steps)} steps"


def lmcache_engine(bench: Bench, port: int) -> Engine:
    """The same engine with LMCache's own connector."""
    (packages,) = Path(LMCACHE).glob("lib/python3*/site-packages")
    behind = bench.where / "behind"
    if not behind.exists():
        behind.mkdir()
        ours = Path(sysconfig.get_path("purelib"))
        for entry in packages.iterdir():
            if not (ours / entry.name).exists():  # what the engine has, it has in the version that it wants
                (behind / entry.name).symlink_to(entry)
        (behind / "sitecustomize.py").write_text(PATCH)
    arguments = {
        **ARGUMENTS,
        "dtype": MID.dtype,
        "model": str(bench.model("mid")),
        "kv_cache_memory_bytes": KV_BYTES["mid"],
        "distributed_executor_backend": "uni",
        "kv_transfer_config": {
            "kv_connector": "LMCacheMPConnector",
            "kv_role": "kv_both",
            "kv_connector_extra_config": {"lmcache.mp.host": "tcp://127.0.0.1", "lmcache.mp.port": port},
        },
    }
    path = os.pathsep.join(filter(None, [str(TESTS), os.environ.get("PYTHONPATH"), str(behind)]))
    environment = {**ONE_PROCESS, "PYTHONHASHSEED": "0", "PYTHONPATH": path}
    return Engine(bench.where / "lmcache-engine.log", arguments, environment=environment)


@contextmanager
def lmcache_server() -> Iterator[int]:
    """Its server's port; 0 where it is not to be measured."""
    if not LMCACHE:
        yield 0
        return
    with socket.socket() as one, socket.socket() as other:
        one.bind(("127.0.0.1", 0))
        other.bind(("127.0.0.1", 0))
        port, http = one.getsockname()[1], other.getsockname()[1]
    command = [f"{LMCACHE}/bin/lmcache", "server", "--host", "127.0.0.1", "--port", str(port), "--http-port", str(http)]
    command += ["--l1-size-gb", "1", "--eviction-policy", "LRU", "--supported-transfer-mode", "auto"]
    command += ["--no-l1-use-lazy"]
    quiet = {"LMCACHE_DISABLE_BANNER": "1", "LMCACHE_TRACK_USAGE": "false", "DO_NOT_TRACK": "1"}
    with subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, **quiet},
    ) as server:
        try:
            assert server.stdout is not None
            assert any("cache server is running" in line for line in server.stdout), "LMCache's server did not start"
            yield port
        finally:
            server.send_signal(signal.SIGINT)
            try:
                server.communicate(timeout=20)
            except subprocess.TimeoutExpired:
                server.kill()
