"""The directory of a disk tier: what it takes, what it refuses, what it never touches, and what it notices."""

import os
import shutil
import sqlite3
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import trio
from lmcache_trio_backends.disk import DiskConfig, DiskTier
from lmcache_trio_backends.disk.home import FORMAT, INDEX_NAME, LOCK_NAME, Home, slab_name

from lmcache_trio.errors import ConfigError, Unavailable
from lmcache_trio.testing.tier_contract import is_right, key_of, load_of, record_of

MIB = 1 << 20
PROBE_NAME = "lmcache-trio-probe"


def disk_tier(path: Path, size: int = 24 * MIB, **settings: Any) -> DiskTier:
    return DiskTier(DiskConfig(path=str(path), size=size, **{"slab_size": 4 * MIB, **settings}))


def inside(path: Path) -> Path:
    """Where the files of the tier in *path* lie."""
    return Home(str(path)).inside


async def stored(tier: DiskTier, *numbers: int) -> list[bool]:
    return list(await tier.store([record_of(key_of(n)) for n in numbers]))


async def loaded(tier: DiskTier, *numbers: int) -> list[bool]:
    loads = [load_of(key_of(n)) for n in numbers]
    hits = list(await tier.load(loads))
    assert all(is_right(load) for load, hit in zip(loads, hits, strict=True) if hit)
    return hits


async def refusal(path: Path, **settings: Any) -> str:
    """Why *path* is refused, as the user is told."""
    with pytest.raises(ConfigError) as caught:
        async with disk_tier(path, **settings).open():
            pass
    assert caught.value.key == "path"
    assert str(path) in caught.value.problem
    return caught.value.problem


def everything(path: Path) -> dict[str, tuple[int, int, bytes]]:
    """Kind and mode, time and content of all in *path*."""
    found = {}
    for one in [path, *path.rglob("*")]:
        state = one.lstat()
        content = one.read_bytes() if stat.S_ISREG(state.st_mode) else b""
        found[str(one)] = (state.st_mode, state.st_mtime_ns, content)
    return found


def a_link(place: Path, target: Path) -> None:
    place.symlink_to(target)


def a_hard_link(place: Path, target: Path) -> None:
    os.link(target, place)


def a_pipe(place: Path, target: Path) -> None:
    os.mkfifo(place)


def something_else(place: Path, target: Path) -> None:
    place.mkdir()


# ---- an empty directory or one of ours, and nothing else


def a_file(name: str) -> Callable[[Path], None]:
    def put(path: Path) -> None:
        (path / name).write_bytes(b"the user's")

    return put


def a_directory(name: str) -> Callable[[Path], None]:
    return lambda path: (path / name / "below").mkdir(parents=True)


THE_USERS: dict[str, Callable[[Path], None]] = {
    "index": a_file("index"),
    "slab": a_file("slab-00000"),
    "lock": a_file("lock"),
    "file of our name": a_file(LOCK_NAME),
    "hidden file": a_file(".env"),
    "empty file": lambda path: (path / "empty").touch(),
    "git": a_directory(".git"),
    "directory": a_directory("photos"),
    "dangling link": lambda path: (path / "link").symlink_to("/nowhere"),
    "lost+found that is a file": a_file("lost+found"),
    "database": lambda path: a_database(path / "index", "CREATE TABLE chunks (mine)"),
    "directory with the name of a format's": a_directory(f"lmcache-trio-format-{FORMAT}"),
}


def a_database(path: Path, schema: str) -> None:
    db = sqlite3.connect(path)
    db.executescript(schema)
    db.close()


@pytest.mark.parametrize("what", THE_USERS)
async def test_a_directory_with_something_of_the_users_is_refused_and_nothing_in_it_is_touched(
    tmp_path: Path, what: str
) -> None:
    THE_USERS[what](tmp_path)
    name = sorted(os.listdir(tmp_path))[0]
    before = everything(tmp_path)
    assert name in await refusal(tmp_path)
    assert everything(tmp_path) == before


@pytest.mark.parametrize("kind", [a_link, something_else])
async def test_what_has_a_slabs_name_behind_the_last_slab_is_not_removed_unless_it_is_a_file(
    tmp_path: Path, kind: Callable[[Path, Path], None]
) -> None:
    path = tmp_path / "kv"
    async with disk_tier(path).open():
        pass
    kind(inside(path) / slab_name(4711), target := tmp_path / "precious")
    target.write_bytes(b"the user's")
    assert slab_name(4711) in await refusal(path)
    assert os.path.lexists(inside(path) / slab_name(4711))


@pytest.mark.parametrize("path", ["/dev/null", "/dev/null/kv", "/" + "x" * 300])
async def test_a_path_that_cannot_be_a_directory_is_refused(path: str) -> None:
    assert "can't be used" in await refusal(Path(path))


@pytest.mark.parametrize("kind", ["longer than a name may be", "longer than a path may be", "closed to this user"])
async def test_a_path_that_cannot_be_looked_at_is_refused_and_not_tried_again_and_again(
    kind: str, tmp_path: Path
) -> None:
    closed = tmp_path / "closed"
    closed.mkdir(mode=0)
    path = {"longer than a name may be": tmp_path / ("x" * 300), "longer than a path may be": tmp_path / ("x/" * 2100)}
    try:
        if kind == "closed to this user" and not os.geteuid():
            os.seteuid(65534)
        problem = await refusal(path.get(kind, closed / "kv"))
    finally:
        os.seteuid(os.getuid())
    assert "give another directory" in problem
    assert ("Permission denied" in problem) == (kind == "closed to this user")


@pytest.mark.parametrize("where", [".", "kv"])
async def test_a_link_that_leads_nowhere_is_named_and_nothing_is_made_for_it(where: str, tmp_path: Path) -> None:
    (link := tmp_path / "link").symlink_to(tmp_path / "gone")
    problem = await refusal(link / where)
    assert f"{link} is a link that leads nowhere" in problem
    assert os.listdir(tmp_path) == ["link"]


@pytest.mark.parametrize("path", ["/etc", "/tmp", "/usr", "/"])
async def test_a_directory_of_the_systems_is_refused(path: str) -> None:
    before = sorted(os.listdir(path)) if path != "/tmp" else []
    assert "can't be used" in await refusal(Path(path))
    assert before == (sorted(os.listdir(path)) if path != "/tmp" else [])
    assert not os.path.exists(f"{path}/{LOCK_NAME}")


async def test_a_directory_that_is_empty_or_as_a_fresh_file_system_is_is_taken(tmp_path: Path) -> None:
    (tmp_path / "lost+found").mkdir(mode=0o700)
    (tmp_path / "lost+found" / "#12").write_bytes(b"found")
    tier = disk_tier(tmp_path)
    for hit in (False, True):
        async with tier.open():
            assert await loaded(tier, 1) == [hit]
            assert await stored(tier, 1) == [True]
    assert (tmp_path / "lost+found" / "#12").read_bytes() == b"found"


async def test_a_directory_whose_mark_was_not_written_when_a_kill_came_is_taken(tmp_path: Path) -> None:
    (tmp_path / LOCK_NAME).touch()
    tier = disk_tier(tmp_path)
    async with tier.open():
        assert await stored(tier, 1) == [True]


@pytest.mark.parametrize("content", [None, b"", b"\0" * 60, b"lmcache-trio dist tier\nid 0123\n"])
async def test_a_mark_that_is_lost_or_damaged_is_made_anew_and_costs_nothing(
    tmp_path: Path, content: bytes | None, caplog: pytest.LogCaptureFixture
) -> None:
    async with (tier := disk_tier(tmp_path)).open():
        assert await stored(tier, 1) == [True]
    (tmp_path / LOCK_NAME).unlink()
    if content is not None:
        (tmp_path / LOCK_NAME).write_bytes(content)
    for one in (tier, disk_tier(tmp_path)):
        async with one.open():
            assert await loaded(one, 1) == [True]
    assert caplog.text.count(f"has lost {LOCK_NAME}") == 1


async def test_a_server_that_is_given_such_a_directory_ends_with_status_2_and_names_it(tmp_path: Path) -> None:
    (path := tmp_path / "checkout").mkdir()
    (path / ".git").mkdir()
    before = everything(path)
    tier = {"path": str(path), "size": "32MiB", "backend": "disk"}
    sets = {f"tiers.0.{name}": value for name, value in tier.items()}
    sets |= {"memory.size": "1MiB", "address": f"unix://{tmp_path}/server.sock"}
    words = [word for name, value in sets.items() for word in ("--set", f"{name}={value}")]
    with trio.fail_after(60):
        done = await trio.run_process(
            [sys.executable, "-m", "lmcache_trio", "serve", *words], capture_stderr=True, check=False
        )
    assert done.returncode == 2
    assert f"tiers.0.path: {str(path)!r}" in done.stderr.decode()
    assert ".git" in done.stderr.decode()
    assert everything(path) == before


async def test_every_file_has_a_prefix_of_ours_and_is_the_users_alone(tmp_path: Path) -> None:
    umask = os.umask(0)
    try:
        tier = disk_tier(tmp_path / "new" / "kv")
        async with tier.open():
            assert all(await stored(tier, 1, 2))
            found = {path.name: stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "new" / "kv").rglob("*")}
            assert {LOCK_NAME, INDEX_NAME, f"{INDEX_NAME}-wal", slab_name(0)} < found.keys()
            assert all(name.startswith("lmcache-trio") for name in found)
            assert [mode for name, mode in found.items() if mode != (0o700 if "format" in name else 0o600)] == []
        for made in (tmp_path / "new", tmp_path / "new" / "kv"):
            assert stat.S_IMODE(made.stat().st_mode) == 0o700
    finally:
        os.umask(umask)


async def test_what_the_user_puts_there_later_is_never_touched(tmp_path: Path) -> None:
    tier = disk_tier(tmp_path, slab_size=MIB)
    async with tier.open():
        assert all(await stored(tier, 1, 2))
    names = ("index", "slab-00000", "slab-00007", "lock", "probe", "notes", "lmcache-trio-slab-notes")
    for place in (tmp_path, inside(tmp_path)):
        for name in names:
            (place / name).write_bytes(b"the user's")
    (tmp_path / "photos").mkdir()
    (inside(tmp_path) / INDEX_NAME).write_bytes(b"no database" * 1000)  # all is begun anew
    for size in (24 * MIB, 4 * MIB):
        other = disk_tier(tmp_path, size)
        async with other.open():
            assert await stored(other, 3) == [True]
    for place in (tmp_path, inside(tmp_path)):
        assert {(place / name).read_bytes() for name in names} == {b"the user's"}
    assert (tmp_path / "photos").is_dir()


# ---- links, owners, modes


@pytest.mark.parametrize("kind", [a_link, a_hard_link, a_pipe, something_else])
@pytest.mark.parametrize(
    "name", [LOCK_NAME, INDEX_NAME, f"{INDEX_NAME}-wal", f"{INDEX_NAME}-journal", slab_name(0), PROBE_NAME]
)
async def test_a_name_of_ours_that_is_no_file_of_ours_is_refused_and_what_it_leads_to_is_untouched(
    tmp_path: Path, kind: Callable[[Path, Path], None], name: str
) -> None:
    path = tmp_path / "kv"
    tier = disk_tier(path)
    async with tier.open():
        assert await stored(tier, 1) == [True]
    target = tmp_path / "precious"
    target.write_bytes(b"the user's" * 1000)
    place = (path if name == LOCK_NAME else inside(path)) / name
    place.unlink(missing_ok=True)
    kind(place, target)
    assert name in await refusal(path)
    assert target.read_bytes() == b"the user's" * 1000
    assert os.path.lexists(place)


async def test_a_link_to_nothing_in_place_of_a_file_is_not_followed(tmp_path: Path) -> None:
    path = tmp_path / "kv"
    async with disk_tier(path).open():
        pass
    (inside(path) / slab_name(0)).symlink_to(tmp_path / "made")
    assert slab_name(0) in await refusal(path)
    assert not (tmp_path / "made").exists()


async def test_a_link_that_comes_while_the_tier_is_open_is_not_followed(tmp_path: Path) -> None:
    path = tmp_path / "kv"
    tier = disk_tier(path)
    (target := tmp_path / "precious").write_bytes(b"the user's")
    async with tier.open():
        (inside(path) / slab_name(0)).symlink_to(target)
        with pytest.raises(Unavailable, match=slab_name(0)):
            await stored(tier, 1)
    assert target.read_bytes() == b"the user's"


async def test_a_linked_directory_in_place_of_ours_is_refused(tmp_path: Path) -> None:
    path, other = tmp_path / "kv", tmp_path / "other"
    async with disk_tier(path).open():
        pass
    inside(path).rename(other)
    inside(path).symlink_to(other)
    before = everything(other)
    assert "lmcache-trio-format" in await refusal(path)
    assert everything(other) == before


@pytest.mark.parametrize("mode", [0o777, 0o770, 0o722, 0o1777])
async def test_a_directory_that_others_can_write_in_is_refused(tmp_path: Path, mode: int) -> None:
    path = tmp_path / "kv"
    path.mkdir()
    path.chmod(mode)
    problem = await refusal(path)
    assert ("chmod go-w" in problem) == (mode != 0o1777)
    assert ("is to be made" in problem) == (mode not in (0o777, 0o722))  # there it would be refused for its parent
    assert list(path.iterdir()) == []


async def test_a_directory_that_others_can_read_is_taken_and_what_is_kept_in_it_is_private(tmp_path: Path) -> None:
    path = tmp_path / "kv"
    path.mkdir(mode=0o755)
    path.chmod(0o755)
    for _ in range(2):
        async with disk_tier(path).open():
            pass
        assert stat.S_IMODE(inside(path).stat().st_mode) == 0o700
        inside(path).chmod(0o755)  # by a hand that means well
        (inside(path) / INDEX_NAME).chmod(0o644)
    async with disk_tier(path).open():
        assert stat.S_IMODE(inside(path).stat().st_mode) == 0o700
        assert stat.S_IMODE((inside(path) / INDEX_NAME).stat().st_mode) == 0o600


@pytest.mark.parametrize("uid", [12345, 65534])
@pytest.mark.parametrize("which", ["directory", "parent", "link to it"])
async def test_what_belongs_to_another_user_is_refused(tmp_path: Path, which: str, uid: int) -> None:
    if os.geteuid():
        pytest.skip("chown: only root may")
    path = tmp_path / "parent" / "kv"
    path.mkdir(parents=True)
    if which == "link to it":
        (link := tmp_path / "link").symlink_to(path)
        os.chown(link, uid, -1, follow_symlinks=False)
        assert str(uid) in await refusal(link)
    else:
        os.chown(path if which == "directory" else path.parent, uid, -1)
        assert str(uid) in await refusal(path)
    assert list(path.iterdir()) == []


@pytest.mark.parametrize("there", [True, False])
async def test_a_directory_in_one_where_everybody_can_write_is_refused(tmp_path: Path, there: bool) -> None:
    (parent := tmp_path / "shared").mkdir()
    path = parent / "deep" / "kv"
    if there:
        path.mkdir(parents=True)
    parent.chmod(0o777)
    assert "chmod o-w" in await refusal(path)
    assert path.exists() is there
    parent.chmod(0o1777)  # as /tmp is: there only the owner can put something else in its place
    async with disk_tier(path).open():
        pass


async def test_a_link_of_ones_own_to_the_directory_is_followed(tmp_path: Path) -> None:
    (tmp_path / "kv").mkdir(mode=0o700)
    (tmp_path / "link").symlink_to(tmp_path / "kv")
    tier = disk_tier(tmp_path / "link")
    async with tier.open():
        assert await stored(tier, 1) == [True]
    direct = disk_tier(tmp_path / "kv")
    async with direct.open():
        assert await loaded(direct, 1) == [True]


# ---- formats


async def test_an_older_format_goes_with_one_line_and_a_newer_one_stays(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "lmcache_trio.disk")
    async with disk_tier(tmp_path).open():
        pass
    older, newer = (tmp_path / f"lmcache-trio-format-{FORMAT + n}" for n in (-1, 1))
    for place in (older, newer):
        place.mkdir()
        for name in (INDEX_NAME, slab_name(0), slab_name(1)):
            (place / name).write_bytes(b"x" * 5000)
    before = everything(newer)
    tier = disk_tier(tmp_path)
    async with tier.open():
        assert not older.exists()
        assert everything(newer) == before
        assert sum("older version" in line for line in caplog.messages) == 1
        assert sum("newer version" in line for line in caplog.messages) == 1
        assert await stored(tier, 1) == [True]
    async with tier.open():
        assert await loaded(tier, 1) == [True]


async def test_what_the_user_put_into_an_older_format_stays(tmp_path: Path) -> None:
    async with disk_tier(tmp_path).open():
        pass
    (older := tmp_path / f"lmcache-trio-format-{FORMAT - 1}").mkdir()
    (older / slab_name(0)).write_bytes(b"ours")
    (older / "notes").write_bytes(b"the user's")
    (older / "lmcache-trio-link").symlink_to(older / "notes")
    async with disk_tier(tmp_path).open():
        assert sorted(os.listdir(older)) == ["lmcache-trio-link", "notes"]


# ---- another directory in the middle of a run


async def fenced(tier: DiskTier, why: str, change: Callable[[], object]) -> None:
    """After *change* the tier refuses loads and stores, and says *why*; and so does the next opening."""
    with pytest.raises(Unavailable, match=why):
        async with tier.open():
            assert await stored(tier, 1) == [True]
            change()
            with pytest.raises(Unavailable, match=why):
                await loaded(tier, 1)
            await tier.store([record_of(key_of(n), (MIB,)) for n in range(10, 20)])
    with pytest.raises(Unavailable, match=r"restart the server|on another disk"):
        async with tier.open():
            pass


async def test_a_directory_that_is_renamed_is_not_made_anew_and_works_again_when_it_is_back(tmp_path: Path) -> None:
    path, away = tmp_path / "kv", tmp_path / "away"
    tier = disk_tier(path)
    await fenced(tier, "not there any more", lambda: path.rename(away))
    assert not path.exists()
    away.rename(path)
    async with tier.open():
        assert await loaded(tier, 1) == [True]
        assert await stored(tier, 2) == [True]


@pytest.mark.parametrize("marked", [True, False])
async def test_a_directory_that_is_replaced_is_left_alone_until_the_right_one_is_back(
    tmp_path: Path, marked: bool
) -> None:
    path, away, other = tmp_path / "kv", tmp_path / "away", tmp_path / "other"
    if marked:
        async with disk_tier(other).open():
            pass
    else:
        other.mkdir()
    before = everything(other)

    def replace() -> None:
        path.rename(away)
        other.rename(path)

    tier = disk_tier(path)
    await fenced(tier, "replaced", replace)
    path.rename(other)
    assert everything(other) == before
    away.rename(path)
    async with tier.open():
        assert await loaded(tier, 1) == [True]


async def test_a_link_that_leads_elsewhere_now_is_noticed(tmp_path: Path) -> None:
    link, one, other = tmp_path / "link", tmp_path / "one", tmp_path / "other"
    for path in (one, other):
        path.mkdir()
    link.symlink_to(one)

    def turn() -> None:
        link.unlink()
        link.symlink_to(other)

    tier = disk_tier(link)
    await fenced(tier, "replaced", turn)
    assert list(other.iterdir()) == []
    link.unlink()
    link.symlink_to(one)
    async with tier.open():
        assert await loaded(tier, 1) == [True]


async def test_a_deletion_after_the_directory_was_renamed_says_so_and_not_which_file_it_missed(tmp_path: Path) -> None:
    path = tmp_path / "kv"
    tier = disk_tier(path)
    with pytest.raises(Unavailable, match="not there any more"):
        async with tier.open():
            assert await stored(tier, 1) == [True]
            path.rename(tmp_path / "away")
            await tier.delete(key_of(1).namespace)


@pytest.mark.parametrize("name", [LOCK_NAME, f"lmcache-trio-format-{FORMAT}"])
async def test_a_part_of_it_that_is_removed_is_noticed(tmp_path: Path, name: str) -> None:
    tier = disk_tier(tmp_path)
    with pytest.raises(Unavailable, match=f"{name}.*removed"):
        async with tier.open():
            assert await stored(tier, 1) == [True]
            (tmp_path / name).rename(tmp_path / "away")
            await loaded(tier, 1)
    (tmp_path / "away").rename(tmp_path / name)
    async with tier.open():
        assert await loaded(tier, 1) == [True]


async def test_a_directory_that_was_emptied_is_begun_anew(tmp_path: Path) -> None:
    path = tmp_path / "kv"
    tier = disk_tier(path)
    with pytest.raises(Unavailable, match="removed"):
        async with tier.open():
            assert await stored(tier, 1) == [True]
            (path / LOCK_NAME).unlink()
            shutil.rmtree(inside(path))
            await loaded(tier, 1)
    async with tier.open():
        assert await loaded(tier, 1) == [False]
        assert await stored(tier, 1) == [True]


def mount(*words: str | Path) -> None:
    """Skips the test where this machine does not let us."""
    done = subprocess.run(["mount", *map(str, words)], capture_output=True, text=True, timeout=30)
    if done.returncode:
        pytest.skip(f"mount: {done.stderr.strip()}")


@pytest.fixture
def mounted(tmp_path: Path) -> Iterator[Path]:
    """A mount point; what is mounted there in the end is unmounted."""
    (place := tmp_path / "place").mkdir(mode=0o700)
    yield place
    while f" {place} " in Path("/proc/self/mountinfo").read_text():  # `ismount` knows no bind mount of one file system
        unmount(place)


def unmount(place: Path) -> None:
    subprocess.run(["umount", "-l", place], check=True, timeout=30)


@pytest.mark.parametrize("below", ["", "kv"])
async def test_a_directory_that_is_unmounted_is_noticed_and_nothing_is_written_under_its_mount_point(
    tmp_path: Path, mounted: Path, below: str
) -> None:
    (source := tmp_path / "source").mkdir(mode=0o700)
    mount("--bind", source, mounted)
    tier = disk_tier(mounted / below)
    why = "not there any more" if below else "replaced"  # the same device: it is a bind mount
    await fenced(tier, why, lambda: unmount(mounted))
    assert list(mounted.iterdir()) == []
    mount("--bind", source, mounted)
    async with tier.open():
        assert await loaded(tier, 1) == [True]


async def test_another_file_system_over_the_directory_is_noticed_by_its_device(tmp_path: Path, mounted: Path) -> None:
    tier = disk_tier(mounted)
    await fenced(tier, r"device \d+:\d+ where", lambda: mount("-t", "tmpfs", "-o", "mode=700", "tmpfs", mounted))
    assert list(mounted.iterdir()) == []
    unmount(mounted)
    async with tier.open():
        assert await loaded(tier, 1) == [True]


async def test_a_directory_that_was_removed_is_not_made_on_another_file_system(tmp_path: Path, mounted: Path) -> None:
    mount("-t", "tmpfs", "-o", "mode=700", "tmpfs", mounted)
    tier = disk_tier(mounted / "kv")

    def lose() -> None:
        shutil.rmtree(mounted / "kv")
        unmount(mounted)

    await fenced(tier, "removed", lose)
    assert list(mounted.iterdir()) == []
