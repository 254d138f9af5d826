"""A branching agent in SGLang's frontend language.

In each turn the program generates reasoning, forks into two ways to go on, sketches both, selects
one and calls a tool.

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

import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import sglang as sgl

from bench.agent.answers import Answer, tokenize
from bench.agent.loops import REASONING, TOOL_CALL
from bench.agent.prompt import THINK_END, after_call, messages, rendered
from bench.agent.tools import CALL_SCHEMA, LONGEST_CALL, execute
from bench.server import Endpoint

FORK, BRANCH, SELECT = "fork", "branch", "select"
WAYS = ("careful", "quick")
SKETCH = 48
"""Tokens of each branch."""


def program(s: Any, record: Recorder, beginning: str, turns: int, reasoning: int) -> None:
    """The program: it thinks, tries two ways, chooses one, calls a tool, and so on."""
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
        s += after_call(execute(s[f"call {turn}"]))


class Recorder(sgl.RuntimeEndpoint):
    """A server as the backend of one agent.

    Attributes:
        turn: set by the program.
        sent: text of each request and its answer, in the order of the answers.
    """

    def __init__(self, url: str, agent: int) -> None:
        super().__init__(url)
        self.agent, self.turn = agent, 0
        self.sent: list[tuple[str, Answer]] = []

    def generate(self, s: Any, sampling_params: Any) -> tuple[str, dict[str, Any]]:
        """What `gen` sends."""
        kind = BRANCH if s.fork_start_text_pos is not None else REASONING
        kind = TOOL_CALL if sampling_params.json_schema else kind
        reply, info = super().generate(s, sampling_params)
        self._record(kind, s.text_, reply, info)
        return reply, info

    def commit_lazy_operations(self, s: Any) -> None:
        """Before a fork the frontend sends the common text, for the cache."""
        self._send(FORK, s, {"text": s.text_, "sampling_params": {"max_new_tokens": 0}})

    def _generate_http_request(self, s: Any, data: dict[str, Any]) -> Any:
        """What `select` sends: the common text, then that with every choice behind it."""
        return self._send(SELECT, s, data)

    def _send(self, kind: str, s: Any, data: dict[str, Any]) -> Any:
        answer = super()._generate_http_request(s, data)
        one = isinstance(answer, dict)
        texts, answers = ([data["text"]], [answer]) if one else (data["text"], answer)
        for text, part in zip(texts, answers, strict=True):
            self._record(kind, text, "", part["meta_info"])
        return answer

    def _record(self, kind: str, text: str, reply: str, info: dict[str, Any]) -> None:
        asked = {"path": "frontend", "agent": self.agent, "turn": self.turn, "kind": kind}
        self.sent.append((text, Answer.of(reply, info, **asked)))


def with_known(endpoint: Endpoint, sent: list[tuple[str, Answer]]) -> list[Answer]:
    """The record of one agent: known is what an earlier request has sent or got, as text."""
    found, texts = [], [""]
    for text, answer in sent:
        known = max(len(earlier) for earlier in texts if text.startswith(earlier))
        new = len(tokenize(endpoint, prompt=text[known:], add_special_tokens=False))
        found.append(replace(answer, known=answer.prompt - new if known else 0))
        texts.append(text + answer.text)
    return found


def run_programs(
    endpoint: Endpoint, system: str, count: int, turns: int, reasoning: int
) -> list[Answer]:
    """`count` agents at once, each a run of the program."""

    def run(number: int) -> list[tuple[str, Answer]]:
        record = Recorder(endpoint.url, number)
        beginning = rendered(messages(system, number))
        state = sgl.function(program).run(
            record, beginning, turns, reasoning, backend=record, temperature=0
        )
        if state.error():
            raise state.error()
        return record.sent

    with ThreadPoolExecutor(count) as pool:
        runs = list(pool.map(run, range(count)))
    return [answer for sent in runs for answer in with_known(endpoint, sent)]
