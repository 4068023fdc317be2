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
suppress_warnings = ["misc.highlighting_failure"]  # a command with JSON in it is no syntax error
default_role = "code"

myst_heading_anchors = 3
myst_enable_extensions = ["deflist"]

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_default_options = {"members": True, "imported-members": True}
nitpick_ignore_regex = [
    (r"py:.*", r"(?!lmcache_trio).*"),  # not ours
    (r"py:.*", r".*\.T"),  # a type variable
    (r"py:.*", r"lmcache_trio\._(core|server|transport)\..*"),  # private, seen in a signature
]

HERE = Path(__file__).parent


def _add_news(app: Sphinx, docname: str, source: list[str]) -> None:
    """Put the news fragments, one sentence a file, where changes.md asks for them."""
    if docname != "changes":
        return
    lines = [f"- {path.read_text().strip()}" for path in sorted((HERE / "newsfragments").glob("*.md"))]
    source[0] = source[0].replace("<!-- news -->", "\n".join(lines) or "Nothing yet.")


def _keep_pictures(_app: Sphinx, _what: str, _name: str, _obj: object, _options: object, lines: list[str]) -> None:
    """An indented block in a docstring is code or a picture: show it as it is."""
    shown: list[str] = []
    for line in lines:
        if line.startswith("    ") and len(shown) > 1 and not shown[-1] and not shown[-2].startswith(" "):
            shown += ["::", ""]
        shown.append(line)
    lines[:] = shown


def setup(app: Sphinx) -> None:
    """Sphinx calls this."""
    app.connect("source-read", _add_news)
    app.connect("autodoc-process-docstring", _keep_pictures)
