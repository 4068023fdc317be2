"""Run by `nox -s build` where torch is not installed: a server serves, keeps a prompt, and answers its lookup.

The commands of the command line are the installed ones, and so is the engine's scheduler. Its worker copies bytes.
"""

import subprocess
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path

import trio

from lmcache_trio import Role, open_client
from lmcache_trio.adapters import PollingSchedulerAdapter

TOKENS = list(range(256))
PROGRAM = str(Path(sys.executable).parent / "lmcache-trio")


def main() -> None:
    if find_spec("torch") is not None:
        sys.exit("torch is installed here: this shows nothing")
    with tempfile.TemporaryDirectory(prefix="no-torch-", dir="/tmp") as folder:
        address = f"unix://{folder}/server.sock"
        tier = f'tiers=[{{backend="disk", path="{folder}/disk", size="64MiB", slab_size="16MiB"}}]'
        command = [PROGRAM, "serve", "--address", address, "--set", "memory.size=64MiB", tier]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
            assert server.stdout is not None
            assert "ready" in server.stdout.readline()
            try:
                trio.run(_use, address)
            finally:
                server.terminate()
        assert server.returncode == 0
    done = _run("demo")
    assert (done.returncode, "lmcache-trio[demo]" in done.stderr) == (2, True), done.stderr


async def _use(address: str) -> None:
    """Keep one prompt and look it up, while an operator looks and measures."""
    scheduler = PollingSchedulerAdapter(
        address, engine_id="e", identity=["m"], block_tokens=16, chunk_tokens=64, lookup_timeout=30.0
    )
    async with open_client(address, role=Role.WORKER, engine="e") as worker:
        await worker.register(b"f" * 32, 4096, 16)
        assert await trio.to_thread.run_sync(_look_up, scheduler, "first") == 0
        digests, session = scheduler.extend("first", TOKENS), scheduler.session_spec("first")
        async with worker.storing(session, b"", digests) as storing:
            for i, slot in storing.slots.items():
                slot[:] = digests[i] * (len(slot) // 32)
        assert len(storing.slots) == len(digests), storing.dropped
        assert await trio.to_thread.run_sync(_look_up, scheduler, "again") == len(TOKENS)
        await trio.to_thread.run_sync(_operate, address)
    scheduler.shutdown()


def _look_up(scheduler: PollingSchedulerAdapter, name: str) -> int | None:
    scheduler.maybe_submit_lookup_request(name, TOKENS)
    return scheduler.check_lookup_result(name)


def _operate(address: str) -> None:
    for arguments in (["status"], ["status", "--check"], ["ls"], ["ping"]):
        done = _run(*arguments, "--address", address)
        assert done.returncode == 0, done.stderr
        print(done.stdout)
    rows = ("--rows", "ping", "lookup_8k_hit", "lookup_8k_miss", "--rounds", "1", "--lookups", "5")
    done = _run("bench", *rows, "--address", address)
    assert (done.returncode, "lookup_8k_hit" in done.stdout) == (0, True), done.stderr
    print(done.stdout)


def _run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([PROGRAM, *arguments], capture_output=True, text=True, timeout=120, check=False)


if __name__ == "__main__":
    main()
