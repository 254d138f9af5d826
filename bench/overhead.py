"""What the policy costs, and what it gains, against stock SGLang in the same run.

Two servers stand side by side, one without the plugin; the same requests go to each in turn.
(a) `untriggered`: outputs too short for a round: the price of having the policy on.
(b) `evicting`: outputs of thousands of tokens: the price of the rounds against shorter attention.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from tqdm import tqdm

from bench.arms import triattention
from bench.machine import machine
from bench.models.tiny import make_model
from bench.planning import measure
from bench.server import STOCK_ENVIRONMENT, Server
from bench.table import spread, table

BUDGET, INTERVAL = 256, 64
REQUESTS = 8
SHORT_REPEATS = 3  # Runs of case (a) take seconds: more of them for each run of case (b).
PROMPT = "Work through the following problem step by step. "


def tokens_per_second(server: Server, tokens: int) -> float:
    """All requests at once, greedy, each of exactly `tokens` output tokens."""
    server.flush_cache()
    sampling = {"max_new_tokens": tokens, "temperature": 0, "ignore_eos": True}
    texts = [f"{index} {PROMPT}" for index in range(REQUESTS)]
    began = time.perf_counter()
    with ThreadPoolExecutor(REQUESTS) as pool:
        list(pool.map(lambda t: server.generate(text=t, sampling_params=sampling), texts))
    return REQUESTS * tokens / (time.perf_counter() - began)


def compare(servers: dict[str, Server], tokens: int, repeats: int) -> dict[str, Any]:
    """Alternate between the servers; throughputs in tokens/s and the ratio of medians."""
    figures: dict[str, list[float]] = {arm: [] for arm in servers}
    for repeat in tqdm(range(repeats), desc=f"{tokens} tokens"):
        for arm in sorted(servers, reverse=repeat % 2 == 1):
            figures[arm].append(tokens_per_second(servers[arm], tokens))
    medians = {arm: statistics.median(values) for arm, values in figures.items()}
    ratio = medians["triattention"] / medians["stock"]
    return {"output_tokens": tokens, "tokens_per_second": figures, "ratio": ratio}


def run(tokens: int, repeats: int, folder: Path) -> dict[str, Any]:
    """All figures; servers and their logs in `folder`.

    Raises:
        RuntimeError: rounds happened where none should, or none where some should.
    """
    planning = [measure(requests) for requests in (1, 8, 64, 256)]
    model = make_model("qwen3", folder / "model")
    policy = triattention("auto", BUDGET, INTERVAL)
    with (
        Server(model, [], folder / "stock.log", STOCK_ENVIRONMENT) as stock,
        Server(model, policy, folder / "policy.log") as ours,
    ):
        servers = {"stock": stock, "triattention": ours}
        for server in servers.values():
            tokens_per_second(server, BUDGET)  # Warm-up.
        untriggered = compare(servers, BUDGET, repeats * SHORT_REPEATS)
        before = ours.kv_policy()["rounds"]
        evicting = compare(servers, tokens, repeats)
        report = ours.kv_policy()
    if before or not report["rounds"]:
        raise RuntimeError(f"{before} rounds where none should happen, {report['rounds']} in all")
    found = {"machine": machine(), "budget": BUDGET, "interval": INTERVAL, "requests": REQUESTS}
    found |= {"planning": planning, "untriggered": untriggered, "evicting": evicting}
    return {**found, "policy": report}


def tables(result: dict[str, Any]) -> str:
    """For the terminal; tokens/s as median (lowest-highest)."""
    planning = [["batch", "idle step, us", "per due request, us"]]
    for row in result["planning"]:
        times = row["idle_step_us"], row["due_request_us"]
        planning.append([str(row["requests"]), *(f"{each:.1f}" for each in times)])
    speed = [["case", "tokens", "stock, tokens/s", "triattention, tokens/s", "ratio"]]
    for case in ("untriggered", "evicting"):
        row = result[case]
        arms = (spread(values) for values in row["tokens_per_second"].values())
        speed.append([case, str(row["output_tokens"]), *arms, f"{row['ratio']:.2f}"])
    return f"{table(planning)}\n\n{table(speed)}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=4096, help="output tokens of case (b)")
    parser.add_argument("--repeats", type=int, default=3, help="runs of case (b) on each server")
    parser.add_argument("--output", type=Path, default=Path("results/overhead.json"))
    arguments = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="sglang-tri-overhead-"))
    result = run(arguments.tokens, arguments.repeats, folder)
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(result, indent=2))
    print(tables(result))


if __name__ == "__main__":
    main()
