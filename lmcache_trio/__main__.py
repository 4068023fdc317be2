"""`python -m lmcache_trio` is `lmcache-trio`."""

import sys

from lmcache_trio.cli import main

if __name__ == "__main__":
    sys.exit(main())
