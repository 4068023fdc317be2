"""Plain host memory: entering its pages, and moving the blocks of a chunk between paged KV and a slot.

Engines and the server's `host` device both move blocks with this, so that a slot holds the same bytes either way. Every
call lets the GIL go for as long as it copies. It imports numpy, so a server imports it with its first engine.

Measured (64 pieces, 32 KiB blocks, 16 scattered ones a chunk, one thread, share of memcpy's processor time between
private arrays): gather by `ndarray.take` 0.92, with one call per piece 0.88 to 0.91; scatter by assignment of one void
item per block 0.93, with one call per piece 0.91. Before: torch's `index_select(out=)` 0.81, which first copies all of
the KV where blocks lie apart, and `index_copy_` 0.65. So it is one call where the pieces lie without a gap, which also
waits for the GIL once instead of 64 times.
"""

import ctypes
from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

import attrs
import numpy as np
import numpy.typing as npt

from lmcache_trio.abc import Piece
from lmcache_trio.errors import Misuse

__all__ = ["BlockIndex", "Bytes", "PagedBlocks", "Run", "blocks_of", "enter_pages", "in_line"]

Bytes = npt.NDArray[np.uint8]
BlockIndex = npt.NDArray[np.int64]

_POPULATE_WRITE = 23  # Linux 5.14; older kernels say EINVAL
_libc = ctypes.CDLL(None, use_errno=True)
_libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]


def enter_pages(address: int, length: int) -> bool:
    """Enter the pages of *length* bytes at *address*, a page's, into this process' table, without the GIL.

    It takes longer than a copy of them. False: this kernel cannot, and they come one by one as they are touched.
    """
    return bool(_libc.madvise(address, length, _POPULATE_WRITE) == 0)


class Run(Protocol):
    """Pieces that one call moves. In a slot they stand one behind the other, each with the chunk's blocks in order.
    Block numbers must be in range.
    """

    @property
    def block_bytes(self) -> int:
        """Bytes of one block, over the pieces."""
        ...

    def gather(self, blocks: BlockIndex, part: Bytes) -> None:
        """Copy the blocks *blocks* of each piece into *part* of a slot, which has just their length."""
        ...

    def scatter(self, part: Bytes, count: int, places: "slice | BlockIndex", blocks: BlockIndex) -> None:
        """Of the *count* blocks in *part* of a slot, copy those at *places* into the blocks *blocks* of each piece."""
        ...


class PagedBlocks:
    """All blocks of one worker's KV: *runs*, in the order of a slot. Any thread may copy, and several at once.

    *half*, if given, is called in the middle of a copy. `Misuse`, and nothing is copied, unless a slot is as long as
    its chunk: a longer one would be published half empty, a shorter one written or read over.
    """

    def __init__(self, runs: Sequence[Run]) -> None:
        self.runs = runs
        self.block_bytes = sum(run.block_bytes for run in runs)
        """Bytes of one block, over all layers and pieces."""

    def gather(self, blocks: BlockIndex, slot: Bytes, *, half: Callable[[], None] | None = None) -> None:
        """Copy the blocks *blocks*, those of one chunk, into *slot*, a writable array of their bytes."""
        for run, part in self._parts(slot, len(blocks), half):
            run.gather(blocks, part)

    def scatter(
        self,
        slot: Bytes,
        count: int,
        places: "slice | BlockIndex",
        blocks: BlockIndex,
        *,
        half: Callable[[], None] | None = None,
    ) -> None:
        """Of the *count* blocks in *slot*, copy those at *places* into the blocks *blocks*, and into no other."""
        for run, part in self._parts(slot, count, half):
            run.scatter(part, count, places, blocks)

    def _parts(self, slot: Bytes, count: int, half: Callable[[], None] | None) -> Iterator[tuple[Run, Bytes]]:
        """Each run, and its part of *slot*, which holds *count* blocks."""
        if slot.size != count * self.block_bytes:
            raise Misuse(
                f"the slot has {slot.size} bytes, which {count} blocks of {self.block_bytes} bytes do not fill exactly"
            )
        at = 0
        for i, run in enumerate(self.runs):
            if half is not None and i == len(self.runs) // 2:
                half()
            end = at + count * run.block_bytes
            yield run, slot[at:end]
            at = end


class _HostRun:
    """Pieces of one allocation at a constant distance, moved by one call where they lie without a gap.

    *rows* is their memory as [pieces, blocks, bytes of a block].
    """

    def __init__(self, rows: Bytes) -> None:
        pieces, count, length = rows.shape
        self.block_bytes = pieces * length
        self._rows = rows
        self._item = f"V{length}"
        items = rows.view(self._item)[:, :, 0]
        self._pieces = list(items)
        self._flat = items.reshape(-1) if rows.flags.c_contiguous else None
        self._starts = count * np.arange(pieces)[:, None]

    def gather(self, blocks: BlockIndex, part: Bytes) -> None:
        pieces, _, length = self._rows.shape
        out = part.reshape(pieces, len(blocks), length)
        if self._flat is not None:  # else `take` would first copy everything into one piece
            self._rows.take(blocks, axis=1, out=out, mode="clip")  # the mode "raise" would make a temporary
        elif self._rows.strides[1] == length:
            for rows, of_piece in zip(self._rows, out, strict=True):
                rows.take(blocks, axis=0, out=of_piece, mode="clip")
        else:
            for i, block in enumerate(blocks.tolist()):
                np.copyto(out[:, i], self._rows[:, block])

    def scatter(self, part: Bytes, count: int, places: "slice | BlockIndex", blocks: BlockIndex) -> None:
        source = part.view(self._item).reshape(-1, count)
        if self._flat is not None and len(blocks) == count:
            self._flat[(self._starts + blocks).ravel()] = source.reshape(-1)
        else:
            for items, of_piece in zip(self._pieces, source, strict=True):
                items[blocks] = of_piece[places]


def in_line(pieces: Sequence[Piece]) -> list[list[Piece]]:
    """Neighbours among *pieces* that lie in one allocation at a constant distance, together."""
    found: list[list[Piece]] = []
    for piece in pieces:
        run = found[-1] if found else []
        alike = bool(run) and attrs.evolve(piece, offset=0) == attrs.evolve(run[0], offset=0)
        step = piece.offset - run[-1].offset if alike else 0
        if step > 0 and (len(run) == 1 or step == run[1].offset - run[0].offset):
            run.append(piece)
        else:
            found.append([piece])
    return found


def blocks_of(pieces: Sequence[Piece], allocations: Sequence[Bytes], num_blocks: int) -> PagedBlocks:
    """The blocks of *pieces*, which stand in the order of a slot and lie in *allocations*, whole ones."""
    runs = []
    for run in in_line(pieces):
        head, memory = run[0], allocations[run[0].allocation]
        step = run[1].offset - head.offset if len(run) > 1 else len(run)
        stride = head.stride if num_blocks > 1 else head.length  # a tensor of one block may have any
        shape = (len(run), num_blocks, head.length)
        rows = np.lib.stride_tricks.as_strided(memory[head.offset :], shape, (step, stride, 1))
        runs.append(_HostRun(rows))
    return PagedBlocks(runs)
