"""The memory that a process may have, read from trees that look like /proc and /sys/fs/cgroup of several systems."""

import os
from pathlib import Path

import pytest
from lmcache_trio_backends import cpu
from lmcache_trio_backends._memory_limits import ProcessMemory, memory_of_process
from lmcache_trio_backends.cpu import CpuConfig, CpuMemory

from lmcache_trio import ConfigError

GIB = 1 << 30
MIB = 1 << 20
UNLIMITED = 9223372036854771712  # what version 1 says where there is no limit


class System:
    """A machine of 64 GiB, 48 of them free, with nothing mounted yet."""

    def __init__(self, top: Path) -> None:
        self.proc, self.top = top / "proc", top / "sys fs"
        (self.proc / "self").mkdir(parents=True)
        self.write(self.proc / "meminfo", "MemTotal: 67108864 kB\nMemFree: 1 kB\nMemAvailable: 50331648 kB\n")
        self.write(self.proc / "self/mountinfo", "1 0 0:1 / / rw - ext4 /dev/root rw\n")
        self.write(self.proc / "self/cgroup", "")

    def write(self, path: Path, text: str) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)

    def mount(self, own: str, *, kind: str, root: str = "/") -> Path:
        """Mount the memory cgroups of *kind*, of which the process is in *own*. Returns the mount point."""
        mount = self.top / kind
        mount.mkdir(parents=True)
        line = f"9 1 0:26 {root} {str(mount).replace(' ', chr(92) + '040')} rw,nosuid shared:4 - "
        line += "cgroup2 cgroup2 rw,nsdelegate\n" if kind == "v2" else "cgroup cgroup rw,memory\n"
        with (self.proc / "self/mountinfo").open("a") as file:
            file.write(line)
        with (self.proc / "self/cgroup").open("a") as file:
            file.write(f"0::{own}\n" if kind == "v2" else f"7:cpu,cpuacct:/\n4:memory:{own}\n")
        return mount

    def memory(self) -> ProcessMemory:
        return memory_of_process(self.proc)


@pytest.fixture
def system(tmp_path: Path) -> System:
    return System(tmp_path)


def test_without_a_cgroup_it_is_the_machines(system: System) -> None:
    assert system.memory() == ProcessMemory(64 * GIB, 48 * GIB, "this machine's memory")


def test_this_process_has_some() -> None:
    memory = memory_of_process()
    assert 0 < memory.free <= memory.limit


@pytest.mark.parametrize("limited", ["system.slice/kv.service", "system.slice", "."])
def test_in_version_2_the_least_limit_of_its_own_and_all_above_holds(system: System, limited: str) -> None:
    mount = system.mount("/system.slice/kv.service", kind="v2")
    for directory in ("system.slice/kv.service", "system.slice"):
        system.write(mount / directory / "memory.max", f"{8 * GIB}\n" if directory != limited else "max\n")
    system.write(mount / limited / "memory.max", f"{300 * MIB}\n")
    system.write(mount / "other.slice/memory.max", "4096\n")
    memory = system.memory()
    assert memory.limit == memory.free == 300 * MIB
    assert memory.named == f"the limit in {mount / limited / 'memory.max'}"


@pytest.mark.parametrize("limited", ["docker/one", "docker", "."])
def test_in_version_1_too(system: System, limited: str) -> None:
    mount = system.mount("/docker/one", kind="v1")
    for directory in ("docker/one", "docker", "."):
        limit = 300 * MIB if directory == limited else UNLIMITED
        system.write(mount / directory / "memory.limit_in_bytes", f"{limit}\n")
    assert system.memory().limit == 300 * MIB


def test_where_both_versions_are_mounted_the_one_with_the_memory_counts(system: System) -> None:
    system.mount("/", kind="v2")
    mount = system.mount("/docker/one", kind="v1")
    system.write(mount / "docker/one/memory.limit_in_bytes", f"{GIB}\n")
    assert system.memory().limit == GIB


def test_a_limit_that_slows_down_is_one_as_well(system: System) -> None:
    mount = system.mount("/kv.service", kind="v2")
    system.write(mount / "kv.service/memory.max", f"{8 * GIB}\n")
    system.write(mount / "kv.service/memory.high", f"{6 * GIB}\n")
    assert system.memory().limit == 6 * GIB


def test_in_a_container_with_a_view_of_its_own_the_mounts_top_is_its_cgroup(system: System) -> None:
    mount = system.mount("/", kind="v2")
    system.write(mount / "memory.max", f"{2 * GIB}\n")
    assert system.memory().limit == 2 * GIB


@pytest.mark.parametrize("own", ["/docker/one", "/docker/one/inner", "/kubepods/pod/one", "/../../elsewhere"])
def test_in_a_container_that_sees_its_path_on_the_host_too(system: System, own: str) -> None:
    mount = system.mount(own, kind="v1", root="/docker/one")
    system.write(mount / "memory.limit_in_bytes", f"{2 * GIB}\n")
    system.write(mount / "inner/memory.limit_in_bytes", f"{UNLIMITED}\n")
    assert system.memory().limit == 2 * GIB


@pytest.mark.parametrize("own", ["/", "/inner"])
@pytest.mark.parametrize(("kind", "limit"), [("v2", "memory.max"), ("v1", "memory.limit_in_bytes")])
def test_with_the_hosts_cgroups_mounted_in_a_namespace_of_its_own_they_are_searched(
    system: System, kind: str, limit: str, own: str
) -> None:
    mount = system.mount(own, kind=kind, root="/../..")
    system.write(mount / "docker" / limit, f"{3 * GIB}\n")
    for name, pids in (("one", "1\n2\n"), ("two", f"1\n{os.getpid()}\n"), ("three", "")):
        inside = mount / "docker" / name / own.lstrip("/")
        system.write(inside / limit, f"{2 * GIB if name == 'two' else GIB}\n")
        system.write(inside / "cgroup.procs", pids)
    assert system.memory().limit == 2 * GIB


def test_version_1_tells_of_a_limit_above_what_is_mounted(system: System) -> None:
    mount = system.mount("/docker/one", kind="v1", root="/docker/one")
    system.write(mount / "memory.limit_in_bytes", f"{UNLIMITED}\n")
    system.write(mount / "memory.stat", f"cache 0\nhierarchical_memory_limit {GIB}\n")
    assert system.memory().limit == GIB


@pytest.mark.parametrize(
    ("kind", "limit", "usage", "figure"),
    [
        ("v2", "memory.max", "memory.current", "inactive_file"),
        ("v1", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    ],
)
def test_what_others_of_the_cgroup_have_is_not_free_but_page_cache_is(
    system: System, kind: str, limit: str, usage: str, figure: str
) -> None:
    mount = system.mount("/pod/one", kind=kind)
    system.write(mount / "pod" / limit, f"{10 * GIB}\n")
    system.write(mount / "pod" / usage, f"{7 * GIB}\n")
    system.write(mount / "pod" / "memory.stat", f"anon 1\n{figure} {2 * GIB}\n")
    memory = system.memory()
    assert (memory.limit, memory.free) == (10 * GIB, 5 * GIB)


def test_a_cgroup_that_is_full_leaves_nothing_free(system: System) -> None:
    mount = system.mount("/one", kind="v2")
    system.write(mount / "one/memory.max", f"{GIB}\n")
    system.write(mount / "one/memory.current", f"{2 * GIB}\n")
    assert system.memory().free == 0


def test_a_size_above_the_limit_is_refused_with_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "memory_of_process", lambda: ProcessMemory(300 * MIB, 300 * MIB, "the limit in /x"))
    with pytest.raises(ConfigError, match=r"1 GiB do not fit the limit in /x of 300 MiB; give less") as caught:
        CpuMemory(CpuConfig(size=GIB))
    assert caught.value.key == "memory.size"


def test_a_size_above_what_is_free_is_told(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(cpu, "memory_of_process", lambda: ProcessMemory(40 * MIB, 8 * MIB, "the limit in /x"))
    assert CpuMemory(CpuConfig(size=8 * MIB)).size == 8 * MIB
    assert caplog.messages == []
    assert CpuMemory(CpuConfig(size=9 * MIB)).size == 9 * MIB
    (told,) = caplog.messages
    assert "only 8 MiB of the limit in /x are free now" in told
    assert "the arena will take 9 MiB" in told


def test_without_a_size_the_arena_takes_a_quarter_of_the_limit_and_half_of_what_is_free_at_most(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(cpu, "memory_of_process", lambda: ProcessMemory(40 * MIB, 40 * MIB, "it"))
    assert CpuMemory(CpuConfig()).size == 10 * MIB
    monkeypatch.setattr(cpu, "memory_of_process", lambda: ProcessMemory(40 * MIB, 8 * MIB, "it"))
    assert CpuMemory(CpuConfig()).size == 4 * MIB
