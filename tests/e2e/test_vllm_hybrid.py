"""Models with several KV groups: windows, chunked local attention and states beside full attention, or a window alone.

vLLM's hybrid cache manager is on, with and without our connector. Each row compares greedy ids with those of an engine
without one, and says how many tokens were not computed. The last rows of a model print figures.
"""

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from statistics import median

import attrs
import pytest
from support.e2e import rows
from support.e2e.bench import CHUNK, Bench
from support.e2e.engine import Engine, Server
from support.e2e.expected import Expected, Prompt, tokens_of
from support.e2e.pressure import Pressure
from support.e2e.rows import Situation, check, stored

pytestmark = pytest.mark.e2e

TURNS = int(os.environ.get("E2E_TURNS", "1"))
"""One shows that it works; three are what docs/performance.md quotes."""
CLEARLY = 0.05
"""A difference of two logarithms. What is computed with a hit differs a little from what is computed at once."""


def two_turn_chat(bench: Bench, kind: str, expected: Expected) -> None:
    """A state is kept at the end of the first turn's prompt, and not behind what was decoded."""
    engine = bench.engine(kind)
    check(engine, expected["turn one"])
    engine.forget()
    check(engine, expected["turn two"], cached=CHUNK if model_of(kind) == "qwen3next" else 2 * CHUNK)


def partial_prefix(bench: Bench, kind: str, expected: Expected) -> None:
    """Of a window or a state only those are kept in memory that were stored: of a state no one in the middle."""
    engine = bench.engine(kind)
    check(engine, expected["long 0"])
    engine.forget()
    check(engine, expected["branch"], cached=0 if model_of(kind) == "qwen3next" else 1400 // CHUNK * CHUNK)


def aborted(bench: Bench, kind: str, expected: Expected) -> None:
    """In the middle of its prompt, while it loads, and while it answers."""
    engine, prompt = bench.engine(kind), expected["long 1"]
    for steps in (1, 2, 3, 6, 9):
        engine.abort(prompt.tokens, steps=steps)
        engine.forget()
    check(engine, prompt)
    engine.forget()
    check(engine, prompt, cached=stored(prompt))
    engine.abort(prompt.tokens, steps=1)
    check(engine, prompt)


@attrs.frozen
class Parts:
    """What a hit of ten chunks needs of a model, and what is left of it when parts go. *shorter* is a hit of five."""

    of_shorter: int
    """Parts that the shorter hit needs of groups that are not of full attention."""
    without_windows: int
    """Chunks of the longest hit once the windows and states of the long one are gone."""
    cold: int = 0
    """Windows that no hit of ten chunks needs, of those that are computed again then: they go first."""
    without_full: int = 0
    """Chunks of the longest hit once the tenth chunk of full attention is gone, and all others are there."""
    of_4100: int = attrs.field(kw_only=True)
    """Parts that a hit of sixteen chunks, 4,096 tokens, needs of groups that are not of full attention."""
    kib_of_4100: int = attrs.field(kw_only=True)
    """KiB of all parts that this hit needs. One layer's full attention has 1 KiB a token."""
    layers: int = attrs.field(kw_only=True, default=4)


PARTS: Mapping[str, Parts] = {
    "gemma3": Parts(4, 5, cold=2, without_full=9, of_4100=4, kib_of_4100=16 * 512 + 4 * 512, layers=6),
    "gemma2": Parts(2, 5, cold=1, without_full=9, of_4100=2, kib_of_4100=16 * 512 + 2 * 512),
    "gptoss": Parts(1, 5, cold=1, without_full=9, of_4100=1, kib_of_4100=16 * 512 + 256),
    "llama4": Parts(3, 8, without_full=9, of_4100=0, kib_of_4100=16 * 256),
    "mistral": Parts(2, 5, of_4100=2, kib_of_4100=2 * 1024),
    "qwen3next": Parts(3, 5, without_full=5, of_4100=3, kib_of_4100=16 * 256 + 3 * 136),
}
"""gptoss's window of 128 tokens needs half a part. The eighth and the sixteenth chunk of llama4 end an attention chunk
of 1,024 tokens: no hit there needs others. qwen3next has a state of the shorter prompt alone, or of the longer one.
"""


def a_part_was_evicted(bench: Bench, kind: str, expected: Expected) -> None:
    """By other prompts, in the server's own order: first windows and states, later a chunk of full attention."""
    engine, server, prompt = bench.engine(kind), bench.servers["hybrid"], expected["long 0"]
    parts = PARTS[model_of(kind)]
    full = 0 if kind.startswith("mistral") else stored(prompt) // CHUNK
    shorter = prompt.tokens[: 5 * CHUNK + 120]
    check(engine, prompt)
    engine.forget()
    engine.generate([shorter], tokens=1)  # a state is kept where a prompt ends
    engine.forget()
    check(engine, prompt, cached=stored(prompt))
    engine.forget()
    assert engine.generate([shorter], tokens=1).cached == [5 * CHUNK]
    engine.forget()
    with Pressure(server) as pressure:
        pressure.keep(full + parts.of_shorter)
    check(engine, prompt, cached=parts.without_windows * CHUNK)
    engine.forget()  # what was computed again is stored; of full attention nothing was
    if not full:
        return
    with Pressure(server) as pressure:
        pressure.keep(pressure.others() - parts.cold - 1)
    check(engine, prompt, cached=parts.without_full * CHUNK)
    engine.forget()
    check(engine, prompt, cached=stored(prompt))


def hit_after_the_engine_was_restarted(bench: Bench, kind: str, expected: Expected) -> None:
    """What an engine with few blocks stored."""
    engine = bench.engine(f"{kind}, few blocks")
    check(engine, expected["long 0"])
    engine.forget()
    check(bench.engine(kind, fresh=True), expected["long 0"], cached=stored(expected["long 0"]))


def hit_from_disk_after_the_server_was_restarted(bench: Bench, kind: str, expected: Expected) -> None:
    """The engine lives on; a row of the tiny model restarts both."""
    engine, prompt = bench.engine(kind), expected["long 0"]
    with server_with_a_disk(bench) as server:
        join(engine)
        check(engine, prompt, cached=0)
        engine.forget()
        server.stop()  # by SIGTERM: what is queued for the disk is written within the grace
        server.start(*disk_settings(bench))
        join(engine)
        check(engine, prompt, cached=stored(prompt))
        (tier,) = server.statistics()["tiers"]
        assert tier["loads"] > 0
        assert tier["backend"]["corrupt"] == 0
    join(engine)


def corrupted_bytes(bench: Bench, kind: str, expected: Expected) -> None:
    rows.corrupted_bytes_of("long 1", bench.servers["hybrid"])(bench, kind, expected)


def figures(bench: Bench, kind: str, expected: Expected) -> None:
    """Of 4,100 tokens: vLLM's blocks, times to the first token, and bytes that are enough for a whole hit."""
    engine, alone, parts = bench.engine(kind), bench.beside(f"{kind}, no connector"), PARTS[kind]
    assert engine.blocks() == alone.blocks()
    times: dict[str, list[float]] = {"alone": [], "cold": [], "hit": []}
    for turn in range(TURNS):
        prompt = clear_prompt(alone, 8000 + 100 * turn)
        for name, asked in (("alone", alone), ("cold", engine)):
            asked.forget()
            made = asked.generate([prompt.tokens], tokens=1)
            assert (made.ids, made.cached) == ([prompt.ids], [0])
            times[name].append(made.seconds)
        for _ in range(3):
            times["hit"].append(hit(engine, prompt))
    with Pressure(bench.servers["hybrid"]) as pressure:
        kept = pressure.keep((0 if kind == "mistral" else 16) + parts.of_4100)
        assert kept == parts.kib_of_4100 << 10
        hit(engine, prompt)
        engine.forget()
    full = parts.layers * 16 * CHUNK << 10
    print(f"\n{kind}, 4,100 tokens: {engine.blocks()} blocks of KV with and without a connector")
    print(f"  memory that a whole hit needs: {kept >> 10:,} KiB; by all layers full, {full >> 10:,}: {kept / full:.3f}")
    print("  first token:", *(f"{name} {median(found):.4f} s" for name, found in times.items()))


def clear_prompt(engine: Engine, seed: int) -> Prompt:
    """A prompt of 4,100 tokens whose first token is likelier than the next one by far."""
    while True:
        tokens = tokens_of(seed, 4100)
        made = engine.generate([tokens], tokens=1, margins=True)
        if made.margins[0] >= CLEARLY:
            return Prompt(tokens, made.ids[0])
        seed += 1


def hit(engine: Engine, prompt: Prompt) -> float:
    """Seconds until the first token of a whole hit."""
    engine.forget()
    made = engine.generate([prompt.tokens], tokens=1)
    assert (made.ids, made.cached) == ([prompt.ids], [stored(prompt)])
    return made.seconds


@contextmanager
def server_with_a_disk(bench: Bench) -> Iterator[Server]:
    """The server of these models, started anew with a disk tier; without one when it is over."""
    server = bench.servers["hybrid"]
    server.stop()
    server.start(*disk_settings(bench))
    try:
        yield server
    finally:
        server.stop()
        server.start()


def disk_settings(bench: Bench) -> list[str]:
    tier = {"backend": "disk", "path": str(bench.where / "hybrid tier"), "size": "256MiB"}
    return [f"tiers.0.{key}={value}" for key, value in tier.items()]


def join(engine: Engine) -> None:
    """Return when *engine* stores at its server, and hits what it stored. It may just have been started."""
    for attempt in range(50):
        prompt = tokens_of(9000 + attempt, CHUNK + 40)
        engine.generate([prompt], tokens=1)
        engine.forget()
        if engine.generate([prompt], tokens=1).cached == [CHUNK]:
            engine.forget()
            return
        engine.forget()
    raise AssertionError(f"the engine did not find back to a restarted server: see {engine.log}")


def model_of(kind: str) -> str:
    return kind.partition(",")[0]


@attrs.frozen
class Row:
    """*engine* is a key of `support.e2e.bench.KINDS`, which begins with the name of a model."""

    engine: str
    situation: Situation

    @property
    def name(self) -> str:
        return f"{self.engine}: {self.situation.__name__.replace('_', ' ')}"


MODELS = ["gemma3", "qwen3next", "gptoss", "llama4", "mistral", "gemma2"]
FEW = [
    *(rows.cold, rows.hit_after_reset_prefix_cache, partial_prefix, two_turn_chat, rows.preempted_after_a_hit),
    *(aborted, a_part_was_evicted),
]
MANY = [
    *(hit_after_the_engine_was_restarted, hit_from_disk_after_the_server_was_restarted, corrupted_bytes),
    figures,
]
TABLE = [
    row
    for model in MODELS
    for row in [*(Row(f"{model}, few blocks", each) for each in FEW), *(Row(model, each) for each in MANY)]
]


@pytest.mark.parametrize("row", TABLE, ids=lambda row: row.name)
def test_a_model_with_several_groups_says_what_it_says_without_the_connector(
    row: Row, bench: Bench, hybrid: Callable[[str], Expected], capsys: pytest.CaptureFixture[str]
) -> None:
    row.situation(bench, row.engine, hybrid(model_of(row.engine)))
    if printed := capsys.readouterr().out:
        with capsys.disabled():
            print(printed, end="")
