"""The documentation says what the code says: its tables are made from it, its links lead somewhere."""

import ast
import os
import re
import subprocess
import sys
from importlib.metadata import entry_points
from pathlib import Path
from types import ModuleType
from typing import Any

import attrs
import pytest
from lmcache_trio_backends.disk import DiskTier
from support.programs import DOCS, load_program

from lmcache_trio import open_server
from lmcache_trio.adapters.vllm.settings import ConnectorSettings
from lmcache_trio.config import Access, ClientConfig, Config, Limits
from lmcache_trio.statistics import FIGURES, EngineHeld, LayoutHeld, figures_of

PAGES = sorted(DOCS.rglob("*.md"))


@pytest.fixture(scope="module")
def tables() -> ModuleType:
    """docs/reference/tables.py, which is a script and in no package."""
    return load_program("reference/tables.py")


@pytest.mark.parametrize("page", [page for page in PAGES if "<!-- table: " in page.read_text()], ids=lambda p: p.stem)
def test_the_tables_of_the_reference_are_those_of_the_code(tables: ModuleType, page: Path) -> None:
    assert page in tables.PAGES
    text = page.read_text()
    assert text == tables.render(text), "run python docs/reference/tables.py"


def test_every_setting_of_the_server_and_of_each_built_in_backend_has_help_and_stands_in_the_reference() -> None:
    text = (DOCS / "reference" / "configuration.md").read_text()
    found: list[Any] = [Config]
    for group in ("memory", "tiers", "devices"):
        ours = [e for e in entry_points(group=f"lmcache_trio.{group}") if e.dist and e.dist.name == "lmcache-trio"]
        found += [entry.load().Config for entry in ours]
    for cls in found:
        assert f"<!-- table: settings {cls.__module__}:{cls.__name__} -->" in text
    for cls in (*found, Access, ClientConfig, ConnectorSettings, Limits):
        assert [field.name for field in attrs.fields(cls) if not field.metadata.get("help")] == []


async def test_every_figure_that_a_server_tells_has_a_unit_and_a_meaning_in_the_reference(
    tables: ModuleType, tmp_path: Path
) -> None:
    tier = {"backend": "disk", "path": str(tmp_path / "d"), "size": 1 << 28, "slab_size": 1 << 26}
    memory = {"backend": "cpu", "size": 1 << 20}
    config = Config(address="memory://figures", memory=memory, tiers=(tier,), grace=0.1)
    async with open_server(config) as server:
        found = server.statistics()
    text = (DOCS / "reference" / "statistics.md").read_text()
    assert set(found) == set(FIGURES)
    told_by = {FIGURES[part]: found[part] for part in ("server", "held", "counted")}
    told_by[FIGURES["tiers"]] = found["tiers"][0]
    assert set(found["tiers"][0]["backend"]) == set(DiskTier.figures)
    for cls in (*FIGURES.values(), EngineHeld, LayoutHeld):
        assert f"<!-- table: figures {cls.__name__} -->" in text
        figures = figures_of(cls)
        assert [key for key, (unit, meaning) in figures.items() if not unit or not meaning] == []
        assert cls not in told_by or set(told_by[cls]) == set(figures)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(DOCS)))
def test_every_relative_link_leads_to_a_file(page: Path) -> None:
    targets = re.findall(r"\]\((?!https?:|#)([^)#\s]+)", page.read_text())
    assert [t for t in targets if not (page.parent / t).exists()] == []


def test_each_file_and_name_that_answers_where_do_i_change_is_there() -> None:
    text = (DOCS / "where.md").read_text()
    answers = re.findall(r"^: `([^`]+)`: (.+)$", text, re.MULTILINE)
    assert len(answers) == len(re.findall(r"^: ", text, re.MULTILINE))
    assert len(re.findall(r"^\*\*.+\?\*\*\n: ", text, re.MULTILINE)) >= 20  # questions that have an answer
    missing = []
    for path, names in answers:
        defined = names_in(DOCS.parent / path) if (DOCS.parent / path).is_file() else set()
        wanted = re.findall(r"`([^`]+)`", names)
        assert wanted
        missing += [(path, name) for name in wanted if name not in defined]
    assert missing == []


def names_in(path: Path) -> set[str]:
    """What *path* defines: functions, classes, constants, and `Class.member`."""
    found: set[str] = set()
    for node in ast.parse(path.read_text()).body:
        found |= defined_by(node)
        if isinstance(node, ast.ClassDef):
            found |= {f"{node.name}.{name}" for member in node.body for name in defined_by(member)}
    return found


def defined_by(node: ast.stmt) -> set[str]:
    """The names that this one statement defines."""
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        return {node.name}
    targets = node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
    return {target.id for target in targets if isinstance(target, ast.Name)}


@pytest.mark.parametrize(
    "page",
    [DOCS.parent / "README.md", *(page for page in PAGES if page.parent.name != "newsfragments")],
    ids=lambda page: str(page.relative_to(DOCS.parent)),
)
def test_no_line_of_a_page_but_a_row_of_a_table_is_wider_than_a_hundred_columns(page: Path) -> None:
    lines = enumerate(page.read_text().splitlines(), start=1)
    assert [number for number, line in lines if len(line) > 100 and not line.startswith("|")] == []


def test_every_command_and_each_of_its_flags_stands_in_the_reference() -> None:
    commands = set(re.findall(r"^│ ([a-z]+) ", usage(), re.MULTILINE))
    assert {"serve", "status", "demo"} <= commands
    text = (DOCS / "reference" / "command_line.md").read_text()
    assert "\n: None" not in text, "a flag has no help"
    sections = text.split("\n## lmcache-trio ")[1:]
    documented = {section.split()[0]: section for section in sections}
    assert set(documented) == commands
    for name in commands:
        flags = set(re.findall(r"--[a-z][a-z-]+", usage(name))) - {"--help", "--version"}
        assert flags
        assert {flag for flag in flags if flag not in documented[name]} == set()


def usage(*command: str) -> str:
    """What --help prints, wide enough that no flag is cut."""
    run = [sys.executable, "-m", "lmcache_trio", *command, "--help"]
    environment = os.environ | {"COLUMNS": "200"}
    return subprocess.run(run, capture_output=True, text=True, check=True, timeout=60, env=environment).stdout


_HELP = """
import importlib, pkgutil, pydoc, lmcache_trio, lmcache_trio_backends
for package in (lmcache_trio, lmcache_trio_backends):
    for module in pkgutil.walk_packages(package.__path__, package.__name__ + "."):
        if not module.name.endswith("__main__"):
            try:
                print(pydoc.plaintext.document(importlib.import_module(module.name)))
            except ImportError as exc:  # a module for an engine that is not here
                assert (exc.name or "").partition(".")[0] not in ("lmcache_trio", "lmcache_trio_backends"), exc
"""


def test_no_help_holds_a_value_of_the_environment() -> None:
    """A default value stands in `help()` and in the API's reference, so it can't be the environment."""
    planted = {name: f"the-value-of-{name.lower()}" for name in ("SOME_SECRET", "XDG_RUNTIME_DIR", "LOGNAME")}
    planted["XDG_RUNTIME_DIR"] = "/the-value-of-xdg"
    run = [sys.executable, "-c", _HELP]
    done = subprocess.run(run, capture_output=True, text=True, check=False, timeout=120, env=os.environ | planted)
    assert done.returncode == 0, done.stderr
    assert "load_config(" in done.stdout
    assert "DiskConfig(" in done.stdout
    assert [value for value in planted.values() if value in done.stdout] == []
