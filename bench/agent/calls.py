"""One agent, by either of two ways to send its history, and what each of its requests cost."""

from __future__ import annotations

import json
import time
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import openai
import requests

from bench.agent.prompt import THINK_END, after_call, messages
from bench.agent.tools import CALL_SCHEMA, Toolbox
from bench.server import Endpoint

REASONING, TOOL_CALL = "reasoning", "tool call"
LONGEST_CALL = 160  # Tokens; bounded arguments end before that in any tokenizer.


@dataclass(frozen=True)
class Call:
    """One request of an agent: counts in tokens, times in seconds.

    Attributes:
        path: how the history was sent.
        agent, turn: which agent's, and in which of its turns, from 1.
        kind: what was asked for.
        prompt: the whole prompt.
        cached: of these, found in the cache.
        generated: the answer.
        known: of the prompt, what the request before has sent and got.
        first_token_s: until the first token arrived.
        total_s: until the last.
    """

    path: str
    agent: int
    turn: int
    kind: str
    prompt: int
    cached: int
    generated: int
    known: int
    first_token_s: float
    total_s: float

    @property
    def prefilled(self) -> int:
        return self.prompt - self.cached

    @property
    def new(self) -> int:
        """What no request before has sent or got."""
        return self.prompt - self.known


@dataclass(frozen=True)
class Answer:
    """One answer; the last five are as in `Call`. `ids` are known on the token-exact path only."""

    text: str
    ids: list[int]
    prompt: int
    cached: int
    generated: int
    first_token_s: float
    total_s: float


class Agent(ABC):
    """An agent in a tool loop: it thinks, calls a tool, sees the result, thinks again.

    Args:
        endpoint: the server.
        number: of all agents of the server.
        system: the system prompt.
    """

    path: str

    def __init__(self, endpoint: Endpoint, number: int, system: str) -> None:
        self._endpoint = endpoint
        self._number = number
        self._messages: list[dict[str, str]] = messages(system, number)
        self._toolbox = Toolbox()
        self._turn = 0
        self._known = 0

    def reason(self, tokens: int) -> Call:
        """Think for exactly `tokens` tokens."""
        self._turn += 1
        return self._record(REASONING, self._reason(tokens))

    def call_tool(self) -> Call:
        """One tool call, which the grammar enforces; its result becomes part of the history."""
        answer = self._call_tool()
        self._append(answer, self._toolbox.execute(answer.text))
        return self._record(TOOL_CALL, answer)

    def _record(self, kind: str, answer: Answer) -> Call:
        # A template that leaves reasoning out can make the prompt shorter than what is known.
        known, self._known = min(self._known, answer.prompt), answer.prompt + answer.generated
        return Call(
            self.path,
            self._number,
            self._turn,
            kind,
            answer.prompt,
            answer.cached,
            answer.generated,
            known,
            answer.first_token_s,
            answer.total_s,
        )

    @abstractmethod
    def _reason(self, tokens: int) -> Answer: ...

    @abstractmethod
    def _call_tool(self) -> Answer: ...

    @abstractmethod
    def _append(self, call: Answer, result: str) -> None: ...


class ExactAgent(Agent):
    """Sends token ids through `/generate`: what was generated comes back as it was generated."""

    path = "exact"

    def __init__(self, endpoint: Endpoint, number: int, system: str) -> None:
        super().__init__(endpoint, number, system)
        self._ids = tokenize(endpoint, messages=self._messages)

    def _reason(self, tokens: int) -> Answer:
        sampling = {"min_new_tokens": tokens, "max_new_tokens": tokens}
        answer = stream_generate(self._endpoint, self._ids, sampling)
        self._ids = self._ids + answer.ids + self._tokenize(THINK_END)
        return answer

    def _call_tool(self) -> Answer:
        sampling = {"max_new_tokens": LONGEST_CALL, "json_schema": json.dumps(CALL_SCHEMA)}
        return stream_generate(self._endpoint, self._ids, sampling)

    def _append(self, call: Answer, result: str) -> None:
        self._ids = self._ids + call.ids + self._tokenize(after_call(result))

    def _tokenize(self, text: str) -> list[int]:
        return tokenize(self._endpoint, prompt=text, add_special_tokens=False)


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
        self._client = openai.OpenAI(
            base_url=f"{endpoint.url}/v1", api_key="none", timeout=1800, max_retries=0
        )
        self._thought = ""

    def _reason(self, tokens: int) -> Answer:
        answer = self._stream(self._messages, max_tokens=tokens, extra_body={"min_tokens": tokens})
        self._thought = answer.text
        return answer

    def _call_tool(self) -> Answer:
        begun = {"role": "assistant", "content": self._thought + THINK_END}
        schema = {"name": "tool_call", "schema": CALL_SCHEMA}
        return self._stream(
            [*self._messages, begun],
            max_tokens=LONGEST_CALL,
            response_format={"type": "json_schema", "json_schema": schema},
            extra_body={"continue_final_message": True},
        )

    def _append(self, call: Answer, result: str) -> None:
        whole = {"role": "assistant", "reasoning_content": self._thought, "content": call.text}
        self._messages = [*self._messages, whole, {"role": "tool", "content": result}]

    def _stream(self, history: list[dict[str, str]], **options: Any) -> Answer:
        request: dict[str, Any] = {"messages": history, "temperature": 0, **options}
        began = time.perf_counter()
        first, text, usage = 0.0, "", None
        for chunk in self._client.chat.completions.create(
            model="default", stream=True, stream_options={"include_usage": True}, **request
        ):
            usage = chunk.usage or usage
            delta = chunk.choices[0].delta.content if chunk.choices else None
            if delta:
                first = first or time.perf_counter()
                text += delta
        ended = time.perf_counter()
        assert usage is not None
        details = usage.prompt_tokens_details  # Absent when no token was cached.
        cached = (details.cached_tokens or 0) if details else 0
        counts = (usage.prompt_tokens, cached, usage.completion_tokens)
        return Answer(text, [], *counts, first - began, ended - began)


def tokenize(endpoint: Endpoint, **what: Any) -> list[int]:
    """Token ids of a `prompt`, or of `messages` through the server's chat template."""
    ids: list[int] = endpoint.post("/tokenize", **what).json()["tokens"]
    return ids


def stream_generate(endpoint: Endpoint, ids: list[int], sampling: dict[str, Any]) -> Answer:
    """Greedy `/generate`; the stop token is not among the answer's ids."""
    body: Any = {
        "input_ids": ids,
        "sampling_params": {"temperature": 0, **sampling},
        "stream": True,
    }
    url = f"{endpoint.url}/generate"
    began = time.perf_counter()
    first, last = 0.0, b""
    with requests.post(url, json=body, stream=True, timeout=1800) as response:
        for line in response.iter_lines():
            if line.startswith(b"data: {"):
                first = first or time.perf_counter()
                last = line
    ended = time.perf_counter()
    answer = json.loads(last.removeprefix(b"data: "))
    info, generated = answer["meta_info"], answer["output_ids"]
    if info["finish_reason"].get("matched") == generated[-1]:
        generated.pop()
    counts = (info["prompt_tokens"], info["cached_tokens"], info["completion_tokens"])
    return Answer(answer["text"], generated, *counts, first - began, ended - began)
