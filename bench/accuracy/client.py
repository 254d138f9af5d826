"""Requests whose answers can be judged, what came back, and the rounds that were held."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
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
        policy: settings of its own, by the names of the policy's JSON; the rest are the server's.
        temperature: 0 is greedy.
        extra: more sampling parameters.
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
    """What came back.

    Attributes:
        rid: the request's id, which names the files of its rounds.
        ids: output token ids.
        logprobs: theirs in nats, float64 [tokens].
        text: the output's.
        meta: `meta_info`.
    """

    ask: Ask
    rid: str
    ids: list[int]
    logprobs: np.ndarray
    text: str
    meta: dict[str, Any]

    @property
    def rounds(self) -> int:
        """Rounds that the server says it held."""
        return int(self.meta.get("kv_policy", {}).get("rounds", 0))

    @property
    def tokens(self) -> list[int]:
        """Prompt and output."""
        return self.ask.prompt + self.ids

    def error(self, expected: np.ndarray) -> float:
        """Largest difference from `expected`, which may be of the first tokens alone."""
        errors = np.abs(expected - self.logprobs[: len(expected)])
        return float(errors[~np.isnan(errors)].max())


@dataclass(frozen=True)
class Recorded:
    """A request's rounds, in order.

    Attributes:
        kept: logical positions, int64 [layers or 1, kv_heads or 1, kept] each.
        lengths: logical lengths at which they were held.
    """

    kept: list[np.ndarray]
    lengths: list[int]

    @classmethod
    def read(cls, trace: Path, rid: str) -> Recorded:
        """Those that a server wrote into the folder `trace`."""
        found = cls([], [])
        for path in sorted(trace.glob(f"{rid}-*.npz")):
            with np.load(path) as done:
                found.kept.append(done["kept"])
                found.lengths.append(int(done["logical"]))
        return found


def send(server: Endpoint, ask: Ask) -> Answer:
    rid = uuid.uuid4().hex
    params: dict[str, Any] = {"max_new_tokens": ask.tokens, "temperature": ask.temperature}
    params |= {"ignore_eos": True, **ask.extra}
    if ask.policy:
        params["custom_params"] = {**params.get("custom_params", {}), "kv_policy": ask.policy}
    body = server.generate(
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
