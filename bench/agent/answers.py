"""Answers of a server, and what each of them cost."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import openai

from bench.server import Endpoint


@dataclass(frozen=True)
class Answer:
    """One answer, as a server with `--enable-metrics` reports it; counts are tokens.

    Attributes:
        text: what was generated.
        prompt: the whole prompt.
        cached: of these, found in the cache.
        generated: the answer.
        first_token_s: seconds from the request's arrival to its first token, by the server's clock.
        rounds, evicted: of the policy, while it was generated.
        slots: KV slots that prompt and answer hold at the end.
        compressed: whether the prompt was found behind compressed history.
        path: how the history was sent.
        agent, turn: who asked, and in which of its turns, from 1.
        kind: what was asked for.
        known: of the prompt, what the agent has sent or got before.
    """

    text: str
    prompt: int
    cached: int
    generated: int
    first_token_s: float
    rounds: int
    evicted: int
    slots: int
    compressed: bool
    path: str = ""
    agent: int = 0
    turn: int = 0
    kind: str = ""
    known: int = 0

    @classmethod
    def of(cls, text: str, info: dict[str, Any], **asked: Any) -> Answer:
        """Of its `meta_info`, and of who asked for it."""
        policy = info.get("kv_policy", {})
        prompt, generated = info["prompt_tokens"], info["completion_tokens"]
        return cls(
            text,
            prompt,
            info["cached_tokens"],
            generated,
            info["prefill_finished_time"] - info["request_received_ts"],
            policy.get("rounds", 0),
            policy.get("evicted_tokens", 0),
            policy.get("resident_slots", prompt + generated),
            policy.get("history") == "compressed",
            **asked,
        )

    @property
    def prefilled(self) -> int:
        return self.prompt - self.cached

    @property
    def new(self) -> int:
        """Of the prompt, what the agent has neither sent nor got before."""
        return self.prompt - self.known


def total(answers: Iterable[Answer], count: str) -> int:
    """The sum of one count, named as in `Answer`."""
    return sum(getattr(answer, count) for answer in answers)


def chat_client(endpoint: Endpoint) -> openai.OpenAI:
    url = f"{endpoint.url}/v1"
    return openai.OpenAI(base_url=url, api_key="none", timeout=1800, max_retries=0)


def chat(
    client: openai.OpenAI, messages: list[dict[str, str]], **options: Any
) -> tuple[str, dict[str, Any]]:
    """A greedy answer through chat completions: its text and its `meta_info`."""
    history: Any = messages
    body = {"temperature": 0, "return_meta_info": True, **options}
    answer = client.chat.completions.create(model="default", messages=history, extra_body=body)
    choice: Any = answer.choices[0]
    return choice.message.content or "", choice.meta_info


def tokenize(endpoint: Endpoint, **what: Any) -> list[int]:
    """Token ids of a `prompt`, or of `messages` through the server's chat template."""
    ids: list[int] = endpoint.post("/tokenize", **what).json()["tokens"]
    return ids
