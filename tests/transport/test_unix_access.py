"""Who may connect, and to whom: each end looks at the other's uid, told by the kernel, before it believes a byte."""

import json
import os
import shutil
import socket
import stat
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import attrs
import pytest
import trio

import lmcache_trio._transport.over_unix
import lmcache_trio.client
import lmcache_trio.config
from lmcache_trio import Config, ConfigError, Misuse, Role, Unavailable, open_client, open_server
from lmcache_trio._server.socket_directory import prepare_directory
from lmcache_trio._wire.codec import encode
from lmcache_trio._wire.messages import ErrorKind, Refused
from lmcache_trio.adapters import SchedulerAdapter, WorkerAdapter
from lmcache_trio.config import Access

ONE, OTHER, GROUP = 54_321, 54_322, 54_400
FRIEND = 54_323
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can be several users")


@attrs.define
class Child:
    """A process of another user, forked before there is a loop: *work* runs when it is told to go."""

    pid: int
    go: int
    said: int
    ended: bool = False

    def start(self) -> None:
        os.write(self.go, b"g")

    def result(self) -> Any:
        """What *work* returned."""
        with os.fdopen(os.dup(self.said), "rb") as said:
            return json.loads(said.read())

    def end(self) -> None:
        os.close(self.go)
        os.close(self.said)
        os.waitpid(self.pid, 0)


@pytest.fixture
def child() -> Iterator[Callable[..., Child]]:
    made: list[Child] = []

    def fork(work: Callable[[], Any], uid: int, groups: tuple[int, ...] = ()) -> Child:
        waits, go = os.pipe()
        said, says = os.pipe()
        pid = os.fork()
        if not pid:
            try:
                os.setgroups(groups)
                os.setresgid(uid, uid, uid)
                os.setresuid(uid, uid, uid)
                os.close(go)
                found = work() if os.read(waits, 1) else None
                os.write(says, json.dumps(found).encode())
            except BaseException as exc:  # noqa: BLE001
                os.write(says, json.dumps(f"failed: {exc!r}").encode())
            finally:
                os._exit(0)
        os.close(waits)
        os.close(says)
        made.append(Child(pid, go, said))
        return made[-1]

    yield fork
    for each in made:
        each.end()


@pytest.fixture
def place() -> Iterator[Path]:
    """A directory that every user can get to and write in, as /tmp."""
    made = Path(tempfile.mkdtemp(prefix="lt-", dir="/tmp"))
    made.chmod(0o1777)
    yield made
    shutil.rmtree(made)


def listens(path: Path, answer: bytes) -> list[str]:
    """Make the directory of *path* first, listen there, and return what the first client sent, if anything."""
    path.parent.mkdir()
    path.parent.chmod(0o755)
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        listener.bind(str(path))
        path.chmod(0o666)
        listener.listen()
        (path.parent / "ready").touch()
        listener.settimeout(20)
        came, _ = listener.accept()
        with came:
            came.settimeout(20)
            said = came.recv(1 << 16)
            if said:
                came.send(b"\0" + answer)
        return [said.hex()]


async def ready(path: Path) -> None:
    with trio.fail_after(20):
        while not (path.parent / "ready").exists():
            await trio.lowlevel.checkpoint()


def visit(address: str, role: Role = Role.WORKER) -> str:
    """What a client gets, in words: what it reads of the arena after it wrote there, or the error."""

    async def run() -> str:
        with trio.fail_after(20):
            try:
                async with open_client(address, role=role, engine=f"of {os.geteuid()}", server_uids=[0]) as client:
                    if role is Role.OBSERVER:
                        return "pong" if await client.ping() == client.boot else "?"
                    assert client.arena is not None
                    client.arena.view(0, 5)[:] = b"bytes"
                    return bytes(client.arena.view(0, 5)).decode()
            except Unavailable as exc:
                return f"unavailable: {exc}"

    return trio.run(run)


async def _serve(config: Config, *children: Child) -> list[Any]:
    """Serve, have each of *children* come, one after the other, and return what each said."""
    async with open_server(config) as server:
        found = []
        for each in children:
            each.start()
            found.append(await trio.to_thread.run_sync(each.result))
        found.append(server.statistics()["counted"]["refused"])
        return found


def config_at(path: Path, **settings: Any) -> Config:
    return Config(address=f"unix://{path}", memory={"backend": "cpu", "size": 1 << 20}, grace=0.1, **settings)


@needs_root
def test_a_stranger_who_made_the_directory_first_is_sent_nothing(child: Callable[..., Child], place: Path) -> None:
    path = place / "lmcache-trio-0" / "server.sock"
    stranger = child(lambda: listens(path, b""), ONE)

    async def come() -> None:
        stranger.start()
        await ready(path)
        with pytest.raises(Unavailable, match=rf"uid {ONE} listens at .*nothing was sent.*server_uids"):
            async with open_client(f"unix://{path}", role=Role.WORKER, engine="e"):
                pass

    trio.run(come)
    assert stranger.result() == [""]


@needs_root
@pytest.mark.parametrize("named_by", ["argument", "environment"])
def test_a_server_of_a_uid_that_is_named_is_believed(
    child: Callable[..., Child], place: Path, named_by: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = place / "theirs" / "server.sock"
    answer = encode(Refused(ErrorKind.UNAVAILABLE, "it was asked"))
    theirs = child(lambda: listens(path, answer), ONE)
    if named_by == "environment":
        monkeypatch.setenv("LMCACHE_TRIO_CLIENT__SERVER_UIDS", f"[7, {ONE}]")

    async def come() -> None:
        theirs.start()
        await ready(path)
        with pytest.raises(Unavailable, match="it was asked"):
            async with open_client(f"unix://{path}", server_uids=[ONE] if named_by == "argument" else None):
                pass

    trio.run(come)
    assert theirs.result() != [""]


@needs_root
@pytest.mark.parametrize("role", ["scheduler", "worker"])
def test_an_adapter_speaks_to_a_server_of_a_uid_that_it_was_given(
    child: Callable[..., Child], place: Path, role: str
) -> None:
    path = place / "theirs" / "server.sock"
    theirs = child(lambda: listens(path, encode(Refused(ErrorKind.UNAVAILABLE, "it was asked"))), ONE)
    theirs.start()
    trio.run(ready, path)
    adapter: SchedulerAdapter | WorkerAdapter
    if role == "scheduler":
        adapter = SchedulerAdapter(
            f"unix://{path}", engine_id="e", identity=["m"], block_tokens=16, server_uids=[ONE], connect_timeout=0.01
        )
    else:
        adapter = WorkerAdapter(
            f"unix://{path}", engine_id="e", block_tokens=16, server_uids=[ONE], connect_timeout=0.01
        )
    try:
        assert theirs.result() != [""]
    finally:
        adapter.shutdown()


@pytest.mark.parametrize("uids", [1000, "1000", ["1000"], [-1], [True]])
def test_an_adapter_refuses_what_is_not_a_list_of_uids(uids: Any) -> None:
    with pytest.raises(Misuse, match="server_uids"):
        SchedulerAdapter("unix:///nowhere", engine_id="e", identity=["m"], block_tokens=16, server_uids=uids)
    with pytest.raises(Misuse, match="server_uids"):
        WorkerAdapter("unix:///nowhere", engine_id="e", block_tokens=16, server_uids=uids)


@needs_root
def test_by_default_nobody_but_the_servers_uid_and_root_may_connect_and_the_others_are_told_the_way_out(
    child: Callable[..., Child], place: Path
) -> None:
    path = place / "run" / "server.sock"
    stranger = child(lambda: visit(f"unix://{path}"), ONE)
    (said, refused) = trio.run(_serve, config_at(path), stranger)
    assert said.startswith("unavailable: permission denied at unix://")
    assert f"for uid {ONE}" in said
    assert "[access]" in said
    assert refused == 0
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700


@needs_root
def test_uids_that_are_named_may_connect_and_all_others_are_refused_by_name(
    child: Callable[..., Child], place: Path
) -> None:
    path = place / "run" / "server.sock"
    address = f"unix://{path}"
    friends = [child(lambda: visit(address), uid) for uid in (ONE, FRIEND)]
    strangers = [child(lambda role=role: visit(address, role), OTHER) for role in (Role.WORKER, Role.OBSERVER)]
    *said, refused = trio.run(_serve, config_at(path, access=Access(uids=(ONE, FRIEND))), *(friends + strangers))
    assert said[:2] == ["bytes", "bytes"]
    for each in said[2:]:
        assert f"uid {OTHER} may not connect" in each
        assert "[access]" in each
    assert refused == 2


@needs_root
@pytest.mark.parametrize("groups", [(), (GROUP,), (1, 2, GROUP)])
def test_members_of_a_group_that_is_named_may_connect(
    child: Callable[..., Child], place: Path, groups: tuple[int, ...]
) -> None:
    path = place / "run" / "server.sock"
    comer = child(lambda: visit(f"unix://{path}"), ONE, groups)
    said, _ = trio.run(_serve, config_at(path, access=Access(group=GROUP)), comer)
    assert said == "bytes" if groups else said.startswith("unavailable: permission denied")
    found = path.parent.stat()
    assert (found.st_gid, stat.S_IMODE(found.st_mode)) == (GROUP, 0o750)


@needs_root
def test_an_address_made_for_one_client_is_not_used_up_by_somebody_who_may_not_connect(
    child: Callable[..., Child], place: Path
) -> None:
    near = f"unix://{place}/server.sock"
    access = Access(uids=(ONE,))

    def connects() -> int:
        (path,) = place.glob("server.sock.*")
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as sock:
            sock.connect(str(path))
            return len(sock.recv(1))

    stranger, friend = child(connects, OTHER), child(connects, ONE)

    async def meet() -> None:
        listener = lmcache_trio._transport.listen_pair(near, access)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(_come, stranger, friend)
            with trio.fail_after(20):
                connection = await listener.accept()
            assert connection.open_pidfd() is not None
            connection.close()

    async def _come(first: Child, second: Child) -> None:
        for each in (first, second):
            each.start()
            assert await trio.to_thread.run_sync(each.result) == 0

    trio.run(meet)


@needs_root
@pytest.mark.parametrize(
    ("access", "directory", "file"),
    [
        (Access(), 0o700, 0o600),
        (Access(group=GROUP), 0o750, 0o660),
        (Access(uids=(ONE,)), 0o755, 0o666),
        (Access(uids=(ONE,), group=GROUP), 0o755, 0o666),
    ],
)
def test_modes_of_directories_and_sockets_follow_from_who_may_connect(
    access: Access, directory: int, file: int, place: Path
) -> None:
    path = place / "a" / "b" / "server.sock"
    former = os.umask(0o077)
    try:
        prepare_directory(f"unix://{path}", access)
    finally:
        os.umask(former)

    async def look() -> None:
        front = lmcache_trio._transport.listen(f"unix://{path}", access)
        pair = lmcache_trio._transport.listen_pair(front.address, access)
        for made in (path, Path(pair.address.removeprefix("unix://"))):
            assert stat.S_IMODE(made.stat().st_mode) == file
            assert made.stat().st_gid == (0 if access.gid is None else GROUP)
        pair.close()
        front.close()

    trio.run(look)
    assert [stat.S_IMODE(folder.stat().st_mode) for folder in (path.parent, path.parent.parent)] == [directory] * 2


def test_a_directory_of_sockets_alone_gets_the_mode_that_access_asks_for_and_another_is_refused(place: Path) -> None:
    former = place / "former"
    former.mkdir(mode=0o700)
    address = f"unix://{former}/server.sock"
    prepare_directory(address, Access(uids=(ONE,)))
    assert stat.S_IMODE(former.stat().st_mode) == 0o755
    home = place / "home"
    home.mkdir(mode=0o700)
    (home / "letters").touch()
    with pytest.raises(ConfigError, match=rf"cannot get through {home} \(mode 0700\)") as caught:
        prepare_directory(f"unix://{home}/server.sock", Access(uids=(ONE,)))
    assert caught.value.key == "access"
    assert stat.S_IMODE(home.stat().st_mode) == 0o700


def test_a_directory_that_others_can_write_in_is_refused_and_a_directory_in_it_is_the_way_out(place: Path) -> None:
    """As with an emptyDir of Kubernetes, whose mode nobody in the pod can change."""
    place.chmod(0o777)
    with pytest.raises(ConfigError, match=rf"address=unix://{place}/lmcache-trio/server.sock"):
        prepare_directory(f"unix://{place}/server.sock")
    prepare_directory(f"unix://{place}/lmcache-trio/server.sock")
    assert stat.S_IMODE((place / "lmcache-trio").stat().st_mode) == 0o700


def test_access_at_an_address_that_does_not_tell_who_connects_is_refused() -> None:
    with pytest.raises(ConfigError, match="unix:// address") as caught:
        Config(address="tcp://127.0.0.1:0", access=Access(uids=(ONE,)))
    assert caught.value.key == "access"
