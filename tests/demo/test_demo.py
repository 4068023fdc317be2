"""`lmcache-trio demo`, as a user runs it: five processes, one table, one exit status, and nothing left behind."""

import os
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import attrs
import pytest

from lmcache_trio.cli.demo import demo as demo_command
from lmcache_trio.demo import command as demo
from lmcache_trio.demo.command import DemoSettings, PromptComparison, Served, verdict
from lmcache_trio.errors import ConfigError

DEMO = [sys.executable, "-m", "lmcache_trio", "demo"]
SMALL = ["--prompts", "2", "--longest", "700", "--new-tokens", "4"]


def environment(directory: Path) -> dict[str, str]:
    return {**os.environ, "TMPDIR": str(directory), "COLUMNS": "120"}


def nothing_is_left(directory: Path, pids: Sequence[int]) -> bool:
    """No process of *pids*, no file of the demo's."""
    return not list(directory.iterdir()) and not any(Path(f"/proc/{pid}").exists() for pid in pids)


@pytest.fixture
def directory() -> Iterator[Path]:
    """Short enough for a socket's path, so that the demo does put its files there."""
    with tempfile.TemporaryDirectory(prefix="demo-", dir="/tmp") as made:
        yield Path(made)


@contextmanager
def running(directory: Path, arguments: Sequence[str]) -> Iterator[subprocess.Popen[str]]:
    command, pipe = [*DEMO, *arguments], subprocess.PIPE
    with subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, env=environment(directory)) as process:
        try:
            yield process
        finally:
            if process.poll() is None:
                process.terminate()


def wait_processes(demo: subprocess.Popen[str], count: int) -> list[int]:
    """The pids of the demo's processes, as it names them, once it has started *count*. The first is the server."""
    assert demo.stderr is not None
    pids: list[int] = []
    for line in demo.stderr:
        pids += [int(pid) for pid in re.findall(r"process (\d+)", line)]
        if len(pids) == count:
            return pids
    raise AssertionError(f"the demo ended with {len(pids)} of {count} processes started")


def test_the_demo_serves_warm_what_another_engine_computed_also_from_disk_and_leaves_nothing(directory: Path) -> None:
    with running(directory, SMALL) as process:
        pids = wait_processes(process, 5)
        out, errors = process.communicate(timeout=100)
    assert process.returncode == 0, errors
    rows = [line.split() for line in out.splitlines() if "equal" in line]
    assert len(rows) == 2
    assert rows[0].count("256") == 2  # of 350 tokens, from memory and from the disk
    assert rows[1].count("512") == 2  # of 700: its KV is small, so a chunk has 256 tokens
    assert nothing_is_left(directory, pids)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
@pytest.mark.parametrize("count", [1, 2], ids=["server started", "engine started"])
def test_a_signal_ends_all_processes_and_leaves_nothing(
    directory: Path, number: signal.Signals, code: int, count: int
) -> None:
    with running(directory, ["--prompts", "50"]) as process:
        pids = wait_processes(process, count)
        process.send_signal(number)
        _, errors = process.communicate(timeout=30)
    assert process.returncode == code
    assert "Traceback" not in errors
    assert nothing_is_left(directory, pids)


@pytest.mark.parametrize(("victim", "name"), [(0, "server"), (1, "engine")])
def test_a_process_that_is_killed_fails_the_demo_in_one_line(directory: Path, victim: int, name: str) -> None:
    with running(directory, ["--prompts", "50"]) as process:
        pids = wait_processes(process, 2)
        os.kill(pids[victim], signal.SIGKILL)
        out, errors = process.communicate(timeout=30)
    assert process.returncode == 1
    assert f"the {name} ended with status -9" in errors
    assert "Traceback" not in errors
    assert out == ""
    assert not any(Path(f"/proc/{pid}").exists() for pid in pids)


def test_a_temporary_directory_too_deep_for_a_socket_is_no_obstacle(directory: Path) -> None:
    deep = directory / ("d" * 80)
    deep.mkdir()
    with running(deep, SMALL) as process:
        pids = wait_processes(process, 2)  # the server is ready, so it has its socket
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=30)
    assert nothing_is_left(deep, pids)


def test_a_demo_that_is_not_done_by_its_deadline_fails_in_one_line_and_leaves_nothing(directory: Path) -> None:
    with running(directory, ["--prompts", "50", "--deadline", "0.7"]) as process:
        out, errors = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "not done within 0.7 s" in errors
    assert "Traceback" not in errors
    assert out == ""
    assert nothing_is_left(directory, [int(pid) for pid in re.findall(r"process (\d+)", errors)])


COLD = Served("prompt 0", 600, (1, 2, 3), 0, 0.5)
WARM = attrs.evolve(COLD, reused_tokens=512, first_token_seconds=0.1)


def test_equal_ids_and_something_reused_pass() -> None:
    assert verdict([PromptComparison(COLD, WARM, WARM)]) == []


@pytest.mark.parametrize(
    "warm", [attrs.evolve(WARM, output_ids=(1, 2, 4)), attrs.evolve(WARM, output_ids=(1, 2)), COLD]
)
def test_one_different_id_or_one_prompt_not_reused_fails(warm: Served) -> None:
    assert len(verdict([PromptComparison(COLD, WARM, WARM), PromptComparison(COLD, warm, WARM)])) == 1
    assert len(verdict([PromptComparison(COLD, WARM, WARM), PromptComparison(COLD, WARM, warm)])) == 1


@pytest.mark.parametrize(("warm", "status"), [(WARM, 0), (attrs.evolve(WARM, output_ids=(1, 2, 4)), 1), (COLD, 1)])
def test_the_command_ends_with_status_1_if_an_id_differs_or_nothing_was_reused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], warm: Served, status: int
) -> None:
    async def run(settings: DemoSettings, progress: object) -> list[PromptComparison]:
        return [PromptComparison(COLD, warm, WARM)]

    monkeypatch.setattr(demo, "demo", run)
    try:
        demo_command(prompts=1)
        ended: object = 0
    except SystemExit as exc:
        ended = exc.code
    assert ended == status
    printed = capsys.readouterr()
    assert ("DIFFERENT" in printed.out) == (warm.output_ids != COLD.output_ids)
    assert ("prompt 0" in printed.err) == bool(status)


def test_every_prompt_is_longer_than_a_chunk_and_the_last_is_the_longest() -> None:
    for prompts in range(1, 10):
        lengths = DemoSettings(prompts=prompts, longest=600).lengths
        assert len(lengths) == prompts
        assert min(lengths) > 256
        assert max(lengths) <= 600


def test_the_defaults_fit_into_the_shared_memory_of_a_container() -> None:
    assert DemoSettings().arena_bytes < 64 << 20


@pytest.mark.parametrize("name", ["prompts", "longest", "new_tokens", "threads"])
def test_a_setting_too_small_is_refused_by_its_flag(name: str) -> None:
    too_small: dict[str, Any] = {name: 0}
    with pytest.raises(ConfigError, match="--" + name.replace("_", "-")):
        DemoSettings(**too_small)


@pytest.mark.parametrize("window", [1, -1])
def test_a_window_that_is_none_is_refused_by_its_flag(window: int) -> None:
    with pytest.raises(ConfigError, match="--window"):
        DemoSettings(window=window)


@pytest.mark.parametrize("deadline", [0.0, -1.0, float("nan")])
def test_a_deadline_that_is_none_is_refused_by_its_flag(deadline: float) -> None:
    with pytest.raises(ConfigError, match="--deadline"):
        DemoSettings(deadline=deadline)
