"""Agents in a tool loop, by either of two ways to send their history."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from bench.agent.answers import Answer, chat, chat_client, tokenize
from bench.agent.prompt import THINK_END, after_call, messages
from bench.agent.tools import CALL_SCHEMA, LONGEST_CALL, execute
from bench.server import Endpoint

REASONING, TOOL_CALL = "reasoning", "tool call"
EXACT = "exact"


class Agent(ABC):
    """One agent: it thinks, calls a tool, sees the result, thinks again.

    Args:
        endpoint: the server.
        number: of all agents of the server.
        system: the system prompt.
    """

    path: str

    def __init__(self, endpoint: Endpoint, number: int, system: str) -> None:
        self.endpoint, self.number = endpoint, number
        self.messages = messages(system, number)
        self.turn = self.known = 0

    @abstractmethod
    def think(self, tokens: int) -> Answer:
        """For exactly `tokens` tokens."""

    @abstractmethod
    def call_tool(self) -> Answer:
        """One tool call, which the grammar enforces; its result becomes part of the history."""

    def record(self, kind: str, text: str, info: dict[str, Any]) -> Answer:
        self.turn += kind == REASONING
        # A template that leaves reasoning out can make the prompt shorter than what is known.
        known = min(self.known, info["prompt_tokens"])
        self.known = info["prompt_tokens"] + info["completion_tokens"]
        asked = {"path": self.path, "agent": self.number, "turn": self.turn, "kind": kind}
        return Answer.of(text, info, known=known, **asked)


class ExactAgent(Agent):
    """Sends token ids through `/generate`: what was generated comes back as it was generated."""

    path = EXACT

    def __init__(self, endpoint: Endpoint, number: int, system: str) -> None:
        super().__init__(endpoint, number, system)
        self._ids = tokenize(endpoint, messages=self.messages)

    def think(self, tokens: int) -> Answer:
        text, info = self._generate(min_new_tokens=tokens, max_new_tokens=tokens)
        self._append(THINK_END)
        return self.record(REASONING, text, info)

    def call_tool(self) -> Answer:
        schema = json.dumps(CALL_SCHEMA)
        text, info = self._generate(max_new_tokens=LONGEST_CALL, json_schema=schema)
        self._append(after_call(execute(text)))
        return self.record(TOOL_CALL, text, info)

    def _generate(self, **sampling: Any) -> tuple[str, dict[str, Any]]:
        reply = self.endpoint.generate(
            input_ids=self._ids, sampling_params={"temperature": 0, **sampling}
        )
        info, generated = reply["meta_info"], reply["output_ids"]
        if info["finish_reason"].get("matched") == generated[-1]:
            generated.pop()  # The stop token.
        self._ids = self._ids + generated
        return reply["text"], info

    def _append(self, text: str) -> None:
        self._ids = self._ids + tokenize(self.endpoint, prompt=text, add_special_tokens=False)


class ChatAgent(Agent):
    """Sends messages through the openai client, and text comes back.

    Reasoning is an answer of its own length; the tool call continues that answer behind the end of
    thinking (`continue_final_message`). In the history both are one assistant message: reasoning as
    `reasoning_content`, the call as its content, as it was written. (`tool_calls` would be written
    anew by the template: other blanks, other tokens.)
    """

    path = "chat"

    def __init__(self, endpoint: Endpoint, number: int, system: str) -> None:
        super().__init__(endpoint, number, system)
        self._client = chat_client(endpoint)
        self._thought = ""

    def think(self, tokens: int) -> Answer:
        length = {"min_tokens": tokens, "max_tokens": tokens}
        self._thought, info = chat(self._client, self.messages, **length)
        return self.record(REASONING, self._thought, info)

    def call_tool(self) -> Answer:
        schema = {"name": "tool_call", "schema": CALL_SCHEMA}
        text, info = chat(
            self._client,
            [*self.messages, {"role": "assistant", "content": self._thought + THINK_END}],
            max_tokens=LONGEST_CALL,
            response_format={"type": "json_schema", "json_schema": schema},
            continue_final_message=True,
        )
        whole = {"role": "assistant", "reasoning_content": self._thought, "content": text}
        self.messages = [*self.messages, whole, {"role": "tool", "content": execute(text)}]
        return self.record(TOOL_CALL, text, info)


def tool_loops(endpoint: Endpoint, system: str, count: int) -> list[Agent]:
    """Agents on both paths, `count` on each."""
    paths = [path for path in (ExactAgent, ChatAgent) for _ in range(count)]
    return [path(endpoint, number, system) for number, path in enumerate(paths)]


def take_turn(agents: list[Agent], reasoning: int) -> list[Answer]:
    """All think at once, for `reasoning` tokens, then all call a tool."""
    with ThreadPoolExecutor(len(agents)) as pool:
        thoughts = list(pool.map(lambda agent: agent.think(reasoning), agents))
        return [*thoughts, *pool.map(lambda agent: agent.call_tool(), agents)]
