"""The situations of the table. Each gets a bench and a kind of engine, and asserts the ids of an engine without us."""

import os
from collections.abc import Callable, Mapping
from typing import Any

from support.e2e.bench import CHUNK, Bench
from support.e2e.engine import Engine, Server
from support.e2e.expected import Expected, Prompt

__all__ = [
    "Situation",
    "corrupted_bytes_of",
    "fault",
    "hit_after_the_engine_was_restarted",
    "hit_from_disk_after_engine_and_server_were_restarted",
    "one_rank_ends_in_the_middle_of_a_store",
    "put_on_disk",
]

Situation = Callable[[Bench, str, Expected], None]


def check(engine: Engine, prompt: Prompt, *, cached: int | None = None) -> None:
    """*prompt* has its ids, and *cached* of its tokens were not computed."""
    made = engine.generate([prompt.tokens], tokens=len(prompt.ids))
    assert cached is None or made.cached == [cached]
    assert made.ids == [prompt.ids], f"{made.cached} of {len(prompt.tokens)} tokens came from the cache"


def stored(prompt: Prompt) -> int:
    """Tokens of *prompt* that a hit gives: whole chunks, and one token is left to compute."""
    return (len(prompt.tokens) - 1) // CHUNK * CHUNK


def cold(bench: Bench, kind: str, expected: Expected) -> None:
    check(bench.engine(kind), expected["long 0"], cached=0)


def hit_after_reset_prefix_cache(bench: Bench, kind: str, expected: Expected) -> None:
    engine = bench.engine(kind)
    check(engine, expected["long 0"])
    engine.forget()
    check(engine, expected["long 0"], cached=stored(expected["long 0"]))


def hit_after_the_engine_was_restarted(first: str) -> Situation:
    """What an engine of kind *first* stored: with other processes, another hash seed, another way to load.

    That one is new too: an engine whose cache was reset names what it computes by an identity of its own.
    """

    def situation(bench: Bench, kind: str, expected: Expected) -> None:
        engine = bench.engine(first, fresh=True)
        check(engine, expected["long 0"])
        engine.forget()
        check(bench.engine(kind, fresh=True), expected["long 0"], cached=stored(expected["long 0"]))

    situation.__name__ = f"hit after the engine was restarted, before it was {first}"
    return situation


def partial_prefix(bench: Bench, kind: str, expected: Expected) -> None:
    engine = bench.engine(kind)
    check(engine, expected["long 0"])
    engine.forget()
    check(engine, expected["branch"], cached=600 // CHUNK * CHUNK)


def local_hit_that_ends_inside_a_chunk(bench: Bench, kind: str, expected: Expected) -> None:
    engine = bench.engine(kind)
    check(engine, expected["long 1"])
    engine.forget()
    engine.generate([expected["long 1"].tokens[:400]], tokens=1)  # blocks up to 384 are the engine's own then
    made = engine.generate([expected["long 1"].tokens, expected["long 1"].tokens[:400]], batch=True)
    assert made.ids[0] == expected["long 1"].ids
    assert made.cached[0] == stored(expected["long 1"])


def two_turn_chat(bench: Bench, kind: str, expected: Expected) -> None:
    """The second turn's prompt holds the first one's answer, whose KV was computed by decoding."""
    engine = bench.engine(kind)
    check(engine, expected["turn one"])
    engine.forget()
    check(engine, expected["turn two"], cached=2 * CHUNK)


def repetitive_chat(bench: Bench, kind: str, expected: Expected) -> None:
    """What was drafted and rejected went through the blocks too; what is stored is what was accepted."""
    engine = bench.engine(kind)
    check(engine, expected["stutter"])
    engine.forget()
    check(engine, expected["stutter again"], cached=2 * CHUNK)


def two_requests_in_a_batch(bench: Bench, kind: str, expected: Expected) -> None:
    engine = bench.engine(kind)
    pair = [expected["long 0"], expected["long 1"]]
    for cached in (None, [stored(prompt) for prompt in pair]):
        made = engine.generate([prompt.tokens for prompt in pair], batch=True)
        assert made.ids == [prompt.ids for prompt in pair]
        assert cached is None or made.cached == cached
        engine.forget()


def exact_multiple_of_the_chunk(bench: Bench, kind: str, expected: Expected) -> None:
    engine = bench.engine(kind)
    assert len(expected["exact"].tokens) % CHUNK == 0
    check(engine, expected["exact"])
    engine.forget()
    check(engine, expected["exact"], cached=stored(expected["exact"]))


def preempted_after_a_hit(bench: Bench, kind: str, expected: Expected) -> None:
    """The blocks hold all short prompts and the first to need one more; the last has to wait. 33 blocks of 32 tokens
    are for two of them.
    """
    engine = bench.engine(kind)
    prompts = [prompt for name, prompt in expected.items() if name.startswith("short")]
    for prompt in prompts:
        check(engine, prompt)
    engine.forget()
    before = engine.preemptions()
    made = engine.generate([prompt.tokens for prompt in prompts], batch=True)
    assert made.cached == [CHUNK] * len(prompts)
    assert engine.preemptions() > before
    assert made.ids == [prompt.ids for prompt in prompts]


def reset_cache(bench: Bench, kind: str, expected: Expected) -> None:
    engine = bench.engine(kind)
    check(engine, expected["long 2"])
    engine.forget(connector=True)
    check(engine, expected["long 2"], cached=0)
    engine.forget()
    check(engine, expected["long 2"], cached=stored(expected["long 2"]))


def corrupted_bytes(bench: Bench, kind: str, expected: Expected) -> None:
    corrupted_bytes_of("long 3", bench.server)(bench, kind, expected)


def corrupted_bytes_of(name: str, server: Server) -> Situation:
    """The check can fail: with every sign in *server*'s arena turned, a hit says something else."""

    def situation(bench: Bench, kind: str, expected: Expected) -> None:
        engine = bench.engine(kind)
        check(engine, expected[name])
        engine.forget()
        _turn_signs(server)
        made = engine.generate([expected[name].tokens])
        assert made.cached == [stored(expected[name])]
        assert made.ids != [expected[name].ids]
        engine.forget(connector=True)
        check(engine, expected[name], cached=0)

    return situation


def hit_from_disk_after_engine_and_server_were_restarted(first: str) -> Situation:
    """What an engine of kind *first* stored."""

    def situation(bench: Bench, kind: str, expected: Expected) -> None:
        server, prompt = bench.servers["disk"], expected["long 0"]
        put_on_disk(bench, first, prompt)
        server.start()
        engine = bench.engine(kind, fresh=True)
        check(engine, prompt, cached=stored(prompt))
        (tier,) = server.status()["tiers"]
        assert tier["loads"] == stored(prompt) // CHUNK
        engine.forget()
        check(engine, prompt, cached=stored(prompt))
        counted = engine.metrics()
        by_source = [counted[f"vllm:prompt_tokens_cached_by_source {source}"] for source in ("device", "host", "disk")]
        assert by_source == [0, stored(prompt), stored(prompt)]  # in memory by the second time
        ours = {name: counted[f"vllm:lmcache_trio_{name}"] for name in ("loaded_chunks", "failed_chunks", "copy_bugs")}
        assert ours == {"loaded_chunks": 2 * stored(prompt) // CHUNK, "failed_chunks": 0, "copy_bugs": 0}
        assert counted["vllm:lmcache_trio_loaded_bytes"] == 2 * stored(prompt) * 4096
        assert tier["backend"]["corrupt"] == 0

    situation.__name__ = f"hit from disk after engine and server were restarted, before they were {first}"
    return situation


def corrupted_slabs_are_recomputed_and_counted(bench: Bench, kind: str, expected: Expected) -> None:
    server, prompt = bench.servers["disk"], expected["long 1"]
    put_on_disk(bench, kind, prompt)
    slabs = sorted(bench.tier.glob("lmcache-trio-format-*/lmcache-trio-slab-*"))
    assert slabs, f"no slab in {bench.tier}"
    for slab in slabs:
        content = bytearray(slab.read_bytes())
        content[::4096] = bytes(byte ^ 1 for byte in content[::4096])  # one bit a page: no chunk is whole
        with slab.open("r+b") as file:
            file.write(content)
    server.start()
    engine = bench.engine(kind, fresh=True)
    check(engine, prompt, cached=0)
    (tier,) = server.status()["tiers"]
    assert tier["loads"] == 0
    assert tier["backend"]["corrupt"] > 0
    engine.forget()
    check(engine, prompt, cached=stored(prompt))  # what was computed instead is a hit again


def put_on_disk(bench: Bench, kind: str, prompt: Prompt) -> None:
    """*prompt* is in the disk tier; neither the engine that computed it nor its server lives any more."""
    engine = bench.engine(kind)
    check(engine, prompt)
    engine.forget()
    bench.stop_engine()
    bench.servers["disk"].stop()  # by SIGTERM: what is queued for the disk is written within the grace


def fault(copy: str, point: str, action: str) -> Situation:
    """The server is killed, or killed and started again, while a worker stands at *point* of a load or a store."""

    def situation(bench: Bench, kind: str, expected: Expected) -> None:
        prompt = expected["long 0"]
        engine = _with_a_server(bench, kind, prompt)
        if copy == "store":
            engine.forget(connector=True)

        def break_it(where: Mapping[str, Any]) -> None:
            if (where["copy"], where["point"]) == (copy, point):
                bench.gate.action = None
                bench.server.kill()
                if action == "restart":
                    bench.server.start()

        bench.gate.reached.clear()
        bench.gate.action = break_it
        check(engine, prompt)
        engine.forget()
        assert bench.gate.action is None, f"no {copy} came to {point!r}: {bench.gate.reached}"
        attempts = [where for where in bench.gate.reached if (where["copy"], where["point"]) == ("load", "slots known")]
        assert len(attempts) == (copy == "load"), "what failed was tried again"
        check(engine, prompt)

    situation.__name__ = f"{action} at {point} of a {copy}"
    return situation


def one_rank_ends_in_the_middle_of_a_store(name: str, then: str) -> Situation:
    """The engine goes with it. What the other rank wrote is no chunk: the next, of kind *then*, stores it whole.

    *name* is a prompt that no row stored before. A reset would not do: the next engine would not look for what is
    computed after one.
    """

    def situation(bench: Bench, kind: str, expected: Expected) -> None:
        prompt = expected[name]
        engine = bench.engine(kind)

        def end_it(where: Mapping[str, Any]) -> None:
            if (where["copy"], where["point"], where["rank"]) == ("store", "half copied", 1):
                bench.gate.action = None
                os.kill(where["pid"], 9)

        bench.gate.action = end_it
        try:
            engine.generate([prompt.tokens])
            engine.forget()
        except AssertionError:
            pass  # vLLM ends an engine that lost a worker
        assert bench.gate.action is None
        engine = bench.engine(then, fresh=True)
        check(engine, prompt, cached=0)
        engine.forget()
        check(engine, prompt, cached=stored(prompt))

    situation.__name__ = "one rank ends in the middle of a store"
    return situation


def _with_a_server(bench: Bench, kind: str, prompt: Prompt) -> Engine:
    """The engine, joined to a live server that has *prompt*; however often that has to be stored."""
    engine = bench.engine(kind)
    if bench.server.process is None or bench.server.process.poll() is not None:
        bench.server.start()
    for _ in range(50):
        made = engine.generate([prompt.tokens])
        assert made.ids == [prompt.ids]
        engine.forget()
        if made.cached == [stored(prompt)]:
            return engine
    raise AssertionError(f"the engine did not find back to a restarted server: see {engine.log}")


def _turn_signs(server: Server) -> None:
    """Flip the sign of every float32 in the arena."""
    links = {int(name): os.readlink(f"/proc/{server.pid}/fd/{name}") for name in os.listdir(f"/proc/{server.pid}/fd")}
    (arena,) = {number for number, target in links.items() if target.startswith("/memfd:lmcache-trio arena")}
    file = os.open(f"/proc/{server.pid}/fd/{arena}", os.O_RDWR)
    try:
        for at in range(0, 1 << 26, 1 << 20):
            piece = bytearray(os.pread(file, 1 << 20, at))
            if any(piece):
                piece[3::4] = bytes(byte ^ 0x80 for byte in piece[3::4])
                os.pwrite(file, piece, at)
    finally:
        os.close(file)
