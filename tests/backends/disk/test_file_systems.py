"""The disk tier on real file systems that are full, read-only, or refuse: mounted by whoever may."""

import ctypes
import os
import resource
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing
from lmcache_trio_backends.disk import DiskConfig, DiskTier
from support.live import OpenLive, WatchedTier, chain_of, wait_in_use

from lmcache_trio.errors import ConfigError, Unavailable
from lmcache_trio.testing.tier_contract import is_right, key_of, load_of, record_of

MIB = 1 << 20


def disk_tier(path: Path, size: int = 24 * MIB, **settings: Any) -> DiskTier:
    return DiskTier(DiskConfig(path=str(path), size=size, **{"slab_size": 2 * MIB, **settings}))


async def stored(tier: DiskTier, number: int) -> bool:
    return list(await tier.store([record_of(key_of(number), (MIB,))])) == [True]


async def loaded(tier: DiskTier, *numbers: int) -> list[bool]:
    loads = [load_of(key_of(n), (MIB,)) for n in numbers]
    hits = list(await tier.load(loads))
    assert all(is_right(load) for load, hit in zip(loads, hits, strict=True) if hit)
    return hits


def run(*command: str | Path) -> None:
    """Skips the test, by name and reason, where this machine does not let us. Outside of Trio: it loses the reason."""
    try:
        done = subprocess.run([str(word) for word in command], capture_output=True, text=True, timeout=30)
    except FileNotFoundError:
        pytest.skip(f"{command[0]}: there is no such command here")
    if done.returncode:
        pytest.skip(f"{command[0]}: {done.stderr.strip() or done.returncode}")


@pytest.fixture
def there(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Path]:
    """A file system of its own: the parameter is (kind, megabytes, options of its mount)."""
    kind, megabytes, options = request.param
    if os.geteuid():
        pytest.skip("mount: only root may")
    place = tmp_path / kind
    place.mkdir()
    if kind in ("tmpfs", "ramfs"):  # the latter ignores its size
        run("mount", "-t", kind, "-o", f"size={megabytes}m,{options}", kind, place)
    else:
        image = image_of(place)
        with image.open("wb") as file:
            file.truncate(megabytes * MIB)
        run(f"mkfs.{kind}", "-q", image)
        run("mount", "-o", f"loop,{options}", image, place)
    yield place
    subprocess.run(["umount", "-l", place], check=True, timeout=30)


def image_of(there: Path) -> Path:
    return there.with_suffix(".img")


def on(*kinds: str, megabytes: int = 32, options: str = "rw") -> pytest.MarkDecorator:
    return pytest.mark.parametrize("there", [(kind, megabytes, options) for kind in kinds], indirect=True, ids=kinds)


def fill(filler: Path, leave: int = 0) -> None:
    """Others take every byte of its file system, but for *leave*."""
    with filler.open("wb", buffering=0) as file, pytest.raises(OSError, match="No space"):
        while True:
            file.write(b"\1" * 4096)
    with filler.open("r+b") as file:
        file.truncate(filler.stat().st_size - leave)


@on("tmpfs", "ext4", megabytes=12)
async def test_a_disk_that_others_fill_is_capacity_reached_and_grows_again_when_there_is_room(
    there: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "lmcache_trio.disk")
    tier = disk_tier(there / "kv", 8 * MIB)
    filler = there / "filler"
    async with tier.open():
        assert await stored(tier, 0)
        assert await stored(tier, 1)
        fill(filler)
        taken = tier.statistics()["bytes_taken"]
        for number in range(2, 20):
            assert await stored(tier, number)
            assert await loaded(tier, number - 1, number) == [True, True]
        held = tier.statistics()
        assert (held["bytes_taken"], held["chunks"], held["evicted"]) == (taken, 2, 18)
        assert int(held["disk_full"]) > 0
        assert len([line for line in caplog.messages if "has no space" in line]) == 1
        filler.unlink()
        for number in range(20, 24):
            assert await stored(tier, number)
        assert await loaded(tier, *range(20, 24)) == [True] * 4
        assert int(tier.statistics()["bytes_taken"]) > int(taken)
        assert len([line for line in caplog.messages if "has space again" in line]) == 1
    async with tier.open():
        assert await loaded(tier, *range(20, 24)) == [True] * 4


@on("tmpfs", "ext4", megabytes=12)
async def test_what_a_full_disk_has_left_is_used_before_chunks_evict_each_other(there: Path) -> None:
    tier = disk_tier(there / "kv", 10 * MIB, slab_size=8 * MIB)
    async with tier.open():
        fill(there / "filler", leave=4 * MIB)
        for number in range(3):
            assert await stored(tier, number)
        assert await loaded(tier, *range(3)) == [True] * 3
        assert 3 * MIB <= int(tier.statistics()["bytes_taken"]) < 8 * MIB
    async with tier.open():
        assert await loaded(tier, *range(3)) == [True] * 3


@on("tmpfs", "ext4", megabytes=12)
async def test_many_small_chunks_on_a_full_disk_evict_each_other_though_the_index_cannot_grow(there: Path) -> None:
    tier = disk_tier(there / "kv", 10 * MIB)
    async with tier.open():
        assert await stored(tier, 10_000)
        fill(there / "filler")
        taken = 0
        for number in range(3000):
            taken += list(await tier.store([record_of(key_of(number), (100,))])) == [True]
        assert taken > 2000
        load = load_of(key_of(2999), (100,))
        assert list(await tier.load([load])) == [True]
        assert is_right(load)


@on("tmpfs", "ext4", megabytes=12)
async def test_a_disk_without_a_byte_left_is_opened_and_read_and_grows_later(there: Path) -> None:
    tier = disk_tier(there / "kv", 8 * MIB)
    async with tier.open():
        assert await stored(tier, 1)
    fill(there / "filler")
    for _ in range(3):
        async with tier.open():
            assert await loaded(tier, 1) == [True]
            assert await stored(tier, 2)
            assert await loaded(tier, 1, 2) == [True, True]
            assert await stored(tier, 3)
            assert sum(await loaded(tier, 1, 2, 3)) == 2
            assert await stored(tier, 1)
    (there / "filler").unlink()
    async with tier.open():
        for number in range(10, 14):
            assert await stored(tier, number)
        assert await loaded(tier, *range(10, 14)) == [True] * 4


@on("tmpfs", megabytes=64, options="nr_inodes=9")
async def test_a_disk_that_has_no_room_for_another_file_is_capacity_reached(there: Path) -> None:
    """The root, the directory, its inner one, the lock, the index, its log: three are left, one of them the probe's."""
    tier = disk_tier(there / "kv", 48 * MIB)
    for _ in range(2):
        async with tier.open():
            for number in range(8):
                assert await stored(tier, number)
            assert sum(await loaded(tier, *range(8))) >= 4
        for number in range(9):
            with suppress(OSError):
                (there / f"filler {number}").touch()
    statistics = tier.statistics()
    assert statistics["evicted"]
    assert statistics["disk_full"]
    assert not statistics["lost_index"]


async def test_slabs_for_which_there_are_too_few_file_descriptors_are_refused_with_how_many(tmp_path: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (256, hard))
    try:
        with pytest.raises(ConfigError, match=r"allow 29\d") as caught:
            async with disk_tier(tmp_path / "kv", 240 * MIB, slab_size=MIB).open():
                pass
        assert caught.value.key == "slab_size"
        async with disk_tier(tmp_path / "kv2", 180 * MIB, slab_size=MIB).open():
            pass
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@on("tmpfs", "ext4", megabytes=12)
async def test_a_size_beyond_the_file_system_is_told_with_what_will_be_used(
    there: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tier = disk_tier(there / "kv", 1 << 40)
    async with tier.open():
        (line,) = [line for line in caplog.messages if line.startswith("size is")]
        disk = os.statvfs(there)
        assert f"{1 << 40}" in line
        assert f"it is {disk.f_blocks * disk.f_frsize}" in line
        assert int(tier.statistics()["bytes_capacity"]) < 12 * MIB
        for number in range(30):
            assert await stored(tier, number)
        held = tier.statistics()
        assert int(held["evicted"]) >= 18
        assert held["dropped_no_space"] == 0


@on("tmpfs", megabytes=2)
async def test_a_file_system_that_is_too_small_is_refused(there: Path) -> None:
    with pytest.raises(ConfigError, match="has 2097152 bytes") as caught:
        async with disk_tier(there / "kv").open():
            pass
    assert caught.value.key == "path"


async def test_a_limit_on_a_files_size_is_capacity_reached(tmp_path: Path) -> None:
    tier = disk_tier(tmp_path / "kv", slab_size=8 * MIB)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (3 * MIB + 1, limits[1]))
    try:
        async with tier.open():
            for number in range(10):
                assert await stored(tier, number)
            assert await loaded(tier, 8, 9) == [True, True]
            held = tier.statistics()
            assert 2 * MIB <= int(held["bytes_taken"]) <= 3 * MIB
            assert int(held["evicted"]) >= 7
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    async with tier.open():
        assert await loaded(tier, 8, 9) == [True, True]
        for number in range(20, 26):
            assert await stored(tier, number)
        assert await loaded(tier, *range(20, 26)) == [True] * 6


@on("tmpfs", "ext4")
async def test_a_disk_that_becomes_read_only_is_unavailable_until_it_is_writable_again(there: Path) -> None:
    tier = disk_tier(there / "kv")
    async with tier.open():
        assert await stored(tier, 1)
    remount(there, "ro")
    with pytest.raises(Unavailable, match=r"(?i)read-?only"):
        async with tier.open():
            pass
    remount(there, "rw")
    async with tier.open():
        assert await loaded(tier, 1) == [True]
        assert await stored(tier, 2)


@on("ext4")
def test_a_disk_that_the_kernel_shuts_down_under_us_is_unavailable_until_it_is_mounted_again(there: Path) -> None:
    tier = disk_tier(there / "kv")

    async def used_until_it_fails() -> None:
        async with tier.open():
            assert await stored(tier, 1)
            shut_down(there)
            assert await loaded(tier, 1) in ([True], [False])
            for number in range(2, 6):
                await stored(tier, number)

    async def used_again() -> None:
        async with tier.open():
            assert await stored(tier, 7)
            assert await loaded(tier, 7) == [True]

    with pytest.raises(Unavailable):
        trio.run(used_until_it_fails)
    mount_again(there)
    trio.run(used_again)


@on("tmpfs", "ramfs")
def test_o_direct_is_refused_by_name_where_the_kernel_refuses_it(there: Path) -> None:
    async def opened() -> None:
        async with disk_tier(there / "kv", direct=True).open():
            pass

    try:
        os.close(os.open(there / "try", os.O_RDWR | os.O_CREAT | os.O_DIRECT, 0o600))
    except OSError:
        with pytest.raises(ConfigError, match="O_DIRECT") as caught:
            trio.run(opened)
        assert caught.value.key == "direct"
    else:
        pytest.skip(f"O_DIRECT on {there.name}: this kernel takes it")


@on("ramfs")
async def test_a_file_system_without_fallocate_is_refused_though_the_c_library_would_make_do(there: Path) -> None:
    """glibc emulates posix_fallocate by writing, which gives no bytes away on such a file system: ramfs has no size."""
    fd = os.open(there / "try", os.O_RDWR | os.O_CREAT, 0o600)
    os.posix_fallocate(fd, 0, 4096)
    os.close(fd)
    with pytest.raises(ConfigError, match="fallocate") as caught:
        async with disk_tier(there / "kv").open():
            pass
    assert caught.value.key == "path"
    assert not list(there.rglob("*probe*"))


@on("ext4", megabytes=64)
async def test_its_files_take_no_more_of_a_real_file_system_than_its_size(there: Path) -> None:
    size = 24 * MIB
    before = os.statvfs(there)
    tier = disk_tier(there / "kv", size)
    async with tier.open():
        for number in range(40):
            assert await stored(tier, number)
            now = os.statvfs(there)
            assert (before.f_bfree - now.f_bfree) * now.f_frsize <= size
        assert int(tier.statistics()["evicted"]) > 10


# ---- under a live server


@on("tmpfs", "ext4", megabytes=12)
async def test_a_disk_that_fills_up_under_a_server_is_not_fenced_and_goes_on(live: OpenLive, there: Path) -> None:
    tier = WatchedTier.around(disk_tier(there / "kv"))
    filler = there / "filler"
    async with live(tier) as server:
        assert await server.store(chain_of("first", 2)) == 2
        await server.written_back()
        assert server.tier()["backend"]["chunks"] == 2
        fill(filler)
        for number in range(10):  # 5 MiB, more than the slab that is there
            assert await server.store(chain_of(f"more {number}", 8)) == 8
            await server.written_back()
        assert (server.tier()["failures"], server.tier()["dropped"]) == (0, 0), server.tier()["reason"]
        assert server.tier()["backend"]["evicted"] > 40
        assert await server.hits(chain_of("more 9", 8)) == 8
    async with live(tier) as server:
        assert await server.hits(chain_of("more 9", 8)) == 8
        filler.unlink()
        assert await server.store(chain_of("last", 40)) == 40
        await server.written_back()
    async with live(tier) as server:
        assert await server.hits(chain_of("more 9", 8)) == 8
        assert await server.hits(chain_of("last", 40)) == 40
        assert server.tier()["failures"] == 0


@on("ext4", options="errors=remount-ro")
async def test_a_disk_that_the_kernel_makes_read_only_under_a_server_is_fenced_until_it_is_mounted_again(
    live: OpenLive, there: Path
) -> None:
    tier = WatchedTier.around(disk_tier(there / "kv"))
    async with live(tier) as server:
        assert await server.store(chain_of("first", 2)) == 2
        await server.written_back()
        make_read_only(there)
        assert await server.store(chain_of("second", 2)) == 2
        await server.written_back()
        assert server.tier()["fenced"]
        assert await server.hits(chain_of("second", 2)) == 2
        assert await server.hits(chain_of("first", 2)) == 2
        await wait_probed(server)
        assert "ead-only" in server.tier()["reason"]
        assert await server.hits(chain_of("second", 2)) == 2
        await trio.to_thread.run_sync(mount_again, there)
        await wait_in_use(tier, lambda: bool(server.tier()["fenced"]))
        assert await server.store(chain_of("third", 2)) == 2
        await server.written_back()
        assert (server.tier()["fenced"], server.tier()["bugs"]) == (False, 0)
    async with live(tier) as server:
        assert await server.hits(chain_of("third", 2)) == 2
        assert await server.hits(chain_of("first", 2)) in (0, 2)  # as much as the kernel wrote before


async def wait_probed(server: Any) -> None:
    """Until a tier that is fenced was tried again, in vain."""
    failures = server.tier()["failures"]
    with trio.fail_after(60):
        while server.tier()["failures"] == failures:
            await trio.sleep_until(server.server._parts.tiers.runners[0].calls.fence.until)
            await trio.testing.wait_all_tasks_blocked(0.05)


def make_read_only(there: Path) -> None:
    """What an ext4 that is mounted so does to itself when it finds an error, here one that it is asked to find."""
    source = subprocess.run(["findmnt", "-no", "SOURCE", there], check=True, capture_output=True, text=True).stdout
    trigger = Path("/sys/fs/ext4", Path(source.strip()).name, "trigger_fs_error")
    try:
        trigger.write_text("1")
    except OSError as exc:
        pytest.skip(f"{trigger}: {exc.strerror}")
    with pytest.raises(OSError, match="Read-only"):
        (there / "try").write_bytes(b"")


def mount_again(there: Path) -> None:
    """From a copy: a process in a mount namespace of its own, as of another test, may hold the one that has failed."""
    subprocess.run(["umount", there], check=True, timeout=30)
    copy = image_of(there).with_suffix(".copy")
    shutil.copyfile(image_of(there), copy)
    subprocess.run(["mount", "-o", "loop", copy, there], check=True, timeout=30)


def remount(there: Path, options: str) -> None:
    subprocess.run(["mount", "-o", f"remount,{options}", there], check=True, timeout=30)


def shut_down(there: Path) -> None:
    """What ext4 does to itself when its journal fails (EXT4_IOC_SHUTDOWN, without flushing the log)."""
    libc = ctypes.CDLL(None, use_errno=True)
    fd = os.open(there, os.O_RDONLY)
    try:
        flags = ctypes.c_uint32(2)
        if libc.ioctl(fd, 0x8004587D, ctypes.byref(flags)):
            pytest.skip(f"EXT4_IOC_SHUTDOWN: {os.strerror(ctypes.get_errno())}")
    finally:
        os.close(fd)
