"""Other ways into the server: samples, batches, response APIs, a pause. All over evicted tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import openai
import pytest

from bench.accuracy.client import Answer, Ask, known_logprobs
from tests.client import send, tokens_of
from tests.conftest import Running
from tests.setups import BUDGET, INTERVAL
from tests.steps import decode_steps
from tests.test_conversations import Talk, exact, history
from tests.test_serving import QUESTION, chat_tokens, wait_for_rounds, wait_idle, wait_until

OVERLAP = pytest.mark.parametrize("server", ["page1-overlap", "page4-overlap"], indirect=True)
ONE = pytest.mark.parametrize("server", ["page1-overlap"], indirect=True)
LONG = 2 * (BUDGET + INTERVAL)


def read(ask: Ask, body: dict[str, Any]) -> Answer:
    """One of the answers to a request for several."""
    ids, meta = body["output_ids"], body["meta_info"]
    return Answer(ask, meta["id"], ids, known_logprobs(ids, meta), body["text"], meta)


@OVERLAP
def test_samples_over_compressed_history(server: Running) -> None:
    """Each goes on from it by itself."""
    talk = Talk(server, "samples")
    talk.turn("Begin.")
    prompt = [*talk.tokens, *tokens_of(" Four of you.")]
    params = {"n": 4, "max_new_tokens": LONG, "temperature": 1, "ignore_eos": True}
    bodies = server.server.generate(input_ids=prompt, sampling_params=params, return_logprob=True)
    assert len({tuple(body["output_ids"]) for body in bodies}) == 4
    for body in bodies:
        answer = read(Ask(prompt, LONG, temperature=1.0), body)
        assert history(answer) == "compressed"
        # They share what the first of them has prefilled, and what the turn before has left.
        answer.meta["cached_tokens"] = min(answer.meta["cached_tokens"], len(talk.tokens))
        sample = Talk(server, "samples")
        sample.oracle = talk.oracle.fork()
        exact(sample.judge(answer), answer)
    wait_idle(server)


def responses(server: Running, messages: Sequence[dict[str, str]]) -> str:
    client = openai.OpenAI(base_url=f"{server.server.url}/v1", api_key="none")
    answer = client.responses.create(
        model="tiny", input=list(messages), max_output_tokens=LONG + 2, temperature=0
    )
    return answer.output_text


def messages(server: Running, messages: Sequence[dict[str, str]]) -> str:
    answer = server.server.post(
        "/v1/messages", model="tiny", messages=list(messages), max_tokens=LONG, temperature=0
    )
    assert answer.ok, answer.text
    (block,) = answer.json()["content"]
    return block["text"]


@OVERLAP
@pytest.mark.parametrize("endpoint", [responses, messages])
def test_response_apis(
    server: Running, endpoint: Callable[[Running, Sequence[dict[str, str]]], str]
) -> None:
    """They evict, say what `/generate` says, and go on from compressed history."""
    said = [QUESTION | {"content": f"To {endpoint.__name__}."}]
    for turn in range(2):
        before = server.server.kv_policy()
        text = endpoint(server, said)
        after = server.server.kv_policy()
        assert after["rounds"] >= before["rounds"] + 3
        assert after["alias_hits"] == before["alias_hits"] + turn
        same = send(server, Ask(chat_tokens(server, said), LONG, extra={"ignore_eos": False}))
        assert same.text == text
        assert history(same) == ("compressed" if turn else "exact")
        # The template begins an answer with the mark of thinking.
        said += [{"role": "assistant", "content": f"<think>\n{text}"}, QUESTION]


@OVERLAP
def test_a_batch_with_a_refused_item(server: Running) -> None:
    """All of it is answered with the refusal; nothing of it stays behind."""
    batch = [tokens_of("First of all."), [65, 264, 66], tokens_of("And the last.")]
    params = {"max_new_tokens": 10 * LONG, "ignore_eos": True}
    response = server.server.post("/generate", input_ids=batch, sampling_params=params)
    assert response.status_code == 400
    assert "token 264 at position 1" in response.text
    wait_idle(server)
    Talk(server, "after a refusal").turn("Begin.")


@OVERLAP
@pytest.mark.parametrize("updates", [False, True])
def test_retracted_by_a_pause(server: Running, updates: bool) -> None:
    """Weights may change meanwhile: then nothing goes on from before, and all is right."""
    talk = Talk(server, f"paused {updates}")
    talk.turn("Begin.")
    others = [Talk(server, f"paused {updates} {number}") for number in range(3)]
    asks = [other.ask("Go on and on.", 4 * LONG) for other in others]
    with ThreadPoolExecutor(len(asks)) as pool:
        log, rounds = server.server.log, server.server.kv_policy()["rounds"]
        begin = log.stat().st_size
        answers = pool.map(lambda request: send(server, request), asks)
        wait_for_rounds(server, rounds + 6)
        wait_until(lambda: any(running == len(asks) for running, _ in decode_steps(log, begin)))
        with paused(server, "retract"):
            if updates:
                update_weights(server, flush_cache=False)
        for other, answer in zip(others, answers, strict=True):
            assert answer.meta["num_retractions"] == 1
            exact(other.judge(answer), answer)
    wait_idle(server)
    following = talk.turn(" Next.")
    assert history(following) == ("exact" if updates else "compressed")


@ONE
def test_aborted_by_a_pause(server: Running) -> None:
    """Nothing waits then, and the cache can be flushed with the weights' change."""
    talk = Talk(server, "before the abort")
    talk.turn("Begin.")
    with ThreadPoolExecutor(1) as pool:
        rounds = server.server.kv_policy()["rounds"]
        aborted = pool.submit(server.server.post, "/generate", **endless("Go on and on."))
        wait_for_rounds(server, rounds + 2)
        with paused(server, "abort"):
            update_weights(server, flush_cache=True)
        assert aborted.result().json()["meta_info"]["finish_reason"]["type"] == "abort"
    assert not wait_idle(server)["tree"]
    following = talk.turn(" Next.")
    assert history(following) == "exact"


def endless(text: str) -> dict[str, Any]:
    return {"text": text, "sampling_params": {"max_new_tokens": 20000, "ignore_eos": True}}


@contextmanager
def paused(server: Running, mode: str) -> Iterator[None]:
    assert server.server.post("/pause_generation", mode=mode).ok
    try:
        yield
    finally:
        assert server.server.post("/continue_generation").ok


def update_weights(server: Running, flush_cache: bool) -> None:
    response = server.server.post(
        "/update_weights_from_disk", model_path=str(server.model), flush_cache=flush_cache
    )
    assert response.json()["success"], response.text
    assert server.server.kv_policy()["live_spans"] == 0
