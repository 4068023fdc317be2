"""`lmcache-trio explain`: why the lookups of a request missed."""

import time
from typing import TYPE_CHECKING, Any

from lmcache_trio.cli.ask import ask, check_timeout
from lmcache_trio.cli.flags import Address, ServersFile, ServersSets, Switch, Timeout, load_settings
from lmcache_trio.cli.text import count, duration, rows

if TYPE_CHECKING:
    from lmcache_trio.client import Client

__all__ = ["explain", "explanation"]

_WORDS = {
    "never_stored": "nothing is known of this prompt: no engine has stored it, as far as the server remembers",
    "new_tail": "new: the prompt diverged here from those that were stored",
    "evicted": "evicted from memory to make room, and no tier has it",
    "writing": "an engine was storing it at that moment",
    "late": "tiers were late",
    "tier_fenced": "a tier that may have it was out of use",
    "not_admitted": "the cache had not taken it",
    "lease_share": "it was there, and leases had reached lease_share",
    "reset": "the engine's cache was reset, and not as much has been stored since",
    "not_registered": "the engine had no cache: not all of its workers were registered",
    "too_large": "a chunk of the engine is larger than the memory",
    "stopping": "the server was ending",
}


def explain(
    request: str = "",
    /,
    *,
    config: ServersFile = None,
    sets: ServersSets = (),
    address: Address = None,
    json: Switch = False,
    timeout: Timeout = 5.0,
) -> None:
    """Print why lookups missed: of one request, or the latest of all.

    Parameters
    ----------
    request
        The engine's own id of the request; without one, the latest 100 lookups that missed.
    json
        Print one JSON object with the key "requests".
    """
    import trio

    check_timeout(timeout)

    async def told(client: "Client") -> list[dict[str, Any]]:
        return await client.explain(request)

    found = trio.run(ask, load_settings(config, sets, address).address, timeout, told)
    if json:
        from json import dumps

        print(dumps({"requests": found}, indent=2))
    elif found:
        print("\n".join(explanation(record, time.time()) for record in found), end="")
    elif request:
        print(f"None of the latest lookups that missed is of the request {request}: it hit whole, or is forgotten.")
    else:
        print("No lookup has missed.")


def explanation(record: dict[str, Any], now: float) -> str:
    """*record* for people, at *now* in seconds since 1970."""
    name, hit = record["request"] or "a request without a name", record["hit_tokens"]
    ago = f"{duration(max(0.0, now - record['time']))} ago"
    wait = f", waited {record['wait_seconds']:.3f} s for tiers" if record["wait_seconds"] else ""
    told = [("asked", f"{count(record['tokens'], 'tokens')}, {ago}{wait}")]
    told += [(f"hit in {source}", count(tokens, "tokens")) for source, tokens in hit.items() if tokens]
    for run in record["missed_tokens"]:
        first, tokens = run["from_token"], run["tokens"]
        told.append(("missed", f"{count(tokens, 'tokens')} from {first:,} on: {_why(run)}"))
    return f"{name} of engine {record['engine']}\n" + rows((f"  {label}", text) for label, text in told)


def _why(run: dict[str, Any]) -> str:
    """The reason, and what else is told of it. A server of another release may have reasons of its own."""
    reason = str(run["reason"])
    words = [_WORDS.get(reason, reason)]
    if "evicted_seconds_ago" in run:
        idle = f", unused for {duration(run['idle_seconds'])} or more" if run["idle_seconds"] >= 1 else ""
        words.append(f"it left memory {duration(run['evicted_seconds_ago'])} before{idle}")
    if run.get("detail"):
        words.append(str(run["detail"]))
    return "; ".join(words)
