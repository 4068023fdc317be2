"""A forked child inherits no thread: what owned one is told, in the child, that it is not alive there."""

import os
import weakref
from typing import Protocol

__all__ = ["OwnsThread", "inherited"]


class OwnsThread(Protocol):
    """Something that owns a thread."""

    def forked(self) -> None:
        """In the child: the thread is not there."""


inherited: "weakref.WeakSet[OwnsThread]" = weakref.WeakSet()


def _after_fork_in_child() -> None:
    for owner in list(inherited):
        owner.forked()


os.register_at_fork(after_in_child=_after_fork_in_child)
