"""Cancel a call at any point: `cancelled_at(n, call)` for n = 0, 1, … until it says that the call was done before.

It counts steps of tasks, so it meets every place at which a call may be cancelled, and waits for no clock.
"""

from collections.abc import Awaitable, Callable

import trio

__all__ = ["cancelled_at"]


async def cancelled_at(step: int, call: Callable[[], Awaitable[object]]) -> bool:
    """Await *call*, cancelled when it has been resumed *step* times. Whether it was done before that."""
    with trio.CancelScope() as scope:
        canceller = _Canceller(scope, step)
        trio.lowlevel.add_instrument(canceller)
        try:
            await call()
        finally:
            trio.lowlevel.remove_instrument(canceller)
        return not canceller.fired
    return False


class _Canceller(trio.abc.Instrument):
    """Cancels *scope* after *steps* more steps of any task."""

    def __init__(self, scope: trio.CancelScope, steps: int) -> None:
        self._scope = scope
        self._left = steps
        self.fired = False
        self._spend()

    def after_task_step(self, task: trio.lowlevel.Task) -> None:
        """One step is over."""
        self._spend()

    def _spend(self) -> None:
        if self._left == 0 and not self.fired:
            self.fired = True
            self._scope.cancel()
        self._left -= 1
