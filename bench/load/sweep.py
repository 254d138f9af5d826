"""Workloads on servers that are compared: production SGLang, constrained SGLang, and the policy."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product

from bench.arms import Arm, running, triattention
from bench.cutoff import Clock
from bench.load.client import RATE, Client, LoadFailed, Run, slots_of
from bench.load.workloads import CLIPPED, CONSTRAINED, POLICY, WAITING, Pool, Preset
from bench.metrics import FLAGS
from bench.server import STOCK_ENVIRONMENT, Server
from sglang_tri.patches.scheduler import WAIT

CLIP_VARIABLE = "SGLANG_CLIP_MAX_NEW_TOKENS_ESTIMATION"
FITS = 0.99  # Of a pool: SGLang rounds to pages.


def make_arm(name: str, slots: int, preset: Preset) -> Arm:
    """The server of this name, with a pool of `slots` KV slots."""
    arguments = ["--max-running-requests", str(preset.most), "--max-total-tokens", str(slots)]
    arguments += ["--decode-log-interval", "10", "--incremental-streaming-output"]
    arguments += [*FLAGS, *preset.server]
    if name in (POLICY, WAITING):
        arguments += triattention(preset.stats, preset.budget, preset.interval)
        return Arm(name, arguments, {WAIT: "1"} if name == WAITING else {})
    if name == CONSTRAINED:
        arguments += ["--disable-radix-cache", "--disable-overlap-schedule"]
    clip = {CLIP_VARIABLE: name.removeprefix(CLIPPED)} if name.startswith(CLIPPED) else {}
    return Arm(name, arguments, {**STOCK_ENVIRONMENT, **clip})


def measure(
    pool: Pool, preset: Preset, client: Client, clock: Clock, keep: Callable[[Run], object]
) -> None:
    """Each workload on each arm, `repeats` times, every other time the other way round.

    Args:
        clock: a repeat that does not fit into what is left of it, going by the ones before, is left
            out.
        keep: called with each run.

    Raises:
        LoadFailed: the device is too small, or the load was not served.
        ServerFailed: a server ended, or was not ready in time.
    """
    print(f"pool {pool.name}: starting {', '.join(pool.arms)}", flush=True)
    folder = client.folder / f"pool-{pool.name}-{pool.workloads[0].name}"
    folder.mkdir()
    took: dict[tuple[str, str], float] = {}
    arms = [make_arm(name, pool.slots, preset) for name in pool.arms]
    with running(arms, client.model, folder, lambda: None) as servers:
        for name, server in servers.items():
            _warm_up(name, server, pool.slots, preset)
        for number, workload in product(range(preset.repeats), pool.workloads):
            if sum(took.get((workload.name, arm), 0.0) for arm in pool.arms) > clock.left:
                continue  # A shorter one may fit.
            for arm in pool.arms[:: -1 if number % 2 else 1]:
                run = client.measure(servers[arm], workload, arm, pool.name)
                keep(run)
                print(f"{workload.name}, {arm}: {run[RATE]:.0f} tokens/s", flush=True)
                took[workload.name, arm] = max(run["wall"], took.get((workload.name, arm), 0.0))


def _warm_up(name: str, server: Server, slots: int, preset: Preset) -> None:
    """Let the server do everything once, a round too."""
    if (room := slots_of(server.internal_state())) < FITS * slots:
        raise LoadFailed(f"{name} has room for {room} slots, not for {slots}; {server.log}")
    tokens = preset.budget + 2 * preset.interval
    sampling = {"max_new_tokens": tokens, "ignore_eos": True, "temperature": 0}
    server.generate(text="Warm up.", sampling_params=sampling)
