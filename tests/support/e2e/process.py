"""A vLLM engine in a process of its own, told what to do in JSON lines over a socket that it inherits.

usage: python -m support.e2e.process FD. The first line holds the arguments of `vllm.LLM`, or {"serve": the flags of
vLLM's HTTP server}. `support.e2e.engine.Engine` runs it; vLLM's own output goes to the standard streams, a log.
"""

import json
import os
import socket
import sys
import time
from collections.abc import Callable
from typing import Any


def main(told: int) -> None:
    """Do as the other end of the socket *told* says, until it says stop."""
    channel = socket.socket(fileno=told).makefile("rw")
    started: dict[str, Any] = json.loads(channel.readline())
    begun = time.monotonic()
    if "serve" in started:
        serve(channel, started["serve"])
        return
    from vllm import LLM

    if "LMCACHE_TRIO_E2E_PREFIX_CACHE" in os.environ:
        keep_prefix_cache()
    engine = LLM(**started)
    reply(channel, ready=time.monotonic() - begun)
    for line in channel:
        command = json.loads(line)
        name = command.pop("command")
        if name == "stop":
            break
        reply(channel, **COMMANDS[name](engine, **command))
    shutdown = getattr(engine.llm_engine.engine_core, "shutdown", None)
    if shutdown is not None:
        shutdown()
    reply(channel, stopped=True)


def keep_prefix_cache() -> None:
    """Let vLLM's own prefix cache be on for latent KV too. Its CPU platform switches it off, other platforms do not."""
    from vllm.platforms.cpu import CpuPlatform

    check = CpuPlatform.check_and_update_config

    def checked(vllm_config: Any) -> None:
        check(vllm_config)
        vllm_config.cache_config.enable_prefix_caching = True

    CpuPlatform.check_and_update_config = staticmethod(checked)


def reply(channel: Any, **values: Any) -> None:
    channel.write(json.dumps(values) + "\n")
    channel.flush()


def serve(channel: Any, flags: list[str]) -> None:
    """vLLM's HTTP server with *flags* instead of an engine of our own; the channel says when it takes connections."""
    import uvicorn
    from vllm.entrypoints.launchers.api_server.entry import main as serve_http

    begun = time.monotonic()
    startup = uvicorn.Server.startup

    async def told_startup(self: uvicorn.Server, *args: Any) -> None:
        await startup(self, *args)
        reply(channel, ready=time.monotonic() - begun)

    uvicorn.Server.startup = told_startup
    sys.argv[1:] = flags
    serve_http()


def generate(engine: Any, prompts: list[list[int]], tokens: int, batch: bool, margins: bool) -> dict[str, Any]:
    """Greedy ids of each prompt, the tokens that no one computed, and the seconds until all were there.

    With *margins*, by how much each prompt's closest choice was made: the difference of two logarithms.
    """
    from vllm import SamplingParams

    wanted = SamplingParams(
        temperature=0, max_tokens=tokens, ignore_eos=True, detokenize=False, logprobs=2 if margins else None
    )
    begun = time.monotonic()
    given: list[Any] = [{"prompt_token_ids": prompt} for prompt in prompts]
    outputs = []
    for part in [given] if batch else [[each] for each in given]:
        outputs += engine.generate(part, wanted, use_tqdm=False)
    return {
        "ids": [list(output.outputs[0].token_ids) for output in outputs],
        "cached": [output.num_cached_tokens for output in outputs],
        "seconds": time.monotonic() - begun,
        "margins": [min(map(margin, output.outputs[0].logprobs)) for output in outputs] if margins else [],
    }


def margin(choices: Any) -> float:
    """Between the most likely token and the next."""
    first, second, *_ = sorted((choice.logprob for choice in choices.values()), reverse=True)
    return float(first - second)


def forget(engine: Any, connector: bool = False) -> dict[str, Any]:
    """Drop vLLM's own prefix cache, which is possible at once; what the connector copies has been stored on return."""
    forgotten = engine.llm_engine.reset_prefix_cache(reset_connector=connector)
    engine.collective_rpc(wait_stores)
    return {"forgotten": forgotten}


def reset_at_once(engine: Any) -> dict[str, Any]:
    """Drop vLLM's own prefix cache right now, whatever is still being copied."""
    return {"reset": engine.llm_engine.reset_prefix_cache()}


def wait_stores(worker: Any) -> None:
    """In a worker: return when all that its connector stores can be loaded. Its lookups take another connection."""
    from vllm.distributed.kv_transfer import get_kv_transfer_group, has_kv_transfer_group

    adapter = getattr(get_kv_transfer_group(), "_worker_adapter", None) if has_kv_transfer_group() else None
    if adapter is not None:
        adapter.wait_published()


def sleep(engine: Any) -> dict[str, Any]:
    """Sleep and wake, at once: vLLM preempts everything and resets its cache and the connector."""
    engine.sleep(1)
    engine.wake_up()
    return {"slept": True}


def remap(engine: Any) -> dict[str, Any]:
    """A sleep as workers on a GPU have it from vLLM 0.33 on: the KV memory goes, and comes back with other bytes."""
    engine.sleep(1)
    engine.collective_rpc(lose_kv_memory)
    engine.wake_up()
    return {"remapped": True}


def lose_kv_memory(worker: Any) -> None:
    """In a worker."""
    from vllm.distributed.kv_transfer import get_kv_transfer_group

    connector = get_kv_transfer_group()
    connector.unregister_kv_caches()
    for tensor in connector._kv_caches.values():
        tensor.zero_()
    connector.restore_kv_caches()


def reload(engine: Any, path: str, reset: bool) -> dict[str, Any]:
    """The weights at *path* in place of those that the engine has, as after a training step."""
    engine.collective_rpc("reload_weights", kwargs={"weights_path": path})
    return {"reset": reset and engine.llm_engine.reset_prefix_cache(reset_connector=True)}


def beside(engine: Any, prompt: list[int], other: list[int], tokens: int, lead: int) -> dict[str, Any]:
    """Seconds between *prompt*'s tokens from the moment at which *other* comes, after *lead* tokens, and its own delay.

    *other* is a prompt of which one token is wanted; empty: nobody comes. vLLM's own batching joins the two.
    """
    from vllm import SamplingParams

    def wanted(count: int) -> Any:
        return SamplingParams(temperature=0, max_tokens=count, ignore_eos=True, detokenize=False)

    core = engine.llm_engine
    core.add_request("beside: first", {"prompt_token_ids": prompt}, wanted(tokens))
    gaps: list[float] = []
    seen, last, came, delay = 0, 0.0, 0.0, 0.0
    while core.has_unfinished_requests():
        if other and not came and seen >= lead:
            core.add_request("beside: other", {"prompt_token_ids": other}, wanted(1))
            came = time.monotonic()
        for output in core.step():
            now = time.monotonic()
            if output.request_id == "beside: other":
                delay = now - came
            elif (count := len(output.outputs[0].token_ids)) > seen:
                if seen >= lead:
                    gaps.append((now - last) / (count - seen))
                seen, last = count, now
    return {"gaps": gaps, "delay": delay}


def abort(engine: Any, prompt: list[int], steps: int) -> dict[str, Any]:
    """Ask for *prompt*, take it back after *steps* steps, and drop vLLM's own cache. How many tokens had been said?"""
    from vllm import SamplingParams

    core, said = engine.llm_engine, 0
    wanted = SamplingParams(temperature=0, max_tokens=64, ignore_eos=True, detokenize=False)
    core.add_request("aborted", {"prompt_token_ids": prompt}, wanted)
    for _ in range(steps):
        said = max([said, *(len(output.outputs[0].token_ids) for output in core.step())])
    core.abort_request(["aborted"])
    for _ in range(1000):  # a load ends before its blocks are vLLM's again
        core.step()
        if core.reset_prefix_cache():
            break
    return {"said": said}


def connector_times(engine: Any) -> dict[str, Any]:
    """Seconds of the engine's thread that each step since the last question spent in a `TimedConnector`."""
    from support.e2e import timed

    return {"steps": timed.take_steps()}


def preemptions(engine: Any) -> dict[str, Any]:
    """How many times requests were preempted since the engine started."""
    found = [metric.value for metric in engine.get_metrics() if metric.name == "vllm:num_preemptions"]
    return {"preemptions": sum(found)}


def metrics(engine: Any) -> dict[str, Any]:
    """The counters of vLLM's own metrics, by name; those of several with one name by its last label, too."""
    found: dict[str, float] = {}
    for metric in engine.get_metrics():
        if hasattr(metric, "value"):
            for name in (metric.name, f"{metric.name} {[*metric.labels.values()][-1]}"):
                found[name] = found.get(name, 0) + metric.value
    return {"metrics": found}


def blocks(engine: Any) -> dict[str, Any]:
    """Blocks of KV that vLLM's pool has."""
    return {"blocks": engine.llm_engine.vllm_config.cache_config.num_gpu_blocks}


COMMANDS: dict[str, Callable[..., dict[str, Any]]] = {
    "generate": generate,
    "forget": forget,
    "reset_at_once": reset_at_once,
    "sleep": sleep,
    "remap": remap,
    "reload": reload,
    "preemptions": preemptions,
    "metrics": metrics,
    "blocks": blocks,
    "abort": abort,
    "beside": beside,
    "connector_times": connector_times,
}

if __name__ == "__main__":
    main(int(sys.argv[1]))
