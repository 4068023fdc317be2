"""Makes the directory of the socket's file, and refuses one that is not safe."""

import os
import re
import stat
from contextlib import suppress
from pathlib import Path

from lmcache_trio.config import PRIVATE, Access
from lmcache_trio.config.addresses import socket_path
from lmcache_trio.errors import ConfigError

__all__ = ["prepare_directory"]


def prepare_directory(address: str, access: Access = PRIVATE) -> None:
    """Make the directory of *address* if it is missing, as private as *access* says; ConfigError if it is not safe to
    use, or if a client that *access* names could not get there.

    A user who can write in the directory can replace the server's socket by another one. (A client would not speak to
    that, but would not find the server either.) So the directory must belong to this user or root, and be closed to
    others, unless it is sticky, as /tmp is. A directory of this user that has only the server's sockets gets its mode
    from *access*; any other is left alone.
    """
    path = socket_path(address)
    if path is None:
        return
    directory = path.parent
    try:
        for missing in reversed([folder for folder in (directory, *directory.parents) if not folder.exists()]):
            with suppress(FileExistsError):
                missing.mkdir(mode=0o700)
                _set_mode(missing, access)
        found = directory.stat()
    except OSError as exc:
        raise ConfigError("address", f"cannot use {directory}: {exc.strerror}; give another path") from exc
    if not stat.S_ISDIR(found.st_mode):
        raise ConfigError("address", f"{directory} is not a directory; give another path")
    if found.st_uid not in (os.geteuid(), 0):
        raise ConfigError("address", f"{directory} belongs to another user (uid {found.st_uid}); give another path")
    if found.st_mode & (stat.S_IWGRP | stat.S_IWOTH) and not found.st_mode & stat.S_ISVTX:
        raise ConfigError(
            "address",
            f"others can write in {directory}; `chmod go-w {directory}`, or, where that cannot be done (a volume of a "
            f"container, say), name a directory in it, which the server then makes: "
            f"address=unix://{directory}/lmcache-trio/{path.name}",
        )
    if found.st_uid == os.geteuid() and access != PRIVATE and _holds_sockets_alone(path):
        _set_mode(directory, access)
    _check_way(directory, access)


def _set_mode(directory: Path, access: Access) -> None:
    try:
        if access.gid is not None:
            os.chown(directory, -1, access.gid)
        directory.chmod(access.directory_mode)
    except OSError as exc:
        raise ConfigError("access", f"cannot set group and mode of {directory}: {exc.strerror}") from exc


def _holds_sockets_alone(path: Path) -> bool:
    """Whether the directory of *path* has only files that a server at *path* has made."""
    ours = re.compile(re.escape(path.name) + r"(\.[0-9a-f]{12})?")
    return all(ours.fullmatch(name) for name in os.listdir(path.parent))


def _check_way(directory: Path, access: Access) -> None:
    """ConfigError: a directory on the way is closed to users whom *access* names."""
    if access == PRIVATE:
        return
    for folder in (directory, *directory.parents):
        found = folder.stat()
        group = not access.uids and found.st_gid == access.gid and found.st_mode & stat.S_IXGRP
        if not group and not found.st_mode & stat.S_IXOTH:
            raise ConfigError(
                "access",
                f"those who may connect cannot get through {folder} (mode {stat.S_IMODE(found.st_mode):04o}); give an "
                "address elsewhere, as in unix:///run/lmcache-trio/server.sock, or open it with chmod",
            )
