"""Two data-parallel engines over HTTP, whose lookups are asynchronous: each lookup is answered, and there are hits.

Six chats of four turns share two engines that run one request each, so that several requests' lookups wait at once.
What is judged is what came and what the engines' log says of lookups. The times to the first token are printed beside
those of engines without a connector: a test cannot know how busy a machine is.

Each engine computes in the process that schedules. Workers in processes of their own wait by sched_yield: two of them
leave no time to anybody else on a machine of two cores. A process that only slept for 5 ms woke after 11 s
(Linux 6.18), and so did the server.
"""

import json
import math
import os
import signal
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import attrs
import pytest
import trio
from support.e2e.bench import ARGUMENTS, CHUNK, Bench
from support.e2e.engine import Engine, Server
from support.e2e.expected import Expected, Prompt
from support.e2e.model import TINY

pytestmark = pytest.mark.e2e

CHATS = ("long 0", "long 1", "long 2", "long 3", "exact", "branch")
"""Three for each engine: while one is computed two wait, and their lookups are asked for in one step."""
TURNS = (0.4, 0.6, 0.8, 1.0)
"""How much of a chat's prompt each turn's prompt is."""
ROUNDS = 3
"""How often the chats are held, each time with nothing in vLLM's own caches: the last two find all in ours."""
ROUND_SECONDS = 300.0
"""24 answers of 16 tokens: 15 s where two cores were shared by ten."""
LOOKUP_SECONDS = 10.0
"""Twice the default: a server's process may have to wait where two cores run thirty."""
NOT_ANSWERED = "a lookup was not answered within"
ENVIRONMENT = {
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # two engines share the cores
    "VLLM_ENABLE_V1_MULTIPROCESSING": "01",  # yes; its CPU engine takes "1" as a reason for a worker's process
    "VLLM_SERVER_DEV_MODE": "1",  # POST /reset_prefix_cache
    "LMCACHE_TRIO_E2E_FORK": "1",
}


@attrs.frozen
class Answer:
    """What the stream of one completion said. *cached* tokens of its prompt were not computed."""

    ids: list[int]
    cached: int
    first_seconds: float


def test_each_lookup_of_data_parallel_engines_is_answered(
    bench: Bench, tiny: Expected, capsys: pytest.CaptureFixture[str]
) -> None:
    chats = [tiny[name] for name in CHATS]
    bench.stop_engine()
    with engines(bench, "plain", {}) as address:
        plain = trio.run(hold_all, address, chats)
    server = Server(bench.where / "data-parallel", chunk_tokens=CHUNK, size="256MiB")
    server.start()
    try:
        with engines(bench, "ours", {"kv_transfer_config": transfer(server)}) as address:
            ours = trio.run(hold_all, address, chats)
            counted = server.status()["counted"]
            assert NOT_ANSWERED not in log_of(bench, "ours").read_text(errors="replace")
            os.kill(server.pid, signal.SIGSTOP)
            trio.run(complete, address, chats[0].tokens, 1)
            assert NOT_ANSWERED in log_of(bench, "ours").read_text(errors="replace"), "the log tells of no lookup"
    finally:
        os.kill(server.pid, signal.SIGCONT)
        server.stop()
    assert all(answer.cached >= CHUNK for answers in ours[1:] for answer in answers)
    assert counted["hits"] >= (ROUNDS - 1) * len(CHATS) * len(TURNS)
    with capsys.disabled():
        print(f"\nfirst token: 2 data-parallel engines, {len(CHATS)} chats of {len(TURNS)} turns, seconds")
        for name, rounds in (("plain", plain), ("ours", ours)):
            for i, answers in enumerate(rounds):
                print(f"  {name}, round {i}: p50 {seconds_at(0.5, answers):.3f}, p99 {seconds_at(0.99, answers):.3f}")
        every = [[answer for answers in rounds for answer in answers] for rounds in (ours, plain)]
        print(f"  p99 of all rounds, ours by plain: {seconds_at(0.99, every[0]) / seconds_at(0.99, every[1]):.2f}")


def seconds_at(share: float, answers: Sequence[Answer]) -> float:
    """The time to the first token that *share* of the *answers* stayed within."""
    return sorted(answer.first_seconds for answer in answers)[math.ceil(len(answers) * share) - 1]


def transfer(server: Server) -> dict[str, Any]:
    return {
        "kv_connector": "LMCacheTrioConnector",
        "kv_connector_module_path": "lmcache_trio.adapters.vllm",
        "kv_role": "kv_both",
        "kv_load_failure_policy": "recompute",
        "kv_connector_extra_config": {"address": server.address, "lookup_timeout": LOOKUP_SECONDS},
    }


def log_of(bench: Bench, name: str) -> Path:
    return bench.where / f"data-parallel-{name}.log"


@contextmanager
def engines(bench: Bench, name: str, more: Mapping[str, Any]) -> Iterator[Path]:
    """Two engines behind one front end, which listens at the path that is given."""
    address = bench.where / f"{name}.sock"
    arguments = {
        **ARGUMENTS,
        "model": str(bench.model("tiny")),
        "dtype": TINY.dtype,
        "kv_cache_memory_bytes": 1 << 26,
        "max_num_seqs": 1,
        "data_parallel_size": 2,
        "distributed_executor_backend": "uni",
        "enable_prompt_tokens_details": True,
        "served_model_name": "tiny",
        "uds": str(address),
        **more,
    }
    del arguments["disable_log_stats"]  # as a flag it has no value
    forker = next(iter(bench.forkers.values()))
    engine = Engine(log_of(bench, name), {"serve": flags(arguments)}, environment=ENVIRONMENT, forker=forker)
    try:
        yield address
    finally:
        engine.kill()


def flags(arguments: Mapping[str, Any]) -> list[str]:
    found: list[str] = []
    for name, value in arguments.items():
        said = json.dumps(value) if isinstance(value, dict) else str(value)
        found += [f"--{name.replace('_', '-')}", *([] if value is True else [said])]
    return found


async def hold_all(address: Path, chats: Sequence[Prompt]) -> list[list[Answer]]:
    """The answers of every round, of which each whole prompt's is right."""
    rounds: list[list[Answer]] = []
    for _ in range(ROUNDS):
        with trio.fail_after(ROUND_SECONDS):
            await forget(address)
            answers: list[Answer] = []
            async with trio.open_nursery() as nursery:
                for chat in chats:
                    nursery.start_soon(hold, address, chat, answers)
        assert len(answers) == len(chats) * len(TURNS)
        rounds.append(answers)
    return rounds


async def hold(address: Path, chat: Prompt, answers: list[Answer]) -> None:
    """One chat, whose turns are prefixes of its prompt."""
    for share in TURNS:
        answer = await complete(address, chat.tokens[: round(len(chat.tokens) * share)], len(chat.ids))
        answers.append(answer)
    assert answer.ids == chat.ids, f"{answer.cached} of {len(chat.tokens)} tokens came from a cache"


async def complete(address: Path, prompt: Sequence[int], tokens: int) -> Answer:
    """Continue *prompt* greedily by *tokens*."""
    asked = {
        "model": "tiny",
        "prompt": list(prompt),
        "max_tokens": tokens,
        "temperature": 0,
        "ignore_eos": True,
        "return_token_ids": True,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    began, first = trio.current_time(), math.inf
    said = b""
    async with await post(address, "/v1/completions", asked) as stream:
        async for piece in stream:
            said += piece
            if first is math.inf and b"data: {" in said:
                first = trio.current_time() - began
    events = [json.loads(line[6:]) for line in said.splitlines() if line.startswith(b"data: {")]
    assert events, said
    ids = [token for event in events for choice in event["choices"] for token in choice["token_ids"] or ()]
    assert len(ids) == tokens
    return Answer(ids, events[-1]["usage"]["prompt_tokens_details"]["cached_tokens"], first)


async def forget(address: Path) -> None:
    """Drop vLLM's own prefix caches."""
    said = b""
    async with await post(address, "/reset_prefix_cache", {}) as stream:
        async for piece in stream:
            said += piece
    assert json.loads(said.splitlines()[-1]) == {"success": True}


async def post(address: Path, path: str, asked: Mapping[str, Any]) -> trio.abc.Stream:
    """A connection on which the answer to one request comes. Each event of a stream comes as one line."""
    body = json.dumps(asked).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nConnection: close\r\n"
    stream = await trio.open_unix_socket(address)
    await stream.send_all(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
    return stream
