"""Blocks of several KV groups, a cache of their parts, and a mover of copies, for an engine too simple to be wrong.

A cell says what it holds: the group, and all tokens up to its own. So nothing has to be worked out from other cells,
and wrong KV is seen where it is read: by a step that computes with it, and by a store.
"""

import math
from collections.abc import Callable, Mapping, Sequence

import attrs

from lmcache_trio._core.groups import longest_hit
from lmcache_trio._core.keys import DIGEST_BYTES, join_digests
from lmcache_trio.adapters import Group, LoadSpec, Need, StoreSpec
from lmcache_trio.adapters.scheduler.parts import loaded_runs, stored_runs
from lmcache_trio.adapters.vllm.scheduler_side import Extras
from support.vllm_model import CHUNK
from support.vllm_model import Cache as OneGroupCache
from support.vllm_model import Mover as OneGroupMover

__all__ = ["HOLE", "NULL", "Cell", "GroupCache", "GroupMover", "Pool", "first_seen"]

NULL, HOLE = 0, -1
"""No block, in the engine's lists, and in those that the connector is given."""
Cell = tuple[int, tuple[int, ...]] | None
"""(group, tokens up to this one, or before this state). None: nothing that anybody may read."""


def first_seen(group: Group, tokens: int) -> int:
    """The first of *tokens* leading tokens whose KV, in *group*, the next token reads; of a state: its last one."""
    match group.need:
        case Need.EVERY:
            return 0
        case Need.WINDOW:
            return max(0, tokens - group.tokens + 1)
        case Need.LOCAL:
            return tokens - tokens % group.tokens
        case Need.STATE:
            return max(0, tokens - 1)


class Pool:
    """The device's blocks, and the engine's own prefix cache: a block is found again until another owner gets it."""

    def __init__(self, groups: Sequence[Group], blocks: int) -> None:
        self.groups = groups
        self.cells: dict[int, list[Cell]] = {block: [None] * CHUNK for block in range(1, blocks + 1)}
        self.users = dict.fromkeys(self.cells, 0)
        self.free = list(self.cells)
        self.names: dict[Cell, int] = {}

    def find(self, tokens: Sequence[int]) -> tuple[int, list[list[int]]]:
        """The longest prefix that leaves a token to compute, and its blocks by group."""
        unit = math.lcm(*(group.block_tokens for group in self.groups))
        for end in range((len(tokens) - 1) // unit * unit, 0, -unit):
            lists = [self._named(i, tuple(tokens[:end])) for i in range(len(self.groups))]
            if all(lists):
                return end, [each or [] for each in lists]
        return 0, [[] for _ in self.groups]

    def _named(self, number: int, tokens: tuple[int, ...]) -> list[int] | None:
        """Blocks of all of *tokens*, NULL where nothing of them is read any more; None: one is not there."""
        group, found = self.groups[number], list[int]()
        for at in range(len(tokens) // group.block_tokens):
            if (at + 1) * group.block_tokens <= first_seen(group, len(tokens)):
                found.append(NULL)
                continue
            block = self.names.get((number, tokens[: (at + 1) * group.block_tokens]))
            if block is None:
                return None
            found.append(block)
        return found

    def name(self, lists: Sequence[Sequence[int]], tokens: Sequence[int]) -> None:
        """*tokens* are computed in the blocks *lists*, or will be before anybody reads them."""
        for number, group in enumerate(self.groups):
            for at in range(min(len(tokens) // group.block_tokens, len(lists[number]))):
                if lists[number][at] != NULL:
                    name = number, tuple(tokens[: (at + 1) * group.block_tokens])
                    self.names.setdefault(name, lists[number][at])

    def skip(self, lists: Sequence[list[int]], tokens: int) -> None:
        """Free the blocks that hold nothing that anything behind *tokens* reads."""
        for group, ids in zip(self.groups, lists, strict=True):
            for at in range(min(first_seen(group, tokens) // group.block_tokens, len(ids))):
                self._drop(ids[at])
                ids[at] = NULL

    def grow(
        self, lists: Sequence[list[int]], tokens: int, shared: Sequence[Sequence[int]] = (), computed: int = 0
    ) -> list[int] | None:
        """Let *lists* have blocks for *tokens*: the new ones, or None and no change where too few are free.

        Empty lists begin with *shared*, and with blocks for what of *computed* tokens is to be loaded.
        """
        rows: list[list[int | None]] = []
        for number, group in enumerate(self.groups):
            size, own = group.block_tokens, lists[number]
            known = () if own or not shared else shared[number]
            first = 0 if own else first_seen(group, computed) // size
            end = -(-tokens // size)
            rows.append([NULL if at < first else None for at in range(len(own), end)])
            for at in range(first, len(known)):
                rows[-1][at] = known[at]
        kept = {block for row in rows for block in row if block}
        fresh = [block for block in self.free if block not in kept]
        need = sum(row.count(None) for row in rows)
        if need > len(fresh):
            return None
        new = fresh[:need]
        for block in kept:
            self.users[block] += 1
        for block in new:
            self.users[block] = 1
        self.free = [block for block in self.free if block not in kept and block not in new]
        self.names = {name: block for name, block in self.names.items() if block not in new}
        queue = iter(new)
        for ids, row in zip(lists, rows, strict=True):
            ids += [next(queue) if block is None else block for block in row]
        return new

    def drop(self, lists: Sequence[list[int]]) -> None:
        for ids in lists:
            for block in ids:
                self._drop(block)
            ids.clear()

    def compute(self, lists: Sequence[Sequence[int]], tokens: Sequence[int], start: int) -> None:
        """Compute the KV of *tokens* from *start* on: what is read was written for these tokens, and nobody else reads
        what is written.
        """
        for number, group in enumerate(self.groups):
            ids = lists[number]
            for end in range(start + 1, len(tokens) + 1):
                for at in range(first_seen(group, end - 1), end - 1):
                    assert self._cell(number, ids, at) == (number, tuple(tokens[: at + 1])), "wrong KV was read"
                self._write(number, ids, end - 1, (number, tuple(tokens[:end])))

    def _cell(self, number: int, ids: Sequence[int], at: int) -> Cell:
        block, cell = self._place(number, ids, at)
        return self.cells[block][cell]

    def _write(self, number: int, ids: Sequence[int], at: int, content: Cell) -> None:
        block, cell = self._place(number, ids, at)
        self.cells[block][cell] = content

    def _place(self, number: int, ids: Sequence[int], at: int) -> tuple[int, int]:
        group = self.groups[number]
        block, cell = ids[at // group.block_tokens], at % group.block_tokens
        assert block != NULL, "a hole was used"
        return block, 0 if group.need is Need.STATE else cell

    def _drop(self, block: int) -> None:
        if block != NULL:
            self.users[block] -= 1
            if not self.users[block]:
                self.free.insert(0, block)  # used again as soon as possible


@attrs.frozen
class Lease:
    """The parts that a hit of *chunks* chunks needs, by group and chunk."""

    chunks: int
    parts: Mapping[tuple[int, int], list[list[Cell]]]


class GroupCache(OneGroupCache):
    """A server with room for everything, and the scheduler's adapter to it. Parts may go one by one."""

    def __init__(self, groups: Sequence[Group], slow: Callable[[], bool]) -> None:
        super().__init__(slow)
        self.groups = groups
        self.parts: dict[tuple[int, bytes], list[list[Cell]]] = {}
        self.offered: dict[str, Lease] = {}
        self.taken: dict[bytes, Lease] = {}

    def maybe_submit_lookup_request(
        self, request_id: str, token_ids: Sequence[int], *, extras: Extras | None = None, max_tokens: int | None = None
    ) -> None:
        if request_id in self.answers:
            return
        digests = self.extend(request_id, token_ids)[: (max_tokens or 0) // CHUNK]
        most = min(len(digests), self.failed.get(request_id, len(digests)))
        hit = longest_hit(lambda number, at: (number, digests[at]) in self.parts, self.groups, CHUNK, most)
        needed = [(i, at) for i, group in enumerate(self.groups) for at in range(group.first(hit, CHUNK), hit)]
        self.answers[request_id] = hit * CHUNK
        self.offered[request_id] = Lease(hit, {(i, at): self.parts[i, digests[at]] for i, at in needed})

    def loads_after_alloc(
        self, request_id: str, external_tokens: int, *, local_tokens: int = 0, blocks: Sequence[Sequence[int]]
    ) -> tuple[LoadSpec, ...]:
        answer, offered = self.answers.pop(request_id), self.offered.pop(request_id)
        if not external_tokens:
            return ()
        assert local_tokens + external_tokens == answer
        lease = len(self.taken).to_bytes(4, "big")
        self.taken[lease] = offered
        return tuple(
            LoadSpec(
                *(request_id, 1, lease, run.first, run.count, run.skip, tuple(run.block_ids)),
                group=i,
                part_blocks=group.part_blocks(CHUNK),
            )
            for i, group in enumerate(self.groups)
            for run in loaded_runs(group, CHUNK, blocks[i], local_tokens, answer)
        )

    def store_specs(
        self, request_id: str, first_chunk: int, end_chunk: int, blocks: Sequence[Sequence[int]]
    ) -> tuple[StoreSpec, ...]:
        digests = self.digests[request_id]
        assert end_chunk <= len(digests)
        return tuple(
            self._store(request_id, i, run.first, digests[run.first : run.first + run.count], run.block_ids)
            for i, group in enumerate(self.groups)
            if group.need is not Need.STATE
            for run in stored_runs(group, CHUNK, blocks[i], first_chunk, end_chunk)
        )

    def state_spec(self, request_id: str, group: int, boundary_tokens: int, block_id: int) -> StoreSpec | None:
        at, rest = divmod(boundary_tokens, CHUNK)
        digests = self.digests[request_id][at - 1 : at]
        return None if rest or not at or not digests else self._store(request_id, group, at - 1, digests, [block_id])

    def _store(
        self, request_id: str, group: int, first: int, digests: Sequence[bytes], block_ids: Sequence[int]
    ) -> StoreSpec:
        parent = self.digests[request_id][first - 1] if first else b""
        width = self.groups[group].part_blocks(CHUNK)
        return StoreSpec(request_id, 1, parent, join_digests(digests), tuple(block_ids), group=group, part_blocks=width)

    def mark_failed(self, request_id: str, first_failed_token: int) -> None:
        super().mark_failed(request_id, first_failed_token)
        self.answers.pop(request_id, None)

    def end_session(self, request_id: str) -> None:
        super().end_session(request_id)
        self.offered.pop(request_id, None)


class GroupMover(OneGroupMover):
    """The worker's adapter. *filled* are the blocks that loads have written, by request."""

    def __init__(self, cache: GroupCache, pool: Pool, fails: Callable[[], bool]) -> None:
        self.cache = self.server = cache
        self.pool, self.fails = pool, fails
        self.jobs: list[StoreSpec | LoadSpec] = []
        self.stored: set[str] = set()
        self.retrieved: set[str] = set()
        self.failed: set[int] = set()
        self.failed_requests: set[str] = set()
        self.filled: dict[str, list[int]] = {}
        self.waits = 0

    def copy(self, spec: StoreSpec | LoadSpec) -> None:
        if isinstance(spec, StoreSpec):
            self._store(spec)
        else:
            self._load(spec)

    def _store(self, spec: StoreSpec) -> None:
        group, width = self.server.groups[spec.group], spec.chunk_blocks
        for i in range(spec.chunks):
            digest = spec.digests[i * DIGEST_BYTES : (i + 1) * DIGEST_BYTES]
            tokens = self.server.tokens[digest]
            ids = spec.block_ids[i * width : (i + 1) * width]
            if group.need is Need.STATE:
                part = [[self.pool.cells[ids[0]][0]]]
                right: list[list[Cell]] = [[(spec.group, tokens)]]
            else:
                size = group.block_tokens
                part = [self.pool.cells[block][:size] for block in ids]
                ends = range(len(tokens) - width * size + 1, len(tokens) + 1, size)
                right = [[(spec.group, tokens[: end + at]) for at in range(size)] for end in ends]
            assert part == right, "stored under the name of other tokens"
            self.server.parts[spec.group, digest] = part

    def _load(self, spec: LoadSpec) -> None:
        lease = self.server.taken[spec.lease]
        chunks = range(spec.start, spec.start + spec.count)
        source = [block for chunk in chunks for block in lease.parts[spec.group, chunk]][spec.skip_blocks :]
        assert 0 < len(spec.block_ids) <= len(source)
        failed = self.fails()
        if failed:
            self.failed.update(spec.block_ids)
            self.failed_requests.add(spec.request_id)
        for block, found in zip(spec.block_ids, source, strict=False):
            assert self.pool.users[block] == 1, "a shared block was written"
            self.pool.cells[block][: len(found)] = [None] * len(found) if failed else found
        self.filled.setdefault(spec.request_id, []).extend(spec.block_ids)

    def take_failed_requests(self) -> set[str]:
        failed, self.failed_requests = self.failed_requests, set()
        return failed
