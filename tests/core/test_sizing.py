"""The live curve of the hit ratio by size, against a stack of all chunks that is too simple to be wrong."""

import hashlib
import itertools
from collections.abc import Sequence
from random import Random
from unittest.mock import patch

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lmcache_trio._core import sizing
from lmcache_trio._core.sizing import FACTORS, SizeCurve

SIZES = (1, 3, 10, 31, 100, 1000)
NAMES = [hashlib.sha256(bytes([n])).digest() for n in range(40)]
PROMPTS = st.lists(st.lists(st.integers(0, 19), max_size=8, unique=True), max_size=40)

Prompt = Sequence[bytes]


def unbounded() -> int:
    return 1 << 60


class Stack:
    """Chunks of *bytes* each, the most recent first."""

    def __init__(self) -> None:
        self.chunks: list[tuple[bytes, int]] = []
        self.distances: list[tuple[int, int]] = []
        """For each use, the bytes that must fit for a hit, and its tokens; a huge number is a first use."""

    def looked_up(self, prompt: Prompt, size: int, tokens: int) -> None:
        names = [name for name, _ in self.chunks]
        for digest in prompt:
            above = sum(each for _, each in self.chunks[: names.index(digest)]) if digest in names else unbounded()
            self.distances.append((above + size, tokens))
        self.chunks = [(digest, size) for digest in prompt] + [each for each in self.chunks if each[0] not in prompt]

    def stored(self, prompt: Prompt, size: int) -> None:
        for digest in prompt:
            if digest not in [name for name, _ in self.chunks]:
                self.chunks.insert(0, (digest, size))

    def hit_ratio(self, size: int) -> float:
        hits = sum(tokens for distance, tokens in self.distances if distance <= size)
        return hits / sum(tokens for _, tokens in self.distances) if self.distances else 0.0


@settings(max_examples=40, deadline=None)
@given(prompts=PROMPTS, sizes=st.tuples(st.integers(1, 9), st.integers(1, 9)), slots=st.sampled_from([64, 1 << 18]))
def test_of_a_sample_of_all_chunks_it_is_the_exact_curve(
    prompts: list[list[int]], sizes: tuple[int, int], slots: int
) -> None:
    """Of two models, whose chunks have other sizes. With few slots they are numbered anew every few prompts."""
    curve, stack = SizeCurve(unbounded, rate=0), Stack()
    with patch.object(sizing, "_SLOTS", slots):
        for n, prompt in enumerate(prompts):
            model = n % 3 == 0
            size, digests = sizes[model], [NAMES[number + 20 * model] for number in prompt]
            if n % 5 == 4:
                curve.stored(b"".join(digests), size)
                stack.stored(digests, size)
            else:
                curve.looked_up(digests, size, size)
                stack.looked_up(digests, size, size)
    for size in range(1, 16):  # where a step of the histogram is one byte
        assert curve.hit_ratio(size + 1) == pytest.approx(stack.hit_ratio(size))
    for size in range(16, 400, 7):
        low, high = stack.hit_ratio(size * 15 // 16 - 1), stack.hit_ratio(size * 17 // 16 + 1)
        assert low - 1e-9 <= curve.hit_ratio(size) <= high + 1e-9


@settings(max_examples=40, deadline=None)
@given(
    prompts=st.lists(st.lists(st.binary(min_size=2, max_size=2), max_size=6), max_size=40),
    most=st.integers(2, 20),
    largest=st.integers(1, 200),
)
def test_the_sample_is_bounded_and_a_ratio_is_a_ratio(prompts: list[list[bytes]], most: int, largest: int) -> None:
    curve = SizeCurve(lambda: largest, rate=0, most_sampled=most)
    for prompt in prompts:
        curve.looked_up([hashlib.sha256(name).digest() for name in prompt], 3, 16)
        assert curve.sampled <= most
    assert all(0 <= curve.hit_ratio(size) <= 1 for size in SIZES)


def test_before_the_first_lookup_nothing_is_said() -> None:
    curve = SizeCurve(unbounded)
    curve.stored(b"".join(NAMES), 1)
    assert curve.table(100) == {}
    curve.looked_up(NAMES[:1], 1, 1)
    assert list(curve.table(100)) == [f"{factor:g}" for factor in FACTORS] == ["0.5", "1", "2", "4", "8"]


def test_what_no_size_of_interest_holds_is_forgotten_before_the_rate_is_lowered() -> None:
    curve, random = SizeCurve(lambda: 500, rate=0, most_sampled=1000), Random(1)
    for _ in range(200):
        curve.looked_up([random.randbytes(32) for _ in range(100)], 1, 1)
    assert 500 <= curve.sampled <= 1000
    assert curve._rate == 0
    all_count = SizeCurve(unbounded, rate=0, most_sampled=1000)
    all_count.looked_up([random.randbytes(32) for _ in range(5000)], 1, 1)
    assert 300 < all_count.sampled <= 875
    assert all_count._rate == 3, "an eighth of them is the most that fits"


def test_old_uses_count_less() -> None:
    curve, random = SizeCurve(unbounded, rate=0), Random(1)
    with patch.object(sizing, "MOST_REFERENCES", 1000):
        for _ in range(100):
            curve.looked_up([random.randbytes(32) for _ in range(10)], 1, 1)
        assert curve.hit_ratio(1 << 20) == 0
        for _ in range(500):
            curve.looked_up(NAMES[:10], 1, 1)
        assert curve.hit_ratio(1 << 20) > 0.9


# --- a live sample --------------------------------------------------------------------------------------------------


def conversations(count: int, seed: int) -> list[Prompt]:
    """Chats that go on, under one of twelve system prompts, beside many of one turn."""
    random, chats, made, prompts = Random(seed), list[list[bytes]](), itertools.count(), list[Prompt]()

    def new(length: int) -> list[bytes]:
        return [hashlib.sha256(b"%d %d" % (seed, next(made))).digest() for _ in range(length)]

    systems = [new(random.randrange(1, 12)) for _ in range(12)]
    for _ in range(count):
        if chats and random.random() < 0.6:
            chat = chats.pop(-1 - min(int(random.expovariate(1 / 150)), len(chats) - 1))
        else:
            chat = list(random.choices(systems, [1 / (n + 1) for n in range(12)])[0])
        chat += new(1 + int(random.expovariate(1 / 8)))
        chats.append(chat)
        prompts.append(tuple(chat))
    return prompts


def exact(prompts: Sequence[Prompt], sizes: Sequence[int]) -> list[float]:
    """The hit ratio of LRU with so many chunks."""
    hits = [0] * len(sizes)
    stacks = [dict[bytes, None]() for _ in sizes]
    for prompt in prompts:
        for i, (size, stack) in enumerate(zip(sizes, stacks, strict=True)):
            hits[i] += sum(digest in stack for digest in prompt)
            for digest in reversed(prompt):
                stack.pop(digest, None)
                stack[digest] = None
            while len(stack) > size:
                del stack[next(iter(stack))]
    return [hit / sum(map(len, prompts)) for hit in hits]


@pytest.mark.parametrize("most_sampled", [sizing.MOST_SAMPLED, 4096])
@pytest.mark.parametrize("seed", range(3))
def test_a_live_sample_is_within_two_points_where_250_of_its_chunks_fit(seed: int, most_sampled: int) -> None:
    """A quarter of all uses is of twelve system prompts, so a smaller cache depends on which of these are sampled."""
    prompts = conversations(6000, seed)
    sizes = [500, 1000, 2000, 4000, 8000, 16_000]
    curve = SizeCurve(unbounded, most_sampled=most_sampled)
    for prompt in prompts:
        curve.looked_up(prompt, 1 << 20, 256)
    assert curve.sampled < most_sampled
    right, told = exact(prompts, sizes), [curve.hit_ratio(size << 20) for size in sizes]
    assert right[-1] - right[0] > 0.2, "the sizes make no difference"
    assert told == pytest.approx(right, abs=0.05)
    large = [i for i, size in enumerate(sizes) if size >> curve._rate >= 250]
    assert len(large) >= 3
    assert [told[i] for i in large] == pytest.approx([right[i] for i in large], abs=0.02)
