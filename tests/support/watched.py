"""A server process that tests look at by HTTP."""

import socket
from pathlib import Path

from lmcache_trio.testing.sides import ServerProcess

__all__ = ["Watched", "free_port"]


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port: int = sock.getsockname()[1]
        return port


class Watched:
    """A server with a disk tier and HTTP, which may be killed and started again at the same addresses."""

    def __init__(self, where: Path, *sets: str) -> None:
        self.tier = where / "tier"
        self.url = f"http://127.0.0.1:{free_port()}"
        tier = {"backend": "disk", "path": str(self.tier), "size": "64MiB"}
        named = [f"tiers.0.{key}={value}" for key, value in tier.items()]
        self.server = ServerProcess(f"unix://{where}/server.sock", *named, f"http.address={self.url}", *sets)
        self.server.start()
        self.server.wait_tier()
