"""Agents with tools on four servers: what each way to keep their history costs.

K agents send token ids through `/generate`, K more send messages through the openai client, all at
once. They share a system prompt; each turn is long reasoning, then a tool call that a grammar
enforces, executed by a real tool, its result appended. The servers: stock SGLang; the policy with
`--kv-reuse prompt` (a generation that was evicted from is forgotten) and with
`--kv-reuse continuation` (the next request goes on from it); the policy without a radix cache.

Exit status 1 if the later requests of `continuation` prefill more than what is new, or if the
shared prompt does not hit as in stock SGLang. Times are printed, and judged, but do not fail.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import takewhile
from pathlib import Path

from bench.agent.arms import Workload
from bench.agent.calls import Agent, Call, ChatAgent, ExactAgent, tokenize
from bench.agent.main import main
from bench.agent.prompt import messages
from bench.agent.tools import CALL_SCHEMA
from bench.server import Endpoint

PATHS = (ExactAgent, ChatAgent)
REQUESTS = 2  # Of an agent in a turn: reasoning, tool call.


class ToolLoops(Workload):
    """All agents of one server, on both paths; a step is one request."""

    def __init__(
        self, endpoint: Endpoint, arguments: argparse.Namespace, on_step: Callable[[], object]
    ) -> None:
        super().__init__(endpoint, arguments, on_step)
        paths = [path for path in PATHS for _ in range(arguments.agents)]
        self._agents = [path(endpoint, number, self._system) for number, path in enumerate(paths)]

    @staticmethod
    def steps(arguments: argparse.Namespace) -> int:
        return int(arguments.turns * arguments.agents * len(PATHS) * REQUESTS)

    @staticmethod
    def turns(arguments: argparse.Namespace) -> int:
        return int(arguments.turns)

    def warm_up(self) -> None:
        openings = (messages(self._system, number) for number in (0, 1))
        prompts = (tokenize(self._endpoint, messages=opening) for opening in openings)
        same = takewhile(lambda pair: pair[0] == pair[1], zip(*prompts, strict=False))
        sampling = {"max_new_tokens": 1, "json_schema": json.dumps(CALL_SCHEMA)}
        self._endpoint.generate(input_ids=[token for token, _ in same], sampling_params=sampling)

    def take_turn(self) -> list[Call]:
        """All agents think, then all call a tool."""
        reasoning = self._arguments.reasoning
        return self._all(lambda agent: agent.reason(reasoning)) + self._all(Agent.call_tool)

    def _all(self, request: Callable[[Agent], Call]) -> list[Call]:
        """One request of every agent, at once."""

        def send(agent: Agent) -> Call:
            call = request(agent)
            self._on_step()
            return call

        with ThreadPoolExecutor(len(self._agents)) as pool:
            return list(pool.map(send, self._agents))


if __name__ == "__main__":
    sys.exit(main(ToolLoops, __doc__, Path("results/agents.json")))
