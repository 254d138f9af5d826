"""A model that anyone can download, with its own tokenizer and template, on the real server."""

from __future__ import annotations

from typing import Any

import openai
import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from bench.simulator.oracle import Oracle
from tests import judging
from tests.client import Ask, send_all, simulated
from tests.conftest import Running
from tests.judging import LEAST_ROUNDS, Limits
from tests.setups import BUDGET, INTERVAL

SMOLLM2 = pytest.mark.parametrize("server", ["smollm2-page1", "smollm2-page4"], indirect=True)
MODES = ("per-head", "per-layer-per-head", "union")
LIMITS = Limits(logprobs=1e-3, scores=1e-4, margins=1e-3)
LONG = BUDGET + (LEAST_ROUNDS + 1) * INTERVAL
QUESTION = "Why is the sky blue? Explain it to a child, in several paragraphs."
NEXT = "And why is it red in the evening?"


def chat(tokenizer: PreTrainedTokenizerBase, question: str) -> list[int]:
    messages = [{"role": "user", "content": question}]
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    assert isinstance(ids, list)
    return ids


@SMOLLM2
def test_equal_to_the_simulator(server: Running) -> None:
    """Greedy and sampled answers in all modes, in one batch."""
    tokenizer = AutoTokenizer.from_pretrained(server.model)
    oracle = Oracle(server.model, server.stats)
    asks = [
        Ask(chat(tokenizer, QUESTION), LONG, {"eviction_mode": mode}, temperature)
        for mode in MODES
        for temperature in (0.0, 1.0)
    ]
    answers = send_all(server, asks)
    judging.check(oracle, server, answers, LIMITS)
    # Without eviction the oracle disagrees: the comparison above can fail.
    answer = answers[-1]
    full = oracle.replay(answer.ask.prompt, answer.ids, simulated({"policy": "none"}))
    assert answer.error(full.logprobs) > 100 * LIMITS.logprobs


@SMOLLM2
def test_the_next_turn_hits_as_text(server: Running) -> None:
    """Its own template, its own tokenizer: the answer goes back as it was read."""
    client = openai.OpenAI(base_url=f"{server.server.url}/v1", api_key="none")
    messages = [{"role": "user", "content": QUESTION}]

    def ask(tokens: int) -> dict[str, Any]:
        answer = client.chat.completions.create(
            model="smollm2",
            messages=messages,  # type: ignore[arg-type]
            max_tokens=tokens,
            temperature=0,
            extra_body={"return_meta_info": True},
        ).choices[0]
        messages.append({"role": "assistant", "content": answer.message.content or ""})
        info: dict[str, Any] = answer.meta_info  # type: ignore[attr-defined]
        return info

    first = ask(LONG)
    messages.append({"role": "user", "content": NEXT})
    second = ask(1)
    assert first["kv_policy"]["rounds"] >= LEAST_ROUNDS
    assert second["kv_policy"]["history"] == "compressed"
    whole = first["prompt_tokens"] + first["completion_tokens"]
    assert second["cached_tokens"] >= whole - server.setup.page_size
