"""A branching agent in SGLang's frontend language, on the servers that `bench.agents` compares.

In each turn the program generates reasoning, forks into two ways to go on, sketches both, selects
one and calls a tool. The report is that of `bench.agents`, and so is the verdict.

The frontend holds text and sends all of it with every request, so what is reused is decided by the
tokens that the server makes of that text. They are those of the turn before only if generated text
is tokenized as it was generated: always with the byte tokens of the tiny model; with a real
tokenizer not where it merges over the end of an answer, and not where special tokens were
generated, which text leaves out. From the first other token on, stock SGLang prefills again; a
compressed generation is reused whole or not at all, so it is prefilled from its first token.
`fork` and `gen` reuse it. `select` does not: it asks for log-probabilities of the prompt, which
only exact history has, so it prefills what was compressed.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import sglang as sgl

from bench.agent.arms import Workload
from bench.agent.calls import LONGEST_CALL, Call
from bench.agent.frontend import RecordingEndpoint, Sent, calls
from bench.agent.main import main
from bench.agent.prompt import THINK_END, after_call, opening, task
from bench.agent.tools import CALL_SCHEMA, Toolbox

WAYS = ("careful", "quick")
SKETCH = 48  # Tokens of each branch.


def branching_agent(
    s: Any,
    record: RecordingEndpoint,
    beginning: str,
    turns: int,
    reasoning: int,
    on_turn: Callable[[], object],
) -> None:
    """The program: it thinks, tries two ways, chooses one, calls a tool, and so on."""
    toolbox = Toolbox()
    s += beginning
    for turn in range(1, turns + 1):
        record.turn = turn
        s += sgl.gen(f"thought {turn}", min_tokens=reasoning, max_tokens=reasoning)
        s += "\nThere are two ways to go on.\n"
        s.sync()  # Else it is chance whether the frontend caches the common text before it forks.
        forks = s.fork(len(WAYS))
        for fork, way in zip(forks, WAYS, strict=True):
            fork += f"The {way} way: "
            fork += sgl.gen("sketch", min_tokens=SKETCH, max_tokens=SKETCH)
        for fork, way in zip(forks, WAYS, strict=True):
            s += f"The {way} way: {fork['sketch']}\n"
        s += "I take the way that is "
        s += sgl.select(f"way {turn}", choices=list(WAYS))
        s += THINK_END
        s += sgl.gen(f"call {turn}", max_tokens=LONGEST_CALL, json_schema=json.dumps(CALL_SCHEMA))
        s += after_call(toolbox.execute(s[f"call {turn}"]))
        on_turn()


PROGRAM = sgl.function(branching_agent)


class Programs(Workload):
    """All agents of one server, each a run of the program; a step is a turn of one agent."""

    @staticmethod
    def steps(arguments: argparse.Namespace) -> int:
        return int(arguments.turns * arguments.agents)

    @staticmethod
    def turns(arguments: argparse.Namespace) -> int:
        return 1  # A program runs from beginning to end.

    def warm_up(self) -> None:
        shared, _, _ = opening(self._system, 0).partition(task(0))
        sampling = {"max_new_tokens": 1, "json_schema": json.dumps(CALL_SCHEMA)}
        self._endpoint.generate(text=shared, sampling_params=sampling)

    def take_turn(self) -> list[Call]:
        """All programs at once."""
        with ThreadPoolExecutor(self._arguments.agents) as pool:
            runs = list(pool.map(self._run, range(self._arguments.agents)))
        return [
            call for number, sent in enumerate(runs) for call in calls(self._endpoint, number, sent)
        ]

    def _run(self, number: int) -> list[Sent]:
        record = RecordingEndpoint(self._endpoint.url)
        state = PROGRAM.run(
            record,
            opening(self._system, number),
            self._arguments.turns,
            self._arguments.reasoning,
            self._on_step,
            backend=record,
            temperature=0,
        )
        if state.error():
            raise state.error()
        return record.sent


if __name__ == "__main__":
    note = __doc__.partition("\n\n")[2]
    sys.exit(main(Programs, __doc__, Path("results/frontend_program.json"), note))
