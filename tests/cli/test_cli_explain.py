"""`lmcache-trio explain`, beside a server process: the reasons of a request's misses, as people read them."""

import json
import subprocess
import sys
from collections.abc import Iterator

import pytest
import trio
from support.server import digests

from lmcache_trio import Client, Role, open_client
from lmcache_trio._core.misses import Reason
from lmcache_trio.cli.explain import _WORDS, explanation

PROGRAM = [sys.executable, "-m", "lmcache_trio"]
CHUNK = 64 << 10


@pytest.fixture
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    where = f"unix://{tmp_path_factory.mktemp('explain')}/server.sock"
    command = [
        *PROGRAM,
        "serve",
        "--address",
        where,
        "--set",
        "memory.size=1MiB",
        "grace=0.5",
        "write_share=1.0",
        "lease_share=1.0",
    ]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        assert process.stdout is not None
        assert "ready" in process.stdout.readline()
        yield where
        process.terminate()


def run(*arguments: str) -> str:
    done = subprocess.run([*PROGRAM, "explain", *arguments], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


async def store(scheduler: Client, worker: Client, session: int, chain: list[bytes]) -> None:
    await scheduler.lookup(session, chain)
    async with worker.storing(session, b"", chain) as storing:
        assert len(storing.slots) == len(chain)
    scheduler.end(session)


async def test_a_request_is_explained_by_its_name(address: str) -> None:
    assert run("--address", address) == "No lookup has missed.\n"
    async with (
        open_client(address, role=Role.SCHEDULER, engine="one") as scheduler,
        open_client(address, role=Role.WORKER, engine="one") as worker,
    ):
        await worker.register(b"f" * 32, CHUNK, 16)
        await store(scheduler, worker, 1, digests(16, "old"))
        await store(scheduler, worker, 2, digests(4, "new"))
        await scheduler.lookup(3, [*digests(16, "old"), *digests(1, "tail")], request="chatcmpl-7")
        told = await trio.to_thread.run_sync(run, "chatcmpl-7", "--address", address)
        found = json.loads(await trio.to_thread.run_sync(run, "chatcmpl-7", "--json", "--address", address))
        every = json.loads(await trio.to_thread.run_sync(run, "--json", "--address", address))
        other = await trio.to_thread.run_sync(run, "chatcmpl-8", "--address", address)
    first, *lines = told.splitlines()
    assert first == "chatcmpl-7 of engine one"
    assert [line[:16].strip() for line in lines] == ["asked", "hit in memory", "missed", "missed"]
    assert "512 tokens from 1,536 on: evicted from memory to make room" in lines[2]
    assert "128 tokens from 2,048 on: new: the prompt diverged here" in lines[3]
    assert [run["reason"] for run in found["requests"][0]["missed_tokens"]] == ["evicted", "new_tail"]
    assert [record["request"] for record in every["requests"]] == ["chatcmpl-7", "", ""]
    assert "None of the latest lookups that missed is of the request chatcmpl-8" in other


def test_each_reason_has_words() -> None:
    assert set(_WORDS) == {reason.value for reason in Reason}


def test_a_reason_of_another_release_is_told_as_it_is() -> None:
    record = {"time": 1000.0, "request": "", "engine": "e", "tokens": 128, "hit_tokens": {"memory": 0, "tier": 0}}
    record |= {"missed_tokens": [{"reason": "eclipse", "from_token": 0, "tokens": 128}], "wait_seconds": 1.5}
    assert explanation(record, 1090.0) == (
        "a request without a name of engine e\n"
        "  asked   128 tokens, 1 min 30 s ago, waited 1.500 s for tiers\n"
        "  missed  128 tokens from 0 on: eclipse\n"
    )
