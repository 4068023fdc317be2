"""How a command that has processes and files ends on Ctrl-C and SIGTERM: by cancellation, so in order."""

import signal
from collections.abc import Awaitable, Callable
from typing import TypeVar

import trio

__all__ = ["run_until_signal"]

T = TypeVar("T")


async def run_until_signal(work: Callable[[], Awaitable[T]]) -> T:
    """Return what *work* returns. When SIGINT or SIGTERM comes, *work* is cancelled: SystemExit of 128 + its number.

    KeyboardInterrupt could be raised between any two lines, those of a context manager too. Repeats of the signal are
    ignored until *work* has ended; a SIGINT that the caller's shell has set to be ignored stays ignored.
    """
    numbers = [number for number in (signal.SIGINT, signal.SIGTERM) if signal.getsignal(number) is not signal.SIG_IGN]
    came: list[int] = []
    with trio.open_signal_receiver(*numbers) as signals:
        async with trio.open_nursery() as nursery:
            with trio.CancelScope() as working:

                async def watch() -> None:
                    async for number in signals:
                        came.append(number)
                        working.cancel()

                nursery.start_soon(watch)
                try:
                    return await work()
                finally:
                    nursery.cancel_scope.cancel()
    raise SystemExit(128 + came[0])
