"""The command line that the benches of agents share."""

from __future__ import annotations

import argparse
from pathlib import Path

from bench.agent.arms import Workload, measure
from bench.agent.goals import judge
from bench.agent.report import report


def main(workload: type[Workload], description: str, output: Path, note: str = "") -> int:
    """Measure, judge, report; returns the exit status.

    Args:
        workload: what each server is to do.
        description: for `--help`.
        output: default of `--output`.
        note: printed below the report.
    """
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_arguments(parser)
    parser.add_argument("--output", type=Path, default=output)
    arguments = parser.parse_args()
    outcomes = measure(workload, arguments)
    goals = judge(outcomes, arguments.reasoning)
    report(outcomes, goals, vars(arguments), arguments.output)
    print(f"\n{note}")
    return 1 if any(goal.failed for goal in goals) else 0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What every workload lets its user choose about the servers."""
    parser.add_argument("--agents", type=int, default=2, help="agents on each path")
    parser.add_argument("--turns", type=int, default=2, help="turns of each agent")
    parser.add_argument("--reasoning", type=int, default=1024, help="tokens of reasoning in a turn")
    parser.add_argument("--prompt-tokens", type=int, default=2048, help="least, of the shared part")
    parser.add_argument("--budget", type=int, default=256, help="--kv-budget")
    parser.add_argument("--interval", type=int, default=64, help="--kv-interval")
    parser.add_argument("--model-path", type=Path, help="default: a tiny random model")
    parser.add_argument("--stats", default="auto", help="query statistics of that model")
    parser.add_argument(
        "--base-url",
        help="measure this server, whose cache is flushed, instead of starting some; "
        "it needs --enable-cache-report and no --reasoning-parser",
    )
    parser.add_argument("server_arguments", nargs="*", help="for all servers, after --")
