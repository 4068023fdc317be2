"""The command line. `program` has the commands and the exit statuses; each other module is one command, or shared."""

from lmcache_trio.cli.program import app, main

__all__ = ["app", "main"]
