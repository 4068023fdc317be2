"""Forks engines that are told what to do by `process`, with vLLM imported already: that takes 14 s each time.

usage: python -m support.e2e.fork FD. Each packet on the socket FD is one engine: its environment as JSON, and two
descriptors, its channel and its log. The answer is its process id. The imports here start no thread, compute nothing
(a child could not use OpenMP's threads that did it) and open no socket of NNG.
"""

import gc
import importlib
import json
import multiprocessing
import os
import signal
import socket
import sys
from contextlib import suppress
from typing import Any, NoReturn

import torch

from support.e2e import process

IMPORTED = (
    "vllm.entrypoints.llm",
    "vllm.entrypoints.launchers.cli_args",  # of 0.32
    "vllm.entrypoints.common.cli_args",  # of 0.33
    "vllm.distributed.elastic_ep.elastic_execute",
    "vllm.model_executor.layers.quantization.online.base",
    "vllm.model_executor.models.llama",
    "vllm.v1.attention.backends.cpu_attn",
    "vllm.v1.core.sched.scheduler",
    "vllm.v1.executor.multiproc_executor",
    "vllm.v1.worker.cpu_worker",
)
"""Whose imports an engine waits for while it starts; all but the first were seen in a profile of that. What this vLLM
does not have is left out.
"""

FORK = "LMCACHE_TRIO_E2E_FORK"
"""Set: what vLLM would spawn is forked too, as it does by itself where it does not run on the CPU."""

contexts = multiprocessing.get_context


def serve(channel: socket.socket) -> None:
    """Fork until the other end is closed."""
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for the children here; their pidfds tell
    gc.freeze()
    while True:
        packet, descriptors, _, _ = socket.recv_fds(channel, 1 << 20, 2)
        if not packet:
            return
        told, log = descriptors
        pid = os.fork()
        if pid == 0:
            channel.close()
            run(json.loads(packet), told, log)
        os.close(told)
        os.close(log)
        channel.send(str(pid).encode())


def run(environment: dict[str, str], told: int, log: int) -> NoReturn:
    """In the child: as if it had been started with *environment*."""
    os.setsid()
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    os.environ.clear()
    os.environ.update(environment)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.close(log)
    gc.unfreeze = lambda: None  # vLLM does so when it ends: 1 s to look once more at everything that was imported
    if FORK in environment:
        multiprocessing.get_context = forking
        os.register_at_fork(after_in_child=bind)
    process.main(told)
    sys.stdout.flush()
    os._exit(0)  # the engine has shut down; taking the interpreter apart as well takes 3 s


def forking(method: str | None = None) -> Any:
    return contexts(None if method is None else "fork")


def bind() -> None:
    """What OpenMP reads when a process begins, and did not read in one that was forked: its threads and their cores."""
    if cores := os.environ.get("GOMP_CPU_AFFINITY"):
        os.sched_setaffinity(0, map(int, cores.split()))
        torch.set_num_threads(len(cores.split()))


if __name__ == "__main__":
    for name in IMPORTED:
        with suppress(ModuleNotFoundError):
            importlib.import_module(name)
    serve(socket.socket(fileno=int(sys.argv[1])))
