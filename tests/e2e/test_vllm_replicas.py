"""Two ranks of a real engine that hold the same KV: the server keeps it once, and both ranks load it."""

import pytest
from support.e2e import rows
from support.e2e.bench import CHUNK, Bench
from support.e2e.expected import ask_two_ranks

pytestmark = pytest.mark.e2e


def test_what_two_ranks_hold_alike_is_kept_once_and_loaded_by_both(bench: Bench) -> None:
    expected = ask_two_ranks(bench.engine("replicas, no connector"))
    prompt = expected["long 0"]
    engine = bench.engine("replicas")
    before = bench.server.status()["held"]
    rows.check(engine, prompt, cached=0)
    engine.forget()
    rows.check(engine, prompt, cached=rows.stored(prompt))
    held = bench.server.status()["held"]
    chunks = held["chunks_ready"] - before["chunks_ready"]
    assert chunks == (len(prompt.tokens) + len(prompt.ids) - 1) // CHUNK
    assert held["slots_ready"] - before["slots_ready"] == chunks
    engine.forget()
    rows.check(bench.engine("replicas", fresh=True), expected["long 0"], cached=rows.stored(prompt))
    bench.stop_engine()
