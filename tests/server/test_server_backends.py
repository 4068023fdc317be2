"""Backends are found by name; the directory of the socket is safe to use."""

import importlib.metadata
import os
import stat
from pathlib import Path
from typing import Any

import pytest

from lmcache_trio import ConfigError
from lmcache_trio._server.plugins import find_backend, make_memory
from lmcache_trio._server.socket_directory import prepare_directory
from lmcache_trio.abc import Memory


def test_the_built_in_memory_is_found_by_its_name() -> None:
    memory = make_memory({"backend": "cpu", "size": "1MiB"})
    assert memory.size == 1 << 20


def test_an_unknown_backend_is_named_with_those_that_are_installed() -> None:
    with pytest.raises(ConfigError, match="no backend is called 'cup'; did you mean 'cpu'") as caught:
        make_memory({"backend": "cup"})
    assert caught.value.key == "memory.backend"
    assert "installed: cpu" in str(caught.value)


def test_a_backends_own_setting_is_named_under_its_table() -> None:
    for table, key in (({"size": 5}, "memory.size"), ({"sizes": 5}, "memory.sizes"), ({"size": []}, "memory.size")):
        with pytest.raises(ConfigError) as caught:
            make_memory({"backend": "cpu", **table})
        assert caught.value.key == key


@pytest.mark.parametrize(
    ("value", "words"),
    [("os:nothing", "cannot be imported"), ("no_such_module:X", "cannot be imported"), ("os:sep", "is not a class")],
)
def test_an_entry_point_that_leads_nowhere_is_named(monkeypatch: pytest.MonkeyPatch, value: str, words: str) -> None:
    point = importlib.metadata.EntryPoint("mine", value, "lmcache_trio.memory")
    monkeypatch.setattr("lmcache_trio._server.plugins.entry_points", lambda group: [point])
    with pytest.raises(ConfigError, match=words):
        find_backend("memory", "memory", "mine")


def test_a_class_that_is_not_a_memory_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    point = importlib.metadata.EntryPoint("mine", "pathlib:Path", "lmcache_trio.memory")
    monkeypatch.setattr("lmcache_trio._server.plugins.entry_points", lambda group: [point])
    with pytest.raises(ConfigError, match="which is not a Memory"):
        make_memory({"backend": "mine"})


def test_a_missing_directory_is_made_private_to_the_user(tmp_path: Path) -> None:
    prepare_directory(f"unix://{tmp_path}/a/b/server.sock")
    assert stat.S_IMODE((tmp_path / "a/b").stat().st_mode) == 0o700


def test_a_directory_that_others_can_write_in_is_refused_unless_it_is_sticky(tmp_path: Path) -> None:
    folder = tmp_path / "open"
    folder.mkdir()
    folder.chmod(0o777)
    with pytest.raises(ConfigError, match="chmod go-w"):
        prepare_directory(f"unix://{folder}/server.sock")
    folder.chmod(0o1777)
    prepare_directory(f"unix://{folder}/server.sock")


def test_a_directory_of_another_user_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    theirs = os.getuid() or 1
    if os.getuid() == 0:
        os.chown(tmp_path, theirs, -1)
    else:
        monkeypatch.setattr(os, "getuid", lambda: theirs + 1)
    with pytest.raises(ConfigError, match="belongs to another user"):
        prepare_directory(f"unix://{tmp_path}/server.sock")


def test_other_addresses_need_no_directory() -> None:
    prepare_directory("tcp://127.0.0.1:0")


def test_every_backend_that_is_installed_can_be_loaded_and_has_a_config() -> None:
    for point in importlib.metadata.entry_points(group="lmcache_trio.memory"):
        cls: Any = find_backend("memory", "memory", point.name)
        assert issubclass(cls, Memory)
        assert isinstance(cls.Config, type)
