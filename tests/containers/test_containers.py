"""Server and engine in namespaces of their own (pid, ipc, mount), with a /dev/shm of 1 MiB each, that share the
socket's directory and nothing else: as docs/howto/containers.md has it.
"""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import attrs
import pytest
import trio

from lmcache_trio import open_client

ENGINE = """
import hashlib, sys, trio
from lmcache_trio import Role, open_client

address, what = sys.argv[1:]
digests = [hashlib.sha256(f"chunk {i}".encode()).digest() for i in range(3)]
contents = [bytes([65 + i]) * 65536 for i in range(3)]

async def main():
    async with open_client(address, role=Role.SCHEDULER, engine="e") as scheduler:
        async with open_client(address, role=Role.WORKER, engine="e") as worker:
            assert worker.arena is not None, worker.arena_note
            await worker.register(b"f" * 32, 65536, 16)
            if what == "device":
                print(attach(), flush=True)
                return
            answer = await scheduler.lookup(1, digests)
            if answer.chunks:
                async with worker.retrieving(answer.lease, 0, answer.chunks) as views:
                    found = [bytes(view) for view in views]
                print("hit", answer.chunks, found == contents, flush=True)
                return
            async with worker.storing(1, b"", digests) as storing:
                for i, slot in storing.slots.items():
                    slot[:] = contents[i]
                    if what == "hold":
                        print("in mid store", flush=True)
                        await trio.sleep_forever()
            print("cold", len(storing.slots), flush=True)

trio.run(main)
"""

DEVICE = """
import sys, torch
from lmcache_trio.adapters import WorkerAdapter
from lmcache_trio.adapters.shared_kv import shared_tensor

worker = WorkerAdapter(sys.argv[1], engine_id="d", block_tokens=16)
kv = {f"layer {i}": shared_tensor(8 * 1024).view(8, 1024) for i in range(2)}
worker.register_kv_caches(kv, num_blocks=8)
print(worker.path, worker.path_reason, flush=True)
worker.shutdown()
"""

ENTER = """
set -e
mount -t tmpfs -o size=1m tmpfs /dev/shm
mount --bind "$SHARED" "$SHARED"
[ -z "$READ_ONLY" ] || mount -o remount,bind,ro /
[ -z "$ONLY_CONNECTS" ] || mount -o remount,bind,ro "$SHARED"
[ -z "$AS" ] || exec setpriv --reuid "$AS" --regid "$AS" --clear-groups "$@"
exec "$@"
"""

UNSHARE = ["unshare", "--pid", "--ipc", "--mount", "--fork", "--mount-proc", "--kill-child"]


def _why_not() -> str:
    """Why there can be no containers here, if so."""
    for tool in ("unshare", "setpriv", "mount"):
        if shutil.which(tool) is None:
            return f"there is no {tool}"
    tried = subprocess.run(
        [*UNSHARE, "sh", "-c", "mount -t tmpfs tmpfs /dev/shm"], capture_output=True, text=True, timeout=30, check=False
    )
    return tried.stderr.strip()


pytestmark = pytest.mark.skipif(bool(_why_not()), reason=f"unshare is not permitted here: {_why_not()}")


@attrs.frozen
class Users:
    """Who runs the two containers; *read_only*: neither can write anywhere but in the shared directory."""

    server: int = 0
    engine: int = 0
    read_only: bool = False


@attrs.define
class Pod:
    """The two containers' volume, and ways to start a process in one."""

    shared: Path
    users: Users
    stack: contextlib.ExitStack

    @property
    def address(self) -> str:
        return f"unix://{self.shared}/server/server.sock"

    def start(self, uid: int, *command: str, **environ: str) -> "subprocess.Popen[str]":
        env = {**os.environ, **environ, "SHARED": str(self.shared), "AS": str(uid or ""), "HOME": str(self.shared)}
        env.setdefault("ONLY_CONNECTS", "")
        env |= {"READ_ONLY": "1" if self.users.read_only else "", "PYTHONDONTWRITEBYTECODE": "1"}
        process = self.stack.enter_context(
            subprocess.Popen(
                [*UNSHARE, "sh", "-c", ENTER, "sh", *command],
                env=env,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                cwd="/",
                start_new_session=True,
            )
        )
        self.stack.callback(kill, process)
        return process

    def serve(self) -> "subprocess.Popen[str]":
        sets = [f"address={self.address}", "memory.size=64MiB", "grace=1"]
        if self.users.engine != self.users.server:
            sets.append(f"access.uids=[{self.users.engine}]")
        server = self.start(self.users.server, sys.executable, "-m", "lmcache_trio", "serve", "--set", *sets)
        assert server.stdout is not None
        said = []
        for line in server.stdout:
            said.append(line)
            if "is ready" in line:
                return server
        raise AssertionError("".join(said))

    def engine(self, what: str = "", program: str = ENGINE) -> "subprocess.Popen[str]":
        environ = {"ONLY_CONNECTS": "1"}
        if self.users.server not in (0, self.users.engine):
            environ["LMCACHE_TRIO_CLIENT__SERVER_UIDS"] = f"[{self.users.server}]"
        return self.start(self.users.engine, sys.executable, "-c", program, self.address, what, **environ)

    def says(self, program: str = ENGINE) -> str:
        out, _ = self.engine(program=program).communicate(timeout=60)
        return str(out).strip()


def kill(process: "subprocess.Popen[str]") -> None:
    """What runs in the container: a change of uid has made it forget that it ends with `unshare`."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait(timeout=30)


@pytest.fixture
def pods() -> Iterator[Callable[[Users], Pod]]:
    with contextlib.ExitStack() as stack:

        def make(users: Users) -> Pod:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="lt-", dir="/tmp")))
            folder.chmod(0o777)  # as an emptyDir
            for uid in {users.server, users.engine} - {0}:
                command = ["setpriv", "--reuid", str(uid), "--clear-groups", "--regid", str(uid)]
                command += [sys.executable, "-c", "import lmcache_trio.client, lmcache_trio_backends.cpu"]
                if subprocess.run(command, capture_output=True, timeout=60, check=False, cwd="/").returncode:
                    pytest.skip(f"uid {uid} cannot read this checkout or its environment")
            return Pod(folder, users, stack.enter_context(contextlib.ExitStack()))

        yield make


async def _held(pod: Pod, **wanted: int) -> dict[str, Any]:
    """What the server holds, once that is as *wanted*."""
    with trio.fail_after(30):
        async with open_client(pod.address, server_uids=[pod.users.server]) as client:
            while True:
                held: dict[str, Any] = (await client.statistics())["held"]
                if all(held[name] == count for name, count in wanted.items()):
                    return held


@pytest.mark.parametrize(
    "users",
    [Users(), Users(1000, 1000, read_only=True), Users(1000, 1001, read_only=True), Users(0, 1001, read_only=True)],
    ids=["root", "one uid, read-only root", "two uids, read-only root", "root serves a uid"],
)
def test_an_engine_in_another_container_needs_the_sockets_directory_and_nothing_else(
    pods: Callable[[Users], Pod], users: Users
) -> None:
    pod = pods(users)
    server = pod.serve()
    assert pod.says() == "cold 3"
    assert pod.says() == "hit 3 True"
    assert pod.says(DEVICE).splitlines()[-1] == "device the server has opened this engine's KV"

    # the engine is killed in the middle of a copy: its slots are free once the server has seen its exit
    engine_of_another = pod.engine("hold", ENGINE.replace('"chunk {i}"', '"other {i}"'))
    assert engine_of_another.stdout is not None
    assert engine_of_another.stdout.readline() == "in mid store\n"
    trio.run(lambda: _held(pod, slots_writing=3))
    kill(engine_of_another)
    trio.run(lambda: _held(pod, slots_writing=0, slots_quarantined=0, lost_writers=0, engines=0))
    assert pod.says() == "hit 3 True"

    # the server is killed: nothing but its socket is left, and the next one is found at the same place
    kill(server)
    assert [path.name for path in pod.shared.glob("**/*") if not path.is_dir()] == ["server.sock"]
    pod.serve()
    assert pod.says() == "cold 3"
    assert pod.says() == "hit 3 True"


def test_an_engine_whose_uid_was_not_named_is_told_what_to_name(pods: Callable[[Users], Pod]) -> None:
    pod = pods(Users(1000, 1000))
    pod.serve()
    stranger = attrs.evolve(pod, users=Users(1000, 1001))
    said = stranger.says()
    assert "permission denied" in said
    assert "[access]" in said


def test_an_engine_that_does_not_know_the_servers_uid_sends_it_nothing(pods: Callable[[Users], Pod]) -> None:
    pod = pods(Users(1000, 1001))
    pod.serve()
    doubtful = attrs.evolve(pod, users=Users(0, 1001))
    said = doubtful.says()
    assert "a process of uid 1000 listens" in said
    assert "server_uids" in said
