"""Writes the lists and tables of the reference from the code; `tests/docs/test_docs.py` fails while a page differs.

    python docs/reference/tables.py        # after a setting, a figure or a message has changed

A page asks for one of these, and the text from there to `<!-- end -->` is replaced:

    <!-- table: settings MODULE:CLASS -->      a list: a line of a page has at most 100 columns, a cell can't be broken
    <!-- table: figures CLASS -->              what a server tells, of `lmcache_trio.statistics`
    <!-- table: backend MODULE:CLASS -->       what a tier's backend tells
    <!-- table: server_metrics -->             the same, as Prometheus reads it
    <!-- table: flags COMMAND -->              as the parser of the command line has them
    <!-- table: rows -->                       the benchmark's
    <!-- table: messages -->                   the protocol's
    <!-- table: chunks -->                     the length of a chunk of models that many people run
    <!-- table: metrics -->                    the connector's, in vLLM's own /metrics
"""

import re
import textwrap
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import attrs

from lmcache_trio import cli, statistics
from lmcache_trio._core.keys import chunk_tokens_for
from lmcache_trio._server import metrics as server_metrics
from lmcache_trio._wire import messages
from lmcache_trio._wire.messages import Message, Role
from lmcache_trio._wire.protocol import PUSHES, REPLIES, speakers
from lmcache_trio.adapters.vllm.figures import DROPPED, METRICS
from lmcache_trio.bench.settings import ROWS

HERE = Path(__file__).parent
PAGES = (
    HERE / "command_line.md",
    HERE / "configuration.md",
    HERE / "disk-tier.md",
    HERE / "protocol.md",
    HERE / "statistics.md",
    HERE.parent / "howto" / "operate.md",
    HERE.parent / "howto" / "vllm.md",
)
_CODE = re.compile(r"(?<!\S)(--[\w-]+(?: [\w.]+=[^\s;]*?)?|\$\w+|~|[\w.-]*\w[=_][^\s;]*?)(?=[.,;:)]*(?:\s|$))")
"""Flags, variables and names in a line of help, which is plain text."""
_TABLE = re.compile(r"(<!-- table: (.+?) -->\n).*?(?=<!-- end -->)", re.DOTALL)


def render(page: str) -> str:
    """*page* with every table in it made anew."""
    return _TABLE.sub(lambda found: f"{found[1]}\n{_table(*found[2].split())}\n", page)


def _table(kind: str, *args: str) -> str:
    if kind == "settings":
        return "\n".join(_settings(*args)) or "It has no settings.\n"
    if kind == "flags":
        return "\n".join(_flags(*args))
    if kind == "rows":
        names = " ".join(f"`{name}`," for name in ROWS).removesuffix(",")
        return textwrap.fill(f"The rows are {names}.", 100) + "\n"
    if kind == "server_metrics":
        return "\n".join(_server_metrics())
    rows_of: dict[str, Callable[..., Iterator[list[str]]]] = {
        "figures": _figures,
        "backend": _backend,
        "chunks": _chunks,
        "metrics": _metrics,
        "messages": _messages,
    }
    rows = rows_of[kind](*args)
    head, *body = ([cell.replace("|", "\\|") for cell in row] for row in rows)
    return "".join(f"| {' | '.join(row)} |\n" for row in (head, ["---"] * len(head), *body))


def _settings(where: str) -> Iterator[str]:
    module, _, name = where.partition(":")
    for field in attrs.fields(getattr(import_module(module), name)):
        yield _item(f"`{field.name}` ({_default(field.default)})", str(field.metadata.get("help", "")))


def _flags(*command: str) -> Iterator[str]:
    """What *command* takes, as its parser has it."""
    app = cli.app
    for name in command:
        app = app[name]
    for argument in app.assemble_argument_collection(parse_docstring=True):
        names = " ".join(f"`{name}{_value(argument.hint)}`" for name in argument.names)
        if argument.field_info.kind is not argument.field_info.KEYWORD_ONLY:
            names = f"`{argument.field_info.name.upper()}`"
        default = argument.field_info.default
        is_shown = default not in (None, (), argument.field_info.empty) and default is not False
        text = _CODE.sub(r"`\1`", " ".join(str(argument.parameter.help).split()))
        yield _item(names + (f" (default: `{default}`)" if is_shown else ""), text)


def _value(hint: Any) -> str:
    """What stands behind a flag of the type *hint*."""
    kinds = {bool: "", int: " N", float: " NUMBER", str: " TEXT", Path: " PATH"}
    kinds |= {tuple[str, ...]: " TEXT …", tuple[float, ...]: " [NUMBER]"}
    if get_origin(hint) is Literal:
        return f" {'|'.join(get_args(hint))}"
    plain = [kind for kind in get_args(hint) or (hint,) if kind is not type(None)]
    return kinds[hint] if hint in kinds else kinds[plain[0]]


def _item(term: str, text: str) -> str:
    return f"{term}\n{textwrap.fill(text, 99, initial_indent=': ', subsequent_indent='  ', break_on_hyphens=False)}\n"


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
    for key, (unit, meaning) in statistics.figures_of(getattr(statistics, name)).items():
        yield [f"`{key}`", unit, meaning]


def _backend(where: str) -> Iterator[list[str]]:
    yield ["Key", "Unit", "Meaning"]
    module, _, name = where.partition(":")
    for key, (unit, meaning) in getattr(import_module(module), name).figures.items():
        yield [f"`{key}`", unit, meaning]


_MODELS = (
    ("Qwen2.5 0.5B", 16, 24 * 2 * 2 * 64 * 2),
    ("Qwen2.5 7B", 16, 28 * 2 * 4 * 128 * 2),
    ("Qwen3 8B", 16, 36 * 2 * 8 * 128 * 2),
    ("Qwen3 30B-A3B", 16, 48 * 2 * 4 * 128 * 2),
    ("Qwen3 235B-A22B, TP 4", 16, 94 * 2 * 1 * 128 * 2),
    ("Llama 3.2 1B", 16, 16 * 2 * 8 * 64 * 2),
    ("Llama 3.1 8B", 16, 32 * 2 * 8 * 128 * 2),
    ("Llama 3.1 8B, fp8 KV", 16, 32 * 2 * 8 * 128),
    ("Llama 3.3 70B, TP 8", 16, 80 * 2 * 1 * 128 * 2),
    ("Llama 3.1 405B, TP 8", 16, 126 * 2 * 1 * 128 * 2),
    ("gpt-oss 20B (12 of 24 layers with a window)", 16, 24 * 2 * 8 * 64 * 2),
    ("gpt-oss 120B, TP 8 (18 of 36)", 16, 36 * 2 * 1 * 64 * 2),
    ("Gemma 3 12B (40 of 48)", 16, 48 * 2 * 8 * 256 * 2),
    ("DeepSeek V3, R1 and Kimi K2, any TP", 64, 61 * 576 * 2),
    ("the same, fp8 KV", 64, 61 * 576),
)
"""A name, tokens of a block, and bytes that one rank keeps per token: layers · K and V · heads · head size · 2."""


def _chunks() -> Iterator[list[str]]:
    yield ["Model", "Block", "KiB per token, one rank", "Chunk, tokens", "MiB, one rank", "Chunks of a 128k prompt"]
    for name, block_tokens, token_bytes in _MODELS:
        tokens = chunk_tokens_for("auto", block_tokens, token_bytes)
        sizes = f"{token_bytes / 1024:.1f}", str(tokens), f"{tokens * token_bytes / (1 << 20):.2f}"
        yield [name, str(block_tokens), *sizes, f"{131_072 // tokens:,}"]


def _metrics() -> Iterator[list[str]]:
    yield ["Metric", "Kind", "Meaning"]
    for figure, metric in METRICS.items():
        labels = "{reason}" if figure == DROPPED else ""
        yield [f"`{metric.name}{labels}`", "histogram" if metric.buckets else "counter", metric.documentation]


def _server_metrics() -> Iterator[str]:
    of_tiers = server_metrics.OF_TIERS
    told = (*server_metrics.HELD, *server_metrics.COUNTED, *server_metrics.RATES, *of_tiers)
    by_name: dict[str, server_metrics.Figure] = {}
    for figure in told:
        by_name.setdefault(figure.name, figure)
    for name, figure in by_name.items():
        labels = [*(["tier"] if figure in of_tiers else []), *(["of"] if figure.of else [])]
        labels += [figure.label] if figure.label else []
        by = f" (by {', '.join(f'`{label}`' for label in labels)})" if labels else ""
        yield _item(f"`{name}{'_total' if figure.counted else ''}`{by}", figure.meaning)


def _messages() -> Iterator[list[str]]:
    yield ["Opcode", "Message", "Sent by", "Answered by", "Fields"]
    named = (getattr(messages, name) for name in messages.__all__)
    kinds = [cls for cls in named if attrs.has(cls) and issubclass(cls, Message)]
    for cls in sorted(kinds, key=lambda cls: cls.opcode):
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
