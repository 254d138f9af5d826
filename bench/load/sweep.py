"""The workloads of a pool on all arms, again and again."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from bench.arms import Arm, running
from bench.cutoff import Clock
from bench.load.arms import CLIPPED, CONSTRAINED, PRODUCTION, make_arms
from bench.load.client import Client
from bench.load.plan import Planned
from bench.load.presets import RICH, Pool, Preset
from bench.load.run import Run, measure, slots_of
from bench.load.workloads import Workload
from bench.server import Server

FITS = 0.99  # Of a pool: SGLang rounds to pages.
T = TypeVar("T")


class DoesNotFit(RuntimeError):
    """The device has no memory for a pool of this size; the message says how much there is."""


@dataclass(frozen=True)
class Sweep:
    """Measures pools.

    Attributes:
        preset: the sizes of everything.
        arguments: `repeats`, `stats` and `server_arguments`.
        model: its folder.
        client: sends the load.
        folder: for the servers' logs.
        progress: called with a line of text before each step.
        on_wait: called while servers start.
        clock: a repeat that does not fit into what is left of it, going by the ones before, is left
            out.
        took: seconds of the longest run so far, by workload and arm.
    """

    preset: Preset
    arguments: argparse.Namespace
    model: Path
    client: Client
    folder: Path
    progress: Callable[[str], object]
    on_wait: Callable[[], object]
    clock: Clock = field(default_factory=Clock)
    took: dict[tuple[str, str], float] = field(default_factory=dict)

    def planned(self, pool: Pool) -> Planned:
        """The runs of `measure`."""
        names = [(w.name, arm) for w in pool.workloads for arm in self._names(pool)]
        return Planned({(pool.name, *pair): self.arguments.repeats for pair in names})

    def measure(self, pool: Pool) -> Generator[Run, None, None]:
        """Each workload on each arm, `repeats` times, every other time the other way round.

        Raises:
            DoesNotFit: the device is too small.
            LoadFailed: the load was not served.
            ServerFailed: a server ended, or was not ready in time.
        """
        slots = pool.slots or self._capacity(pool)
        arms = self._arms(pool, slots)
        repeats = range(self.arguments.repeats)
        if self.preset.side_by_side:
            with self._running(pool, arms, 0) as servers:
                for number in repeats:
                    yield from self._send_all(pool, slots, servers, number)
            return
        for number in repeats:
            for arm in _turned(arms, number):
                with self._running(pool, [arm], number) as servers:
                    yield from self._send_all(pool, slots, servers, number)

    def _arms(self, pool: Pool, slots: int | None) -> list[Arm]:
        arguments = self.arguments
        return make_arms(
            self.preset, self._names(pool), slots, arguments.stats, arguments.server_arguments
        )

    def _names(self, pool: Pool) -> list[str]:
        """Of the arms; where there is room for all, estimates of lengths change nothing."""
        names = self.preset.arms
        return [name for name in names if pool.name != RICH or not name.startswith(CLIPPED)]

    def _capacity(self, pool: Pool) -> int:
        """Slots that production SGLang has if memory decides: all arms get as many."""
        production = [arm for arm in self._arms(pool, None) if arm.name == PRODUCTION]
        with self._running(pool, production, 0) as servers:
            return slots_of(servers[PRODUCTION].internal_state())

    def _running(
        self, pool: Pool, arms: Sequence[Arm], number: int
    ) -> AbstractContextManager[dict[str, Server]]:
        self.progress(f"pool {pool.name}: starting {', '.join(arm.name for arm in arms)}")
        name = f"{pool.workloads[0].name} pool {pool.name} run {number + 1}"
        folder = self.folder / name.replace(" ", "-")
        folder.mkdir(exist_ok=True)
        return running(arms, self.model, folder, self.on_wait)

    def _send_all(
        self, pool: Pool, slots: int, servers: dict[str, Server], number: int
    ) -> Iterator[Run]:
        for name, server in servers.items():
            room = slots_of(server.internal_state())
            if room < FITS * slots:
                raise DoesNotFit(f"{name} has room for {room} slots, not for {slots}")
            if not number or not self.preset.side_by_side:
                self._warm_up(server)
        for workload in pool.workloads:
            expected = sum(self.took.get((workload.name, name), 0.0) for name in servers)
            if expected > self.clock.left:
                continue  # A shorter one may fit.
            for name in _turned(list(servers), number):
                yield self._send(pool, workload, name, servers[name])

    def _send(self, pool: Pool, workload: Workload, name: str, server: Server) -> Run:
        self.progress(f"pool {pool.name}: {workload.name}, {name}")
        run = measure(self.client, server, workload, name, pool.name, name != CONSTRAINED)
        key = workload.name, name
        self.took[key] = max(run.wall, self.took.get(key, 0.0))
        return run

    def _warm_up(self, server: Server) -> None:
        """Let the server do everything once, a round too."""
        tokens = self.preset.budget + 2 * self.preset.interval
        sampling = {"max_new_tokens": tokens, "ignore_eos": True, "temperature": 0}
        server.generate(text="Warm up.", sampling_params=sampling)


def _turned(items: Sequence[T], number: int) -> Sequence[T]:
    return items[::-1] if number % 2 else items
