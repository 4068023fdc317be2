"""Measures what a load by layers can bring at best: time to first token of a hit, beside a load of all layers at once.

Run as `python docs/plots/layerwise.py`. A thread copies the prompt's KV, and the demo's model computes what the hit
leaves: after the whole copy, or behind a gate per layer. There is no server, so nothing is added to either way. A copy
that is slower than memory sleeps for as long as its bytes would take. `layerwise.json` has what it printed, beside what
lmcache-trio's own moves by layers brought before they were taken out.
"""

import json
import statistics
import threading  # noqa: TID251  (a program of its own, with no loop)
import time

import torch

from lmcache_trio.demo.model import Model, ModelConfig
from lmcache_trio.demo.model_kv import ModelKV

BLOCK, ROUNDS = 16, 7
TOKENS, LEFT = (1024, 4096), (1, 32)
SPEEDS = {"memory": 0.0, "4 GB/s": 4e9, "1 GB/s": 1e9, "0.25 GB/s": 0.25e9}
WAYS = ("nothing loaded", "whole", "by layers")
CONFIG = ModelConfig(layers=12, hidden=512, heads=8, kv_heads=8, intermediate=1408)


class GatedKV(ModelKV):
    """Waits for a layer before the pass touches it."""

    gates: tuple[threading.Event, ...] = ()

    def write(self, layer: int, blocks: torch.Tensor, start: int, keys: torch.Tensor, values: torch.Tensor) -> None:
        if self.gates:
            self.gates[layer].wait()
        super().write(layer, blocks, start, keys, values)


def copy(kv: GatedKV, stored: list[torch.Tensor], tokens: int, speed: float) -> None:
    """In a thread: the KV of *tokens* tokens, layer by layer."""
    for layer, (into, source) in enumerate(zip(kv.layers.values(), stored, strict=True)):
        begun, blocks = time.perf_counter(), tokens // BLOCK
        into[:, :blocks].copy_(source[:, :blocks])
        if speed:
            rest = source[:, :blocks].nbytes / speed - (time.perf_counter() - begun)
            time.sleep(max(0.0, rest))  # noqa: TID251  (it is the slow copy)
        if kv.gates:
            kv.gates[layer].set()


def main() -> None:
    """Print one JSON object per line."""
    torch.set_num_threads(1)
    model, blocks = Model(CONFIG), (max(TOKENS) + max(LEFT)) // BLOCK
    kv, table = GatedKV(CONFIG.kv_shape(num_blocks=blocks, block_tokens=BLOCK)), torch.arange(blocks)
    stored = [torch.randn_like(layer) for layer in kv.layers.values()]
    for tokens in TOKENS:
        for left in LEFT:
            for name, speed in SPEEDS.items():
                seconds: dict[str, list[float]] = {way: [] for way in WAYS}
                for _ in range(ROUNDS):
                    for way in WAYS:
                        kv.gates = tuple(threading.Event() for _ in stored) if way == "by layers" else ()
                        loading = threading.Thread(target=copy, args=(kv, stored, tokens, speed))
                        begun = time.perf_counter()
                        if way != "nothing loaded":
                            loading.start()
                        if way == "whole":
                            loading.join()
                        model.forward(torch.zeros(left, dtype=torch.int64), tokens, kv, table)
                        seconds[way].append(time.perf_counter() - begun)
                found = {way: round(1000 * statistics.median(each), 1) for way, each in seconds.items()}
                print(json.dumps({"tokens": tokens, "left": left, "copy": name, "milliseconds": found}), flush=True)


if __name__ == "__main__":
    main()
