"""The directory that the address of a socket file needs."""

import os
import stat
from contextlib import suppress
from pathlib import Path

from lmcache_trio.errors import ConfigError

__all__ = ["prepare_directory", "socket_path"]


def socket_path(address: str) -> Path | None:
    """The file of a unix or ipc address; None for other transports."""
    scheme, _, path = address.partition("://")
    return Path(path) if scheme in ("unix", "ipc") else None


def prepare_directory(address: str) -> None:
    """Make the directory of *address* if it is missing, private to the user; ConfigError if it is not safe to use.

    Whoever can write in the directory can put a socket of their own in the place of ours, so it must belong to this
    user (or root) and be closed to others, unless it is sticky, as /tmp is.
    """
    path = socket_path(address)
    if path is None:
        return
    directory = path.parent
    try:
        with suppress(FileExistsError):
            directory.mkdir(mode=0o700, parents=True)
        found = directory.stat()
    except OSError as exc:
        raise ConfigError("address", f"cannot use {directory}: {exc.strerror}; give another path") from exc
    if not stat.S_ISDIR(found.st_mode):
        raise ConfigError("address", f"{directory} is no directory; give another path")
    if found.st_uid not in (os.getuid(), 0):
        raise ConfigError("address", f"{directory} belongs to another user (uid {found.st_uid}); give another path")
    if found.st_mode & (stat.S_IWGRP | stat.S_IWOTH) and not found.st_mode & stat.S_ISVTX:
        raise ConfigError("address", f"others can write in {directory}; `chmod go-w {directory}`, or give another path")
