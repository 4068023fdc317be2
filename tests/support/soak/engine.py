"""One engine process of the soak: both adapters over a small KV, doing at random all that engines do.

Run as `python engine.py ADDRESS SEED PATH`; PATH is how its KV goes: shm, device or any. There is no model: what a
block holds follows from the model's identity, the weights, the layout and the tokens up to the block's end, and from
nothing else. So each byte that a load leaves in a block that it did not call failed can be compared with what it must
be, whoever stored it and when; before a load the blocks are filled with what no chunk holds.

A line of JSON with what was counted is written every few steps. A wrong byte is written with all that is known of it,
and the process ends with status 3. Any line on standard input, or its end, tells it to finish what is under way and
leave.
"""

import hashlib
import itertools
import json
import select
import sys
import time
from collections import Counter
from collections.abc import Sequence
from random import Random
from typing import Any

import attrs
import numpy as np
import torch

from lmcache_trio.adapters import PollingSchedulerAdapter, SchedulerAdapter, WorkerAdapter
from lmcache_trio.adapters.shared_kv import shared_tensor
from lmcache_trio.threads import Handoff

BLOCK, CHUNK, BLOCKS = 16, 64, 192
PROMPTS, LONGEST = 48, 8
"""Prompts, and the chunks of the longest."""
POISON = 0xA5
MODELS = ("model 0", "model 1")
VERSIONS = ("weights 0", "weights 1")
REQUEST_IDS = 6
"""Few, so that ids are used again while what they stood for before is still under way."""
SAY_EVERY = 20
"""Steps: what a killed engine did since is not counted."""
PATIENCE = 3.0
"""Seconds for a server to answer, which a killed one does not."""
PAUSE = 0.02
"""Seconds at most between steps: the server is to be busy, and two cores not full."""


@attrs.frozen
class Layout:
    """A layer's KV. Slots of "a" and "b" have the same length, those of "c" are not a whole number of pages."""

    name: str
    layers: int
    dtype: str
    shape: tuple[int, ...]
    """Of a block, without its own dimension."""
    axis: int
    """Where that one stands."""

    @property
    def block_bytes(self) -> int:
        """Of one layer."""
        return int(np.prod(self.shape)) * np.dtype(self.dtype).itemsize

    def made(self, shared: bool) -> dict[str, torch.Tensor]:
        """*shared*: in memory that the server can open."""
        shape = (*self.shape[: self.axis], BLOCKS, *self.shape[self.axis :])
        dtype = getattr(torch, self.dtype)
        layers: dict[str, torch.Tensor] = {}
        for i in range(self.layers):
            flat = shared_tensor(self.block_bytes * BLOCKS) if shared else None
            tensor = torch.zeros(shape, dtype=dtype) if flat is None else flat.view(dtype).view(shape)
            layers[f"layer {i}"] = tensor
        return layers


LAYOUTS = (
    Layout("a", 4, "float32", (2, BLOCK, 2, 8), 1),
    Layout("b", 4, "float16", (2, BLOCK, 4, 8), 0),
    Layout("c", 2, "float32", (2, BLOCK, 1, 11), 1),
)


class Cache:
    """The KV of one registration, block by block as bytes."""

    def __init__(self, layout: Layout, shared: bool) -> None:
        self.layout, self.shared = layout, shared
        self.tensors = layout.made(shared)
        self._blocks = [np.moveaxis(tensor.numpy().view(np.uint8), layout.axis, 0) for tensor in self.tensors.values()]
        self._free = list(range(BLOCKS))

    def take(self, count: int, random: Random) -> list[int]:
        """*count* blocks that lie anywhere; none if there are too few."""
        if count > len(self._free):
            return []
        random.shuffle(self._free)
        taken, self._free = self._free[:count], self._free[count:]
        return taken

    def give_back(self, blocks: Sequence[int]) -> None:
        self._free += blocks

    def write(self, block: int, data: bytes) -> None:
        each = np.frombuffer(data, np.uint8).reshape(self.layout.layers, -1)
        for blocks, piece in zip(self._blocks, each, strict=True):
            blocks[block] = piece.reshape(blocks[block].shape)

    def poison(self, blocks: Sequence[int]) -> None:
        for layer in self._blocks:
            layer[list(blocks)] = POISON

    def read(self, block: int) -> bytes:
        return b"".join(layer[block].tobytes() for layer in self._blocks)


@attrs.frozen
class Weights:
    """What besides tokens and layout decides the bytes. *epoch*: how often all of it, in this layout, was reset."""

    model: str
    version: str
    epoch: int = 0


def prompt(number: int) -> list[int]:
    """Prompts share their first two chunks by sixes."""
    family, own = Random(number % 6), Random(1000 + number)
    shared = [family.randrange(32_000) for _ in range(2 * CHUNK)]
    return shared + [own.randrange(32_000) for _ in range((LONGEST - 2) * CHUNK)]


def contents(weights: Weights, layout: Layout, tokens: Sequence[int], upto: int | None = None) -> list[bytes]:
    """What each whole block of *tokens* holds, all layers together, or its first *upto* bytes."""
    length = layout.layers * layout.block_bytes if upto is None else upto
    name = hashlib.sha256(repr((weights, layout.name)).encode()).digest()
    made = []
    for start in range(0, len(tokens) - BLOCK + 1, BLOCK):
        name = hashlib.sha256(name + repr(tokens[start : start + BLOCK]).encode()).digest()
        made.append(hashlib.shake_128(name).digest(length))
    return made


def owner_of(data: bytes, at: int) -> str:
    """Whose bytes *data* are, found at *at* of a block; only what all engines share is looked through."""
    if data == bytes([POISON]) * len(data):
        return "nobody's: the load did not touch them"
    shared = itertools.product(MODELS, VERSIONS, LAYOUTS, range(PROMPTS))
    for model, version, layout, number in shared:
        for i, content in enumerate(contents(Weights(model, version), layout, prompt(number), at + len(data))):
            if content[at:] == data:
                return f"block {i} of prompt {number} of {model} with {version} in layout {layout.name}"
    return "not known"


@attrs.define(eq=False)
class Move:
    """A load or store under way. Its request's weights and KV are those that it began with."""

    request_id: str
    number: int
    weights: Weights
    cache: Cache
    blocks: list[int]
    first: int
    """Block of the prompt that *blocks* begin with."""
    how: str


class Wrong(Exception):
    """A byte of a load that was called good is another's."""


class Engine:
    """One life of an engine: two adapters with an engine id of their own."""

    def __init__(self, address: str, name: str, path: str, random: Random, counts: Counter[str]) -> None:
        self.name, self.path, self.random, self.counts = name, path, random, counts
        self.own = random.random() < 0.3
        """Does nobody else have this model? Then it is known what a reset must have dropped."""
        model = f"model of {name}" if self.own else random.choice(MODELS)
        self.weights = Weights(model, random.choice(VERSIONS))
        self.epochs = Counter[str]()
        kind = random.choice([SchedulerAdapter, PollingSchedulerAdapter])
        self.cache = self.new_cache()
        self.scheduler = kind(
            address,
            engine_id=name,
            identity=[model],
            block_tokens=BLOCK,
            chunk_tokens=CHUNK,
            weights_version=self.weights.version,
            lookup_timeout=PATIENCE,
            connect_timeout=PATIENCE,
        )
        self.worker = WorkerAdapter(
            address,
            engine_id=name,
            block_tokens=BLOCK,
            chunk_tokens=CHUNK,
            reply_timeout=PATIENCE,
            connect_timeout=PATIENCE,
        )
        self.worker.register_kv_caches(self.cache.tensors, num_blocks=BLOCKS)
        self.loads: list[Move] = []
        self.stores: list[Move] = []
        self.failed: set[int] = set()

    def new_cache(self) -> Cache:
        shared = self.path == "device" or (self.path == "any" and self.random.random() < 0.5)
        return Cache(self.random.choice(LAYOUTS), shared)

    def step(self) -> None:
        """One thing that engines do."""
        self.finish()
        chance = self.random.random()
        if chance < 0.015:
            self.reset()
        elif chance < 0.03:
            self.other_weights()
        elif chance < 0.045:
            self.other_layout()
        else:
            self.serve(f"request {self.random.randrange(REQUEST_IDS)}")

    # --- one request ------------------------------------------------------------------------------------------------

    def serve(self, request_id: str) -> None:
        number = self.random.randrange(PROMPTS)
        tokens = prompt(number)[: self.random.randrange(1, LONGEST * CHUNK // BLOCK + 1) * BLOCK]
        found = self.look_up(request_id, tokens)
        weights = self.weights  # which this request keeps
        self.counts["lookups"] += 1
        self.counts["found tokens"] += found
        if self.random.random() < 0.01:
            self.reset()
        if self.random.random() < 0.06:  # aborted while it waits for blocks
            self.counts["aborts"] += 1
            self.scheduler.end_session(request_id)
            return
        if found:
            self.load(request_id, number, weights, found)
        whole = len(tokens) // CHUNK * CHUNK
        if found < whole:
            self.store(request_id, number, weights, found, tokens)
        if self.random.random() < 0.2 and len(tokens) < LONGEST * CHUNK:  # it goes on
            more = prompt(number)[: len(tokens) + CHUNK]
            self.store(request_id, number, weights, max(found, whole), more)
        if self.random.random() < 0.8:  # else its id is used again before its end
            self.counts["aborts"] += any(move.request_id == request_id for move in self.loads + self.stores)
            self.scheduler.end_session(request_id)

    def look_up(self, request_id: str, tokens: list[int]) -> int:
        self.scheduler.maybe_submit_lookup_request(request_id, tokens)
        while (found := self.scheduler.check_lookup_result(request_id)) is None:
            self.scheduler.wait_lookups([request_id], 0.2)
        return found

    def load(self, request_id: str, number: int, weights: Weights, found: int) -> None:
        first = self.random.randrange(found // BLOCK) if self.random.random() < 0.3 else 0
        last = self.random.randrange(first, found // BLOCK) + 1 if self.random.random() < 0.2 else found // BLOCK
        blocks = self.cache.take(last - first, self.random)
        if not blocks:
            self.scheduler.update_after_alloc(request_id, 0)
            return
        self.cache.poison(blocks)
        spec = self.scheduler.update_after_alloc(
            request_id, len(blocks) * BLOCK, local_tokens=first * BLOCK, block_ids=blocks
        )
        assert spec is not None
        how = self.random.choice(("now", "submitted"))
        move = Move(request_id, number, weights, self.cache, blocks, first, how)
        if how == "submitted":
            self.worker.submit_retrieve(spec)
            self.loads.append(move)
            return
        self.worker.retrieve_now([spec])
        self.check([move])
        if failed := [i for i, block in enumerate(blocks) if block in self.failed]:
            self.scheduler.mark_failed(request_id, (first + failed[0]) * BLOCK)
            self.failed.difference_update(blocks)
        if self.random.random() < 0.3:
            self.scheduler.free_lookup_locks(request_id)

    def store(self, request_id: str, number: int, weights: Weights, start: int, tokens: list[int]) -> None:
        """Store the whole chunks of *tokens* from token *start* on."""
        first, end = start // CHUNK * (CHUNK // BLOCK), len(tokens) // CHUNK * (CHUNK // BLOCK)
        blocks = self.cache.take(max(0, end - first), self.random)
        if not blocks:
            return
        held = contents(weights, self.cache.layout, tokens[: end * BLOCK])[first:]
        for block, content in zip(blocks, held, strict=True):
            self.cache.write(block, content)
        self.scheduler.extend(request_id, tokens)
        spec = self.scheduler.store_spec(request_id, start // CHUNK, blocks)
        how = self.random.choice(("now", "submitted"))
        move = Move(request_id, number, weights, self.cache, blocks, first, how)
        self.counts["stores"] += 1
        if how == "now":
            self.worker.store_now([spec])
            self.cache.give_back(blocks)
            return
        self.worker.submit_store(spec)
        if self.random.random() < 0.3:  # the engine wants the blocks back at once
            self.worker.wait_stores([request_id])
            self.cache.poison(blocks)
        self.stores.append(move)

    # --- what ends --------------------------------------------------------------------------------------------------

    def finish(self) -> None:
        """Check what has ended, and give its blocks back."""
        stored, loaded = self.worker.take_finished()
        ended = [move for move in self.loads if move.request_id in loaded]
        self.loads = [move for move in self.loads if move.request_id not in loaded]
        self.check(ended)
        for move in ended:
            self.failed.difference_update(move.blocks)
        for move in self.stores:
            if move.request_id in stored:
                move.cache.give_back(move.blocks)
        self.stores = [move for move in self.stores if move.request_id not in stored]

    def check(self, moves: Sequence[Move]) -> None:
        """Compare all that *moves* loaded, but for what they called failed, and give the blocks back."""
        self.failed |= self.worker.take_failed_blocks()
        for move in moves:
            wanted = contents(move.weights, move.cache.layout, prompt(move.number))[move.first :]
            for i, block in enumerate(move.blocks):
                if block in self.failed:
                    self.counts["failed blocks"] += 1
                    continue
                found = move.cache.read(block)
                self.counts["compared bytes"] += len(found)
                self.counts[f"compared blocks, {'device' if move.cache.shared else 'shm'}"] += 1
                if found != wanted[i]:
                    raise Wrong(self.described(move, i, found, wanted[i]))
            move.cache.give_back(move.blocks)

    def described(self, move: Move, i: int, found: bytes, wanted: bytes) -> str:
        at = next(k for k, (a, b) in enumerate(zip(found, wanted, strict=True)) if a != b)
        same = sum(a == b for a, b in zip(found, wanted, strict=True))
        report = {
            "engine": self.name,
            "path": f"{self.worker.path}: {self.worker.path_reason}",
            "request": f"{move.request_id}, prompt {move.number}, block {move.first + i} in block {move.blocks[i]}",
            "how": move.how,
            "weights": repr(move.weights),
            "layout": move.cache.layout.name,
            "first wrong byte": at,
            "wrong bytes": f"{len(found) - same} of {len(found)}",
            "wanted": wanted[at : at + 32].hex(),
            "found": found[at : at + 32].hex(),
            "counts": dict(self.counts),
        }
        return json.dumps(report)

    def wait_all(self) -> None:
        """Until nothing is under way any more."""
        deadline = time.monotonic() + 60
        while self.worker.statistics()["running"]:
            if time.monotonic() > deadline:
                raise AssertionError(f"moves did not end: {self.worker.statistics()}, {self.loads}, {self.stores}")
            pause(0.005)
        self.finish()
        assert not self.loads + self.stores, "moves ended, and were not named"

    # --- rare things ------------------------------------------------------------------------------------------------

    def reset(self) -> None:
        """What began before keeps its own weights: it may be loaded as it was, and is stored nowhere."""
        self.counts["resets"] += 1
        before, done = self.weights, self.scheduler.reset_cache()
        self.weights = attrs.evolve(before, version=f"of {self.name}, its reset {self.counts['resets']}")
        if self.own and done and before.version in VERSIONS:  # the same name, of which nothing is left
            self.epochs[self.cache.layout.name] += 1
            self.weights = attrs.evolve(before, epoch=self.epochs[self.cache.layout.name])
            self.scheduler.set_weights_version(before.version)

    def other_weights(self) -> None:
        """Not of a model of its own: a reset drops all versions, and only one of them is known by an epoch."""
        if not self.own:
            self.counts["weight changes"] += 1
            self.weights = attrs.evolve(self.weights, version=self.random.choice(VERSIONS))
            self.scheduler.set_weights_version(self.weights.version)

    def other_layout(self) -> None:
        """As an engine that wakes up with other KV, some of it with moves under way."""
        self.counts["layout changes"] += 1
        if self.random.random() < 0.5:
            self.wait_all()
        former, self.cache = self.cache, self.new_cache()
        self.weights = attrs.evolve(self.weights, epoch=self.epochs[self.cache.layout.name])
        self.worker.register_kv_caches(self.cache.tensors, num_blocks=BLOCKS)
        self.wait_all()
        self.counts[f"layouts, {'shared' if former.shared else 'private'}"] += 1

    def leave(self, abrupt: bool) -> None:
        """*abrupt*: with moves under way, which the adapters' ends have to wait for."""
        if not abrupt:
            self.wait_all()
        bugs = self.worker.statistics().get("copy_bugs", 0)
        self.worker.shutdown()
        self.scheduler.shutdown()
        assert not bugs, f"copy_bugs: {bugs}"
        self.finish()


_never: Handoff[bool] = Handoff()


def pause(seconds: float) -> None:
    _never.wait(seconds)


def say(**words: Any) -> None:
    print(json.dumps(words), flush=True)


def told_to_leave(seconds: float) -> bool:
    """The pause between two steps, which a line on standard input ends."""
    return bool(select.select([sys.stdin], [], [], seconds)[0])


def main(address: str, seed: int, path: str) -> int:
    torch.set_num_threads(1)
    random, counts = Random(seed), Counter[str]()
    leaving = False
    for life in itertools.count():
        if leaving:
            break
        engine = Engine(address, f"engine {seed}.{life}", path, random, counts)
        counts["engines"] += 1
        steps = random.randrange(60, 500)
        try:
            for step in range(steps):
                engine.step()
                if step % SAY_EVERY == 0:
                    say(counts=dict(counts))
                if leaving := told_to_leave(random.random() * PAUSE):
                    break
            engine.leave(abrupt=random.random() < 0.5)
        except Wrong as exc:
            say(wrong=json.loads(str(exc)) | {"seed": seed, "life": life, "step": step})
            return 3
    say(counts=dict(counts))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], int(sys.argv[2]), sys.argv[3]))
