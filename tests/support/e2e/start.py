"""How an engine's process comes to be: as a child of its own, or forked off one that has imported vLLM already."""

import json
import os
import select
import socket
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

__all__ = ["TESTS", "Forker", "Process", "fresh_process", "with_offline"]

TESTS = Path(__file__).parents[2]
OFFLINE = {
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    "VLLM_TARGET_DEVICE": "cpu",
    "VLLM_HOST_IP": "127.0.0.1",
    "VLLM_ALLOW_INSECURE_SERIALIZATION": "1",  # a worker in a process of its own is sent what it shall wait for
    "OMP_WAIT_POLICY": "PASSIVE",  # threads that spin starve everything else on two cores
}


def with_offline(more: Mapping[str, str]) -> dict[str, str]:
    """An engine's environment: ours, what keeps vLLM off the network, and *more*."""
    # No empty part: it would be the working directory, and the checkout would hide what is installed.
    path = os.pathsep.join(filter(None, [str(TESTS), os.environ.get("PYTHONPATH")]))
    return {**os.environ, **OFFLINE, "PYTHONPATH": path, **more}


class Process:
    """An engine's process, leader of a group of its own."""

    def __init__(self, pid: int, popen: "subprocess.Popen[bytes] | None" = None) -> None:
        self.pid = pid
        self._popen = popen
        self._pidfd = os.pidfd_open(pid)

    def alive(self) -> bool:
        return not self.wait(0)

    def wait(self, seconds: float) -> bool:
        """Has it ended, within *seconds*?"""
        ended = bool(select.select([self._pidfd], [], [], seconds)[0])
        if ended and self._popen is not None:
            self._popen.wait()
        return ended

    def close(self) -> None:
        os.close(self._pidfd)


def fresh_process(environment: Mapping[str, str], told: socket.socket, log: Path) -> Process:
    """One that begins with a new interpreter: its hash seed and its path are *environment*'s."""
    popen = _new_python("process", environment, told, log)
    return Process(popen.pid, popen)


def _new_python(
    module: str, environment: Mapping[str, str], told: socket.socket, log: Path
) -> "subprocess.Popen[bytes]":
    """A new interpreter that runs *module*, which is told what to do through *told*."""
    with log.open("ab") as output:
        return subprocess.Popen(
            [sys.executable, "-m", f"support.e2e.{module}", str(told.fileno())],
            pass_fds=[told.fileno()],
            stdout=output,
            stderr=output,
            stdin=subprocess.DEVNULL,
            env=environment,
            start_new_session=True,
        )


class Forker:
    """The process that engines are forked off. Whoever makes it need not wait: it imports while others work."""

    def __init__(self, log: Path, *, hash_seed: str) -> None:
        self._log = log
        self._channel, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._channel.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 20)
        with theirs:
            self._popen = _new_python("fork", with_offline({"PYTHONHASHSEED": hash_seed}), theirs, log)

    def fork(self, environment: Mapping[str, str], told: socket.socket, log: Path) -> Process:
        """An engine with *environment*, but for what Python itself reads when it begins."""
        with log.open("ab") as output:
            socket.send_fds(self._channel, [json.dumps(dict(environment)).encode()], [told.fileno(), output.fileno()])
        said = self._channel.recv(64)
        assert said, f"no engine can be forked: see {self._log}"
        return Process(int(said))

    def close(self) -> None:
        self._channel.close()
        self._popen.wait()
