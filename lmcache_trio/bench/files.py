"""The files of a disk tier, seen from outside: dropped from the page cache, and read directly. Imports no torch."""

import itertools
import os
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import attrs

from lmcache_trio.errors import Unavailable

__all__ = ["PAGE", "Extent", "forget", "index_mark", "pieces", "read_direct", "why_no_direct", "written"]

PAGE = 4096
"""What O_DIRECT wants offsets, lengths and addresses to be multiples of, on any disk."""
_IN_MEMORY = ("tmpfs", "ramfs", "devtmpfs")


@attrs.frozen
class Extent:
    """*length* bytes at *start* of a file: whole pages."""

    path: Path
    start: int
    length: int


def why_no_direct(folder: Path) -> str:
    """Why no disk can be read directly through a file in *folder*; empty where it can."""
    kind = _file_system(folder)
    if kind in _IN_MEMORY:  # since Linux 6.6 they take the flag, and copy from memory
        return f"a {kind} has no disk to be read directly"
    with tempfile.NamedTemporaryFile(dir=folder) as file:
        try:
            os.close(os.open(file.name, os.O_RDONLY | os.O_DIRECT))
        except OSError as exc:
            return f"the file system refuses O_DIRECT ({exc.strerror})"
    return ""


def _file_system(folder: Path) -> str:
    device = os.stat(folder).st_dev
    name = f"{os.major(device)}:{os.minor(device)}"
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        mount, _, kind = line.partition(" - ")
        if mount.split()[2] == name:
            return kind.split()[0]
    return ""  # btrfs, for one, gives its files numbers of their own


def forget(folder: Path) -> None:
    """Have the kernel drop all files in *folder* from its page cache."""
    for path in folder.rglob("*"):
        if path.is_file():
            _forget(path)


def _forget(path: Path) -> None:
    try:
        file = os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        return
    try:
        os.fsync(file)  # pages that are not on the disk yet stay
        os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(file)


def index_mark(folder: Path) -> Path:
    """The file in which a disk tier in *folder* notes each change of its index."""
    return next(folder.rglob("lmcache-trio-index-mark"))


def written(path: Path) -> list[Extent]:
    """Where *path* holds bytes: not where it has a hole, or room that was set aside and never written."""
    found, at = [], 0
    file = os.open(path, os.O_RDONLY)
    try:
        end = os.fstat(file).st_size
        while at < end:
            try:
                start = os.lseek(file, at, os.SEEK_DATA)
            except OSError:  # ENXIO: no more of them
                break
            at = os.lseek(file, start, os.SEEK_HOLE)
            first, last = -(-start // PAGE), at // PAGE
            if first < last:
                found.append(Extent(path, first * PAGE, (last - first) * PAGE))
    finally:
        os.close(file)
    return found


def pieces(extents: Sequence[Extent], skip: int, size: int, most: int) -> Iterator[Extent]:
    """*size* bytes of *extents*, one after the other and over again, from byte *skip* on; at most *most* at a time."""
    whole = sum(extent.length for extent in extents)
    if not whole:
        raise Unavailable("there is nothing to be read: no byte was written")
    skip %= whole
    for extent in itertools.cycle(extents):
        at = min(skip, extent.length)
        skip -= at
        while at < extent.length:
            if not size:
                return
            length = min(most, extent.length - at, size)
            yield Extent(extent.path, extent.start + at, length)
            at, size = at + length, size - length


def read_direct(file: int, extent: Extent, view: memoryview) -> None:
    """Fill the page-aligned *view* from *extent* of *file*, which was opened with O_DIRECT."""
    done = 0
    while done < extent.length:
        got = os.preadv(file, [view[done : extent.length]], extent.start + done)
        if not got:
            raise Unavailable(f"{extent.path} ended at {extent.start + done}: it was cut while it was read")
        done += got
