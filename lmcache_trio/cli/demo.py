"""`lmcache-trio demo`: the main job, on a small model."""

from importlib.util import find_spec
from typing import Literal

from lmcache_trio.cli.ending import end_with, interrupt_by_exception
from lmcache_trio.errors import ConfigError

__all__ = ["demo"]


def demo(  # noqa: PLR0913  (flags)
    *,
    prompts: int = 4,
    longest: int = 2000,
    new_tokens: int = 16,
    window: int = 256,
    threads: int | None = None,
    seed: int = 0,
    path: Literal["auto", "device", "shm"] = "auto",
    deadline: float | None = None,
) -> None:
    """Store the KV of one engine, end it, start another and get it back. Takes less than a minute.

    Parameters
    ----------
    prompts
        How many prompts to serve.
    longest
        Tokens of the longest prompt; the shortest has half as many.
    new_tokens
        Tokens to generate for each prompt.
    window
        Tokens that every second layer of the model attends to; a hit brings their last chunks alone. 0: all tokens.
    threads
        Threads that the engine computes with; by default one for two cores, 4 at most.
    seed
        Seed of the model's weights and of the prompts.
    path
        Which process copies the KV: the server (device), the engine (shm), or the server if it can (auto).
    deadline
        Seconds after which the demo gives up, with exit status 1; by default never.
    """
    if find_spec("torch") is None:
        raise ConfigError("demo", "runs a small model, which needs torch: pip install 'lmcache-trio[demo]'")
    from lmcache_trio.demo import command as job

    interrupt_by_exception()
    given = {} if threads is None else {"threads": threads}
    sizes = {"prompts": prompts, "longest": longest, "new_tokens": new_tokens, "window": window}
    end_with(job.main(job.DemoSettings(**sizes, seed=seed, path=path, deadline=deadline, **given)))
