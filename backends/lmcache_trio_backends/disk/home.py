"""The directory of one disk tier: whether it may be used, which files in it are ours, and whether it is still there.

    PATH/                          the user's: empty at first, or marked as a disk tier's
    PATH/lmcache-trio.lock         the mark, with the directory's id; held by flock while a server uses the directory
    PATH/lmcache-trio-format-2/    all other files of this version; private, as is each file in it
    PATH/lmcache-trio-format-N/    another version's: an older one is removed, a newer one stays as it is

Rule 1: the tier opens, makes and removes files through the descriptor of the directory that it checked, never through a
symbolic link. So it changes nothing elsewhere if the path leads elsewhere in the middle of a run.
Rule 2: a file is removed or written only under a name of the tier's own.
Every method blocks, and runs in the index file's thread; `check` runs in any thread.
"""

import errno
import fcntl
import logging
import os
import re
import secrets
import stat
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import NoReturn

import attrs

from lmcache_trio.errors import ConfigError

__all__ = ["FORMAT", "INDEX_NAME", "LOCK_NAME", "Home", "open_own", "slab_name"]

log = logging.getLogger("lmcache_trio.disk")

FORMAT = 2
"""Version of all files except the lock, whose format never changes."""
LOCK_NAME = "lmcache-trio.lock"
INDEX_NAME = "lmcache-trio-index"
_FORMAT_NAME = re.compile(r"lmcache-trio-format-(\d{1,9})")
_SLAB_NAME = re.compile(r"lmcache-trio-slab-(\d{5,9})")
_PREFIX = "lmcache-trio-"
_MARK = re.compile(rb"lmcache-trio disk tier\nid ([0-9a-f]{32})\n(?:process (\d+)\n)?")
_MARK_BYTES = 128
_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
_OVERFLOW_UID = 65534
"""The owner that a user namespace shows for files of a user whom it does not have, as for `/` itself."""
_BACK = " (unmounted, or renamed?): bring it back, or restart the server to begin anew in its place"


def _is_mapped(uid: int) -> bool:
    """Whether this process's user namespace has a user *uid*."""
    rows = [[int(field) for field in line.split()] for line in Path("/proc/self/uid_map").read_text().splitlines()]
    return any(first <= uid < first + count for first, _, count in rows)


def slab_name(index: int) -> str:
    """The file of slab *index*."""
    return f"lmcache-trio-slab-{index:05}"


@attrs.define
class _Known:
    """The directory as it was when it was open last, to tell it from another in its place."""

    id: bytes
    place: tuple[int, int]
    removed: bool = False


class Home:
    """The directory *path* of one tier. Lives as long as the tier; open between `open` and `close`."""

    def __init__(self, path: str) -> None:
        self.path = Path(path)
        self.inside = self.path / f"{_PREFIX}format-{FORMAT}"
        self._top = self._in = self._lock = -1
        self._known: _Known | None = None
        self._is_open = False

    # ---- opening

    def open(self, *, flush: bool) -> None:
        """Make or check the directory, lock it, remove older formats. *flush*: its names outlive a power failure.

        ConfigError: it may not be used. OSError: it can't be used now, or another directory stands in its place.
        """
        try:
            self._check_way()
            self._open_top(flush)
            mark = self._lock_directory()
            self._remove_older_formats()
            self._open_inside(flush)
            self.check()
            self._known = _Known(mark, _place(os.fstat(self._top)))
            self._is_open = True
        except BaseException:
            self.close()
            raise

    def _check_way(self) -> None:
        """ConfigError when another user could put another directory in the place of this one."""
        real = Path(os.path.realpath(self.path))
        trusted = {os.geteuid(), 0} if _is_mapped(_OVERFLOW_UID) else {os.geteuid(), 0, _OVERFLOW_UID}
        for step in dict.fromkeys([self.path, *self.path.parents, *real.parents]):
            try:
                found = step.lstat()
            except FileNotFoundError:
                continue
            if step == self.path and not stat.S_ISLNK(found.st_mode):
                continue  # `_open_top` checks the directory itself
            if found.st_uid not in trusted:
                self._refuse(f"{step} in it belongs to another user (uid {found.st_uid}), who could replace it")
            if stat.S_ISDIR(found.st_mode) and found.st_mode & stat.S_IWOTH and not found.st_mode & stat.S_ISVTX:
                self._refuse(f"every user can write in {step}, and replace files in it; `chmod o-w {step}`")

    def _open_top(self, flush: bool) -> None:
        known = self._known
        if not self.path.exists():
            if known is not None and not known.removed:
                raise FileNotFoundError(errno.ENOENT, f"the directory is not there any more{_BACK}")
            missing = [path for path in (self.path, *self.path.parents) if not path.exists()]
            if dead := [path for path in missing if path.is_symlink()]:
                self._refuse(f"{dead[0]} is a link that leads nowhere")
            above = missing[-1].parent
            if known is not None and above.stat().st_dev != known.place[0]:
                raise FileNotFoundError(errno.ENOENT, f"the directory was removed, and {above} is on another disk now")
            for path in reversed(missing):
                path.mkdir(mode=0o700, exist_ok=True)
                if flush:
                    _flush_names(path.parent)
        self._top = os.open(self.path, _DIRECTORY)
        found = os.fstat(self._top)
        if found.st_uid not in (os.geteuid(), 0):
            self._refuse(f"it belongs to another user (uid {found.st_uid})")
        if found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
            ways = [f"`chmod go-w {self.path}`"]
            if found.st_mode & stat.S_ISVTX:
                ways = []  # /tmp is meant to be so
            if found.st_mode & stat.S_ISVTX or not found.st_mode & stat.S_IWOTH:
                ways.append(f"name a directory in it that is to be made, as {self.path / 'kv'}")
            self._refuse(f"others can write in it; {', or '.join(ways)}")

    def _lock_directory(self) -> bytes:
        """Lock the directory, if it is a tier's or may become one. Returns its id."""
        mark = self._mark()
        known = self._known
        if known is not None and not known.removed:
            is_same = mark is not None and mark[1] == known.id
            if not is_same and _place(os.fstat(self._top)) != known.place:
                raise FileNotFoundError(errno.ENOENT, f"another directory stands in its place{_BACK}")
        if mark is None:
            self._claim()
        self._lock = open_own(LOCK_NAME, os.O_RDWR | os.O_CREAT, dir_fd=self._top, shown=self.path)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as exc:
            if exc.errno not in (errno.EAGAIN, errno.EACCES):
                raise
            held = _MARK.match(os.pread(self._lock, _MARK_BYTES, 0))
            process = held[2].decode("ascii") if held and held[2] else "unknown"
            problem = f"{str(self.path)!r} is in use by process {process}; give each server a directory of its own"
            raise ConfigError("path", problem) from exc
        mark = _MARK.match(os.pread(self._lock, _MARK_BYTES, 0))
        if mark is None:
            content = f"lmcache-trio disk tier\nid {secrets.token_hex(16)}\n".encode("ascii")
            os.pwrite(self._lock, content, 0)
            os.fsync(self._lock)  # once in its life: a power failure must not leave files without their mark
            os.fsync(self._top)
            mark = _MARK.match(content)
            assert mark is not None
        os.ftruncate(self._lock, mark.end(1) + 1)  # without its id the directory would be foreign
        os.pwrite(self._lock, f"process {os.getpid()}\n".encode("ascii"), mark.end(1) + 1)
        return mark[1]

    def _mark(self) -> "re.Match[bytes] | None":
        try:
            fd = open_own(LOCK_NAME, os.O_RDONLY, dir_fd=self._top, shown=self.path)
        except FileNotFoundError:
            return None
        try:
            return _MARK.match(os.pread(fd, _MARK_BYTES, 0))
        finally:
            os.close(fd)

    def _claim(self) -> None:
        """ConfigError when the directory holds a file of the user's.

        A mark that is lost or damaged does not matter if all files in the directory can only be a tier's.
        """
        names = set(os.listdir(self._top))
        ours = {name for name in names if self._is_format(name)}
        foreign = {name for name in names - ours if not self._is_nothing(name, marked=bool(ours))}
        if foreign:
            some = ", ".join(map(repr, sorted(foreign)[:3])) + (", …" if len(foreign) > 3 else "")
            self._refuse(f"it holds files that are not a disk tier's ({some}), and nothing of them is touched")
        elif ours:
            log.warning("%s has lost %s, or it is damaged: it is made anew", self.path, LOCK_NAME)
        else:
            log.info("a disk tier is begun in %s", self.path)

    def _is_format(self, name: str) -> bool:
        """Whether it is a format's directory as `_open_inside` makes it, with nothing but a tier's files in it."""
        found = os.stat(name, dir_fd=self._top, follow_symlinks=False)
        if not _FORMAT_NAME.fullmatch(name) or not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid():
            return False
        fd = os.open(name, _DIRECTORY | os.O_NOFOLLOW, dir_fd=self._top)
        try:
            return all(inner.startswith(_PREFIX) for inner in os.listdir(fd))
        finally:
            os.close(fd)

    def _is_nothing(self, name: str, *, marked: bool) -> bool:
        """Whether it is a fresh file system's lost+found, or an empty mark (beside files of a tier, a damaged one)."""
        found = os.stat(name, dir_fd=self._top, follow_symlinks=False)
        if name == LOCK_NAME:
            return stat.S_ISREG(found.st_mode) and found.st_size <= (_MARK_BYTES if marked else 0)
        return name == "lost+found" and stat.S_ISDIR(found.st_mode)

    def _remove_older_formats(self) -> None:
        for name in sorted(os.listdir(self._top)):
            number = _FORMAT_NAME.fullmatch(name)
            if number is None or int(number[1]) == FORMAT:
                continue
            if int(number[1]) > FORMAT:
                log.info("%s was made by a newer version: it stays, and takes room beside `size`", self.path / name)
            else:
                self._remove_format(name)

    def _remove_format(self, name: str) -> None:
        log.info("%s was made by an older version: it is removed, and the cache begun anew", self.path / name)
        fd = os.open(name, _DIRECTORY | os.O_NOFOLLOW, dir_fd=self._top)
        try:
            for file in os.listdir(fd):
                found = os.stat(file, dir_fd=fd, follow_symlinks=False)
                if file.startswith(_PREFIX) and stat.S_ISREG(found.st_mode):
                    os.unlink(file, dir_fd=fd)
        finally:
            os.close(fd)
        try:
            os.rmdir(name, dir_fd=self._top)
        except OSError as exc:
            if exc.errno != errno.ENOTEMPTY:
                raise
            log.warning("%s holds other files too: they stay", self.path / name)

    def _open_inside(self, flush: bool) -> None:
        try:
            os.mkdir(self.inside.name, 0o700, dir_fd=self._top)
        except FileExistsError:
            pass
        else:
            if flush:
                os.fsync(self._top)
        try:
            self._in = os.open(self.inside.name, _DIRECTORY | os.O_NOFOLLOW, dir_fd=self._top)
        except OSError as exc:
            if exc.errno not in (errno.ENOTDIR, errno.ELOOP):
                raise
            raise ConfigError("path", f"{self.inside} is not a directory of this tier; remove it") from exc
        found = os.fstat(self._in)
        if found.st_uid != os.geteuid():
            raise ConfigError("path", f"{self.inside} belongs to another user (uid {found.st_uid}); remove it")
        if found.st_mode & 0o077:
            os.fchmod(self._in, 0o700)

    # ---- files, while it is open

    def open_file(self, name: str, flags: int) -> int:
        """Open a file of the tier's; see `open_own`."""
        try:
            return open_own(name, flags, dir_fd=self._in, shown=self.inside)
        except FileNotFoundError:
            self.check()
            raise

    def slabs(self) -> Iterator[tuple[int, str]]:
        """(number, name) of each slab's file, in no order."""
        for name in os.listdir(self._in):
            if number := _SLAB_NAME.fullmatch(name):
                yield int(number[1]), name

    def remove_file(self, name: str) -> None:
        """Remove it if it exists; ConfigError if it is not a file."""
        with suppress(FileNotFoundError):
            if not stat.S_ISREG(os.stat(name, dir_fd=self._in, follow_symlinks=False).st_mode):
                raise _irregular(self.inside / name)
            os.unlink(name, dir_fd=self._in)

    def file_system(self) -> os.statvfs_result:
        """Size and free space of the directory's file system."""
        return os.fstatvfs(self._in)

    def flush_names(self) -> None:
        """The names of the tier's files outlive a power failure from now on."""
        os.fsync(self._in)

    def check(self) -> None:
        """OSError when the path leads elsewhere now: bytes that are written here would never be found again."""
        if self._top < 0:
            return
        top = os.fstat(self._top)
        try:
            there = self.path.stat()
        except OSError as exc:
            how = (
                "was removed" if not top.st_nlink else f"is not there any more (unmounted, or renamed?): {exc.strerror}"
            )
            raise FileNotFoundError(errno.ENOENT, f"the directory {how}") from exc
        if there.st_dev != top.st_dev:
            how = f"was unmounted, or mounted over: device {_device(there)} where {_device(top)} was"
            raise FileNotFoundError(errno.ENOENT, f"the directory {how}")
        if there.st_ino != top.st_ino:
            raise FileNotFoundError(errno.ENOENT, "the directory was replaced by another")
        for name, fd in ((LOCK_NAME, self._lock), (self.inside.name, self._in)):
            try:
                is_same = os.path.samestat(os.stat(name, dir_fd=self._top, follow_symlinks=False), os.fstat(fd))
            except FileNotFoundError:
                is_same = False
            if not is_same:
                raise FileNotFoundError(errno.ENOENT, f"{name!r} in the directory was removed or replaced")

    def close(self) -> None:
        """Close and unlock the directory. Idempotent."""
        if self._is_open and self._known is not None:
            self._known.removed = not os.fstat(self._top).st_nlink
        self._is_open = False
        fds = (self._in, self._top, self._lock)
        self._top = self._in = self._lock = -1
        for fd in fds:
            if fd >= 0:
                os.close(fd)

    def _refuse(self, why: str) -> NoReturn:
        fix = "give an empty directory for this server alone, or one that is not there yet"
        raise ConfigError("path", f"{str(self.path)!r} can't be used: {why}; {fix}")


def open_own(name: str | Path, flags: int, *, dir_fd: int | None = None, shown: Path = Path()) -> int:
    """Open a regular file of this user's, and make it private; ConfigError if anything else has its name."""
    where = shown / name
    try:
        fd = os.open(name, flags | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK, 0o600, dir_fd=dir_fd)
    except OSError as exc:
        if exc.errno not in (errno.ELOOP, errno.EISDIR, errno.ENXIO):
            raise
        raise _irregular(where) from exc
    try:
        found = os.fstat(fd)
        if not stat.S_ISREG(found.st_mode):
            raise _irregular(where)
        if found.st_nlink > 1:
            raise ConfigError("path", f"{where} has a second name elsewhere (a hard link); remove one")
        if found.st_uid != os.geteuid():
            raise ConfigError("path", f"{where} belongs to another user (uid {found.st_uid}); remove it")
        if found.st_mode & 0o077 and flags & os.O_RDWR:
            os.fchmod(fd, 0o600)
    except BaseException:
        os.close(fd)
        raise
    return fd


def _irregular(path: Path) -> ConfigError:
    return ConfigError("path", f"{path} is not a regular file (a link, a directory, a pipe?); remove it")


def _place(found: os.stat_result) -> tuple[int, int]:
    return found.st_dev, found.st_ino


def _device(found: os.stat_result) -> str:
    return f"{os.major(found.st_dev)}:{os.minor(found.st_dev)}"


def _flush_names(directory: Path) -> None:
    fd = os.open(directory, _DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
