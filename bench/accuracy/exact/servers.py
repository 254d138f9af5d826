"""The servers that are checked: how they are started, and what they say of themselves."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench import metrics
from bench.arms import Arm, triattention
from bench.cutoff import held_back
from bench.server import STOCK_ENVIRONMENT, STRICT, Server, stop_all
from sglang_tri.config import PER_REQUEST
from sglang_tri.patches.scheduler import TRACE, TRACE_ROWS

BUDGET, INTERVAL = 48, 24
# A budget that no output reaches.
NEVER = 4096
POOL = 6144
KINDS = ("stock", "huge", "policy", "no-prefill-graphs")
# Requests may say their mode and budget.
OWN_SETTINGS = {PER_REQUEST: "1"}
_COMMON = [
    *("--max-total-tokens", str(POOL), "--max-running-requests", "32", *metrics.FLAGS),
    *("--decode-log-interval", "10", "--grammar-backend", "none"),
    # As long as the longest prefill that CUDA graphs are captured for.
    *("--chunked-prefill-size", "1024"),
]
# Several of them stand on one device, and each of them needs little.
_ON_GPU = ["--mem-fraction-static", "0.9", "--cuda-graph-max-bs-decode", "32"]
# A server that waits would take a core from one that works.
_ON_CPU = ["--sleep-on-idle"]


def arms(page_size: int, given: argparse.Namespace, gpu: bool, folder: Path) -> list[Arm]:
    """One of each of KINDS, in the order in which they are used; the last on a GPU alone.

    given: the command line; folder: for what they record.
    """
    common = [*_COMMON, *(_ON_GPU if gpu else _ON_CPU), "--dtype", given.dtype]
    common += ["--page-size", str(page_size)]
    if given.attention_backend:
        common += ["--attention-backend", given.attention_backend]
    common += given.server_arguments
    evicting = [*common, *triattention(given.stats, BUDGET, INTERVAL)]
    stock, huge, policy, eager = (f"{kind}-{page_size}" for kind in KINDS)

    def traced(name: str) -> dict[str, str]:
        return {**STRICT, **OWN_SETTINGS, TRACE: str(trace(folder, name)), TRACE_ROWS: "1"}

    made = [
        Arm(stock, common, STOCK_ENVIRONMENT),
        Arm(huge, [*common, *triattention(given.stats, NEVER, INTERVAL)], OWN_SETTINGS),
        Arm(policy, evicting, traced(policy)),
        Arm(eager, [*evicting, "--disable-prefill-cuda-graph"], traced(eager)),
    ]
    return made if gpu else made[:-1]


def trace(folder: Path, name: str) -> Path:
    """Where a server writes its rounds."""
    return folder / f"{name}-rounds"


class Fleet:
    """Starts servers in the order in which they are used, `at_once` at a time; logs in `folder`."""

    def __init__(self, arms: Sequence[Arm], model: Path, folder: Path, at_once: int) -> None:
        self._waiting = list(arms)
        self._model, self._folder, self._at_once = model, folder, at_once
        self._running: dict[str, Server] = {}

    def get(self, name: str) -> Server:
        """The server once it is ready; raises ServerFailed if it will not be."""
        self._start()
        self._running[name].wait_until_ready()
        return self._running[name]

    def log_tail(self, name: str) -> str:
        """The end of a server's log, whether it runs or not."""
        return self._running[name].log_tail()

    def done(self, *names: str) -> None:
        """Stop these; others start in their place."""
        stop_all([self._running.pop(name) for name in names])
        self._start()

    def close(self) -> None:
        self._waiting.clear()
        self.done(*self._running)

    def _start(self) -> None:
        while self._waiting and len(self._running) < self._at_once:
            arm = self._waiting.pop(0)
            log = self._folder / f"{arm.name}.log"
            with held_back():
                self._running[arm.name] = Server(self._model, arm.arguments, log, arm.environment)


def describe(server: Server) -> dict[str, Any]:
    """What ran: backends, as the server resolved them, and the shares of steps in graphs."""
    state = server.internal_state()
    names = [name for name in state if name.endswith(("attention_backend", "sampling_backend"))]
    found = {name: state[name] for name in sorted(names) if isinstance(state[name], str)}
    found |= {name: state[name] for name in ("dtype", "page_size", "device")}
    found["graph_memory_gb"] = state["memory_usage"]["graph"]
    found["graph_share"] = {phase: graph_share(server, phase) for phase in ("decode", "prefill")}
    return found


def graph_share(server: Server, phase: str) -> float | None:
    """Of this phase's steps, how many were replayed from CUDA graphs; None if there were none."""
    found, name = metrics.read(server.url), f"cuda_graph_passes_total {phase}"
    replayed, others = (found.get(f"{name}_{kind}", 0.0) for kind in ("cuda_graph", "none"))
    return replayed / (replayed + others) if replayed + others else None
