"""Which bytes a copy moves between GPU memory and the arena, as few moves as the layout allows. No driver is asked."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from lmcache_trio.abc import Copy, Memory
from lmcache_trio_backends._cuda_driver import Move

__all__ = ["PIN", "address_of", "moves_of"]

PIN = 256 << 20
"""Bytes of the arena that are registered by one call. No move crosses from one to the next: a driver may refuse it."""


def moves_of(copy: Copy, bases: Sequence[int], memory: Memory) -> Iterator[Move]:
    """Blocks that lie one behind the other on both sides are one move."""
    count, at = copy.chunk_blocks, 0
    for piece in copy.attached.export.pieces[copy.group]:
        base = bases[piece.allocation] + piece.offset
        for i, slot in enumerate(copy.slots):
            for place, first, run in _runs(copy.blocks[i * count : (i + 1) * count], piece.stride, piece.length):
                start, length = slot + at + place * piece.length, run * piece.length
                host = address_of(memory, start, length)
                yield from _cut(start, Move(host, base + first * piece.stride, length))
        at += count * piece.length


def _cut(offset: int, move: Move) -> Iterator[Move]:
    """*move*, whose host side is at *offset* in the arena, in parts that each lie in one registration."""
    done = 0
    while done < move.length:
        part = min(move.length - done, PIN - (offset + done) % PIN)
        yield Move(move.host + done, move.gpu + done, part)
        done += part


def _runs(blocks: Any, stride: int, length: int) -> Iterator[tuple[int, int, int]]:
    """(place in the slot, first block, how many) of the blocks that are to be touched."""
    place = 0
    while place < len(blocks):
        run = 1
        if blocks[place] >= 0:
            while stride == length and place + run < len(blocks) and blocks[place + run] == blocks[place] + run:
                run += 1
            yield place, blocks[place], run
        place += run


def address_of(memory: Memory, offset: int, length: int) -> int:
    """Where bytes of the arena lie in this process."""
    return int(np.frombuffer(memory.view(offset, length), dtype=np.uint8).ctypes.data)
