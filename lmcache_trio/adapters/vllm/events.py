"""Which of vLLM's blocks are in the server's memory and on its tiers, as far as routers are told: events to publish.

The server names chunks by digests, and vLLM names blocks by hashes of its own. A chunk's blocks are known when the
request is at hand that stores it or hits it: then they are noted, and told once the server says that the chunk is in
memory, or on a tier. A chunk that left is told by the same blocks. What an engine never had at hand it never tells.
A tier may name a chunk before the engine does: a lookup finds it there before it is a hit.

To routers all tiers are one medium: a block came when the first tier has it, and left with the last one.

    expect()   a request stores these chunks       SchedulerSide._store
    found()    a lookup found these chunks         SchedulerSide.offer
    clear()    the engine has reset its cache      SchedulerSide.reset
    take()     the events since the last call      take_events

It decides and never waits. vLLM is not imported here: `kv_events` makes vLLM's events of these.
"""

from array import array
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol, TypeAlias

import attrs

from lmcache_trio.adapters import CacheChange, Group

__all__ = ["BlockEvents", "BlocksRemoved", "BlocksStored", "HashedRequest"]

EVERYWHERE = -1
"""All places, as bits."""
MOST_TIERS = 16
"""As many tiers as a server tells of."""
MOST_EXPECTED = 4096
"""Chunks whose blocks are at hand, to be told when the server names them: some 3 KiB each with 256 tokens."""
MOST_UNNAMED = 16_384
"""Chunks that a tier has, and that no request of this engine has named yet: some 200 bytes each."""
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
    """Blocks of *group* that are in memory, or *on_tier*: their hashes, the hash before them, their tokens in order.

    *about* is what `describe` said of the request.
    """

    group: int
    hashes: Sequence[bytes]
    parent: bytes | None
    token_ids: Sequence[int]
    block_tokens: int
    about: Any
    on_tier: bool = False


@attrs.frozen
class BlocksRemoved:
    """Blocks of *group* that are not in memory any more, or not *on_tier*."""

    group: int
    hashes: Sequence[bytes]
    on_tier: bool = False


Event: TypeAlias = BlocksStored | BlocksRemoved


@attrs.frozen
class _Blocks:
    """A chunk's hashes and tokens, and the hash before its first."""

    hashes: Sequence[bytes]
    before: bytes | None
    token_ids: "array[int]"
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
        self._unnamed: OrderedDict[bytes, int] = OrderedDict()  # by digest: the places that have it
        # By digest, hashes and places. A place is a bit: of group g in memory bit g, on tier n bit n * groups + g.
        self._told: OrderedDict[bytes, tuple[Sequence[bytes], int]] = OrderedDict()
        self._told_hashes = 0
        self._memory = (1 << len(groups)) - 1
        self._on_tiers = [sum(1 << n * len(groups) + g for n in range(1, MOST_TIERS + 1)) for g in range(len(groups))]
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
                if not self._told.get(digest, ((), 0))[1] >> number & 1 or digest in self._unnamed:
                    self._note(request, digest, chunk, chunk_tokens)
                    self._came(0, number, digest)

    def clear(self) -> None:
        """Nothing that was told is there any more."""
        self._take_back(EVERYWHERE)
        self._expected.clear()

    def take(self) -> Sequence[Event]:
        """The events since the last call, in order."""
        self._see_changes()
        if not self._events:
            return ()
        events, self._events = self._events, []
        return events

    def _see_changes(self) -> None:
        for change in self._cache.take_changes():
            if change.cleared:  # what is being stored may still come
                self._take_back(self._memory << change.tier * len(self._groups) if change.tier else EVERYWHERE)
            for digest in change.came:
                self._came(change.tier, change.group, digest)
            for digest in change.left:
                self._left(digest, 1 << change.tier * len(self._groups) + change.group)

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
            array("q", request.all_token_ids[first:last]),
            self._describe(request, first, last),
        )
        self._expected.move_to_end(digest)
        if len(self._expected) > MOST_EXPECTED:
            self._expected.popitem(last=False)
        places = self._unnamed.pop(digest, 0)
        for place in range(places.bit_length()):
            if places >> place & 1:
                self._came(*divmod(place, len(self._groups)), digest)

    def _came(self, tier: int, group: int, digest: bytes) -> None:
        place = 1 << tier * len(self._groups) + group
        blocks, (hashes, places) = self._expected.get(digest), self._told.get(digest, ((), 0))
        if places & place:
            return
        if not (tier and places & self._on_tiers[group]):  # else another tier has it already
            if blocks is None:
                if tier:  # of memory a lookup says it again
                    self._await_name(digest, place)
                return
            part, skipped, block_tokens = self._part(group, blocks.hashes)
            before = blocks.hashes[skipped - 1] if skipped else blocks.before
            tokens = tuple(blocks.token_ids[skipped * self._hash_tokens :])
            self._events.append(BlocksStored(group, part, before, tokens, block_tokens, blocks.about, tier > 0))
            self._told_hashes += 0 if hashes else len(blocks.hashes)
            hashes = blocks.hashes
        self._told[digest] = (hashes, places | place)
        while self._told_hashes > MOST_TOLD:
            self._left(next(iter(self._told)), EVERYWHERE)

    def _await_name(self, digest: bytes, place: int) -> None:
        """A tier has the chunk in *place*, and the chunk's blocks are not at hand."""
        self._unnamed[digest] = self._unnamed.get(digest, 0) | place
        if len(self._unnamed) > MOST_UNNAMED:
            self._unnamed.popitem(last=False)

    def _left(self, digest: bytes, gone: int) -> None:
        """The chunk is at none of the places *gone*."""
        if places := self._unnamed.pop(digest, 0) & ~gone:
            self._unnamed[digest] = places
        hashes, places = self._told.get(digest, ((), 0))
        if not places & gone:
            return
        for number, on_tier in self._removed(places, gone):
            self._events.append(BlocksRemoved(number, self._part(number, hashes)[0], on_tier))
        self._keep(digest, hashes, places & ~gone)

    def _take_back(self, gone: int) -> None:
        """All chunks have left the places *gone*."""
        self._unnamed = OrderedDict((digest, left) for digest, has in self._unnamed.items() if (left := has & ~gone))
        removed: dict[tuple[int, bool], list[bytes]] = {}
        for digest, (hashes, places) in list(self._told.items()):
            for number, on_tier in self._removed(places, gone):
                removed.setdefault((number, on_tier), []).extend(self._part(number, hashes)[0])
            self._keep(digest, hashes, places & ~gone)
        self._events += [BlocksRemoved(number, each, on_tier) for (number, on_tier), each in sorted(removed.items())]

    def _removed(self, places: int, gone: int) -> Iterator[tuple[int, bool]]:
        """The groups and media of which a chunk in *places* has nothing left without those *gone*. A medium is memory,
        or all tiers.
        """
        for number, on_tiers in enumerate(self._on_tiers):
            for on_tier, medium in ((False, 1 << number), (True, on_tiers)):
                if places & medium and not places & medium & ~gone:
                    yield number, on_tier

    def _keep(self, digest: bytes, hashes: Sequence[bytes], places: int) -> None:
        if places:
            self._told[digest] = (hashes, places)
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
