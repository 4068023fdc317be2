"""Which blocks of a request hold the parts of its chunks, in one KV group.

A block list of an engine is positional: its item i holds the tokens from ``i * block_tokens`` on, and -1 is a *hole*, a
position of which the engine keeps no block. A hole is never read and never written. No I/O and no state here.
"""

from collections.abc import Iterator, Sequence

import attrs

from lmcache_trio._core.groups import Group, Need
from lmcache_trio.adapters.specs import own_numbers
from lmcache_trio.errors import Misuse

__all__ = ["HOLE", "PartRun", "loaded_runs", "stored_runs"]

HOLE = -1


@attrs.frozen
class PartRun:
    """Blocks without a hole between them, in the parts of *count* chunks from *first* on.

    They begin behind the first *skip* blocks of the first part, and may end before the last part does.
    """

    first: int
    count: int
    skip: int
    block_ids: Sequence[int]


def loaded_runs(
    group: Group, chunk_tokens: int, blocks: Sequence[int], local_tokens: int, tokens: int
) -> list[PartRun]:
    """What a hit of the first *tokens* tokens needs to be loaded in *group*, where the engine has *local_tokens*.

    *blocks*: all of the request's in this group. *tokens* ends at a chunk's end, unless the group keeps every chunk.
    The runs name each block once: those of the needed parts that are not the engine's already, and no hole. `Misuse`:
    the list does not cover the hit, or has a hole in the place of its state.
    """
    boundary = -(-tokens // chunk_tokens)
    if group.need is Need.STATE:
        place = (tokens - 1) // group.block_tokens if group.block_tokens else len(blocks) - 1
        block = own_numbers("blocks", blocks[place : place + 1]) if place >= 0 else []
        if not block or block[0] == HOLE:
            raise Misuse(f"there is no block for the state behind {tokens} tokens: {len(blocks)} blocks were given")
        return [PartRun(boundary - 1, 1, 0, block)]
    first = max(group.first(boundary, chunk_tokens), local_tokens // chunk_tokens)
    whole, width = chunk_tokens // group.block_tokens, group.part_blocks(chunk_tokens)
    # A part that is shorter than its chunk is needed alone: so the needed blocks are one slice.
    start = max((first + 1) * whole - width, local_tokens // group.block_tokens)
    end = -(-tokens // group.block_tokens)
    if len(blocks) < end:
        raise Misuse(f"{len(blocks)} blocks of {group.block_tokens} tokens are fewer than {tokens} tokens take")
    runs = []
    for begin, block_ids in _between_holes(own_numbers("blocks", blocks[start:end])):
        at, last = start + begin, start + begin + len(block_ids) - 1
        chunk = at // whole
        runs.append(PartRun(chunk, last // whole - chunk + 1, at - ((chunk + 1) * whole - width), block_ids))
    return runs


def stored_runs(group: Group, chunk_tokens: int, blocks: Sequence[int], first: int, end: int) -> list[PartRun]:
    """The chunks from *first* until *end* whose parts in *group*, which is of no states, have no hole.

    *blocks*: all of the request's in this group. `Misuse`: they end before the last chunk does.
    """
    whole, width = chunk_tokens // group.block_tokens, group.part_blocks(chunk_tokens)
    if len(blocks) < end * whole:
        raise Misuse(f"{len(blocks)} blocks of {group.block_tokens} tokens end before chunk {end - 1} does")
    runs, held = list[PartRun](), list[int]()
    for chunk in range(first, end):
        part = own_numbers("blocks", blocks[(chunk + 1) * whole - width : (chunk + 1) * whole])
        if HOLE not in part:
            held += part
        elif held:
            count = len(held) // width
            runs.append(PartRun(chunk - count, count, 0, held))
            held = []
    if held:
        count = len(held) // width
        runs.append(PartRun(end - count, count, 0, held))
    return runs


def _between_holes(blocks: Sequence[int]) -> Iterator[tuple[int, Sequence[int]]]:
    """Each longest piece of *blocks* without a hole, and where it begins."""
    begin = 0
    for at in [i for i, block in enumerate(blocks) if block == HOLE] if HOLE in blocks else []:
        if at > begin:
            yield begin, blocks[begin:at]
        begin = at + 1
    if begin < len(blocks):
        yield begin, blocks[begin:]
