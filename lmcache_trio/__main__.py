"""`lmcache-trio` and `python -m lmcache_trio`: where both begin.

It imports nothing that takes time before it has said what Ctrl-C means.
"""

import signal
import sys

__all__ = ["main"]


def main() -> int:
    """Run the command line; returns the exit status.

    Until a server's loop runs, Ctrl-C has its default action: it ends the process, without a word. Python's own is a
    KeyboardInterrupt at any line, and an import may not survive that: one of a module in C crashed (SIGSEGV).
    """
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # else it is ignored: the process must go on
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    from lmcache_trio import cli

    return cli.main()


if __name__ == "__main__":
    sys.exit(main())
