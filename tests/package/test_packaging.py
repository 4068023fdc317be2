"""The package as a user gets it: what the wheel holds, what its entry points name, and what importing it costs."""

import re
import subprocess
import sys
import tomllib
import zipfile
from importlib.metadata import distribution
from pathlib import Path
from typing import Any

import pytest

from lmcache_trio import abc

ROOT = Path(__file__).parents[2]
INTERFACES = {"lmcache_trio.memory": abc.Memory, "lmcache_trio.tiers": abc.Tier, "lmcache_trio.devices": abc.Device}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    """The wheel of this checkout."""
    dist = tmp_path_factory.mktemp("dist")
    subprocess.run([sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", dist], cwd=ROOT, check=True)
    (path,) = dist.glob("*.whl")
    return zipfile.ZipFile(path)


def test_a_plain_install_asks_for_no_torch_and_the_demos_does(wheel: zipfile.ZipFile) -> None:
    (name,) = (name for name in wheel.namelist() if name.endswith(".dist-info/METADATA"))
    asked = [line for line in wheel.read(name).decode().splitlines() if line.startswith("Requires-Dist: torch")]
    assert [re.search(r"extra == '(\w+)'", line.replace('"', "'")) is not None for line in asked] == [True]
    assert "demo" in asked[0]


def declared_entry_points() -> dict[str, dict[str, str]]:
    """What pyproject.toml promises, group by group."""
    with (ROOT / "pyproject.toml").open("rb") as file:
        found: dict[str, dict[str, str]] = tomllib.load(file)["project"]["entry-points"]
    return found


def test_the_wheels_top_level_names_are_the_two(wheel: zipfile.ZipFile) -> None:
    names = {name.split("/")[0] for name in wheel.namelist()}
    assert {n for n in names if not n.endswith(".dist-info")} == {"lmcache_trio", "lmcache_trio_backends"}


@pytest.mark.parametrize("package", ["lmcache_trio", "lmcache_trio_backends"])
def test_the_wheel_tells_type_checkers_that_it_is_typed(wheel: zipfile.ZipFile, package: str) -> None:
    assert f"{package}/py.typed" in wheel.namelist()


def test_the_wheel_holds_every_module_of_the_checkout(wheel: zipfile.ZipFile) -> None:
    sources = {str(p.relative_to(ROOT)) for p in (ROOT / "lmcache_trio").rglob("*.py")}
    sources |= {str(p.relative_to(ROOT / "backends")) for p in (ROOT / "backends").rglob("*.py")}
    assert sources == {name for name in wheel.namelist() if name.endswith(".py")}


def test_every_declared_entry_point_names_a_class_that_keeps_its_interface() -> None:
    installed = distribution("lmcache-trio").entry_points
    for group, entries in declared_entry_points().items():
        for name, value in entries.items():
            (entry,) = installed.select(group=group, name=name)
            assert entry.value == value
            plugin: Any = entry.load()
            assert issubclass(plugin, INTERFACES[group])
            assert isinstance(plugin.Config, type)
            assert not getattr(plugin, "__abstractmethods__", None)


def test_importing_every_public_name_imports_no_torch() -> None:
    code = (
        "import sys, lmcache_trio\n"
        "for name in lmcache_trio.__all__: getattr(lmcache_trio, name)\n"
        "sys.exit('torch was imported' if 'torch' in sys.modules else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


def test_the_command_line_loads_without_torch() -> None:
    code = "import sys, lmcache_trio.cli; sys.exit('torch was imported' if 'torch' in sys.modules else 0)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
