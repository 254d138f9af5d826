"""One workload on one server, once: SGLang's own client sends it, metrics show how it is served."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from contextlib import ExitStack
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from statistics import fmean
from typing import Any

from bench.cutoff import held_back
from bench.load.workloads import Workload
from bench.metrics import Watch
from bench.server import Server

RATE = "output_throughput"
FIGURES = (
    *("duration", RATE, "request_throughput"),
    *("median_ttft_ms", "p95_ttft_ms", "p99_ttft_ms"),
    *("median_itl_ms", "p95_itl_ms", "p99_itl_ms"),
)
"""What is kept of the client's results, by its names: seconds, output tokens and requests per
second, milliseconds to the first token and from one token to the next."""
POINTS = 300  # Kept of what is seen over time.
_WARM, _PAUSE_S = "Warmup completed", 1.0

Run = dict[str, Any]
"""What was measured: `FIGURES`, and what `Client.measure` adds."""


def name_of(run: Run) -> str:
    return f"{run['workload']}, pool {run['pool']}, {run['arm']}"


class LoadFailed(RuntimeError):
    """Requests failed, or could not be sent; the message says which log to read."""


@dataclass(frozen=True)
class Client:
    """SGLang's client, a process for each run.

    Attributes:
        folder: for its log, its results and its home: it keeps prompts there.
        model: folder of the model that is served; prompts of ids are drawn from its vocabulary.
        tokenizer: folder of the tokenizer that prompts of text are drawn with.
    """

    folder: Path
    model: Path
    tokenizer: Path

    def measure(self, server: Server, workload: Workload, arm: str, pool: str) -> Run:
        """Empty the cache, send the workload.

        The client warms up with the first prompt, which stays in a radix cache: its system prompt
        is known from the beginning. Looks are those of `bench.metrics.Watch`, ten a second, that
        find requests decoding; what they show is up to 10 decode steps old.

        Raises:
            LoadFailed: something is missing that the result would be wrong without.
        """
        clock = time.monotonic()
        if not server.flush_cache():
            raise LoadFailed(f"{arm}: the cache could not be emptied; {server.log}")
        before = server.internal_state()
        with Watch(server.url) as watch:
            began, found = self._send(server.url, workload)
        after, end = server.internal_state(), began + found["duration"]
        looks = [look for look in watch.decoding if began <= look.time <= end]
        if not looks:
            raise LoadFailed(f"{arm}: over too soon to be seen decoding; {server.log}")
        thinned = looks[:: -(-len(looks) // POINTS)]
        return {
            **{"arm": arm, "pool": pool, "workload": workload.name},
            **{name: found[name] for name in FIGURES},
            "slots": slots_of(after),  # Of the pool.
            "attention": after["decode_attention_backend"] or after["attention_backend"],
            "cached": sum(found["cached_tokens"]),  # Prompt tokens that were not computed.
            "retracted": watch.retracted,
            "rounds": _rounds(after) - _rounds(before),
            # Requests in the batch, and KV slots that a step reads, those that requests share once
            # for each of them: means of the looks.
            "running": fmean(look.running for look in looks),
            "read": fmean(look.read for look in looks),
            "peak_slots": max(look.slots for look in looks),  # In use.
            # Seconds since the load began, running requests, tokens/s.
            "over_time": [(look.time - began, look.running, look.throughput) for look in thinned],
            "wall": time.monotonic() - clock,  # Seconds, the client's start included.
        }

    def _send(self, url: str, workload: Workload) -> tuple[float, dict[str, Any]]:
        """The Unix time at which the load began, and the client's results.

        The client says that it has warmed up, sleeps for a second, and begins.
        """
        log, output, began = self.folder / "client.log", self.folder / "client.jsonl", 0.0
        output.unlink(missing_ok=True)
        tokenizer = self.tokenizer if workload.system else self.model
        command = [sys.executable, "-u", "-m", "sglang.benchmark.serving", *workload.arguments]
        command += ["--backend", "sglang", "--base-url", url, "--tokenizer", str(tokenizer)]
        command += ["--cache-report", "--output-details", "--output-file", str(output)]
        command += ["--disable-tqdm"]
        environment = {**os.environ, "HOME": str(self.folder), **self._stand_in()}
        with log.open("a") as file, ExitStack() as stack:
            with held_back():  # Servers would answer a client that is left behind before they end.
                process = subprocess.Popen(
                    command, stdout=subprocess.PIPE, stderr=file, text=True, env=environment
                )
                stack.enter_context(process)
                stack.callback(process.kill)
            for line in process.stdout or ():
                file.write(line)
                if line.startswith(_WARM):
                    began = time.time() + _PAUSE_S
            if process.wait() or not began:
                raise LoadFailed(f"{workload.name}: SGLang's client gave up; {log}")
        found: dict[str, Any] = json.loads(output.read_text())
        # A refusal that comes as a stream of one error counts as an answer there.
        silent = sum(not first_token for first_token in found["ttfts"])
        written, due = found["total_output_tokens"], workload.requests * workload.output
        if silent or found["completed"] != workload.requests:
            errors = sorted({error for error in found["errors"] if error})
            raise LoadFailed(f"{workload.name}: {silent} requests got no token; {errors}; {log}")
        if workload.system and written != due:
            raise LoadFailed(f"{workload.name}: {written} output tokens, not {due}; {log}")
        return began, found

    def _stand_in(self) -> dict[str, str]:
        """Environment in which a package that the client imports, and does not use here, is."""
        if find_spec("datasets"):
            return {}
        folder = self.folder / "packages"
        folder.mkdir(exist_ok=True)
        (folder / "datasets.py").write_text("load_dataset = None\n")
        path = os.environ.get("PYTHONPATH")
        return {"PYTHONPATH": os.pathsep.join([str(folder), *([path] if path else [])])}


def slots_of(state: dict[str, Any]) -> int:
    """Size of a server's pool, from its internal state."""
    slots: int = state["memory_usage"]["token_capacity"]
    return slots


def _rounds(state: dict[str, Any]) -> int:
    return int(state["kv_policy"]["rounds"]) if "kv_policy" in state else 0
