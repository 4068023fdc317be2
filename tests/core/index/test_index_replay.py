"""Traffic like a chat service's: prompts that share system prompts and grow turn by turn, against the textbook's LRU.

The oracle is an ordered dict. Each request brings its chunks to the recent end, deepest first, so that it never drops a
chunk before those that extend it: what an index of leases, reservations and trees must come to as well.
"""

from collections import OrderedDict
from collections.abc import Callable, Iterator
from random import Random
from typing import Any

import pytest

from lmcache_trio._core.keys import join_digests

Prompt = tuple[bytes, ...]
REQUESTS = 1500


def traffic(seed: int, requests: int) -> Iterator[Prompt]:
    """Each request is a new conversation after one of a few system prompts, or the next turn of a recent one."""
    draw, made = Random(seed), 0
    systems: list[Prompt] = []
    open_ones: list[Prompt] = []

    def fresh(count: int) -> Prompt:
        nonlocal made
        made += count
        return tuple(number.to_bytes(32, "little") for number in range(made - count, made))

    systems += [fresh(length) for length in (1, 2, 4, 8)]
    for _ in range(requests):
        if open_ones and draw.random() < 0.6:  # the recent ones are the likelier to go on
            at = len(open_ones) - 1 - min(int(draw.expovariate(0.1)), len(open_ones) - 1)
            before = open_ones.pop(at)
        else:
            before = draw.choices(systems, weights=(8, 4, 2, 1))[0]
        prompt = before + fresh(draw.randint(1, 6))
        if len(prompt) < 40:
            open_ones.append(prompt)
        yield prompt


class Textbook:
    """Least recently used, over a plain ordered dict."""

    def __init__(self, room: int) -> None:
        self.room = room
        self.order: OrderedDict[bytes, None] = OrderedDict()

    def serve(self, prompt: Prompt) -> int:
        hits = next((i for i, digest in enumerate(prompt) if digest not in self.order), len(prompt))
        for digest in reversed(prompt):
            self.order[digest] = None
            self.order.move_to_end(digest)
        while len(self.order) > self.room:
            self.order.popitem(last=False)
        return hits


def serve(world: Any, prompt: Prompt, session: int) -> int:
    """One request's life: lookup, retrieve, store of the missing chunks, end."""
    index, key = world.index, ("e", session)
    lease = index.lease(key, (world.name,), prompt, world.now)
    hits: int = lease.chunks if lease else 0
    if lease:
        index.take(lease.id)
        assert index.unpin(index.pin(lease.id, "e", world.name, 1, 0, 0, hits).id, 1)
    if hits < len(prompt):
        parent = prompt[hits - 1] if hits else b""
        stored = index.reserve(key, 1, 0, world.name, parent, join_digests(prompt[hits:]), world.now)
        assert len(stored.slots) + stored.dropped.get("present", 0) == len(prompt) - hits
        index.commit(stored.id, 1)
    index.end_session(key)
    return hits


@pytest.mark.parametrize(("seed", "room"), [(1, 60), (2, 150), (3, 400), (4, 100_000)])
def test_every_request_hits_the_same_chunks_as_in_the_textbooks_lru(
    world: Callable[..., Any], seed: int, room: int
) -> None:
    w, textbook = world(room, lease_share=1.0), Textbook(room)
    expected, got = 0, 0
    for session, prompt in enumerate(traffic(seed, REQUESTS)):
        hits = textbook.serve(prompt)
        assert serve(w, prompt, session) == hits
        expected, got = expected + len(prompt), got + hits
    assert 0.1 < got / expected < 0.9, "traffic that tells nothing"
    assert bool(w.counted["evictions"]) == (room < 100_000)


def test_after_a_reset_it_is_as_if_the_cache_were_new(world: Callable[..., Any]) -> None:
    """What was reset takes no room from anything, though it is swept only when a reserve wants its place."""
    w, textbook = world(150, lease_share=1.0), Textbook(150)
    for session, prompt in enumerate(traffic(5, REQUESTS)):
        if session % 250 == 249:
            textbook = Textbook(150)
            w.index.reset(w.name)
        assert serve(w, prompt, session) == textbook.serve(prompt)
    while w.index.sweep(1):
        pass
    assert w.held["chunks_ready"] == len(textbook.order)
    assert w.held["chunks_stale"] == w.held["chunks_quarantined"] == 0
