"""Cancels an operation at any step that any task of its loop takes, for tests that try them all. It decides nothing."""

from collections.abc import Awaitable, Callable

import trio

__all__ = ["cancelled_at"]


class CancelAt(trio.abc.Instrument):
    """Cancels *scope* when the tasks of this loop have taken *steps* more steps."""

    def __init__(self, scope: trio.CancelScope, steps: float) -> None:
        self._scope, self._left = scope, steps

    def after_task_step(self, task: trio.lowlevel.Task) -> None:
        self._left -= 1
        if self._left == 0:
            self._scope.cancel()


async def cancelled_at(steps: float, operation: Callable[[], Awaitable[object]]) -> bool:
    """Run *operation*, cancelled *steps* steps later. False: it had completed by then."""
    with trio.CancelScope() as scope:
        instrument = CancelAt(scope, steps)
        trio.lowlevel.add_instrument(instrument)
        if steps == 0:
            scope.cancel()
        try:
            await operation()
        finally:
            trio.lowlevel.remove_instrument(instrument)
    return scope.cancel_called
