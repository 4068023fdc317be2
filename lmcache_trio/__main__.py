"""`lmcache-trio` and `python -m lmcache_trio`: where both begin.

It imports nothing that takes time before it has said what Ctrl-C means.
"""

import os
import signal
import sys
from contextlib import suppress

__all__ = ["main"]


def main() -> int:
    """Run the command line; returns the exit status.

    Until a server's loop runs, Ctrl-C has its default action: it ends the process, without a word. Python's own is a
    KeyboardInterrupt at any line, and an import may not survive that: one of a module in C crashed (SIGSEGV).
    """
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # else it is ignored: the process must go on
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    _fill_standard_descriptors()
    from lmcache_trio import cli

    return cli.main()


def _fill_standard_descriptors() -> None:
    """Open what was closed of 0, 1 and 2 (`2>&-`): else a file of ours gets the number, and whatever a library in C has
    to say goes into it."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            with suppress(OSError):
                os.open(os.devnull, os.O_RDWR)  # which takes the lowest number that is free


if __name__ == "__main__":
    sys.exit(main())
