"""The command line. Its commands are `serve`, those that ask or look, and those that measure; each has a file.

It reads flags, calls what does the work, and turns what that raises into one line on standard error and an exit status:
0; 1, it did not work out; 2, the flags or the settings are wrong; 128 + n, ended by signal n. Each command imports
what it needs when it runs, so that `serve` and `status` start in a fraction of a second and import no torch.
"""

import signal
import sys
from collections.abc import Sequence

from cyclopts import App, CycloptsError

from lmcache_trio.cli.bench import bench
from lmcache_trio.cli.clear import clear
from lmcache_trio.cli.demo import demo
from lmcache_trio.cli.doctor import doctor
from lmcache_trio.cli.ending import NAME, NO_OUTPUT, discard_output, fail
from lmcache_trio.cli.explain import explain
from lmcache_trio.cli.loglevel import loglevel
from lmcache_trio.cli.ls import ls
from lmcache_trio.cli.ping import ping
from lmcache_trio.cli.serve import serve
from lmcache_trio.cli.size import size
from lmcache_trio.cli.status import status
from lmcache_trio.errors import LMCacheTrioError, Misuse

__all__ = ["app", "main"]


def _version() -> str:
    from lmcache_trio import __version__

    return f"{NAME} {__version__}"


app = App(name=NAME, help="A KV-cache server for LLM engines.", version=_version)
app.command(serve)
app.command(status)
app.command(ls)
app.command(explain)
app.command(ping)
app.command(clear)
app.command(loglevel)
app.command(doctor)
app.command(size)
app.command(demo)
app.command(bench)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    try:
        code = _run(arguments)
        if sys.stdout is not None:
            sys.stdout.flush()
    except BrokenPipeError:  # whoever read the output has enough of it: end as any program would, without a word
        code = 128 + signal.SIGPIPE
    except OSError as exc:
        if exc.errno not in NO_OUTPUT:
            raise
        code = fail(f"{exc.filename or 'the output'} could not be written: {exc.strerror}", 1)
    else:
        return code
    discard_output()
    return code


def _run(arguments: Sequence[str] | None) -> int:
    try:
        command, bound, _ = app.parse_args(arguments, print_error=False, exit_on_error=False)
        command(*bound.args, **bound.kwargs)
    except CycloptsError as exc:
        return fail(f"{' '.join(str(exc).split())} (see {NAME} --help)", 2)
    except KeyboardInterrupt:
        return 130
    except LMCacheTrioError as exc:
        return _report(exc)
    except BaseExceptionGroup as group:
        return _report_group(group)
    except SystemExit as exc:
        return exc.code if isinstance(exc.code, int) else int(exc.code is not None)
    return 0


def _report(exc: LMCacheTrioError) -> int:
    return fail(str(exc), 2 if isinstance(exc, Misuse) else 1)


def _report_group(group: BaseExceptionGroup[BaseException]) -> int:
    """A nursery wraps what a task raised. What we raise on purpose needs no traceback; anything else is a bug."""
    if group.split((LMCacheTrioError, KeyboardInterrupt))[1] is not None:
        raise group
    if group.subgroup(KeyboardInterrupt) is not None:
        return 130
    leaf: BaseException = group
    while isinstance(leaf, BaseExceptionGroup):
        leaf = leaf.exceptions[0]
    assert isinstance(leaf, LMCacheTrioError)
    return _report(leaf)
