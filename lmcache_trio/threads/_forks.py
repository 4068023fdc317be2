"""A forked child inherits no thread: each owner of a thread is told so, in the child."""

import os
import weakref
from typing import Protocol

__all__ = ["OwnsThread", "inherited"]


class OwnsThread(Protocol):
    """Something that owns a thread."""

    def forked(self) -> None:
        """This process is a forked child, which has no such thread."""


inherited: "weakref.WeakSet[OwnsThread]" = weakref.WeakSet()


def _after_fork_in_child() -> None:
    for owner in list(inherited):
        owner.forked()


os.register_at_fork(after_in_child=_after_fork_in_child)
