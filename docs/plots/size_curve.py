"""How near is the live curve of the hit ratio by size? A replay of a request trace, against exact ones.

    python docs/plots/size_curve.py TRACE.jsonl

*TRACE* has one JSON object a line, whose `hash_ids` name the blocks of a prompt as a chain, as the traces that the
Mooncake project published with its paper at FAST '25 (`FAST25-release/traces` in kvcache-ai/Mooncake) have. By default
prompts are made by `conversations`. For each size it prints the hit ratio of

    exact    an LRU stack of all chunks, first chunk of a prompt most recent
    curve    `SizeCurve`, as a server runs it
    index    the server's index itself, with its eviction, leases and arena
    tiers    that index with a quarter of the size, above a tier that evicts by the recency of its stores and loads
"""

import hashlib
import itertools
import json
import sys
import time
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from pathlib import Path
from random import Random

from lmcache_trio._core.index.arena import Arena
from lmcache_trio._core.index.index import Index
from lmcache_trio._core.sizing import SizeCurve

CHUNK_BYTES, CHUNK_TOKENS = 4096, 512
NAMESPACE = b"n" * 32

Prompt = Sequence[bytes]
"""The digests of its chunks."""


def conversations(count: int, *, seed: int = 0) -> Iterator[Prompt]:
    """Prompts of *count* requests: chats that go on, under one of twelve system prompts, beside many of one turn."""
    random, open_chats, made = Random(seed), list[list[bytes]](), itertools.count()

    def new(length: int) -> list[bytes]:
        return [hashlib.sha256(b"%d %d" % (seed, next(made))).digest() for _ in range(length)]

    systems = [new(random.randrange(1, 12)) for _ in range(12)]
    for _ in range(count):
        if open_chats and random.random() < 0.6:
            recent = min(int(random.expovariate(1 / 150)), len(open_chats) - 1)
            chat = open_chats.pop(-1 - recent)
        else:
            chat = list(random.choices(systems, [1 / (n + 1) for n in range(12)])[0])
        chat += new(1 + int(random.expovariate(1 / 8)))
        open_chats.append(chat)
        yield tuple(chat)


def trace(path: Path) -> Iterator[Prompt]:
    """The prompts of a trace."""
    with path.open() as lines:
        for line in lines:
            yield tuple([hashlib.sha256(b"%d" % block).digest() for block in json.loads(line)["hash_ids"]])


def exact(prompts: Sequence[Prompt], sizes: Sequence[int]) -> list[float]:
    """The hit ratio of LRU with *sizes* chunks, of every chunk."""
    uses = sum(map(len, prompts))
    tree, last, now, hits = [0] * (uses + 1), dict[bytes, int](), 0, [0] * len(sizes)

    def add(at: int, what: int) -> None:
        while at <= uses:
            tree[at] += what
            at += at & -at

    def up_to(at: int) -> int:
        found = 0
        while at:
            found += tree[at]
            at &= at - 1
        return found

    for prompt in prompts:
        for digest in prompt:
            if digest in last:
                above = len(last) - up_to(last[digest])
                for i, size in enumerate(sizes):
                    hits[i] += above < size
        for digest in reversed(prompt):
            if digest in last:
                add(last[digest], -1)
            now += 1
            last[digest] = now
            add(now, 1)
    return [hit / uses for hit in hits]


def curve(prompts: Sequence[Prompt], sizes: Sequence[int]) -> list[float]:
    """What a server would say of *sizes* chunks."""
    made = SizeCurve(lambda: 8 * CHUNK_BYTES * sizes[-1])
    for prompt in prompts:
        made.looked_up(prompt, CHUNK_BYTES, CHUNK_TOKENS)
    return [made.hit_ratio(size * CHUNK_BYTES) for size in sizes]


def index(prompts: Sequence[Prompt], size: int, tier_size: int = 0) -> float:
    """The hit ratio of a server's index with *size* chunks, above a tier of *tier_size*."""
    arena, numbers, tier = Arena(), itertools.count(), OrderedDict[bytes, None]()
    arena.grow(size * CHUNK_BYTES)
    made = Index(arena, new_id=lambda: next(numbers).to_bytes(16, "big"))
    made.attach(NAMESPACE, [CHUNK_BYTES])
    hits = 0
    for number, prompt in enumerate(prompts):
        session = ("engine", number)
        found = 0
        if tier_size:
            found = made.match((NAMESPACE,), prompt)
            while found < len(prompt) and prompt[found] in tier:
                tier.move_to_end(prompt[found])
                loaded = made.reserve_load(NAMESPACE, prompt[found - 1] if found else b"", prompt[found], number)
                if loaded is None:
                    break
                made.commit(loaded.id, -1)
                found += 1
        lease = made.lease(session, (NAMESPACE,), prompt, number)
        leased = lease.chunks if lease is not None else 0
        hits += max(leased, found)
        reserved = made.reserve(session, 1, 0, NAMESPACE, b"", b"".join(prompt), number)
        if reserved.id:
            for key in made.commit(reserved.id, 1):
                tier[key.digest] = None
        while len(tier) > tier_size:
            tier.popitem(last=False)
        if lease is not None:
            made.release(lease.id)
    return hits / sum(map(len, prompts))


def main() -> None:
    prompts = list(trace(Path(sys.argv[1])) if len(sys.argv) > 1 else conversations(12_000))
    distinct = len({digest for prompt in prompts for digest in prompt})
    print(f"{len(prompts)} prompts, {sum(map(len, prompts))} chunks, {distinct} of them distinct")
    sizes = [int(distinct * share) for share in (0.0125, 0.025, 0.05, 0.1, 0.2, 0.4)]
    begin = time.process_time()
    of_curve = curve(prompts, sizes)
    print(f"curve: {(time.process_time() - begin) / len(prompts) * 1e6:.1f} us a lookup")
    print("  chunks   exact   curve   index   tiers")
    for size, right, told in zip(sizes, exact(prompts, sizes), of_curve, strict=True):
        real, tiers = index(prompts, size), index(prompts, size // 4, size)
        print(f"{size:8}" + "".join(f"{100 * ratio:7.1f}%" for ratio in (right, told, real, tiers)))


if __name__ == "__main__":
    main()
