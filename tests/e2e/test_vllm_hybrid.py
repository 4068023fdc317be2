"""Models with several KV groups: windows, chunked local attention and states beside full attention, or a window alone.

vLLM's hybrid cache manager is on, with and without our connector. Each row compares greedy ids with those of an engine
without one, and says how many tokens were not computed.
"""

from collections.abc import Callable

import attrs
import pytest
from support.e2e import rows
from support.e2e.bench import CHUNK, Bench
from support.e2e.expected import Expected
from support.e2e.rows import Situation, check, stored

pytestmark = pytest.mark.e2e


def two_turn_chat(bench: Bench, kind: str, expected: Expected) -> None:
    """A state is kept at the end of the first turn's prompt, and not behind what was decoded."""
    engine = bench.engine(kind)
    check(engine, expected["turn one"])
    engine.forget()
    check(engine, expected["turn two"], cached=CHUNK if kind == "qwen3next" else 2 * CHUNK)


def partial_prefix(bench: Bench, kind: str, expected: Expected) -> None:
    """Of a window or a state only those are kept in memory that were stored: of a state no one in the middle."""
    engine = bench.engine(kind)
    check(engine, expected["long 0"])
    engine.forget()
    check(engine, expected["branch"], cached=0 if kind == "qwen3next" else 1400 // CHUNK * CHUNK)


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


def hit_after_the_engine_was_restarted(bench: Bench, kind: str, expected: Expected) -> None:
    engine = bench.engine(kind, fresh=True)
    check(engine, expected["long 0"])
    engine.forget()
    check(bench.engine(kind, fresh=True), expected["long 0"], cached=stored(expected["long 0"]))


def hit_from_disk_after_engine_and_server_were_restarted(bench: Bench, kind: str, expected: Expected) -> None:
    server, prompt = bench.servers["disk"], expected["long 0"]
    rows.put_on_disk(bench, kind, prompt)
    server.start()
    check(bench.engine(kind, fresh=True), prompt, cached=stored(prompt))
    (tier,) = server.status()["tiers"]
    assert tier["loads"] > 0
    assert tier["backend"]["corrupt"] == 0


def preempted_after_a_hit(bench: Bench, kind: str, expected: Expected) -> None:
    """Each of three groups has 33 blocks of 32 tokens: as many as two prompts of 505 need, and one request more."""
    rows.preempted_after_a_hit(bench, kind, expected)


def corrupted_bytes(bench: Bench, kind: str, expected: Expected) -> None:
    rows.corrupted_bytes_of("long 1", bench.servers["hybrid"])(bench, kind, expected)


@attrs.frozen
class Row:
    """*engine* is a key of `support.e2e.bench.KINDS`, which begins with the name of a model."""

    engine: str
    situation: Situation

    @property
    def name(self) -> str:
        return f"{self.engine}: {self.situation.__name__.replace('_', ' ')}"


HITS = [rows.cold, rows.hit_after_reset_prefix_cache, partial_prefix, two_turn_chat]
TABLE = [
    *(Row("gemma3", each) for each in [*HITS, aborted, corrupted_bytes, hit_after_the_engine_was_restarted]),
    Row("gemma3, few blocks", preempted_after_a_hit),
    Row("gemma3, disk", hit_from_disk_after_engine_and_server_were_restarted),
    *(Row("qwen3next", each) for each in [*HITS, aborted]),
    Row("qwen3next, disk", hit_from_disk_after_engine_and_server_were_restarted),
    *(Row("gptoss", each) for each in [*HITS, hit_after_the_engine_was_restarted]),
    *(Row("llama4", each) for each in HITS),
    *(Row("mistral", each) for each in [*HITS, aborted]),
    *(Row("gemma2", each) for each in HITS),
]


@pytest.mark.parametrize("row", TABLE, ids=lambda row: row.name)
def test_a_model_with_several_groups_says_what_it_says_without_the_connector(
    row: Row, bench: Bench, hybrid: Callable[[str], Expected]
) -> None:
    row.situation(bench, row.engine, hybrid(row.engine.partition(",")[0]))
