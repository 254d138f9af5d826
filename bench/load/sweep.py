"""All workloads on all arms in pools of several sizes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TypeVar

from bench.arms import Arm, running
from bench.load.arms import CONSTRAINED
from bench.load.client import Client
from bench.load.presets import Pool
from bench.load.run import Run, measure
from bench.server import Server

T = TypeVar("T")


class Sweep:
    """Measures pool after pool.

    Args:
        model: its folder.
        client: sends the load.
        folder: for the servers' logs.
        side_by_side: whether all servers of a pool stand at once.
        repeats: how often each workload is sent to each arm.
        progress: called with a line of text before each step.
        on_wait: called while servers start.
    """

    def __init__(
        self,
        model: Path,
        client: Client,
        folder: Path,
        side_by_side: bool,
        repeats: int,
        progress: Callable[[str], None],
        on_wait: Callable[[], None],
    ) -> None:
        self._model, self._client, self._folder = model, client, folder
        self._side_by_side, self._repeats = side_by_side, repeats
        self._progress, self._on_wait = progress, on_wait

    def measure(self, pool: Pool, arms: list[Arm]) -> Iterator[Run]:
        """Each workload on each arm, `repeats` times, every other time the other way round."""
        folder = self._folder / f"{pool.workloads[0].name}, {pool.name}".replace(" ", "-")
        folder.mkdir()
        if self._side_by_side:
            with self._running(arms, folder, pool) as servers:
                for number in range(self._repeats):
                    yield from self._send_all(pool, servers, number)
            return
        for number in range(self._repeats):
            for arm in _turned(arms, number):
                with self._running([arm], folder, pool) as servers:
                    yield from self._send_all(pool, servers, number)

    def _running(
        self, arms: list[Arm], folder: Path, pool: Pool
    ) -> AbstractContextManager[dict[str, Server]]:
        self._progress(f"pool {pool.name}: starting {', '.join(arm.name for arm in arms)}")
        return running(arms, self._model, folder, self._on_wait)

    def _send_all(self, pool: Pool, servers: dict[str, Server], number: int) -> Iterator[Run]:
        for workload in pool.workloads:
            for name in _turned(list(servers), number):
                self._progress(f"pool {pool.name}: {workload.name}, {name}")
                shares = name != CONSTRAINED
                yield measure(self._client, servers[name], workload, name, pool.name, shares)


def _turned(items: list[T], number: int) -> list[T]:
    return items[::-1] if number % 2 else items
