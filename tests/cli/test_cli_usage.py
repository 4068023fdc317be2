"""The command line's edges, in processes of their own: flags, settings, exit statuses. None of them starts a server."""

import os
import signal
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ENVIRONMENT = {k: v for k, v in os.environ.items() if not k.startswith("LMCACHE_TRIO_")}


def run(*arguments: str, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "lmcache_trio", *arguments],
        capture_output=True,
        text=True,
        timeout=60,
        env={**ENVIRONMENT, **(env or {})},
        check=False,
    )


def refused(done: subprocess.CompletedProcess[str], *words: str) -> None:
    assert done.returncode == 2, done.stderr
    assert done.stderr.count("\n") == 1, done.stderr  # one line, no traceback
    assert done.stderr.startswith("lmcache-trio: ")
    for word in words:
        assert word in done.stderr
    assert done.stdout == ""


def test_the_version_is_printed() -> None:
    done = run("--version")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("lmcache-trio")


def test_the_help_names_every_command() -> None:
    done = run("--help")
    assert done.returncode == 0
    for command in ("serve", "status", "demo"):
        assert command in done.stdout


@pytest.mark.parametrize("arguments", [["--help"], ["serve", "--help"], ["--version"]])
def test_help_that_nobody_reads_leaves_no_traceback(arguments: list[str]) -> None:
    program = [sys.executable, "-m", "lmcache_trio", *arguments]
    for where, words in (("exec 3> >(:); wait $!; ", ""), ("exec 3>/dev/full; ", "No space left on device")):
        command = ["bash", "-c", where + '"$@" >&3', "bash", *program]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, env=ENVIRONMENT, check=False)
        assert done.returncode not in (0, 120)
        assert done.stderr.count("\n") == bool(words)
        assert words in done.stderr


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["bogus"], "bogus"),
        (["serve", "--bogus"], "--bogus"),
        (["serve", "extra"], "extra"),
        (["status", "--timeout", "soon"], "--timeout"),
        (["status", "--timeout", "0"], "--timeout"),
        (["status", "--timeout", "nan"], "--timeout"),
        (["demo", "--prompts", "0"], "--prompts"),
        (["demo", "--longest", "10"], "--longest"),
        (["demo", "--new-tokens", "0"], "--new-tokens"),
        (["demo", "--threads", "0"], "--threads"),
    ],
)
def test_a_wrong_flag_ends_in_one_line_that_names_it(arguments: list[str], word: str) -> None:
    refused(run(*arguments), word)


@pytest.mark.parametrize(
    ("setting", "key", "fix"),
    [
        ("chunk_tokns=256", "chunk_tokns", "chunk_tokens"),
        ('chunk_tokens="many"', "chunk_tokens", "integer"),
        ("chunk_tokens=0", "chunk_tokens", "1 or more"),
        ("lease_timeout=-1", "lease_timeout", "more than 0"),
        ("lease_timeout=nan", "lease_timeout", "more than 0"),
        ("lease_share=2", "lease_share", "at most 1"),
        ("grace=soon", "grace", "number"),
        ("memory.size=16EB", "memory.size", "bytes"),
        ("memory.sise=16MiB", "memory.sise", "size"),
        ("memory.size=900TiB", "memory.size", "fit"),
        ("memory.backend=nope", "memory.backend", "cpu"),
        ("memory=3", "memory", "table"),
        ("tiers.0.backend=nope", "tiers.0.backend", "nope"),
        ("tiers.0.path=/x", "tiers.0.backend", "missing"),
        ('tiers=[{backend="disk", path="/x", size="1GiB", sise=1}]', "tiers.0.sise", "size"),
        ("device.backend=nope", "device.backend", "nope"),
        ("address=there", "address", "unix://"),
        ("address=unix://relative", "address", "absolute"),
        ("address=tcp://0.0.0.0:5555", "address", "loopback"),
        ("address=tcp://127.0.0.1", "address", "port"),
        ("nonsense", "--set", "key=value"),
    ],
)
def test_a_wrong_setting_ends_in_one_line_that_names_the_key_and_the_fix(
    setting: str, key: str, fix: str, tmp_path: Path
) -> None:
    address = [] if setting.startswith("address") else ["--address", f"unix://{tmp_path}/s.sock"]
    refused(run("serve", *address, "--set", setting), key, fix)


@pytest.mark.parametrize("how", [["--config", "~/server.toml"], ["--config=$HOME/server.toml"], []])
def test_the_file_is_named_as_a_path_is_in_a_shell(how: list[str], tmp_path: Path) -> None:
    (tmp_path / "server.toml").write_text("grace = -1\n")
    env = {"HOME": str(tmp_path)} | ({} if how else {"LMCACHE_TRIO_CONFIG": "~/server.toml"})
    refused(run("serve", "--address", f"unix://{tmp_path}/s.sock", *how, env=env), "grace", "out of range")


def test_a_wrong_key_in_the_file_is_named_too(tmp_path: Path) -> None:
    file = tmp_path / "server.toml"
    file.write_text("[memory]\nbackend = 'cpu'\nsise = '1GiB'\n")
    refused(run("serve", "--address", f"unix://{tmp_path}/s.sock", "--config", str(file)), "memory.sise", "size")


def test_the_environment_names_the_file_and_is_named_itself(tmp_path: Path) -> None:
    absent = str(tmp_path / "absent.toml")
    refused(run("serve", env={"LMCACHE_TRIO_CONFIG": absent}), f"LMCACHE_TRIO_CONFIG: cannot read {absent!r}")
    refused(run("serve", env={"LMCACHE_TRIO_CHUNK_TOKENS": "many"}), "chunk_tokens", "LMCACHE_TRIO_CHUNK_TOKENS")
    refused(
        run("serve", "--address", f"unix://{tmp_path}/s.sock", env={"LMCACHE_TRIO_LOG": "loud"}), "LMCACHE_TRIO_LOG"
    )


@pytest.mark.parametrize("level", ["INFO", "Warning", "debug", "", "WARN", "Critical"])
def test_a_level_of_log_is_understood_in_either_case(level: str, tmp_path: Path) -> None:
    arguments = ["serve", "--address", f"unix://{tmp_path}/s.sock", "--set", "tiers.0.backend=nope"]
    refused(run(*arguments, env={"LMCACHE_TRIO_LOG": level}), "tiers.0.backend")  # the next thing that is wrong


def test_several_settings_follow_one_flag(tmp_path: Path) -> None:
    refused(run("serve", "--set", f"address=unix://{tmp_path}/s.sock", "grace=1", "chunk_tokens=0"), "chunk_tokens")


@pytest.mark.parametrize("module", ["lmcache_trio.cli", "lmcache_trio._server.supervise", "lmcache_trio_backends.disk"])
def test_nothing_that_every_server_imports_imports_torch_numpy_or_pynng(module: str) -> None:
    """Each would take a fifth of the second in which a server is ready, or more."""
    code = f"import sys, {module}; print([m for m in ('torch', 'numpy', 'pynng') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout == "[]\n"


INTERRUPTED = """
import os, runpy, signal, sys
class CtrlC:
    def find_spec(self, name, path=None, target=None):
        if name == where:
            os.kill(os.getpid(), signal.SIGINT)
assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
sys.meta_path.insert(0, CtrlC())
where, sys.argv = sys.argv[1], sys.argv[1:]
runpy.run_module("lmcache_trio", run_name="__main__")
"""


@pytest.mark.parametrize(
    "module",
    [
        *("lmcache_trio.cli", "cyclopts", "lmcache_trio.config", "attrs", "cattrs", "trio", "msgspec"),
        *("lmcache_trio._server.supervise", "lmcache_trio._wire.codec"),
    ],
)
def test_ctrl_c_while_a_server_starts_ends_it_without_a_word(module: str, tmp_path: Path) -> None:
    """Wherever it is by then: here at an import. A KeyboardInterrupt in mid-import left a traceback, or a SIGSEGV."""
    command = [sys.executable, "-c", INTERRUPTED, module, "serve", "--address", f"unix://{tmp_path}/s.sock"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, env=ENVIRONMENT, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (-signal.SIGINT, "", "")  # a shell calls it 130


def test_ctrl_c_is_ignored_where_it_was_ignored_before() -> None:
    """A shell starts background jobs so, that the Ctrl-C of another command does not end them."""
    code = INTERRUPTED.replace("assert", "signal.signal(signal.SIGINT, signal.SIG_IGN)\nassert not")
    command = [sys.executable, "-c", code, "cyclopts", "--version"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, env=ENVIRONMENT, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_the_program_and_the_module_begin_at_the_same_line() -> None:
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    assert project["scripts"] == {"lmcache-trio": "lmcache_trio.__main__:main"}
