"""Servers that are compared with each other."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from bench.cutoff import held_back
from bench.server import Server, stop_all


@dataclass(frozen=True)
class Arm:
    """A server to compare: its name, its arguments, variables added to its environment."""

    name: str
    arguments: list[str]
    environment: dict[str, str] = field(default_factory=dict)


def triattention(stats: str | Path, budget: int, interval: int) -> list[str]:
    """The policy's flags; `stats` is a file, or `auto`."""
    return [
        *("--kv-policy", "triattention", "--kv-stats", str(stats)),
        *("--kv-budget", str(budget), "--kv-interval", str(interval)),
    ]


@contextmanager
def running(
    arms: Sequence[Arm], model: Path, folder: Path, on_wait: Callable[[], object]
) -> Iterator[dict[str, Server]]:
    """The servers of `arms`, started at once, by name; their logs lie in `folder`."""
    servers: dict[str, Server] = {}
    try:
        for arm in arms:
            log = folder / f"{arm.name}.log"
            with held_back():  # A server that is not in `servers` yet would be left behind.
                servers[arm.name] = Server(model, arm.arguments, log, arm.environment, on_wait)
        for server in servers.values():
            server.wait_until_ready()
        yield servers
    finally:
        _stop(list(servers.values()))


def _stop(servers: Sequence[Server]) -> None:
    try:
        stop_all(servers)
    except BaseException:  # Of a signal's handler: it must leave no server behind.
        stop_all(servers)
        raise
