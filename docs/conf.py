"""How Sphinx builds these pages. It fetches nothing: links between our own names are checked, foreign ones are not."""

from importlib.metadata import version as installed
from pathlib import Path

from sphinx.application import Sphinx

project = "lmcache-trio"
author = "The lmcache-trio developers"
version = release = installed("lmcache-trio")

extensions = ["myst_parser", "sphinx.ext.autodoc"]
exclude_patterns = ["_build", "newsfragments"]
html_theme = "furo"
html_title = f"lmcache-trio {release}"
highlight_language = "text"
default_role = "code"

myst_heading_anchors = 3
myst_enable_extensions = ["deflist"]

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_default_options = {"members": True, "imported-members": True, "show-inheritance": True}
nitpick_ignore_regex = [(r"py:.*", r"(?!lmcache_trio).*"), (r"py:.*", r".*\.T")]  # not ours; a type variable

HERE = Path(__file__).parent


def _add_news(app: Sphinx, docname: str, source: list[str]) -> None:
    """Put the news fragments, one sentence a file, where changes.md asks for them."""
    if docname != "changes":
        return
    lines = [f"- {path.read_text().strip()}" for path in sorted((HERE / "newsfragments").glob("*.md"))]
    source[0] = source[0].replace("<!-- news -->", "\n".join(lines) or "Nothing yet.")


def setup(app: Sphinx) -> None:
    """Sphinx calls this."""
    app.connect("source-read", _add_news)
