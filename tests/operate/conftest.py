"""A real server with HTTP, a real browser, a real Prometheus. Without them nothing is collected: `nox -s operate`."""

import shutil
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest

collect_ignore: list[str] = []
BROWSER = shutil.which("chromium")
if find_spec("playwright") is None or BROWSER is None:
    collect_ignore += ["test_page.py"]
else:
    from playwright.sync_api import Browser, sync_playwright

    # Chromium has no sandbox as root, and looks for its maker's hosts unless it is told not to.
    FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"]
    FLAGS += ["--disable-component-update", "--disable-sync"]

    @pytest.fixture(scope="session")
    def browser() -> Iterator[Browser]:
        with sync_playwright() as playwright:
            browser = playwright.chromium.launch(executable_path=BROWSER, args=FLAGS)
            yield browser
            browser.close()


if shutil.which("prometheus") is None or shutil.which("promtool") is None:
    collect_ignore += ["test_prometheus.py"]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--shots", help="a folder for pictures of the page")


@pytest.fixture(scope="session")
def shots(request: pytest.FixtureRequest) -> Path | None:
    """Where pictures of the page go: the docs' own, if `--shots` asks for it."""
    folder = request.config.getoption("--shots")
    return Path(folder) if folder else None
