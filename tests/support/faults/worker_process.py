"""An engine's worker, told by lines on its standard input what to store and load; it stops in the middle of a copy.

Run as `python worker_process.py ADDRESS ENGINE`. `store SESSION FILL DIGESTS` stores three chunks from blocks that are
full of FILL; half way through the first chunk it says "half" and waits for a line, and then its blocks are another
request's: full of 8. `load LEASE` says what the chunks of a lease (in hex) are full of. `go on` goes on.
"""

import sys

import torch

from lmcache_trio.adapters import LoadSpec, StoreSpec, WorkerAdapter

BLOCK, CHUNK = 16, 64
AT = tuple(range(3 * CHUNK // BLOCK))


def say(words: str) -> None:
    print(words, flush=True)


def main(address: str, engine: str) -> None:
    kv = torch.zeros(2, 64, BLOCK, 1, 8)

    def stop(point: str, spec: StoreSpec | LoadSpec) -> None:
        """The engine gives the blocks of a store to another request in the middle of the copy."""
        if point == "half copied" and engine == "doomed" and isinstance(spec, StoreSpec):
            say("half")
            sys.stdin.readline()
            kv.fill_(8)

    worker = WorkerAdapter(
        address, engine_id=engine, block_tokens=BLOCK, connect_timeout=60.0, reply_timeout=60.0, probe=stop
    )
    worker.register_kv_caches({"layer": kv})
    say("here")
    for line in sys.stdin:
        what, *words = line.split()
        if what == "store":
            kv.fill_(float(words[1]))
            worker.store_now([StoreSpec("r", int(words[0]), b"", bytes.fromhex(words[2]), AT)])
            say("over")
        elif what == "load":
            kv.zero_()
            worker.retrieve_now([LoadSpec("r", 1, bytes.fromhex(words[0]), 0, 3, 0, AT)])
            failed = sorted(worker.take_failed_blocks())
            say(f"failed {failed}" if failed else f"full of {sorted(set(kv[:, : len(AT)].flatten().tolist()))}")
    worker.shutdown()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
