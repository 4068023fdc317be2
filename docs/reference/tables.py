"""Writes the lists and tables of the reference from the code; `tests/docs/test_docs.py` fails while a page differs.

    python docs/reference/tables.py        # after a setting, a figure or a sentence has changed

A page asks for a list of settings with `<!-- table: settings MODULE:CLASS -->`, for a table of a server's figures with
`<!-- table: figures CLASS -->`, and for the table of the protocol with `<!-- table: sentences -->`; the text from there
to `<!-- end -->` is replaced. Settings are a list, because a line of a page has at most 100 columns and a cell of a
table cannot be broken.
"""

import re
import textwrap
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any, get_args, get_type_hints

import attrs

from lmcache_trio import statistics
from lmcache_trio._wire import messages
from lmcache_trio._wire.messages import Message, Role
from lmcache_trio._wire.protocol import PUSHES, REPLIES, speakers

HERE = Path(__file__).parent
PAGES = (
    HERE / "configuration.md",
    HERE / "protocol.md",
    HERE / "statistics.md",
    HERE.parent / "howto" / "vllm.md",
)
_TABLE = re.compile(r"(<!-- table: (.+?) -->\n).*?(?=<!-- end -->)", re.DOTALL)


def render(page: str) -> str:
    """*page* with every table in it made anew."""
    return _TABLE.sub(lambda found: f"{found[1]}\n{_table(*found[2].split())}\n", page)


def _table(kind: str, *args: str) -> str:
    if kind == "settings":
        return "\n".join(_settings(*args)) or "It has no settings.\n"
    rows = _figures(*args) if kind == "figures" else _sentences()
    head, *body = ([cell.replace("|", "\\|") for cell in row] for row in rows)
    return "".join(f"| {' | '.join(row)} |\n" for row in (head, ["---"] * len(head), *body))


def _settings(where: str) -> Iterator[str]:
    module, _, name = where.partition(":")
    for field in attrs.fields(getattr(import_module(module), name)):
        text = textwrap.fill(str(field.metadata.get("help", "")), 99, initial_indent=": ", subsequent_indent="  ")
        yield f"`{field.name}` ({_default(field.default)})\n{text}\n"


def _default(value: Any) -> str:
    if value is attrs.NOTHING:
        return "must be given"
    return f"default: {_default_value(value)}"


def _default_value(value: Any) -> str:
    if isinstance(value, attrs.Factory):  # type: ignore[arg-type]
        made = value.factory()
        if attrs.has(type(made)):
            return "those of its table"
        return "one per user" if isinstance(made, str) else _toml(dict(made))
    return "none" if value is None else _toml(value)


def _toml(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"`{key} = {_plain(item)}`" for key, item in value.items()) or "empty"
    return f"`{_plain(value)}`"


def _plain(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return f'"{value}"' if isinstance(value, str) else "[]" if value == () else str(value)


def _figures(name: str) -> Iterator[list[str]]:
    yield ["Key", "Unit", "Meaning"]
    for key, (unit, meaning) in figures_of(getattr(statistics, name)).items():
        yield [f"`{key}`", unit, meaning]


def figures_of(cls: type[Any]) -> dict[str, tuple[str, str]]:
    """Unit and meaning of each figure of *cls* and of its parts, by key."""
    found: dict[str, tuple[str, str]] = {}
    for key, hint in get_type_hints(cls, include_extras=True).items():
        parts = [part for part in (hint, *get_args(hint)) if isinstance(part, type) and attrs.has(part)]
        if parts:
            found |= figures_of(parts[0])
        else:
            found[key] = getattr(hint, "__metadata__", ("", ""))
    return found


def _sentences() -> Iterator[list[str]]:
    yield ["Opcode", "Message", "Sent by", "Answered by", "Fields"]
    named = (getattr(messages, name) for name in messages.__all__)
    sentences = [cls for cls in named if attrs.has(cls) and issubclass(cls, Message)]
    for cls in sorted(sentences, key=lambda cls: cls.opcode):
        fields = ", ".join(f"`{field.name}`" for field in attrs.fields(cls))
        yield [str(cls.opcode), f"`{cls.__name__}`", _said_by(cls), _answered_by(cls), fields]


def _said_by(cls: type[Message]) -> str:
    roles = tuple(Role) if cls is messages.Hello else speakers(cls)
    if roles:
        return "any client" if len(roles) == len(Role) else " or ".join(role.name.lower() for role in roles)
    if cls not in PUSHES:
        return "server"
    return "server, unasked too" if cls in {*REPLIES.values(), messages.ErrorReply} else "server, unasked"


def _answered_by(cls: type[Message]) -> str:
    kinds = (messages.Welcome, messages.Refused) if cls is messages.Hello else [REPLIES[cls]] if cls in REPLIES else []
    return " or ".join(f"`{kind.__name__}`" for kind in kinds)


def main() -> None:
    """Write the pages."""
    for path in PAGES:
        path.write_text(render(path.read_text()))


if __name__ == "__main__":
    main()
