"""How a command ends: its exit status, its error, Ctrl-C, and output that nobody takes."""

import errno
import os
import signal
import sys
from contextlib import suppress

__all__ = ["NAME", "NO_OUTPUT", "discard_output", "end_with", "fail", "interrupt_by_exception"]

NAME = "lmcache-trio"
NO_OUTPUT = (
    *(errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO),
    *(errno.EBADF, errno.EINVAL, errno.EAGAIN, errno.ECONNRESET),
)
"""What a write to standard output can fail with, beside a pipe that nobody reads: a disk, a limit (`ulimit -f`), a
descriptor that takes no output (`1</dev/null`), one that does not block, a socket."""


def discard_output() -> None:
    """Let what is still to be written go nowhere: the interpreter would try it again at its end, with a traceback."""
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, sys.stdout.fileno())
    os.close(null)


def fail(message: str, code: int) -> int:
    if sys.stderr is not None:
        with suppress(OSError):  # the status says it too
            print(f"{NAME}: {message}", file=sys.stderr, flush=True)
    return code


def end_with(code: int) -> None:
    """End with *code* where it is not 0."""
    if code:
        raise SystemExit(code)


def interrupt_by_exception() -> None:
    """Let Ctrl-C raise KeyboardInterrupt from now on, in a command that has processes and files to remove."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:
        signal.signal(signal.SIGINT, signal.default_int_handler)
