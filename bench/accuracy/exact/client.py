"""Requests whose answers can be judged, and what came back."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np

from bench.server import Endpoint

T = TypeVar("T")
S = TypeVar("S")


@dataclass(frozen=True)
class Ask:
    """One request.

    Attributes:
        prompt: token ids.
        tokens: how many to generate.
        temperature: 0 is greedy.
        mode, budget: its own, or the server's.
    """

    prompt: list[int]
    tokens: int
    temperature: float = 0.0
    mode: str | None = None
    budget: int | None = None


@dataclass(frozen=True)
class Answer:
    """What came back.

    Attributes:
        rid: the request's id, which names the files of its rounds.
        ids: output token ids.
        logprobs: theirs in nats, float64 [tokens].
        meta: `meta_info`.
    """

    ask: Ask
    rid: str
    ids: list[int]
    logprobs: np.ndarray
    meta: dict[str, Any]

    @property
    def rounds(self) -> int:
        """Rounds that the server says it held."""
        return int(self.meta.get("kv_policy", {}).get("rounds", 0))

    @property
    def tokens(self) -> list[int]:
        """Prompt and output."""
        return self.ask.prompt + self.ids


def send(server: Endpoint, ask: Ask) -> Answer:
    rid = uuid.uuid4().hex
    params: dict[str, Any] = {
        "max_new_tokens": ask.tokens,
        "temperature": ask.temperature,
        "ignore_eos": True,
    }
    own = {"eviction_mode": ask.mode, "budget": ask.budget}
    own = {name: value for name, value in own.items() if value is not None}
    if own:
        params["custom_params"] = {"kv_policy": own}
    body = server.generate(
        input_ids=ask.prompt, sampling_params=params, rid=rid, return_logprob=True
    )
    logprobs = [logprob for logprob, _, _ in body["meta_info"]["output_token_logprobs"]]
    return Answer(ask, rid, body["output_ids"], np.array(logprobs), body["meta_info"])


def send_all(server: Endpoint, asks: Sequence[Ask]) -> list[Answer]:
    """All at once, so that they share batches."""
    return at_once(lambda ask: send(server, ask), asks, len(asks))


def at_once(call: Callable[[T], S], items: Sequence[T], threads: int) -> list[S]:
    """What it gives for each item. If this is interrupted, it does not wait for what is running."""
    pool = ThreadPoolExecutor(threads)
    try:
        return list(pool.map(call, items))
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
