"""What an engine without a connector generates: the only thing that the rows of the table are compared with.

Sums differ a little with the number of rows that are computed together, and a random model may stand right between two
tokens. So prompts are chosen of which the engine without a connector says the same alone, in a batch, and with its own
prefix cache: what differs then is wrong KV, and nothing else.
"""

import random
from collections.abc import Callable, Mapping, Sequence

import attrs

from support.e2e.engine import Engine

__all__ = ["Expected", "Prompt", "ask_hybrid", "ask_latent", "ask_mid", "ask_one", "ask_tiny", "ask_two_ranks"]

CANDIDATES = 24
CLEAR = 0.005
"""By how much each token of an answer is likelier than the next, in logarithms. A token's KV differs a little
when it is decoded, not prefilled: a prompt whose closest choice is closer has one answer now and another one then."""
TURN = 64
"""Tokens of a turn's answer: with the 450 of its prompt they complete a chunk of 256, by decoding."""


@attrs.frozen
class Prompt:
    """*tokens* and the greedy *ids* that follow them."""

    tokens: list[int]
    ids: list[int]


Expected = Mapping[str, Prompt]


def tokens_of(seed: int, count: int) -> list[int]:
    """*count* token ids that *seed* decides."""
    source = random.Random(seed)
    return [source.randrange(3, 32_000) for _ in range(count)]


def ask_tiny(engine: Engine) -> Expected:
    """Every prompt that the rows on the tiny model use."""
    long = _stable(engine, lambda seed: tokens_of(seed, 1000), 4)
    short = _stable(engine, lambda seed: tokens_of(1000 + seed, 505), 2)
    (exact,) = _stable(engine, lambda seed: tokens_of(2000 + seed, 1024), 1)
    (branch,) = _stable(engine, lambda seed: long[0].tokens[:600] + tokens_of(3000 + seed, 200), 1)
    (one,) = _stable(engine, lambda seed: tokens_of(4000 + seed, 450), 1, wanted=TURN)
    (two,) = _stable(engine, lambda seed: one.tokens + one.ids + tokens_of(5000 + seed, 50), 1)
    (stutter,) = _stable(engine, lambda seed: tokens_of(6000 + seed, 45) * 10, 1, wanted=TURN)
    (again,) = _stable(engine, lambda seed: stutter.tokens + stutter.ids + tokens_of(7000 + seed, 50), 1)
    found = {f"long {i}": prompt for i, prompt in enumerate(long)}
    found |= {f"short {i}": prompt for i, prompt in enumerate(short)}
    return {
        **found,
        "exact": exact,
        "branch": branch,
        "turn one": one,
        "turn two": two,
        "stutter": stutter,
        "stutter again": again,
    }


def ask_two_ranks(engine: Engine) -> Expected:
    return {f"long {i}": prompt for i, prompt in enumerate(_stable(engine, lambda seed: tokens_of(seed, 1000), 3))}


def ask_mid(engine: Engine) -> Expected:
    (found,) = _stable(engine, lambda seed: tokens_of(seed, 4100), 1)
    return {"4,100 tokens": found}


def ask_one(engine: Engine, *, clear: float = CLEAR) -> Prompt:
    """One prompt of 1,200 tokens, of which chunks of 256 and of 384 tokens cover unlike many."""
    (found,) = _stable(engine, lambda seed: tokens_of(seed, 1200), 1, clear=clear)
    return found


def ask_latent(engine: Engine) -> Expected:
    """A prompt, *cold* and behind a *hit* in the engine's own cache, as long as one in chunks of 256 tokens."""
    for seed in range(CANDIDATES):
        tokens = tokens_of(seed, 780)
        engine.forget()
        cold, hit = (engine.generate([tokens], margins=True) for _ in range(2))
        assert (cold.cached, hit.cached) == ([0], [768])
        if min(cold.margins + hit.margins) >= CLEAR:
            return {"cold": Prompt(tokens, cold.ids[0]), "hit": Prompt(tokens, hit.ids[0])}
    raise AssertionError(f"none of {CANDIDATES} prompts has clear answers")


def ask_hybrid(engine: Engine, *, clear: float = CLEAR) -> Expected:
    """The prompts of a model with several KV groups, whose windows have left most of the long ones."""
    long = _stable(engine, lambda seed: tokens_of(seed, 2600), 2, clear=clear)
    (branch,) = _stable(engine, lambda seed: long[0].tokens[:1400] + tokens_of(3000 + seed, 200), 1, clear=clear)
    (one,) = _stable(engine, lambda seed: tokens_of(4000 + seed, 450), 1, wanted=TURN, clear=clear / 10)
    (two,) = _stable(engine, lambda seed: one.tokens + one.ids + tokens_of(5000 + seed, 50), 1, clear=clear)
    short = _stable(engine, lambda seed: tokens_of(1000 + seed, 505), 4, clear=clear)
    found = {"long 0": long[0], "long 1": long[1], "branch": branch, "turn one": one, "turn two": two}
    return found | {f"short {i}": prompt for i, prompt in enumerate(short)}


def _stable(
    engine: Engine, make: Callable[[int], list[int]], count: int, *, wanted: int = 16, clear: float = CLEAR
) -> list[Prompt]:
    """*count* prompts of which the engine says the same in every way of computing them, and the same together."""
    chosen: list[Prompt] = []
    for seed in range(CANDIDATES):
        tokens = make(seed)
        engine.forget()
        asked = engine.generate([tokens], tokens=wanted, margins=True)
        if min(asked.margins) < clear:
            continue
        (cold,) = asked.ids
        (again,) = engine.generate([tokens], tokens=wanted).ids
        if cold == again and _same_together(engine, [*chosen, Prompt(tokens, cold)]):
            chosen.append(Prompt(tokens, cold))
        if len(chosen) == count:
            return chosen
    raise AssertionError(f"only {len(chosen)} of {CANDIDATES} prompts have one answer without a connector")


def _same_together(engine: Engine, prompts: Sequence[Prompt]) -> bool:
    if len(prompts) == 1:
        return True
    engine.forget()
    together = engine.generate([prompt.tokens for prompt in prompts], batch=True).ids
    return together == [prompt.ids for prompt in prompts]
