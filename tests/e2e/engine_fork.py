"""Forks engines that are told what to do by `engine_process`, with vLLM imported already: that takes 11 s each time.

usage: engine_fork.py FD. Each packet on the socket FD is one engine: its environment as JSON, and two descriptors, its
channel and its log. The answer is its process id. What is imported here starts no thread and opens no socket of NNG.
"""

import gc
import json
import os
import signal
import socket
import sys

import engine_process
from vllm import LLM, SamplingParams

__all__ = ["LLM", "SamplingParams"]


def serve(channel: socket.socket) -> None:
    """Fork until the other end is closed; in a child, return once it was told to stop."""
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
            return
        os.close(told)
        os.close(log)
        channel.send(str(pid).encode())


def run(environment: dict[str, str], told: int, log: int) -> None:
    """In the child: as if it had been started with *environment*."""
    os.setsid()
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    os.environ.clear()
    os.environ.update(environment)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.close(log)
    engine_process.main(told)


if __name__ == "__main__":
    serve(socket.socket(fileno=int(sys.argv[1])))
