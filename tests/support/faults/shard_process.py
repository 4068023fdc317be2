"""One rank of an engine, in a process of its own: a real `WorkerAdapter` that does what it is told, a line at a time.

Run as `python shard_process.py ADDRESS ENGINE SHARD SHARDS SEED HEADS`. Each command is one JSON list, and so is each
reply. SEED 0: its KV is zeros.
"""

import json
import os
import sys
from typing import Any

import torch

from lmcache_trio.adapters import LoadSpec, StoreSpec, WorkerAdapter
from lmcache_trio.errors import Unavailable


class Fault:
    """A probe that stops half-way through a copy if it is told to."""

    def __init__(self) -> None:
        self.fault = ""

    def __call__(self, point: str, spec: StoreSpec | LoadSpec) -> None:
        if point != "half copied":
            return
        if self.fault == "fail":
            raise Unavailable("this rank's copy fails")
        if self.fault == "stop":
            say("half copied")
            os.read(0, 1)  # for ever: the test kills it here


def say(*words: Any) -> None:
    print(json.dumps(words), flush=True)


def main(address: str, engine: str, shard: int, shards: int, seed: int, heads: int) -> None:
    torch.set_num_threads(1)
    shape = (2, 64, 16, heads, 8)
    generator = torch.Generator().manual_seed(seed)
    kv = {f"layer {i}": torch.randn(shape, generator=generator) if seed else torch.zeros(shape) for i in range(2)}
    probe = Fault()
    rank = WorkerAdapter(
        address, engine_id=engine, block_tokens=16, shard=shard, shards=shards, connect_timeout=60.0, probe=probe
    )
    rank.register_kv_caches(kv)
    say("ready")
    for line in sys.stdin:
        verb, *words = json.loads(line)
        if verb == "fault":
            (probe.fault,) = words
            say("as you wish")
        elif verb == "store":
            request, session, parent, digests, blocks = words
            spec = StoreSpec(request, session, bytes.fromhex(parent), bytes.fromhex(digests), tuple(blocks))
            rank.store_now([spec])
            say(rank.statistics())
        elif verb == "load":
            request, session, lease, start, count, skip, blocks = words
            rank.retrieve_now([LoadSpec(request, session, bytes.fromhex(lease), start, count, skip, tuple(blocks))])
            say(sorted(rank.take_failed_blocks()))
        elif verb == "sum":
            say([kv[name][:, words[0]].double().sum().item() for name in kv])
        elif verb == "end":
            break
    rank.shutdown()
    say("ended")


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], *(int(word) for word in sys.argv[3:7]))
