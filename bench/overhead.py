"""What the policy costs, and what it gains, against stock SGLang in the same run.

Two servers stand side by side, one without the plugin; the same requests go to each in turn.
(a) `untriggered`: outputs too short for a round: the price of having the policy on.
(b) `evicting`: outputs of thousands of tokens: the price of the rounds against shorter attention.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from tqdm import tqdm

from bench.arms import triattention
from bench.machine import machine
from bench.models.tiny import make_model
from bench.planning import measure
from bench.server import STOCK_ENVIRONMENT, Server
from bench.table import spread

BUDGET, INTERVAL = 256, 64
REQUESTS = 8
SHORT_REPEATS = 3  # Runs of case (a) take seconds: more of them for each run of case (b).
PROMPT = "Work through the following problem step by step. "
ARMS = ("stock", "triattention")


def tokens_per_second(server: Server, tokens: int) -> float:
    """All requests at once, greedy, each of exactly `tokens` output tokens."""
    server.flush_cache()
    sampling = {"max_new_tokens": tokens, "temperature": 0, "ignore_eos": True}
    texts = [f"{index} {PROMPT}" for index in range(REQUESTS)]
    began = time.perf_counter()
    with ThreadPoolExecutor(REQUESTS) as pool:
        list(pool.map(lambda t: server.generate(text=t, sampling_params=sampling), texts))
    return REQUESTS * tokens / (time.perf_counter() - began)


def compare(
    servers: dict[str, Server], tokens: int, repeats: int, progress: Callable[[str], None]
) -> dict[str, Any]:
    """Alternate between the servers; throughputs in tokens/s and the ratio of medians."""
    figures: dict[str, list[float]] = {arm: [] for arm in ARMS}
    for repeat in range(repeats):
        order = ARMS if repeat % 2 == 0 else ARMS[::-1]
        for arm in order:
            figures[arm].append(tokens_per_second(servers[arm], tokens))
            progress(arm)
    medians = {arm: statistics.median(values) for arm, values in figures.items()}
    return {
        "output_tokens": tokens,
        "tokens_per_second": figures,
        "median": medians,
        "ratio": medians["triattention"] / medians["stock"],
    }


def run(arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    model = arguments.model_path or make_model("qwen3", folder / "model")
    policy = triattention(arguments.stats, BUDGET, INTERVAL)
    common = arguments.server_arguments
    bar = tqdm(total=2 * arguments.repeats * (SHORT_REPEATS + 1) + 4, desc="planning")
    planning = [measure(requests) for requests in (1, 8, 64, 256)]
    bar.update(4)
    bar.set_description("starting servers")
    with (
        Server(model, common, folder / "stock.log", STOCK_ENVIRONMENT, bar.refresh) as stock,
        Server(model, [*common, *policy], folder / "policy.log", on_wait=bar.refresh) as ours,
    ):
        servers = {"stock": stock, "triattention": ours}
        for server in servers.values():
            tokens_per_second(server, BUDGET)  # Warm-up.

        def progress(arm: str) -> None:
            bar.set_description(arm)
            bar.update()

        short = arguments.repeats * SHORT_REPEATS
        untriggered = compare(servers, BUDGET, short, progress)
        rounds = ours.kv_policy()["rounds"]
        if rounds:
            raise RuntimeError(f"{rounds} rounds happened where none should")
        evicting = compare(servers, arguments.tokens, arguments.repeats, progress)
        report = ours.kv_policy()
    bar.close()
    if not report["rounds"]:
        raise RuntimeError("no round happened: nothing was measured")
    return {
        "machine": machine(),
        "budget": BUDGET,
        "interval": INTERVAL,
        "requests": REQUESTS,
        "planning": planning,
        "untriggered": untriggered,
        "evicting": evicting,
        "policy": report,
    }


def print_tables(result: dict[str, Any]) -> None:
    print(f"{'batch':>10}{'idle step':>14}{'per due request':>18}")
    for row in result["planning"]:
        idle, due = row["idle_step_us"], row["due_request_us"]
        print(f"{row['requests']:>10}{idle:>11.1f} us{due:>15.1f} us")
    print(f"\n{'case':>14}{'tokens':>8}{'stock':>18}{'triattention':>18}{'ratio':>8}")
    for case in ("untriggered", "evicting"):
        row = result[case]
        cells = "".join(f"{spread(row['tokens_per_second'][arm]):>18}" for arm in ARMS)
        print(f"{case:>14}{row['output_tokens']:>8}{cells}{row['ratio']:>8.2f}")
    print("tokens/s: median (lowest-highest)")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=4096, help="output tokens of case (b)")
    parser.add_argument("--repeats", type=int, default=3, help="runs of case (b) on each server")
    parser.add_argument("--model-path", type=Path, help="default: a tiny random model")
    parser.add_argument("--stats", default="auto", help="query statistics of that model")
    parser.add_argument("--output", type=Path, default=Path("results/overhead.json"))
    parser.add_argument("server_arguments", nargs="*", help="for both servers, after --")
    arguments = parser.parse_args()
    result = run(arguments, Path(tempfile.mkdtemp(prefix="sglang-tri-overhead-")))
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(result, indent=2))
    print_tables(result)
    return 0


if __name__ == "__main__":
    sys.exit(main())
