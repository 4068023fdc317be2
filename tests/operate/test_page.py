"""The page in a real browser: it draws, it updates by itself, and it says when the server is gone or hangs.

`nox -s operate -- --shots docs/images` makes the pictures of the documentation.
"""

import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from playwright.sync_api import Browser, Page, expect
from support.watched import Watched

from lmcache_trio.testing import sides
from lmcache_trio.testing.sides import CHUNK, Side, make_kv

expect.set_options(timeout=60_000)  # ms; what is waited for comes by itself
KEY = "a key that nobody guesses"
Show = Callable[..., Page]


@pytest.fixture
def watched() -> Iterator[Watched]:
    with TemporaryDirectory(prefix="lmcache-trio-") as where:  # a short path, which pictures show
        made = Watched(Path(where))
        yield made
        made.server.end()


@pytest.fixture
def show(browser: Browser) -> Iterator[Show]:
    """Open the page of a server in a window of its own. What the browser complains about is a failure."""
    complaints: list[str] = []
    contexts = []

    def open_page(url: str, *, width: int = 1280, height: int = 1000, dark: bool = False, strict: bool = True) -> Page:
        contexts.append(
            browser.new_context(viewport={"width": width, "height": height}, color_scheme="dark" if dark else "light")
        )
        page = contexts[-1].new_page()
        page.on("pageerror", lambda error: complaints.append(str(error)))
        if strict:
            page.on("console", lambda said: complaints.append(said.text) if said.type == "error" else None)
        page.goto(url)
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert complaints == []


def picture(page: Page, shots: Path | None, name: str) -> None:
    if shots is not None:
        page.screenshot(path=shots / f"{name}.png", full_page=True)


def tile(page: Page, name: str) -> str:
    found = page.locator("section.tile", has_text=name).locator("b").inner_text()
    return found.replace("\xa0", " ")


def test_a_fresh_server_is_drawn_whole(watched: Watched, show: Show, shots: Path | None) -> None:
    page = show(watched.url)
    expect(page.locator("#state")).to_have_text("✓ ready")
    expect(page.locator("#where")).to_have_text(watched.server.address)
    texts = {"hour": "No prompt", "missed": "Nothing was missed", "engines": "No engine", "curve": "It is known once"}
    for name, text in {**texts, "requests": "No lookup has missed"}.items():
        expect(page.locator(f"#{name}")).to_contain_text(text)
    expect(page.locator("#tiers")).to_contain_text("0:disk")
    expect(page.locator("#tiers")).to_contain_text("✓ open")
    assert tile(page, "memory used") == "0.0 %"
    picture(page, shots, "page_fresh")


def test_it_updates_by_itself_and_tells_what_happened(watched: Watched, show: Show, shots: Path | None) -> None:
    page = show(watched.url)
    expect(page.locator("#state")).to_have_text("✓ ready")
    side = Side(watched.server.address, make_kv(seed=1))
    try:
        side.wait_healthy()
        side.check_round_trip("a prompt", list(range(3 * CHUNK)), list(range(12)), list(range(16, 28)))
        side.lookup("another prompt", list(range(1000, 1000 + CHUNK)))
        # 192 of 256 tokens were hits, all from memory
        expect(page.locator("section.tile", has_text="last minute")).to_contain_text("75.0 %")
        expect(page.locator("section.tile", has_text="last hour")).to_contain_text("of 256 tokens")
        expect(page.locator("#hour")).to_contain_text("memory 192 (75.0 %)")
        expect(page.locator("#missed")).to_contain_text("never stored")
        expect(page.locator("#memory tr", has_text="ready")).to_contain_text("3")
        sizes = page.locator("#curve tbody tr td:first-child")
        expect(sizes).to_have_text([re.compile(f"^{size}") for size in ("0.5 ", "as it is", "2 ", "4 ", "8 ")])
        for section in page.locator("section").all():  # nothing reaches out of its box
            assert section.evaluate("box => box.scrollWidth <= box.clientWidth + 1")
        expect(page.locator("#requests tr", has_text="another prompt")).to_contain_text("64 from 0 on: never stored")
        expect(page.locator("#engines")).to_contain_text("✓ in use")
        expect(page.locator("#engines")).to_contain_text("1 to 1 of 1")
        assert page.locator("#hour svg rect.memory").count() >= 1
        picture(page, shots, "page_busy")
    finally:
        side.close()
    expect(page.locator("#engines")).to_contain_text("No engine is connected")


def test_it_says_when_the_server_went_away_and_goes_on_with_the_next(
    watched: Watched, show: Show, shots: Path | None
) -> None:
    page = show(watched.url, strict=False)  # a lost connection is an error of the browser's
    expect(page.locator("#state")).to_have_text("✓ ready")
    watched.server.kill()
    expect(page.locator("#notice")).to_contain_text("The server has not answered for")
    expect(page.locator("#state")).to_have_text("✕ no answer")
    assert re.search(r"figures below are of \d\d:\d\d:\d\d", page.locator("#notice").inner_text())
    assert tile(page, "memory used") == "0.0 %"  # what was known is still there
    picture(page, shots, "page_gone")
    watched.server.start()
    expect(page.locator("#state")).to_have_text("✓ ready")
    expect(page.locator("#notice")).to_be_hidden()


def test_it_stays_usable_while_the_server_hangs(watched: Watched, show: Show) -> None:
    page = show(watched.url, strict=False)
    side = Side(watched.server.address, make_kv(seed=1))
    try:
        side.wait_healthy()
        expect(page.locator("#engines")).to_contain_text("1 to 1 of 1")
        watched.server.pause()
        expect(page.locator("#notice")).to_contain_text("The server has not answered for")
        page.locator("#find").fill("no engine has this name")
        expect(page.locator("#engines")).to_contain_text("0 to 0 of 0")
        page.locator("#find").fill("adapter engine")
        expect(page.locator("#engines")).to_contain_text("1 to 1 of 1")
        watched.server.go_on()
        expect(page.locator("#notice")).to_be_hidden()
    finally:
        watched.server.go_on()
        side.close()


def test_a_fenced_tier_is_told_with_its_reason(watched: Watched, show: Show, shots: Path | None) -> None:
    page = show(watched.url, strict=False)
    expect(page.locator("#tiers")).to_contain_text("✓ open")
    for file in watched.tier.rglob("*"):
        if file.is_file():
            file.unlink()
    side = Side(watched.server.address, make_kv(seed=1))
    try:
        side.wait_healthy()
        side.store("a prompt", list(range(3 * CHUNK)), list(range(12)))
        expect(page.locator("#state")).to_have_text("✕ not ready")
        expect(page.locator("#faults")).to_contain_text("0:disk")
        expect(page.locator("#tiers")).to_contain_text("✕")
        picture(page, shots, "page_fenced")
    finally:
        side.close()


@pytest.mark.parametrize("dark", [False, True])
def test_a_phone_shows_all_of_it_without_scrolling_sideways(
    watched: Watched, show: Show, dark: bool, shots: Path | None
) -> None:
    page = show(watched.url, width=390, height=844, dark=dark)
    expect(page.locator("#state")).to_have_text("✓ ready")
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    ink, ground = page.evaluate(
        "[getComputedStyle(document.body).color, getComputedStyle(document.body).backgroundColor]"
    )
    light = [sum(int(part) for part in re.findall(r"\d+", colour)[:3]) for colour in (ink, ground)]
    assert (light[0] > light[1]) == dark
    picture(page, shots, "page_phone_dark" if dark else "page_phone")


def test_a_server_with_a_key_asks_for_it(tmp_path: Path, show: Show) -> None:
    keys = tmp_path / "keys"
    keys.write_text(f"{KEY}\n")
    keys.chmod(0o600)
    watched = Watched(tmp_path, f"http.key_file={keys}")
    try:
        page = show(watched.url, strict=False)
        page.locator("#secret").fill("not this one, which is long enough")
        page.get_by_role("button", name="Look").click()
        expect(page.locator("#ask")).to_be_visible()
        page.locator("#secret").fill(KEY)
        page.get_by_role("button", name="Look").click()
        expect(page.locator("#state")).to_have_text("✓ ready")
        expect(page.locator("#ask")).to_be_hidden()
    finally:
        watched.server.end()


def test_the_name_of_an_engine_is_text_whatever_it_is(
    watched: Watched, show: Show, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = "<img src=x onerror=alert(1)>"
    monkeypatch.setattr(sides, "engine_ids", iter([name]))
    page = show(watched.url)
    side = Side(watched.server.address, make_kv(seed=1))
    try:
        side.wait_healthy()
        expect(page.locator("#engines")).to_contain_text(name)
        assert page.locator("#engines img").count() == 0
    finally:
        side.close()


def test_a_thousand_engines_are_paged_and_found_by_name(watched: Watched, show: Show) -> None:
    command = [sys.executable, "-m", "support.many_engines", watched.server.address, "1000"]
    where = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=where) as engines:
        assert engines.stdout is not None
        assert engines.stdout.readline() == "ready 1000\n"
        page = show(watched.url)
        expect(page.locator("#engines")).to_contain_text("1 to 25 of 1,000")
        assert page.locator("#engines tbody tr").count() == 25
        page.get_by_role("button", name="later").click()
        expect(page.locator("#engines")).to_contain_text("26 to 50 of 1,000")
        page.locator("#find").fill("engine 0777")
        expect(page.locator("#engines")).to_contain_text("1 to 1 of 1")
        assert engines.communicate()[0] == ""
