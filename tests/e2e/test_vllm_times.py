"""What a hit saves a real engine, and what a cache costs one that never hits: times, three by turns, printed.

LMCache 0.5.6 is measured beside where the variable `E2E_LMCACHE` names a virtual environment that has it: its server
runs there, and its packages are put behind the engine's own. The times are printed, not judged: a test cannot know how
busy a machine is. What is judged are the ids and what came from the cache.
"""

import os
import signal
import socket
import subprocess
import sysconfig
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median

import pytest
from e2e_bench import ARGUMENTS, ONE_PROCESS, Bench
from e2e_engine import Engine
from e2e_expected import Expected

LMCACHE = os.environ.get("E2E_LMCACHE", "")
TURNS = 3
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


@pytest.fixture(scope="module")
def times() -> dict[str, list[float]]:
    """Seconds by what took them, over all turns."""
    return {}


@pytest.fixture(scope="module")
def port() -> Iterator[int]:
    """Of LMCache's server; 0 where it is not to be measured."""
    with lmcache_server() as made:
        yield made


@pytest.mark.parametrize("turn", range(TURNS))
def test_an_engine_alone_one_with_us_and_one_with_lmcache_say_the_same(
    turn: int,
    bench: Bench,
    mid: Expected,
    port: int,
    times: dict[str, list[float]],
    capsys: pytest.CaptureFixture[str],
) -> None:
    prompt = [turn + 2, *mid["4,100 tokens"].tokens[1:]]  # cold in every turn: its first chunk is new
    for name in ("alone", "ours", *(["LMCache"] if port else [])):
        engine = lmcache_engine(bench, port) if name == "LMCache" else start(bench, name)
        try:
            for what, seconds in measure(engine, prompt, expect_hit=name != "alone").items():
                times.setdefault(f"{name}, {what}", []).append(seconds)
        finally:
            if name == "LMCache":
                engine.stop()
    with capsys.disabled():
        print(f"\nafter turn {turn + 1} of {TURNS}, seconds to the last token asked for, medians:")
        for what, found in times.items():
            print(f"  {what}: {median(found):.3f} ({', '.join(f'{t:.3f}' for t in found)})")
        if not LMCACHE:
            print("  LMCache: not measured; E2E_LMCACHE names no environment that has it")


def start(bench: Bench, name: str) -> Engine:
    return bench.engine("mid" if name == "ours" else "mid, no connector", fresh=True)


def measure(engine: Engine, prompt: list[int], *, expect_hit: bool) -> dict[str, float]:
    """Time to first token cold and with a hit; a hit is asked for once vLLM's own cache was dropped."""
    engine.generate([prompt[1:2100]], tokens=4)  # the first request of a process picks its kernels
    cold = engine.generate([prompt], tokens=1)
    engine.forget()
    more = engine.generate([[prompt[0] + 1000, *prompt[1:]]], tokens=NEW)
    assert cold.cached == more.cached == [0]
    found = {"cold": cold.seconds, f"cold and {NEW} tokens": more.seconds}
    hits = []
    for _ in range(2):  # the first one touches memory that nobody has touched
        engine.forget()
        again = engine.generate([prompt], tokens=1)
        assert again.ids == cold.ids
        assert (again.cached != [0]) == expect_hit
        hits.append(again.seconds)
    if expect_hit:
        found["first hit"], found["hit"] = hits
    return found


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
        "dtype": "bfloat16",
        "model": str(bench.model("mid")),
        "distributed_executor_backend": "uni",
        "kv_transfer_config": {
            "kv_connector": "LMCacheMPConnector",
            "kv_role": "kv_both",
            "kv_connector_extra_config": {"lmcache.mp.host": "tcp://127.0.0.1", "lmcache.mp.port": port},
        },
    }
    bench.stop_engine()
    path = os.pathsep.join(filter(None, [str(Path(__file__).parent), os.environ.get("PYTHONPATH"), str(behind)]))
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
