"""The demo over either path: separate processes, real shared memory, equal ids; and it says which path was taken."""

import subprocess
import sys

import pytest


@pytest.mark.parametrize(
    ("asked", "taken"), [("device", "the server has opened this engine's KV"), ("shm", "it was asked for")]
)
def test_the_demo_takes_the_path_that_it_was_asked_for(asked: str, taken: str) -> None:
    command = [sys.executable, "-m", "lmcache_trio", "demo", "--path", asked, "--prompts", "1", "--longest", "600"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=110, check=False)
    assert done.returncode == 0, done.stderr
    assert f"path {asked}: {taken}" in done.stderr
    assert "equal" in done.stdout


def test_a_path_that_is_none_is_refused() -> None:
    command = [sys.executable, "-m", "lmcache_trio", "demo", "--path", "teleport"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2
    assert "--path" in done.stderr
