"""Which of vLLM's blocks are in the server's memory, as far as routers are told: events to publish.

The server names chunks by digests, and vLLM names blocks by hashes of its own. A chunk's blocks are known when the
request is at hand that stores it or hits it: then they are noted, and told once the server says that the chunk is in
memory. A chunk that left is told by the same blocks. What an engine never had at hand it never tells.

    expect()   a request stores these chunks       SchedulerSide._store
    found()    a lookup found these chunks         SchedulerSide.offer
    clear()    the engine has reset its cache      SchedulerSide.reset
    take()     the events since the last call      take_events

It decides and never waits. vLLM is not imported here: `kv_events` makes vLLM's events of these.
"""

from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any, Protocol, TypeAlias

import attrs

from lmcache_trio.adapters import CacheChange, Group

__all__ = ["BlockEvents", "BlocksRemoved", "BlocksStored", "HashedRequest"]

MOST_EXPECTED = 4096
"""Chunks that a request has stored, and that the server has not named: some 4 KiB each with 256 tokens."""
MOST_TOLD = 1 << 21
"""Hashes of blocks that were told and not taken back, some 100 bytes each. Beyond, the oldest chunk is taken back."""


class HashedRequest(Protocol):
    """The part of vLLM's Request that is read here. *block_hashes* has one hash per `hash_tokens` tokens."""

    @property
    def all_token_ids(self) -> Sequence[int]: ...
    @property
    def block_hashes(self) -> Sequence[bytes]: ...


@attrs.frozen
class BlocksStored:
    """Blocks of *group* that are in memory: their hashes, the hash before them, and their tokens in order.

    *about* is what `describe` said of the request.
    """

    group: int
    hashes: Sequence[bytes]
    parent: bytes | None
    token_ids: Sequence[int]
    block_tokens: int
    about: Any


@attrs.frozen
class BlocksRemoved:
    """Blocks of *group* that are not in memory any more."""

    group: int
    hashes: Sequence[bytes]


Event: TypeAlias = BlocksStored | BlocksRemoved


@attrs.frozen
class _Blocks:
    """A chunk's hashes and tokens, and the hash before its first."""

    hashes: Sequence[bytes]
    before: bytes | None
    token_ids: Sequence[int]
    about: Any


class Watched(Protocol):
    """The part of `SchedulerAdapter` that is used here."""

    def take_changes(self) -> Sequence[CacheChange]: ...


class BlockEvents:
    """The events of one engine with *groups*, whose requests have a hash per *hash_tokens* tokens.

    *describe* gives what else events tell of a request's chunk, from its first token to its end.
    """

    def __init__(
        self,
        cache: Watched,
        groups: Sequence[Group],
        hash_tokens: int,
        describe: Callable[[Any, int, int], Any],
    ) -> None:
        self._cache = cache
        self._groups = groups
        self._hash_tokens = hash_tokens
        self._describe = describe
        self._expected: OrderedDict[bytes, _Blocks] = OrderedDict()  # by digest
        self._told: OrderedDict[bytes, tuple[Sequence[bytes], int]] = OrderedDict()  # hashes, and a bit per group
        self._told_hashes = 0
        self._events: list[Event] = []

    def expect(self, request: HashedRequest, digests: Sequence[bytes], first: int, chunk_tokens: int) -> None:
        """*request* stores its chunks from *first* on; *digests* are those of all its chunks until then."""
        for chunk in range(first, len(digests)):
            self._note(request, digests[chunk], chunk, chunk_tokens)

    def found(self, request: HashedRequest, digests: Sequence[bytes], chunk_tokens: int) -> None:
        """A lookup of *request* found that *digests* are a hit, and that memory has what the hit needs."""
        self._see_changes()
        for number, group in enumerate(self._groups):
            for chunk in range(group.first(len(digests), chunk_tokens), len(digests)):
                digest = digests[chunk]
                if not self._told.get(digest, ((), 0))[1] >> number & 1:
                    self._note(request, digest, chunk, chunk_tokens)
                    self._came(number, digest)

    def clear(self) -> None:
        """Nothing that was told is in memory any more."""
        for number in range(len(self._groups)):
            hashes = [
                each
                for of_chunk, groups in self._told.values()
                if groups >> number & 1
                for each in self._part(number, of_chunk)[0]
            ]
            if hashes:
                self._events.append(BlocksRemoved(number, hashes))
        self._told.clear()
        self._expected.clear()
        self._told_hashes = 0

    def take(self) -> Sequence[Event]:
        """The events since the last call, in order."""
        self._see_changes()
        if not self._events:
            return ()
        events, self._events = self._events, []
        return events

    def _see_changes(self) -> None:
        for change in self._cache.take_changes():
            if change.cleared:
                expected = OrderedDict(self._expected)  # what is being stored may still come
                self.clear()
                self._expected = expected
            for digest in change.came:
                self._came(change.group, digest)
            for digest in change.left:
                self._left(change.group, digest)

    def _note(self, request: HashedRequest, digest: bytes, chunk: int, chunk_tokens: int) -> None:
        """What vLLM calls the chunk's blocks, while its request is at hand."""
        per_chunk, rest = divmod(chunk_tokens, self._hash_tokens)
        begin, end = chunk * per_chunk, (chunk + 1) * per_chunk
        if rest or len(request.block_hashes) < end:
            return
        first, last = chunk * chunk_tokens, (chunk + 1) * chunk_tokens
        self._expected[digest] = _Blocks(
            tuple(request.block_hashes[begin:end]),
            request.block_hashes[begin - 1] if begin else None,
            tuple(request.all_token_ids[first:last]),
            self._describe(request, first, last),
        )
        self._expected.move_to_end(digest)
        if len(self._expected) > MOST_EXPECTED:
            self._expected.popitem(last=False)

    def _came(self, group: int, digest: bytes) -> None:
        blocks, (hashes, groups) = self._expected.get(digest), self._told.get(digest, ((), 0))
        if blocks is None or groups >> group & 1:
            return
        part, skipped, block_tokens = self._part(group, blocks.hashes)
        before = blocks.hashes[skipped - 1] if skipped else blocks.before
        tokens = blocks.token_ids[skipped * self._hash_tokens :]
        self._events.append(BlocksStored(group, part, before, tokens, block_tokens, blocks.about))
        groups |= 1 << group
        self._told_hashes += 0 if hashes else len(blocks.hashes)
        self._told[digest] = (blocks.hashes, groups)
        if groups == (1 << len(self._groups)) - 1:
            del self._expected[digest]
        while self._told_hashes > MOST_TOLD:
            oldest, (_, told) = next(iter(self._told.items()))
            for number in range(len(self._groups)):
                if told >> number & 1:
                    self._left(number, oldest)

    def _left(self, group: int, digest: bytes) -> None:
        hashes, groups = self._told.get(digest, ((), 0))
        if not groups >> group & 1:
            return
        self._events.append(BlocksRemoved(group, self._part(group, hashes)[0]))
        groups &= ~(1 << group)
        if groups:
            self._told[digest] = (hashes, groups)
        else:
            del self._told[digest]
            self._told_hashes -= len(hashes)

    def _part(self, group: int, hashes: Sequence[bytes]) -> tuple[Sequence[bytes], int, int]:
        """Of a chunk with *hashes*: those of the blocks of its part in *group*, how many hashes lie before the part,
        and the tokens of a block. A block's hash is that of its last tokens.
        """
        chunk_tokens, unit = len(hashes) * self._hash_tokens, self._groups[group]
        block_tokens = unit.block_tokens or chunk_tokens
        if chunk_tokens % block_tokens or block_tokens % self._hash_tokens:
            block_tokens = chunk_tokens  # a state, whose block has any number of tokens
        width = min(unit.part_blocks(chunk_tokens), chunk_tokens // block_tokens)
        step = block_tokens // self._hash_tokens
        skipped = len(hashes) - width * step
        return hashes[skipped + step - 1 :: step], skipped, block_tokens
