"""KV groups: layers whose KV is kept alike, and which of their chunks a hit needs.

A model with several kinds of attention has several groups. A chunk has one *part* for each group, and a part for each
shard of it. Parts are stored, leased, evicted and loaded on their own. A hit of n chunks, its *boundary*, needs of each
group the parts of some last chunks before it:

    EVERY   all n: full attention, latent KV
    WINDOW  those that hold the last tokens - 1 tokens: a sliding window of *tokens*
    LOCAL   those since the last multiple of *tokens*: attention within chunks of *tokens*
    STATE   the last one: a recurrent state, as it is at the boundary

No I/O and no state here.
"""

from collections.abc import Callable, Sequence
from enum import IntEnum

import attrs
from attrs.validators import ge, le

from lmcache_trio.errors import Misuse

__all__ = ["EVERY", "MOST_GROUPS", "Group", "Need", "check_groups", "longest_hit", "named_groups"]

MOST_GROUPS = 16
"""Groups of one engine, at most. The models of today have up to six."""


class Need(IntEnum):
    """Which parts a hit needs."""

    EVERY = 0
    WINDOW = 1
    LOCAL = 2
    STATE = 3


@attrs.frozen
class Group:
    """One group of layers. *tokens*: of the window, or of an attention chunk; 0 for others.

    *block_tokens*: tokens of one of its blocks. A block of a STATE group holds one state, of any number of tokens.
    """

    need: Need = Need.EVERY
    tokens: int = attrs.field(default=0, validator=[ge(0), le(1 << 30)])
    block_tokens: int = attrs.field(default=0, validator=[ge(0), le(1 << 16)])

    def first(self, boundary: int, chunk_tokens: int) -> int:
        """The first chunk whose part a hit of *boundary* chunks needs; it needs all from there to the boundary."""
        if self.need is Need.EVERY or not boundary:
            return 0
        if self.need is Need.STATE:
            return boundary - 1
        if self.need is Need.WINDOW:
            return max(0, boundary - self.reach(chunk_tokens))
        return boundary * chunk_tokens // self.tokens * self.tokens // chunk_tokens

    def reach(self, chunk_tokens: int) -> int:
        """The most chunks whose parts one hit needs; 0: all of its chunks."""
        if self.need is Need.EVERY:
            return 0
        if self.need is Need.STATE:
            return 1
        if self.need is Need.WINDOW:
            return -(-(self.tokens - 1) // chunk_tokens)
        return -(-self.tokens // chunk_tokens)

    def part_blocks(self, chunk_tokens: int) -> int:
        """Blocks of one part: the last ones of its chunk. A window shorter than a chunk needs no more than its own."""
        if self.need is Need.STATE:
            return 1
        whole = chunk_tokens // self.block_tokens
        return min(whole, -(-(self.tokens - 1) // self.block_tokens)) if self.need is Need.WINDOW else whole


EVERY = Group()
"""The only group of an engine that names none. Its blocks are those of the engine."""


def named_groups(groups: Sequence[Group]) -> tuple[Group, ...]:
    """The groups of an engine whose clients name *groups*: one, `EVERY`, if they name none or one that is no other."""
    return tuple(groups) if len(groups) > 1 or any(group.need is not Need.EVERY for group in groups) else (EVERY,)


def check_groups(groups: Sequence[Group], block_tokens: int, chunk_tokens: int) -> None:
    """`Misuse` names the group that cannot be, in an engine whose chunks are multiples of *block_tokens*.

    *chunk_tokens* is 0 where it is not known yet.
    """
    if not 1 <= len(groups) <= MOST_GROUPS:
        raise Misuse(f"groups has {len(groups)} groups: give 1 to {MOST_GROUPS}")
    for number, group in enumerate(groups):
        where, least = f"group {number} ({group.need.name.lower()})", 2 if group.need is Need.WINDOW else 1
        if group.need in (Need.WINDOW, Need.LOCAL) and group.tokens < least:
            raise Misuse(f"{where} has tokens {group.tokens}: give those of its window, {least} or more")
        if group.need is Need.STATE:
            continue
        for name, unit in (("block_tokens", block_tokens), ("chunk_tokens", chunk_tokens)):
            if unit and (group.block_tokens < 1 or unit % group.block_tokens):
                raise Misuse(
                    f"{where} has blocks of {group.block_tokens} tokens, of which the engine's {name} ({unit}) is not a"
                    " multiple: give the least common multiple of all groups' blocks as block_tokens"
                )


def longest_hit(present: Callable[[int, int], object], groups: Sequence[Group], chunk_tokens: int, most: int) -> int:
    """The largest boundary up to *most* chunks that all *groups* serve.

    *present* says whether a part is there, by the number of its group and by its chunk. It is asked once per part at
    most, and only for parts that a boundary needs which may still be the largest.
    """
    boundary, before = most, -1
    lows = [most] * len(groups)  # by group: its parts from there to the boundary are there
    while before != boundary:
        before = boundary
        for number, group in enumerate(groups):
            low, first = min(lows[number], boundary), group.first(boundary, chunk_tokens)
            while low > first:
                low -= 1
                if not present(number, low):  # each boundary behind it, up to this one, needs it
                    boundary, first = low, group.first(low, chunk_tokens)
            lows[number] = low
    return boundary
