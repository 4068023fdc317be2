"""A tier that somebody else wrote, in a wheel of its own, installed beside ours: chosen by its name in the TOML."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import trio

from lmcache_trio import Role, open_client
from lmcache_trio._wire.messages import AnswerState

TIER = Path(__file__).parents[2] / "docs" / "howto" / "files_tier.py"
PROJECT = """
[build-system]
requires = ["hatchling"]
build-backend = "hatchling.build"

[project]
name = "somebodys-files-tier"
version = "1.0"

[project.entry-points."lmcache_trio.tiers"]
files = "files_tier:FilesTier"

[tool.hatch.build.targets.wheel]
include = ["files_tier.py"]
"""
CONFIG = """
address = "unix://{where}/s.ipc"
prefetch_budget = 30.0

[memory]
backend = "cpu"
size = "16MiB"

[[tiers]]
backend = "{backend}"
{path} = "{where}/chunks"
size = "8MiB"
"""
SHARD = 64 << 10


@pytest.fixture(scope="module")
def beside(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder into which the wheel was installed."""
    project, dist, target = (tmp_path_factory.mktemp(name) for name in ("project", "dist", "target"))
    (project / "pyproject.toml").write_text(PROJECT)
    (project / "files_tier.py").write_text(TIER.read_text())
    subprocess.run([sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", dist], cwd=project, check=True)
    (wheel,) = dist.glob("*.whl")
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", str(target)]
    subprocess.run([*pip, str(wheel)], check=True)
    return target


def serve(beside: Path, config: str, where: Path) -> "subprocess.Popen[str]":
    path = where / "server.toml"
    path.write_text(config)
    command = [sys.executable, "-m", "lmcache_trio", "serve", "--config", str(path)]
    found = os.pathsep.join([str(beside), *filter(None, [os.environ.get("PYTHONPATH")])])
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": found}
    )


def test_it_is_chosen_by_its_name_and_works(beside: Path, tmp_path: Path) -> None:
    config = CONFIG.format(where=tmp_path, backend="files", path="path")
    digests = [bytes([i]) * 32 for i in range(3)]

    async def use(stored: bool) -> None:
        with trio.fail_after(30):
            async with open_client(f"unix://{tmp_path}/s.ipc", role=Role.SCHEDULER, engine="e") as scheduler:
                async with open_client(f"unix://{tmp_path}/s.ipc", role=Role.WORKER, engine="e") as worker:
                    assert await worker.register(b"f" * 32, SHARD, 16)
                    while (await worker.statistics())["tiers"][0]["state"] != "open":  # noqa: ASYNC110
                        await trio.sleep(0.01)
                    answer = await scheduler.lookup(1, digests)
                    assert (answer.state, answer.chunks) == (AnswerState.ANSWERED, 3 if stored else 0)
                    if stored:
                        async with worker.retrieving(answer.lease, 0, 3) as views:
                            assert [bytes(view) for view in views] == [bytes([i]) * SHARD for i in range(3)]
                    else:
                        async with worker.storing(1, b"", digests) as storing:
                            for i, view in storing.slots.items():
                                view[:] = bytes([i]) * SHARD

    for stored in (False, True):
        server = serve(beside, config, tmp_path)
        try:
            assert server.stdout is not None
            assert "ready" in server.stdout.readline()
            trio.run(use, stored)
            server.terminate()
            _, said = server.communicate(timeout=30)
            assert server.returncode == 0, said
        finally:
            server.kill()
            server.communicate()


@pytest.mark.parametrize(
    ("backend", "path", "key", "meant"), [("files", "pth", "tiers.0.pth", "path"), ("fils", "path", "backend", "files")]
)
def test_what_is_misspelt_is_named_with_what_was_meant(
    beside: Path, tmp_path: Path, backend: str, path: str, key: str, meant: str
) -> None:
    server = serve(beside, CONFIG.format(where=tmp_path, backend=backend, path=path), tmp_path)
    _, said = server.communicate(timeout=60)
    assert server.returncode == 2
    assert key in said
    assert f"did you mean {meant!r}?" in said
    assert said.count("\n") == 1
