"""Workloads on servers that are compared: production SGLang, constrained SGLang, and the policy."""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from bench.arms import Arm, running, triattention
from bench.cutoff import Clock
from bench.load.client import RATE, Client, LoadFailed, Run, slots_of
from bench.load.workloads import CLIPPED, CONSTRAINED, POLICY, PRODUCTION, WAITING, Pool, Preset
from bench.metrics import FLAGS
from bench.server import STOCK_ENVIRONMENT, Server
from sglang_tri.patches.scheduler import WAIT

CLIP_VARIABLE = "SGLANG_CLIP_MAX_NEW_TOKENS_ESTIMATION"
FITS = 0.99  # Of a pool: SGLang rounds to pages.
T = TypeVar("T")


def make_arm(name: str, slots: int | None, preset: Preset) -> Arm:
    """A server with `slots` KV slots, or as many as memory allows."""
    arguments = ["--max-running-requests", str(preset.most), *FLAGS, *preset.server]
    arguments += ["--decode-log-interval", "10", "--incremental-streaming-output"]
    arguments += ["--max-total-tokens", str(slots)] if slots else []
    if name in (POLICY, WAITING):
        arguments += triattention(preset.stats, preset.budget, preset.interval)
        return Arm(name, arguments, {WAIT: "1"} if name == WAITING else {})
    if name == CONSTRAINED:
        arguments += ["--disable-radix-cache", "--disable-overlap-schedule"]
    clip = {CLIP_VARIABLE: name.removeprefix(CLIPPED)} if name.startswith(CLIPPED) else {}
    return Arm(name, arguments, {**STOCK_ENVIRONMENT, **clip})


@dataclass
class Sweep:
    """Measures pools.

    Attributes:
        kept: file to which each run is added, too, as soon as it is measured.
        clock: a repeat that does not fit into what is left of it, going by the ones before, is left
            out.
        runs: what was measured.
        took: seconds of the longest run so far, by workload and arm.
    """

    preset: Preset
    client: Client
    kept: Path
    clock: Clock
    runs: list[Run] = field(default_factory=list)
    took: dict[tuple[str, str], float] = field(default_factory=dict)

    def measure(self, pool: Pool) -> None:
        """Each workload on each arm, `repeats` times, every other time the other way round.

        Raises:
            LoadFailed: the device is too small, or the load was not served.
            ServerFailed: a server ended, or was not ready in time.
        """
        slots = pool.slots or self._capacity(pool)
        repeats = list(range(self.preset.repeats))
        together = [(pool.arms, repeats)]
        if not self.preset.side_by_side:
            together = [([arm], [each]) for each in repeats for arm in _turned(pool.arms, each)]
        for arms, numbers in together:
            with self._running(pool, arms, slots) as servers:
                for name, server in servers.items():
                    self._warm_up(name, server, slots)
                for number in numbers:
                    self._send_all(pool, servers, number)

    def _capacity(self, pool: Pool) -> int:
        """Slots that production SGLang has if memory decides: all arms get as many."""
        with self._running(pool, [PRODUCTION], None) as servers:
            return slots_of(servers[PRODUCTION].internal_state())

    def _running(
        self, pool: Pool, arms: Sequence[str], slots: int | None
    ) -> AbstractContextManager[dict[str, Server]]:
        print(f"pool {pool.name}: starting {', '.join(arms)}", flush=True)
        folder = self.client.folder / f"{pool.workloads[0].name} pool {pool.name} {len(self.runs)}"
        folder.mkdir(exist_ok=True)
        made = [make_arm(name, slots, self.preset) for name in arms]
        return running(made, self.client.model, folder, lambda: None)

    def _warm_up(self, name: str, server: Server, slots: int) -> None:
        """Let the server do everything once, a round too."""
        if (room := slots_of(server.internal_state())) < FITS * slots:
            raise LoadFailed(f"{name} has room for {room} slots, not for {slots}; {server.log}")
        tokens = self.preset.budget + 2 * self.preset.interval
        sampling = {"max_new_tokens": tokens, "ignore_eos": True, "temperature": 0}
        server.generate(text="Warm up.", sampling_params=sampling)

    def _send_all(self, pool: Pool, servers: dict[str, Server], number: int) -> None:
        for workload in pool.workloads:
            if sum(self.took.get((workload.name, arm), 0.0) for arm in servers) > self.clock.left:
                continue  # A shorter one may fit.
            for arm in _turned(list(servers), number):
                run = self.client.measure(servers[arm], workload, arm, pool.name)
                self.runs.append(run)
                with self.kept.open("a") as file:
                    print(json.dumps(run), file=file)
                what = f"pool {pool.name}: {workload.name}, {arm}"
                print(f"{what}: {run[RATE]:.0f} tokens/s", flush=True)
                key = workload.name, arm
                self.took[key] = max(run["wall"], self.took.get(key, 0.0))


def _turned(items: Sequence[T], number: int) -> Sequence[T]:
    return items[::-1] if number % 2 else items
