"""Engines with chunks of unlike lengths, on one server and one disk."""

import pytest
from support.e2e import rows
from support.e2e.bench import CHUNK, Bench
from support.e2e.expected import ask_one

pytestmark = pytest.mark.e2e

OWN = 384
"""Tokens of the blocks that vLLM chooses for the states of the wide model, and so of its chunks."""


def test_a_model_with_a_block_size_of_its_own_lives_beside_a_llama(bench: Bench) -> None:
    expected = {
        "disk, async": (ask_one(bench.engine("no connector")), CHUNK),
        "qwen3next, wide, disk": (ask_one(bench.engine("qwen3next, wide, no connector"), clear=0.05), OWN),
    }
    server = bench.servers["disk"]
    for kind, (prompt, chunk) in expected.items():
        engine = bench.engine(kind)
        rows.check(engine, prompt, cached=0)
        engine.forget()
        rows.check(engine, prompt, cached=(len(prompt.tokens) - 1) // chunk * chunk)
        engine.forget()
    bench.stop_engine()
    server.stop()  # by SIGTERM: what is queued for the disk is written within the grace
    server.start()
    for kind, (prompt, chunk) in expected.items():
        before = server.status()["tiers"][0]["loads"]
        rows.check(bench.engine(kind, fresh=True), prompt, cached=(len(prompt.tokens) - 1) // chunk * chunk)
        (tier,) = server.status()["tiers"]
        assert tier["loads"] > before
        assert tier["backend"]["corrupt"] == 0
    bench.stop_engine()
