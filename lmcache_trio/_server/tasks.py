"""How the server starts tasks: a `Starter` puts them into one nursery, a `Branch` opens a nursery for a block.

`supervise` makes both, from one `Tasks`, and hands them out. No other part of the server has a nursery, and no object
keeps one: a part that starts tasks is passed a starter, for as long as the nursery's block lasts.
"""

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Protocol

import trio

__all__ = ["Branch", "Starter", "Tasks"]


class Starter(Protocol):
    """`start(fn, *args)` runs `await fn(*args)` as a task, called *name* in tracebacks and tools."""

    def __call__(self, fn: Callable[..., Awaitable[object]], *args: object, name: object = None) -> None: ...


Branch = Callable[[], AbstractAsyncContextManager[Starter]]
"""`async with branch() as start`: tasks that are cancelled at the end of the block."""


class Tasks:
    """Makes starters, and counts the tasks in their nurseries. (To walk the tree of 2,000 clients takes 20 ms.)"""

    def __init__(self) -> None:
        self._nurseries: set[trio.Nursery] = set()

    @property
    def running(self) -> int:
        """How many tasks the nurseries of all starters have."""
        return sum(len(nursery.child_tasks) for nursery in self._nurseries)

    def starter(self, nursery: trio.Nursery) -> Starter:
        """The starter of tasks in *nursery*."""
        self._nurseries.add(nursery)

        def start(fn: Callable[..., Awaitable[object]], *args: object, name: object = None) -> None:
            nursery.start_soon(fn, *args, name=name or fn)

        return start

    @asynccontextmanager
    async def branch(self) -> AsyncIterator[Starter]:
        """A new nursery for the block, and the starter of its tasks, which are cancelled at the block's end."""
        try:
            async with trio.open_nursery() as nursery:
                yield self.starter(nursery)
                nursery.cancel_scope.cancel()
        finally:
            self._nurseries.discard(nursery)
