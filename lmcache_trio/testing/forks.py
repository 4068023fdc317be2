"""Child processes forked off one that has imported what they need: 20 ms each, where an import of torch takes seconds.

`Forks(*modules).start(arguments)` is for tests what `subprocess.Popen([sys.executable, *arguments])` is: the child has
the environment, the working directory and the standard error of its caller, ends as an interpreter ends, and its exit
status is told. A change of the interpreter itself (its path, its hash seed, its flags) needs a `Popen`. The parent of
the children, run as `python -m lmcache_trio.testing.forks FD MODULE…`, starts no thread and computes nothing.
"""

import atexit
import gc
import importlib
import json
import os
import random
import runpy
import select
import signal
import socket
import struct
import subprocess
import sys
from collections.abc import Sequence
from types import TracebackType
from typing import IO, Any

import attrs

__all__ = ["Fork", "Forks", "engines", "servers"]

_NUMBER = struct.Struct("i")
_PACKET = 1 << 20
"""Bytes of one order at most: the environment is most of it."""


class Fork:
    """One child. *stdin* and *stdout* are the test's ends of pipes; None where the child has none."""

    def __init__(self, told: int, stdin: IO[str] | None, stdout: IO[str] | None) -> None:
        self._told = told
        self.stdin, self.stdout = stdin, stdout
        self.returncode: int | None = None
        self.pid = self._number()

    def _number(self) -> int:
        number = os.read(self._told, _NUMBER.size)
        if not number:
            raise RuntimeError("the process that forks has ended")
        return int(_NUMBER.unpack(number)[0])

    def wait(self, timeout: float | None = None) -> int:
        """The exit status, or -n if signal n ended it."""
        if self.returncode is None:
            if not select.select([self._told], [], [], timeout)[0]:
                raise subprocess.TimeoutExpired([str(self.pid)], timeout or 0.0)
            self.returncode = self._number()
            os.close(self._told)
        return self.returncode

    def poll(self) -> int | None:
        try:
            return self.wait(0)
        except subprocess.TimeoutExpired:
            return None

    def fileno(self) -> int:
        """Readable once the child has ended; for those who wait in a loop of their own. Closed by `wait`."""
        return self._told

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def __enter__(self) -> "Fork":
        return self

    def __exit__(self, kind: type[BaseException] | None, exc: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Close the pipes, and wait for the child's end."""
        for pipe in (self.stdin, self.stdout):
            if pipe is not None:
                pipe.close()
        self.wait()


class Forks:
    """The process that children are forked off. It begins with the first of them, and ends with the interpreter."""

    def __init__(self, *modules: str) -> None:
        self._modules = modules
        self._channel: socket.socket | None = None

    def start(self, arguments: Sequence[str], *, stdin: bool = False, stdout: bool = True) -> Fork:
        """Fork a child that runs *arguments*: `-m MODULE …`, `-c CODE …` or `PROGRAM …`."""
        channel = self._channel or self._begin()
        told, tell = os.pipe()
        theirs, ours_in = os.pipe() if stdin else (os.open(os.devnull, os.O_RDONLY), -1)
        ours_out, their_out = os.pipe() if stdout else (-1, os.dup(1))
        order = {"arguments": list(arguments), "environment": dict(os.environ), "directory": os.getcwd()}
        socket.send_fds(channel, [json.dumps(order).encode()], [theirs, their_out, 2, tell])
        for descriptor in (theirs, their_out, tell):
            os.close(descriptor)
        return Fork(told, open(ours_in, "w") if stdin else None, open(ours_out) if stdout else None)

    def _begin(self) -> socket.socket:
        channel, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        channel.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _PACKET)
        command = [sys.executable, "-m", __name__, str(theirs.fileno()), *self._modules]
        null = subprocess.DEVNULL
        with theirs:
            process = subprocess.Popen(command, pass_fds=[theirs.fileno()], stdin=null, stdout=null)
        atexit.register(_end, os.getpid(), channel, process)
        self._channel = channel
        return channel


def _end(owner: int, channel: socket.socket, process: "subprocess.Popen[bytes]") -> None:
    if os.getpid() == owner:
        channel.shutdown(socket.SHUT_RDWR)
        process.wait()


servers = Forks("lmcache_trio.cli", "lmcache_trio._server.supervise", "lmcache_trio._transport.over_unix")
"""Forks `-m lmcache_trio serve …`: no torch."""

engines = Forks("torch", "lmcache_trio.adapters", "lmcache_trio._transport.over_unix")
"""Forks programs that use the adapters."""


# ---- the parent of the children


@attrs.frozen
class _ChildProgram:
    arguments: list[str]
    environment: dict[str, str]
    directory: str
    descriptors: tuple[int, int, int]

    def run(self) -> None:
        """As the interpreter would; the caller returns, and the interpreter ends."""
        for number, descriptor in enumerate(self.descriptors):
            os.dup2(descriptor, number)
            os.close(descriptor)
        os.chdir(self.directory)
        os.environ.clear()
        os.environ.update(self.environment)
        random.seed()  # or all children would draw the same numbers
        kind, *words = self.arguments
        if kind == "-m":
            sys.argv[:] = words
            runpy.run_module(words[0], run_name="__main__", alter_sys=True)
        elif kind == "-c":
            sys.argv[:] = ["-c", *words[1:]]
            main: dict[str, Any] = sys.modules["__main__"].__dict__
            main["__name__"] = "__main__"
            exec(compile(words[0], "<string>", "exec"), main)
        else:
            sys.argv[:] = self.arguments
            runpy.run_path(kind, run_name="__main__")


def _serve(channel: socket.socket) -> _ChildProgram | None:
    """Fork until the other end is closed. In a child: what it shall run."""
    gc.freeze()
    alive: dict[int, tuple[int, int]] = {}
    """By pidfd: the pid of a child, and where its exit status is told."""
    poller = select.poll()
    poller.register(channel, select.POLLIN)
    while True:
        for descriptor, _ in poller.poll():
            if descriptor in alive:
                pid, tell = alive.pop(descriptor)
                poller.unregister(descriptor)
                os.close(descriptor)
                _tell(tell, os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
                os.close(tell)
                continue
            packet, (stdin, stdout, stderr, tell) = _receive(channel)
            if not packet:
                for pid, _ in alive.values():
                    os.kill(pid, signal.SIGKILL)
                return None
            pid = os.fork()
            if pid == 0:
                channel.close()
                for inherited, (_, other) in alive.items():
                    os.close(inherited)
                    os.close(other)
                os.close(tell)
                return _ChildProgram(**json.loads(packet), descriptors=(stdin, stdout, stderr))
            pidfd = os.pidfd_open(pid)
            poller.register(pidfd, select.POLLIN)
            alive[pidfd] = pid, tell
            _tell(tell, pid)
            for passed in (stdin, stdout, stderr):
                os.close(passed)


def _receive(channel: socket.socket) -> tuple[bytes, list[int]]:
    packet, descriptors, _, _ = socket.recv_fds(channel, _PACKET, 4)
    return packet, descriptors if packet else [-1] * 4


def _tell(tell: int, number: int) -> None:
    try:
        os.write(tell, _NUMBER.pack(number))
    except BrokenPipeError:
        return  # nobody waits for it any more


if __name__ == "__main__":
    for name in sys.argv[2:]:
        importlib.import_module(name)
    if (child := _serve(socket.socket(fileno=int(sys.argv[1])))) is not None:
        child.run()
