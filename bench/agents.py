"""Agents with tools on four servers: what each way to keep their history costs.

K agents send token ids through `/generate`, K more send messages through the openai client, all at
once. They share a system prompt; each turn is long reasoning, then a tool call that a grammar
enforces, executed by a real tool, its result appended. With `--frontend`, K agents are programs in
SGLang's frontend language instead, which branch (`bench/agent/frontend.py`). The servers: stock
SGLang; the policy with `--kv-reuse prompt` (a generation that was evicted from is forgotten) and
with `--kv-reuse continuation` (the next request goes on from it); the policy without a radix cache.

Exit status 1 if the later requests of `continuation` prefill more than what is new, or if the
shared prompt does not hit as in stock SGLang. Times are printed, and judged, but do not fail.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from functools import partial
from itertools import takewhile
from pathlib import Path
from typing import Any

from tqdm import tqdm

from bench import metrics
from bench.agent import frontend, report
from bench.agent.answers import Answer, tokenize
from bench.agent.loops import take_turn, tool_loops
from bench.agent.prompt import TEMPLATE, messages, system_prompt
from bench.agent.report import CONTINUATION, PROMPT, RADIX_OFF, STOCK, Outcome
from bench.agent.tools import CALL_SCHEMA
from bench.arms import Arm, running, triattention
from bench.cutoff import Clock, cut_off
from bench.machine import machine
from bench.models.tiny import make_model
from bench.server import STOCK_ENVIRONMENT, Endpoint

COMMON = [*metrics.FLAGS, "--chat-template", str(TEMPLATE)]
COMMON += ["--decode-log-interval", "1"]  # Figures of each step.
COMMON += ["--constrained-json-disable-any-whitespace"]  # Else it may write blanks for ever.


def pairs(arguments: argparse.Namespace) -> list[list[Arm]]:
    """Those whose times are compared stand side by side."""
    common = [*COMMON, *arguments.server_arguments]
    policy = [*common, *triattention(arguments.stats, arguments.budget, arguments.interval)]
    kept = [Arm(name, [*policy, "--kv-reuse", name]) for name in (PROMPT, CONTINUATION)]
    stock = Arm(STOCK, common, STOCK_ENVIRONMENT)
    return [kept, [stock, Arm(RADIX_OFF, [*policy, "--disable-radix-cache"])]]


def measure(arguments: argparse.Namespace) -> list[Outcome]:
    """All arms, or the one server of `--base-url`."""
    servers, turns = 1 if arguments.base_url else 4, 1 if arguments.frontend else arguments.turns
    with tqdm(total=servers * turns, unit="turn") as bar:
        if arguments.base_url:
            endpoint = Endpoint(arguments.base_url.rstrip("/"))
            check_settings(endpoint.server_info())
            return alternate({endpoint.url: endpoint}, arguments, bar)
        folder = Path(tempfile.mkdtemp(prefix="sglang-tri-agents-"))
        model = arguments.model_path or make_model("qwen3", folder / "model")
        outcomes: list[Outcome] = []
        for pair in pairs(arguments):
            bar.set_description("starting " + " and ".join(arm.name for arm in pair))
            with running(pair, model, folder, bar.refresh) as started:
                outcomes += alternate(started, arguments, bar)
        return outcomes


def check_settings(info: dict[str, Any]) -> None:
    """Whether a server that somebody else started can be measured.

    Raises:
        SystemExit: it cannot; with what to change.
    """
    if not info["enable_metrics"]:
        raise SystemExit("The server does not report slots and times: add --enable-metrics.")
    if info["reasoning_parser"]:
        raise SystemExit("The server holds grammars back until thinking ends: drop its parser.")


def alternate(
    servers: Mapping[str, Endpoint], arguments: argparse.Namespace, bar: tqdm
) -> list[Outcome]:
    """Measure all of them, a turn of each in turn, so that a slow moment strikes all."""
    agents = {name: prepare(server, arguments) for name, server in servers.items()}
    outcomes = {name: Outcome(name) for name in servers}
    for _ in range(1 if arguments.frontend else arguments.turns):
        for name, outcome in outcomes.items():
            bar.set_description(name)
            with metrics.Watch(servers[name].url) as watch:
                began = time.perf_counter()
                outcome.answers += agents[name]()
                outcome.seconds += time.perf_counter() - began
            outcome.peak_slots = max(outcome.peak_slots, watch.peak_slots)
            bar.update()
    return list(outcomes.values())


def prepare(endpoint: Endpoint, arguments: argparse.Namespace) -> Callable[[], list[Answer]]:
    """Leave in the cache what all agents share, and no more; returns what takes a turn of all."""
    endpoint.flush_cache()
    count, reasoning = arguments.agents, arguments.reasoning
    least = arguments.prompt_tokens
    system = system_prompt(lambda text: len(tokenize(endpoint, prompt=text)), least)
    openings = [tokenize(endpoint, messages=messages(system, number)) for number in (0, 1)]
    same = takewhile(lambda pair: pair[0] == pair[1], zip(*openings, strict=False))
    # The server compiles the grammar, too.
    sampling = {"max_new_tokens": 1, "json_schema": json.dumps(CALL_SCHEMA)}
    endpoint.generate(input_ids=[token for token, _ in same], sampling_params=sampling)
    if arguments.frontend:
        return partial(frontend.run_programs, endpoint, system, count, arguments.turns, reasoning)
    return partial(take_turn, tool_loops(endpoint, system, count), reasoning)


def main() -> int:
    arguments = parse(sys.argv[1:])
    with cut_off(Clock()):  # A signal leaves no server behind.
        outcomes = measure(arguments)
    goals = report.judge(outcomes, arguments.reasoning)
    tables = [report.arm_table(outcomes), report.turn_table(outcomes)]
    print(*tables, *goals, sep="\n\n")
    if arguments.frontend:
        print(f"\n{frontend.__doc__}")
    result = {
        "machine": machine(),
        "arguments": vars(arguments),
        "goals": list(map(asdict, goals)),
        "arms": list(map(asdict, outcomes)),
    }
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(result, indent=1, default=str))
    print(f"\nWritten: {arguments.output}")
    return 1 if any(goal.failed for goal in goals) else 0


def parse(words: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--frontend", action="store_true", help="branching programs in the frontend language")
    add("--agents", type=int, default=2, help="agents on each path")
    add("--turns", type=int, default=2, help="turns of each agent")
    add("--reasoning", type=int, default=1024, help="tokens of reasoning in a turn")
    add("--prompt-tokens", type=int, default=2048, help="least, of the shared part")
    add("--budget", type=int, default=256, help="--kv-budget")
    add("--interval", type=int, default=64, help="--kv-interval")
    add("--model-path", type=Path, help="default: a tiny random model")
    add("--stats", default="auto", help="query statistics of that model")
    add(
        "--base-url",
        help="measure this server, whose cache is flushed, instead of starting some; "
        "it needs --enable-metrics and no --reasoning-parser",
    )
    add("--output", type=Path, default=Path("results/agents.json"))
    add("server_arguments", nargs="*", help="for all servers, after --")
    return parser.parse_args(words)


if __name__ == "__main__":
    sys.exit(main())
