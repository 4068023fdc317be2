"""The parts of an engine too simple to be wrong: blocks whose bytes follow from the tokens, a cache, a mover of copies.

The KV of a token is a number worked out from the KV of the token before it, as it lies in the blocks; so KV that is
wrong anywhere makes everything behind it wrong, answers included.
"""

from collections.abc import Callable, Iterable, Sequence

import attrs

from lmcache_trio._core.keys import DIGEST_BYTES, chain_digests, join_digests
from lmcache_trio.adapters import Group, LoadSpec, Need, StoreSpec
from lmcache_trio.adapters.vllm.scheduler_side import Extras

__all__ = [
    "BLOCK",
    "CHUNK",
    "GROUPS",
    "Cache",
    "Memory",
    "Mover",
    "Request",
    "next_kv",
    "sampled",
    "true_answer",
    "true_kv",
]

BLOCK, CHUNK = 2, 4
GROUPS = (Group(Need.EVERY, 0, BLOCK),)
SEED = b"s" * 32
KV = int


def next_kv(before: KV, token: int) -> KV:
    return hash((before, token, "kv"))


def sampled(kv: KV) -> int:
    return kv % 3


def true_kv(tokens: Sequence[int]) -> list[KV]:
    kv, found = 0, []
    for token in tokens:
        kv = next_kv(kv, token)
        found.append(kv)
    return found


def true_answer(prompt: Sequence[int], count: int) -> list[int]:
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(sampled(true_kv(tokens)[-1]))
    return tokens[len(prompt) :]


@attrs.define(eq=False)
class Request:
    request_id: str
    all_token_ids: list[int]
    prompt: int
    wanted: int
    skip_reading_prefix_cache: bool = False
    num_computed_tokens: int = 0
    num_in_flight_tokens: int = 0
    placeholders: int = 0
    state: str = "waiting"  # waiting, loading, running, finished
    loaded: bool = False
    load_failed: bool = False
    blocks: list[int] = attrs.Factory(list)
    block_hashes: list[bytes] = attrs.Factory(list)
    real_tokens: list[int] = attrs.Factory(list)  # what the worker knows, ahead of the scheduler

    @property
    def num_tokens(self) -> int:
        return len(self.all_token_ids)


class Memory:
    """The device's blocks and the engine's own prefix cache: a block is found again until it is written by another."""

    def __init__(self, blocks: int, *, sharing: bool) -> None:
        self.cells: dict[int, list[KV]] = {block: [0] * BLOCK for block in range(blocks)}
        self.users = dict.fromkeys(range(blocks), 0)
        self.free = list(range(blocks))
        self.names: dict[tuple[int, ...], int] = {}
        self.sharing = sharing

    def find(self, tokens: Sequence[int]) -> list[int]:
        """Blocks of the longest prefix that leaves a token to compute."""
        found: list[int] = []
        while (len(found) + 1) * BLOCK < len(tokens):
            block = self.names.get(tuple(tokens[: (len(found) + 1) * BLOCK]))
            if block is None:
                break
            found.append(block)
        return found

    def name(self, tokens: Sequence[int], blocks: Sequence[int]) -> None:
        for i in range(min(len(tokens) // BLOCK, len(blocks)) if self.sharing else 0):
            self.names.setdefault(tuple(tokens[: (i + 1) * BLOCK]), blocks[i])

    def grow(self, request: Request, tokens: int, shared: Sequence[int] = ()) -> bool:
        """Blocks for *tokens*, the leading ones *shared*; all or nothing."""
        need = -(-tokens // BLOCK) - len(request.blocks) - len(shared)
        fresh = [block for block in self.free if block not in shared]
        if need > len(fresh):
            return False
        for block in shared:
            self.users[block] += 1
            if block in self.free:
                self.free.remove(block)
        taken = fresh[: max(0, need)]
        for block in taken:
            self.free.remove(block)
            self.users[block] = 1
            self.names = {name: known for name, known in self.names.items() if known != block}
        request.blocks += [*shared, *taken]
        return True

    def drop(self, request: Request) -> None:
        for block in request.blocks:
            self.users[block] -= 1
            if not self.users[block]:
                self.free.insert(0, block)  # used again as soon as possible
        request.blocks = []


class Cache:
    """A server with room for everything, and the scheduler's adapter to it."""

    chunk_tokens = CHUNK

    def __init__(self, slow: Callable[[], bool]) -> None:
        self.slow = slow
        self.chunks: dict[bytes, list[list[KV]]] = {}
        self.tokens: dict[bytes, tuple[int, ...]] = {}
        self.digests: dict[str, list[bytes]] = {}
        self.answers: dict[str, int] = {}
        self.loaded: dict[str, int] = {}
        self.failed: dict[str, int] = {}
        self.attempts: dict[tuple[str, int], int] = {}
        self.leases: dict[bytes, list[bytes]] = {}
        self.waited_for: list[tuple[str, ...]] = []
        self.ended: list[str] = []

    def wait_lookups(self, request_ids: Sequence[str], seconds: float) -> None:
        self.waited_for.append(tuple(request_ids))

    def maybe_submit_lookup_request(
        self, request_id: str, token_ids: Sequence[int], *, extras: Extras | None = None, max_tokens: int | None = None
    ) -> None:
        if request_id not in self.answers:
            digests = self.extend(request_id, token_ids)[: (max_tokens or 0) // CHUNK]
            hits = 0
            while hits < min(len(digests), self.failed.get(request_id, len(digests))) and digests[hits] in self.chunks:
                hits += 1
            self.answers[request_id] = hits * CHUNK

    def check_lookup_result(self, request_id: str) -> int | None:
        return None if self.slow() else self.answers.get(request_id, 0)

    def loaded_tokens(self, request_id: str) -> int:
        return self.loaded.get(request_id, 0)

    def loads_after_alloc(
        self, request_id: str, external_tokens: int, *, local_tokens: int = 0, blocks: Sequence[Sequence[int]]
    ) -> tuple[LoadSpec, ...]:
        answer = self.answers.pop(request_id)
        if not external_tokens:
            return ()
        assert local_tokens + external_tokens == answer
        (ids,) = blocks
        block_ids = ids[local_tokens // BLOCK : answer // BLOCK]
        assert len(block_ids) * BLOCK == external_tokens
        lease = len(self.leases).to_bytes(4, "big")
        self.leases[lease] = self.digests[request_id][: answer // CHUNK]
        start = local_tokens // CHUNK
        self.attempts[request_id, answer] = self.attempts.get((request_id, answer), 0) + 1
        skip = local_tokens % CHUNK // BLOCK
        return (LoadSpec(request_id, 1, lease, start, answer // CHUNK - start, skip, tuple(block_ids)),)

    def extend(self, request_id: str, token_ids: Sequence[int], *, extras: Extras | None = None) -> list[bytes]:
        digests = chain_digests(SEED, token_ids, CHUNK)
        for i, digest in enumerate(digests):
            self.tokens[digest] = tuple(token_ids[: (i + 1) * CHUNK])
        known = self.digests.get(request_id, [])
        self.digests[request_id] = known + digests[len(known) :]
        return digests

    def store_specs(
        self, request_id: str, first_chunk: int, end_chunk: int, blocks: Sequence[Sequence[int]]
    ) -> tuple[StoreSpec, ...]:
        (ids,) = blocks
        digests = self.digests[request_id]
        assert end_chunk <= len(digests)
        parent = digests[first_chunk - 1] if first_chunk else b""
        block_ids = tuple(ids[first_chunk * CHUNK // BLOCK : end_chunk * CHUNK // BLOCK])
        return (StoreSpec(request_id, 1, parent, join_digests(digests[first_chunk:end_chunk]), block_ids),)

    def state_spec(self, request_id: str, group: int, boundary_tokens: int, block_id: int) -> StoreSpec | None:
        raise AssertionError("no group of states")

    def mark_failed(self, request_id: str, first_failed_token: int) -> None:
        self.failed[request_id] = min(first_failed_token // CHUNK, self.failed.get(request_id, 1 << 30))

    def free_lookup_locks(self, request_id: str) -> None:
        pass

    def end_session(self, request_id: str) -> None:
        self.ended.append(request_id)
        for known in (self.digests, self.answers, self.failed):
            known.pop(request_id, None)


class Mover:
    """The worker's adapter. A copy happens when it is told to, or waited for, and not a moment earlier."""

    def __init__(self, cache: Cache, memory: Memory, fails: Callable[[], bool]) -> None:
        self.cache = cache
        self.memory = memory
        self.fails = fails
        self.jobs: list[StoreSpec | LoadSpec] = []
        self.stored: set[str] = set()
        self.retrieved: set[str] = set()
        self.failed: set[int] = set()
        self.waits = 0

    def wait_retrieve(self, seconds: float) -> None:
        self.waits += 1

    def submit_store(self, spec: StoreSpec) -> None:
        self.jobs.append(spec)

    def submit_retrieve(self, spec: LoadSpec) -> None:
        self.jobs.append(spec)

    def retrieve_now(self, specs: Sequence[LoadSpec]) -> None:
        for spec in specs:
            self.copy(spec)

    def wait_stores(self, request_ids: Iterable[str] | None = None) -> None:
        wanted = set(request_ids or ())
        for spec in [job for job in self.jobs if isinstance(job, StoreSpec) and job.request_id in wanted]:
            self.finish(spec)

    def finish(self, spec: StoreSpec | LoadSpec) -> None:
        self.jobs.remove(spec)
        self.copy(spec)
        (self.stored if isinstance(spec, StoreSpec) else self.retrieved).add(spec.request_id)

    def copy(self, spec: StoreSpec | LoadSpec) -> None:
        cells, width = self.memory.cells, CHUNK // BLOCK
        if isinstance(spec, StoreSpec):
            for i in range(len(spec.digests) // DIGEST_BYTES):
                digest = spec.digests[i * DIGEST_BYTES : (i + 1) * DIGEST_BYTES]
                blocks = [list(cells[block]) for block in spec.block_ids[i * width : (i + 1) * width]]
                flat = [kv for block in blocks for kv in block]
                assert flat == true_kv(self.cache.tokens[digest])[-CHUNK:], "stored under the name of other tokens"
                self.cache.chunks[digest] = blocks
            return
        digests = self.cache.leases[spec.lease][spec.start : spec.start + spec.count]
        source = [block for digest in digests for block in self.cache.chunks[digest]][spec.skip_blocks :]
        assert len(source) == len(spec.block_ids)
        failed = self.fails()
        for block, found in zip(spec.block_ids, source, strict=True):
            assert self.memory.users[block] <= 1, "a shared block was written"
            cells[block] = [-1] * BLOCK if failed else list(found)
        if failed:
            self.failed.update(spec.block_ids)

    def take_finished(self) -> tuple[set[str], set[str]]:
        busy = {(type(job), job.request_id) for job in self.jobs}
        stored = {each for each in self.stored if (StoreSpec, each) not in busy}
        retrieved = {each for each in self.retrieved if (LoadSpec, each) not in busy}
        self.stored -= stored
        self.retrieved -= retrieved
        return stored, retrieved

    def take_failed_blocks(self) -> set[int]:
        failed, self.failed = self.failed, set()
        return failed

    def take_failed_requests(self) -> set[str]:
        raise AssertionError("failures are told by block")
