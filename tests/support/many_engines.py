"""Many engines of one server, in a process of its own: `python -m support.many_engines ADDRESS COUNT`.

It says `ready` when all are connected, and ends with its input. Each has a scheduler and no worker.
"""

import sys

import trio

from lmcache_trio._wire.messages import Role
from support.server import say_hello


async def main(address: str, count: int) -> None:
    engines = [await say_hello(address, Role.SCHEDULER, f"engine {number:04}") for number in range(count)]
    print("ready", len(engines), flush=True)
    await trio.to_thread.run_sync(sys.stdin.read)


trio.run(main, sys.argv[1], int(sys.argv[2]))
