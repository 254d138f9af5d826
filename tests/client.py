"""Requests with their own policy, and what the tests compare of the answers."""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from bench.accuracy.exact.judge import Recorded
from bench.simulator.policies import Policy
from bench.simulator.registry import make_policy
from bench.simulator.request import stagger_slots
from tests.conftest import Running
from tests.setups import BUDGET, INTERVAL


@dataclass(frozen=True)
class Ask:
    """One request: prompt token ids, output length and settings of its own.

    Attributes:
        extra: sampling parameters.
        body: what stands beside them.
    """

    prompt: list[int]
    tokens: int
    policy: dict[str, Any] = field(default_factory=dict)
    temperature: float = 0.0
    extra: dict[str, Any] = field(default_factory=dict)
    body: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Answer:
    ask: Ask
    rid: str
    ids: list[int]
    logprobs: np.ndarray
    text: str
    meta: dict[str, Any]

    def error(self, expected: np.ndarray) -> float:
        """Largest difference from `expected`, which may be of the first tokens alone."""
        errors = np.abs(expected - self.logprobs[: len(expected)])
        return float(errors[~np.isnan(errors)].max())


def tokens_of(text: str) -> list[int]:
    """The tiny models' tokenizer has one token per byte."""
    return list(text.encode())


def send(running: Running, ask: Ask) -> Answer:
    rid = uuid.uuid4().hex
    params = {
        "max_new_tokens": ask.tokens,
        "temperature": ask.temperature,
        "ignore_eos": True,
        **ask.extra,
    }
    if ask.policy:
        params["custom_params"] = {**params.get("custom_params", {}), "kv_policy": ask.policy}
    body = running.server.generate(
        input_ids=ask.prompt, sampling_params=params, rid=rid, return_logprob=True, **ask.body
    )
    ids, meta = body["output_ids"], body["meta_info"]
    return Answer(ask, rid, ids, known_logprobs(ids, meta), body["text"], meta)


def known_logprobs(ids: list[int], meta: dict[str, Any]) -> np.ndarray:
    """The answer's log-probabilities; NaN for the one that SGLang may lose.

    It counts the first as sent where a request is retracted before its first token is known.
    """
    pairs = meta["output_token_logprobs"]
    lost = len(ids) - len(pairs)
    assert 0 <= lost <= min(1, meta["num_retractions"])
    assert [token for _, token, _ in pairs] == ids[lost:]
    return np.array([np.nan] * lost + [logprob for logprob, _, _ in pairs])


def send_all(running: Running, asks: Sequence[Ask]) -> list[Answer]:
    """All at once, so that they share batches."""
    with ThreadPoolExecutor(len(asks)) as pool:
        return list(pool.map(lambda ask: send(running, ask), asks))


def simulated(own: dict[str, Any]) -> Policy:
    """The simulator's policy for a request with settings of its `own`."""
    settings = {"policy": "triattention", "budget": BUDGET, "interval": INTERVAL, **own}
    settings.pop("reuse", None)
    name = settings.pop("policy")
    if name == "none":
        return make_policy("none")
    if name == "triattention":
        settings["mode"] = settings.pop("eviction_mode", "per-head")
    return make_policy(name, **settings)


def stagger(running: Running, prompt: list[int], own: dict[str, Any] | None = None) -> int:
    """Slots by which the first round of a request precedes a full region."""
    return stagger_slots(simulated(own or {}), prompt, running.setup.page_size)


def recorded_rounds(folder: Path, rid: str) -> list[np.ndarray]:
    """Kept logical positions of each round of a request, as the server chose them."""
    return Recorded.read(folder, rid).kept
