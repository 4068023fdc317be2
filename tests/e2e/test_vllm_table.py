"""The table: what a real vLLM engine with our connector says, situation by situation.

Each row compares 16 greedy ids with those of an engine without a connector, and says how many tokens were not computed.
Every value of every setting occurs at least once, and every fault in both load modes; not the whole product. Rows stand
in the order in which they share engines, because starting one takes longer than all that is asked of it.
"""

import attrs
import pytest
from support.e2e import rows
from support.e2e.bench import Bench
from support.e2e.expected import Expected
from support.e2e.rows import (
    Situation,
    fault,
    hit_after_the_engine_was_restarted,
    hit_from_disk_after_engine_and_server_were_restarted,
    one_rank_ends_in_the_middle_of_a_store,
)

pytestmark = pytest.mark.e2e


@attrs.frozen
class Row:
    """*engine* is a key of `support.e2e.bench.KINDS`, *expected* a fixture."""

    engine: str
    situation: Situation
    expected: str = "tiny"

    @property
    def name(self) -> str:
        return f"{self.engine}: {self.situation.__name__.replace('_', ' ')}"


FAULTS = [
    fault(copy, point, action)
    for copy, points in {
        "load": ("slots known", "half copied", "before valid"),
        "store": ("slots known", "half copied", "before commit"),
    }.items()
    for point in points
    for action in ("kill", "restart")
]

TABLE = [
    Row("async", rows.cold),
    Row("async", rows.hit_after_reset_prefix_cache),
    Row("async", rows.partial_prefix),
    Row("async", rows.two_turn_chat),
    Row("async", rows.two_requests_in_a_batch),
    Row("async", rows.exact_multiple_of_the_chunk),
    Row("async", rows.local_hit_that_ends_inside_a_chunk),
    Row("async", rows.reset_cache),
    Row("async", rows.corrupted_bytes),
    Row("sync", hit_after_the_engine_was_restarted("async")),
    Row("sync", rows.partial_prefix),
    Row("sync", rows.two_turn_chat),
    Row("sync", rows.two_requests_in_a_batch),
    Row("sync", rows.exact_multiple_of_the_chunk),
    Row("sync", rows.local_hit_that_ends_inside_a_chunk),
    Row("sync", rows.corrupted_bytes),
    Row("default processes", hit_after_the_engine_was_restarted("sync")),
    Row("default processes", rows.two_turn_chat),
    Row("small blocks", rows.cold),
    Row("small blocks", rows.hit_after_reset_prefix_cache),
    Row("small blocks", rows.local_hit_that_ends_inside_a_chunk),
    Row("speculative", rows.repetitive_chat),
    Row("few blocks", rows.preempted_after_a_hit),
    Row("few blocks, sync", rows.preempted_after_a_hit),
    Row("disk, async", hit_from_disk_after_engine_and_server_were_restarted("disk, async")),
    Row("disk, async", rows.corrupted_slabs_are_recomputed_and_counted),
    Row("disk, sync", hit_from_disk_after_engine_and_server_were_restarted("disk, async")),
    Row("disk, sync", rows.corrupted_slabs_are_recomputed_and_counted),
    *(Row("faults, async", each) for each in FAULTS),
    *(Row("faults, sync", each) for each in FAULTS),
    Row("two ranks", rows.cold, "two_ranks"),
    Row("two ranks", rows.hit_after_reset_prefix_cache, "two_ranks"),
    Row("two ranks", one_rank_ends_in_the_middle_of_a_store("long 1", "two ranks, sync"), "two_ranks"),
    Row("two ranks, sync", one_rank_ends_in_the_middle_of_a_store("long 2", "two ranks, sync"), "two_ranks"),
]


@pytest.mark.parametrize("row", TABLE, ids=lambda row: row.name)
def test_an_engine_with_the_connector_says_what_one_without_says(
    row: Row, bench: Bench, request: pytest.FixtureRequest
) -> None:
    expected: Expected = request.getfixturevalue(row.expected)
    row.situation(bench, row.engine, expected)


def test_a_hit_saves_time_to_first_token(bench: Bench, mid: Expected, capsys: pytest.CaptureFixture[str]) -> None:
    prompt = mid["4,100 tokens"]
    engine = bench.engine("mid")
    cold = engine.generate([prompt.tokens], tokens=1)
    engine.forget()
    hit = engine.generate([prompt.tokens], tokens=1)
    engine.forget()
    said = engine.generate([prompt.tokens])
    assert cold.cached == [0]
    assert hit.cached == said.cached == [rows.stored(prompt)]
    assert said.ids == [prompt.ids]
    with capsys.disabled():
        print(f"\ntime to first token of 4,100 tokens: cold {cold.seconds:.3f} s, hit {hit.seconds:.3f} s")
    assert hit.seconds < cold.seconds


def test_other_weights_on_the_same_path_are_a_miss(bench: Bench, tiny: Expected) -> None:
    engine = bench.engine("async", fresh=True)
    rows.check(engine, tiny["long 0"])
    engine.forget()
    bench.stop_engine()
    bench.write_model("tiny", seed=1)
    try:
        prompt = tiny["long 0"].tokens
        (without,) = bench.engine("no connector", fresh=True).generate([prompt]).ids
        made = bench.engine("async", fresh=True).generate([prompt])
        assert made.cached == [0]
        assert made.ids == [without]
        assert without != tiny["long 0"].ids
    finally:
        bench.stop_engine()
        bench.write_model("tiny", seed=0)
