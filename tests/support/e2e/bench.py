"""What the rows of the table share: models, a server, one engine at a time, and what an engine without us would say."""

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import attrs

from support.e2e.engine import Engine, Gate, Server, tail
from support.e2e.hybrid import HYBRIDS, write_hybrid
from support.e2e.model import MID, NARROW, TINY, Shape, write_llama
from support.e2e.start import Forker

__all__ = ["BROUGHT", "CHUNK", "KINDS", "KV_EVENTS", "Bench", "Kind"]

CHUNK = 256
"""Tokens of a chunk on the servers of the table: two blocks of 128, eight of 32."""

BROUGHT = 512
"""Tokens that a connector of `support.e2e.foreign` offers."""

KV_EVENTS = f"ipc://@lmcache-trio-e2e-kv-events-{os.getpid()}"
"""Where an engine of the kind "kv events" publishes them: a name in no directory, of this process alone."""

SHAPES: Mapping[str, Shape] = {"tiny": TINY, "other": TINY, "narrow": NARROW, "mid": MID}
KV_BYTES = {"tiny": 1 << 28, "narrow": 1 << 28, "mid": 1 << 30}
"""Of an engine. Every start fills them with zeros: 0.5 s a GiB."""

ARGUMENTS: Mapping[str, Any] = {
    "max_model_len": 8192,
    "block_size": 128,
    "enforce_eager": True,
    "enable_prefix_caching": True,
    "enable_chunked_prefill": True,
    "max_num_batched_tokens": 2048,
    "max_num_seqs": 4,
    "seed": 0,
    "skip_tokenizer_init": True,
    "disable_log_stats": False,
}
ONE_PROCESS = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_OMP_THREADS_BIND": "0-1"}
DEFAULT_PROCESSES = {"VLLM_CPU_OMP_THREADS_BIND": "0-1"}
MODULES = {"FaultyConnector": "support.e2e.faulty", "TimedConnector": "support.e2e.timed"}
OWN_CACHE = {"LMCACHE_TRIO_E2E_PREFIX_CACHE": "1"}
TWO_RANKS = {"VLLM_CPU_OMP_THREADS_BIND": "0|1", "LMCACHE_TRIO_E2E_FORK": "1"}
PATIENCE: Mapping[str, Mapping[str, Any]] = {"memory": {}, "hybrid": {}, "disk": {"lookup_timeout": 60.0}}
"""Settings of an engine, by its server: what is on disk is waited for, as `Bench` lets the server wait."""
HASH_SEEDS = ("0", "1")
"""Of the interpreters that engines are forked off; the first where a kind does not say. What vLLM spawns has none."""


@attrs.frozen
class Kind:
    """One way to run an engine. *extra* is `kv_connector_extra_config`; None: without a connector.

    *server* is a key of `Bench.servers`: two with memory alone, one with a disk tier below it.
    """

    extra: Mapping[str, Any] | None
    environment: Mapping[str, str] = ONE_PROCESS
    arguments: Mapping[str, Any] = attrs.Factory(dict)
    model: str = "tiny"
    connector: str = "LMCacheTrioConnector"
    server: str = "memory"
    before: str = ""
    """A connector of `support.e2e.foreign` that is asked before ours, in a MultiConnector."""


def hybrid(name: str) -> dict[str, Any]:
    """Arguments for *name* of `support.e2e.hybrid`: a prompt is computed in steps that leave a window behind."""
    own = {"disable_hybrid_kv_cache_manager": False, "max_num_batched_tokens": 768}
    return {**own, "block_size": None} if name.startswith("qwen3next") else own  # vLLM chooses what fits the states


FEW_BLOCKS = {"gemma3": 55, "gemma2": 37, "gptoss": 27, "llama4": 73, "mistral": 19, "qwen3next": 25}
"""By model, the null block included: enough for 2,688 tokens of one prompt, and for four prompts of 505, but not for
their answers too. gptoss's window is so short that a step computes half as much there.
"""


def few_blocks(name: str) -> dict[str, Any]:
    """Arguments for *name* of `support.e2e.hybrid`, with which requests are preempted."""
    few = {"num_gpu_blocks_override": FEW_BLOCKS[name], "max_model_len": 2688}
    return {**hybrid(name), **few, **({"max_num_batched_tokens": 384} if name == "gptoss" else {})}


TOLD = {"kv_events_config": {"enable_kv_cache_events": True, "endpoint": KV_EVENTS}, "block_size": 32}

KINDS: Mapping[str, Kind] = {
    "no connector": Kind(None),
    "async": Kind({}, {**ONE_PROCESS, "PYTHONHASHSEED": "0"}),
    "sync": Kind({"load": "sync", "sync_lookup": True}, {**ONE_PROCESS, "PYTHONHASHSEED": "1"}),
    "small blocks": Kind({"sync_lookup": True}, arguments={"block_size": 32}),
    "few blocks": Kind({}, arguments={"block_size": 32, "num_gpu_blocks_override": 34, "max_model_len": 1024}),
    "few blocks, sync": Kind(
        {"load": "sync"}, arguments={"block_size": 32, "num_gpu_blocks_override": 34, "max_model_len": 1024}
    ),
    "speculative": Kind(
        {}, arguments={"speculative_config": {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 2}}
    ),
    "disk, async": Kind({}, server="disk"),
    "disk, sync": Kind({"load": "sync", "sync_lookup": True}, server="disk"),
    "default processes": Kind({"load": "sync"}, DEFAULT_PROCESSES),
    "faults, async": Kind({}, connector="FaultyConnector"),
    "faults, sync": Kind({"load": "sync", "sync_lookup": True}, connector="FaultyConnector"),
    "two ranks, no connector": Kind(None, TWO_RANKS, {"tensor_parallel_size": 2}),
    "two ranks": Kind({}, TWO_RANKS, {"tensor_parallel_size": 2}, connector="FaultyConnector"),
    "two ranks, sync": Kind({"load": "sync"}, TWO_RANKS, {"tensor_parallel_size": 2}, connector="FaultyConnector"),
    "replicas, no connector": Kind(None, TWO_RANKS, {"tensor_parallel_size": 2}, model="narrow"),
    "replicas": Kind({}, TWO_RANKS, {"tensor_parallel_size": 2}, model="narrow"),
    "dsv2, own cache": Kind(None, {**ONE_PROCESS, **OWN_CACHE}, model="dsv2"),
    "dsv2, two ranks, own cache": Kind(None, {**TWO_RANKS, **OWN_CACHE}, {"tensor_parallel_size": 2}, model="dsv2"),
    "dsv2, two ranks": Kind({}, TWO_RANKS, {"tensor_parallel_size": 2}, model="dsv2"),
    "dsv2, two ranks, disk": Kind({}, TWO_RANKS, {"tensor_parallel_size": 2}, model="dsv2", server="disk"),
    "two processes": Kind({}, {**DEFAULT_PROCESSES, "LMCACHE_TRIO_E2E_FORK": "1"}),
    "behind a failing connector": Kind({}, before="FailingConnector"),
    "kv events": Kind({}, arguments=TOLD),
    "kv events, disk": Kind({}, arguments=TOLD, server="disk"),
    "mid, no connector": Kind(None, model="mid"),
    "mid": Kind({}, model="mid"),
    "mid, timed": Kind({}, model="mid", connector="TimedConnector"),
    **{f"{name}, no connector": Kind(None, arguments=hybrid(name), model=name) for name in HYBRIDS},
    **{name: Kind({}, arguments=hybrid(name), model=name, server="hybrid") for name in HYBRIDS},
    **{f"{name}, disk": Kind({}, arguments=hybrid(name), model=name, server="disk") for name in HYBRIDS},
    **{f"{name}, few blocks": Kind({}, arguments=few_blocks(name), model=name, server="hybrid") for name in FEW_BLOCKS},
}


def behind(before: str, ours: Mapping[str, Any]) -> dict[str, Any]:
    """Both, in a MultiConnector: the first that has tokens of a prompt loads them, and both store."""
    foreign = {"kv_connector": before, "kv_connector_module_path": "support.e2e.foreign", "kv_role": "kv_both"}
    both = {"connectors": [foreign, ours]}
    return {"kv_connector": "MultiConnector", "kv_role": "kv_both", "kv_connector_extra_config": both}


class Bench:
    """Engines are slow to start: the one that is asked for again is kept until another kind is asked for."""

    def __init__(self, where: Path) -> None:
        self.where = where
        tier = {"backend": "disk", "path": str(where / "tier"), "size": "256MiB"}
        sets = [f"tiers.0.{key}={value}" for key, value in tier.items()]
        sets += ["tier_timeout=60", "prefetch_budget=60", "grace=60"]  # a machine's disk may stand still for seconds
        self.server = Server(where / "server", chunk_tokens=CHUNK, size="1GiB")
        self.servers = {
            "memory": self.server,
            "hybrid": Server(where / "hybrid", chunk_tokens=CHUNK, size="64MiB"),
            "disk": Server(where / "disk", chunk_tokens=CHUNK, size="256MiB", settings=sets),
        }
        self.tier = where / "tier"
        self.gate = Gate(where / "gate.sock")
        self.forkers = {seed: Forker(where / f"forker-{seed}.log", hash_seed=seed) for seed in HASH_SEEDS}
        self._name = self._other_name = ""
        self._engine: Engine | None = None
        self._other: Engine | None = None
        self._models: dict[str, Path] = {}

    def model(self, name: str) -> Path:
        """*name* is one of SHAPES or of HYBRIDS; written when first asked for."""
        if name not in self._models:
            self._models[name] = self.write_model(name, seed=0)
        return self._models[name]

    def write_model(self, name: str, *, seed: int) -> Path:
        if name in HYBRIDS:
            return write_hybrid(self.where / "models" / name, name, seed=seed)
        return write_llama(self.where / "models" / name, SHAPES[name], seed=seed)

    def engine(self, name: str, *, fresh: bool = False) -> Engine:
        """The engine of kind *name*, started if need be. *fresh*: started anew in any case."""
        if fresh or name != self._name or self._engine is None or not self._engine.alive():
            self.stop_engine()
            self._engine, self._name = self.start(name), name
        self.gate.action = None
        self.gate.reached.clear()
        return self._engine

    def beside(self, name: str) -> Engine:
        """One more engine, of kind *name*, which is kept until one more of another kind is asked for."""
        if name != self._other_name or self._other is None or not self._other.alive():
            self._stop_other()
            self._other, self._other_name = self.start(name), name
        return self._other

    def _stop_other(self) -> None:
        if self._other is not None:
            self._other.stop()
        self._other, self._other_name = None, ""

    def stop_engine(self) -> None:
        if self._engine is not None:
            self._engine.stop()
        self._engine, self._name = None, ""

    def start(self, name: str) -> Engine:
        """One more engine of kind *name*, for the caller to stop."""
        kind = KINDS[name]
        dtype = (HYBRIDS if kind.model in HYBRIDS else SHAPES)[kind.model].dtype
        arguments = {**ARGUMENTS, "dtype": dtype, "model": str(self.model(kind.model))}
        arguments |= {"kv_cache_memory_bytes": KV_BYTES.get(kind.model, 1 << 28), **kind.arguments}
        if kind.environment is ONE_PROCESS or kind.environment.get("VLLM_ENABLE_V1_MULTIPROCESSING") == "0":
            arguments["distributed_executor_backend"] = "uni"
        if kind.extra is not None:
            server = self.servers[kind.server]
            if server.process is None or server.process.poll() is not None:
                server.start()
            ours = {
                "kv_connector": kind.connector,
                "kv_connector_module_path": MODULES.get(kind.connector, "lmcache_trio.adapters.vllm"),
                "kv_role": "kv_both",
                "kv_connector_extra_config": {"address": server.address, **PATIENCE[kind.server], **kind.extra},
            }
            recompute = {"kv_load_failure_policy": "recompute"}
            arguments["kv_transfer_config"] = (
                {**behind(kind.before, ours), **recompute} if kind.before else {**ours, **recompute}
            )
        log = self.where / f"{name.replace(', ', '-').replace(' ', '-')}.log"
        gate = self.gate if kind.connector == "FaultyConnector" else None
        forker = self.forkers[kind.environment.get("PYTHONHASHSEED", HASH_SEEDS[0])]
        return Engine(log, arguments, environment=kind.environment, gate=gate, forker=forker)

    def logs(self) -> Iterator[tuple[str, str]]:
        """The ends of the four logs of engines and servers that were written to last, by name, the latest first."""
        logs = [*self.where.glob("*.log"), *self.where.glob("*/server.log")]
        for log in sorted(logs, key=lambda log: log.stat().st_mtime, reverse=True)[:4]:
            yield str(log.relative_to(self.where)), tail(log)

    def close(self) -> None:
        self.stop_engine()
        self._stop_other()
        for server in self.servers.values():
            server.stop()
        self.gate.close()
        for forker in self.forkers.values():
            forker.close()
