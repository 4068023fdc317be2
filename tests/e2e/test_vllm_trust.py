"""What a real engine stores while something goes wrong beside it, and whom vLLM's blocks belong to."""

import pytest
from support.e2e.bench import BROUGHT, CHUNK, Bench
from support.e2e.engine import Engine
from support.e2e.expected import Expected
from support.e2e.rows import check, stored

pytestmark = pytest.mark.e2e


@pytest.mark.parametrize("reset", [False, True], ids=["without a reset", "with a reset"])
def test_what_other_weights_computed_is_never_served_to_the_engine_of_the_checkpoint(
    bench: Bench, tiny: Expected, reset: bool
) -> None:
    """The second engine's files, name and layout are those of the first one before its weights were replaced."""
    prompt = tiny["exact" if reset else "long 1"]
    other = bench.write_model("other", seed=1)
    engine = bench.engine("async", fresh=True)
    check(engine, tiny["long 0"])
    told = warnings(engine)
    assert engine.reload(other, reset=reset) == reset
    made = engine.generate([prompt.tokens], tokens=len(prompt.ids))
    assert made.ids != [prompt.ids], "the other weights say the same"
    engine.forget()
    again = engine.generate([prompt.tokens], tokens=len(prompt.ids))
    assert again.ids == made.ids
    assert again.cached == [stored(prompt) if reset else 0]
    assert warnings(engine) - told == (not reset)
    check(bench.engine("async", fresh=True), prompt, cached=0)
    bench.stop_engine()


def warnings(engine: Engine) -> int:
    """How many times engines of this kind have said that nobody had reset."""
    return engine.log.read_text(errors="replace").count("weights have changed and its caches were not reset")


def test_what_a_failed_load_of_another_connector_spoiled_is_not_stored(bench: Bench, tiny: Expected) -> None:
    """It brings the first tokens of the prompt, and says when the step is over that it did not."""
    prompt = tiny["long 2"]
    engine = bench.engine("async", fresh=True)
    engine.forget(connector=True)
    engine = bench.engine("behind a failing connector", fresh=True)
    assert len(prompt.tokens) > BROUGHT > CHUNK
    check(engine, prompt)  # vLLM computes what was not brought
    engine.forget()
    clean = bench.engine("async", fresh=True)
    check(clean, prompt, cached=stored(prompt))  # and that was stored
    bench.stop_engine()


@pytest.mark.parametrize("kind", ["async", "two processes"])
def test_an_engine_sleeps_and_resets_right_after_it_has_stored(bench: Bench, tiny: Expected, kind: str) -> None:
    """Nothing of vLLM's is held for a store, so that nobody has to turn the crank of an engine in one process."""
    engine = bench.engine(kind, fresh=True)
    for prompt in (tiny["long 0"], tiny["long 1"]):
        check(engine, prompt)
        engine.reset_at_once()
        check(engine, prompt)
        engine.sleep()
        check(engine, prompt, cached=0)  # a sleep resets the connector too
    bench.stop_engine()


@pytest.mark.parametrize("kind", ["async", "two processes"])
def test_an_engine_whose_kv_memory_was_remapped_stores_and_loads_as_before(
    bench: Bench, tiny: Expected, kind: str
) -> None:
    engine = bench.engine(kind, fresh=True)
    check(engine, tiny["long 0"])
    engine.remap()
    for _ in range(2):
        check(engine, tiny["long 0"], cached=0)  # a sleep resets the connector too
        engine.forget()
        check(engine, tiny["long 0"], cached=stored(tiny["long 0"]))
        engine.remap()
    bench.stop_engine()
