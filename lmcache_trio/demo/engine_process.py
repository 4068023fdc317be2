"""The engine process of `lmcache-trio demo`: serves the demo's prompts one after the other, and says how it went.

Run as `python -m lmcache_trio.demo.engine_process ADDRESS SETTINGS`, *SETTINGS* as JSON. It writes one JSON object a
line to its standard output, and nothing else: one when it is ready, then one a prompt. Served, it ends.
"""

import json
import sys
import uuid
from collections.abc import Sequence
from typing import cast

import attrs
import torch

from lmcache_trio.adapters.worker.adapter import Path
from lmcache_trio.demo.command import DemoSettings
from lmcache_trio.demo.connected_engine import connect
from lmcache_trio.demo.engine import EngineConfig
from lmcache_trio.demo.model import Model, ModelConfig
from lmcache_trio.demo.model_kv import ModelKV
from lmcache_trio.errors import Unavailable

__all__ = ["main"]


def main(arguments: Sequence[str]) -> None:
    address, settings = arguments[0], DemoSettings(**json.loads(arguments[1]))
    torch.set_num_threads(settings.threads)
    model = ModelConfig(seed=settings.seed, window=settings.window)
    blocks = -(-(settings.longest + settings.new_tokens) // 16)
    _warm_up(model)
    config, path = EngineConfig(model=model, num_blocks=blocks), cast("Path", settings.path)
    with connect(address, config, engine_id=uuid.uuid4().hex, path=path) as connected:
        worker = connected.worker
        if path == "device" and worker.path != path:
            raise Unavailable(f"the device path is not to be had: {worker.path_reason}")
        # The scheduler hears of the namespace a little later
        _say(healthy=worker.is_healthy(), path=worker.path, reason=worker.path_reason)
        for i, prompt in enumerate(_prompts(settings, model.vocabulary)):
            connected.engine.submit(f"prompt {i}", prompt, settings.new_tokens)
            (completion,) = connected.engine.run().values()
            _say(tokens=len(prompt), **attrs.asdict(completion))


def _prompts(settings: DemoSettings, vocabulary: int) -> list[list[int]]:
    """The same in every process. They share no prefix: what is served cold is cold."""
    rng = torch.Generator().manual_seed(settings.seed + 1)
    return [torch.randint(0, vocabulary, (length,), generator=rng).tolist() for length in settings.lengths]


def _warm_up(config: ModelConfig) -> None:
    """The first pass of a process starts torch's threads and picks its kernels: no prompt should pay for that."""
    kv = ModelKV(config.kv_shape(num_blocks=16, block_tokens=16))
    Model(config).forward(torch.zeros(256, dtype=torch.int64), 0, kv, torch.arange(16))


def _say(**values: object) -> None:
    print(json.dumps(values), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
