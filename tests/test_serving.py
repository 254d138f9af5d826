"""What SGLang can do, it still does while tokens are evicted; what a user can see, is there."""

from __future__ import annotations

import json
import re
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import openai
import pytest
import requests
from transformers import AutoTokenizer

from tests.client import Ask, send, send_all, stagger, tokens_of
from tests.conftest import Running
from tests.probing import ask
from tests.setups import BUDGET, INTERVAL, THINKING

OVERLAP = pytest.mark.parametrize("server", ["page1-overlap", "page4-overlap"], indirect=True)
ONE = pytest.mark.parametrize("server", ["page1-overlap"], indirect=True)
LONG = 3 * (BUDGET + INTERVAL)
PROMPT = "Once upon a time there was a cache that forgot what it no longer needed."


def ceil_to(length: int, page_size: int) -> int:
    return -(-length // page_size) * page_size


def wait_idle(server: Running) -> dict[str, Any]:
    """The probe's report once nothing runs: every slot is free or in the tree."""
    deadline = time.monotonic() + 60
    while True:
        report = ask(server.probe)
        if report["free"] + len(report["tree"]) == report["size"]:
            return report
        assert time.monotonic() < deadline, report["free"]
        time.sleep(0.2)


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def wait_for_rounds(server: Running, rounds: int) -> None:
    """Until so many were held since the server's start."""
    wait_until(lambda: bool(server.server.kv_policy()["rounds"] >= rounds))


def generate(server: Running, text: str = PROMPT, tokens: int = LONG, **params: Any) -> Any:
    sampling = {"max_new_tokens": tokens, "temperature": 0, "ignore_eos": True, **params}
    return server.server.generate(text=text, sampling_params=sampling)


@OVERLAP
@pytest.mark.parametrize("policy", ["triattention", "streaming"])
def test_peak_slots(server: Running, policy: str) -> None:
    """Measured in the allocator: prompt + budget + interval, in whole pages, and no more."""
    page = server.setup.page_size
    budget, interval = 37, 22
    settings = {"policy": policy, "budget": budget, "interval": interval}
    for count in (1, 6):
        server.server.flush_cache()
        ask(server.probe)
        prompts = [tokens_of(f"{index} {PROMPT}") for index in range(count)]
        answers = send_all(server, [Ask(prompt, 200, settings) for prompt in prompts])
        generated = ceil_to(budget, page) + ceil_to(interval, page) + page - 1
        bound = sum(len(prompt) + generated for prompt in prompts)
        peak = ask(server.probe)["peak_used"]
        assert peak <= bound
        assert count > 1 or peak > len(prompts[0]) + budget
        assert all(answer.meta["kv_policy"]["rounds"] >= 5 for answer in answers)


@OVERLAP
def test_tree_slots_never_change(server: Running) -> None:
    """120 mixed requests: what the radix tree owns stays byte for byte what it was."""
    server.server.flush_cache()
    policies: list[dict[str, Any]] = [
        {},
        {"policy": "streaming", "budget": 20, "interval": 16},
        {"eviction_mode": "union", "budget": 16, "interval": 16},
        {"policy": "none"},
    ]

    def batch(first: int) -> list[Ask]:
        shared = [tokens_of(f"System prompt {index}. " + PROMPT) for index in range(4)]
        return [
            Ask(shared[n % 4] + tokens_of(f"{n:4}"), 4 + (n * 7) % 60, policies[n % 4 - n % 3])
            for n in range(first, first + 20)
        ]

    send_all(server, batch(0) + batch(20))
    before = wait_idle(server)["tree"]
    for first in range(40, 160, 20):
        send_all(server, batch(first))
    after = wait_idle(server)["tree"]
    assert len(before) > 400
    assert {path: after.get(path) for path in before} == before


@OVERLAP
def test_what_enters_the_tree(server: Running) -> None:
    """Without reuse, an evicted generation leaves its prompt behind; any other, all of itself."""
    page = server.setup.page_size
    for tokens, evicted in ((20, False), (LONG, True)):
        server.server.flush_cache()
        prompt = tokens_of(f"{tokens} {PROMPT}")
        first = send(server, Ask(prompt, tokens, {"reuse": "prompt"}))
        assert (first.meta["kv_policy"]["rounds"] > 0) == evicted
        again = send(server, Ask(prompt + first.ids + tokens_of("next"), 4))
        if evicted:
            wholes = {len(prompt)}
        else:  # With overlap, the step that feeds the last token was already under way.
            wholes = {len(prompt) + len(first.ids) - late for late in (0, 1)}
        assert again.meta["cached_tokens"] in {whole // page * page for whole in wholes}


@OVERLAP
def test_streaming_abort_stop_and_parallel_samples(server: Running) -> None:
    whole = generate(server)
    assert whole["meta_info"]["kv_policy"]["rounds"] >= 2
    text = whole["text"]
    stop = text[150:160]
    stopped = generate(server, stop=[stop])
    assert stopped["text"] == text[: text.index(stop)]
    assert stopped["meta_info"]["kv_policy"]["rounds"] >= 1

    several = generate(server, n=3, temperature=1.0)
    assert len(several) == 3
    assert all(sample["meta_info"]["kv_policy"]["evicted_tokens"] > 0 for sample in several)

    chunks = stream(server, LONG)
    assert chunks[-1]["text"] == text
    assert chunks[-1]["meta_info"]["kv_policy"] == whole["meta_info"]["kv_policy"]
    assert "kv_policy" not in chunks[0]["meta_info"]


def stream(server: Running, tokens: int, rid: str | None = None) -> list[dict[str, Any]]:
    body = {
        "text": PROMPT,
        "stream": True,
        "rid": rid,
        "sampling_params": {"max_new_tokens": tokens, "temperature": 0, "ignore_eos": True},
    }
    url = f"{server.server.url}/generate"
    with requests.post(url, json=body, stream=True, timeout=300) as response:
        lines = [line[6:] for line in response.iter_lines() if line.startswith(b"data: ")]
    return [json.loads(line) for line in lines if line != b"[DONE]"]


@OVERLAP
def test_abort_in_mid_generation(server: Running) -> None:
    rounds = server.server.kv_policy()["rounds"]
    chunks: list[dict[str, Any]] = []
    reader = threading.Thread(target=lambda: chunks.extend(stream(server, 5000, "to-abort")))
    reader.start()
    wait_for_rounds(server, rounds + 3)
    server.server.post("/abort_request", rid="to-abort")
    reader.join(60)
    assert chunks[-1]["meta_info"]["finish_reason"]["type"] == "abort"
    assert chunks[-1]["meta_info"]["completion_tokens"] < 5000
    wait_idle(server)


@OVERLAP
def test_json_schema(server: Running) -> None:
    schema = {"type": "array", "items": {"enum": ["ab", "cd"]}, "minItems": 50, "maxItems": 50}
    answer = generate(server, tokens=1000, json_schema=json.dumps(schema), ignore_eos=False)
    assert len(json.loads(answer["text"])) == 50
    assert answer["meta_info"]["kv_policy"]["rounds"] >= 5


@OVERLAP
def test_flush_cache(server: Running) -> None:
    before = generate(server)
    assert server.server.flush_cache()
    after = generate(server)
    assert after["meta_info"]["cached_tokens"] == 0
    assert after["text"] == before["text"]
    wait_idle(server)


QUESTION = {"role": "user", "content": PROMPT}


def chat_tokens(server: Running, messages: Sequence[dict[str, str]] = (QUESTION,)) -> list[int]:
    """The messages as the server's chat template writes them."""
    tokens: list[int] = AutoTokenizer.from_pretrained(server.model).apply_chat_template(
        list(messages),
        chat_template=THINKING.read_text(),
        add_generation_prompt=True,
        return_dict=False,
    )
    return tokens


@ONE
def test_chat_with_the_openai_client(server: Running) -> None:
    client = openai.OpenAI(base_url=f"{server.server.url}/v1", api_key="none")
    answer = client.chat.completions.create(
        model="tiny",
        messages=[QUESTION],
        max_tokens=LONG,
        temperature=0,
        extra_body={"ignore_eos": True, "return_meta_info": True},
    )
    info = answer.choices[0].meta_info["kv_policy"]  # type: ignore[attr-defined]
    assert set(info) == {"history", "rounds", "evicted_tokens", "resident_slots"}
    assert answer.usage is not None
    prompt = chat_tokens(server)
    assert len(prompt) == answer.usage.prompt_tokens
    assert info["evicted_tokens"] == info["rounds"] * INTERVAL - stagger(server, prompt)
    assert info["resident_slots"] <= answer.usage.prompt_tokens + BUDGET + INTERVAL


@ONE
def test_server_info_and_log(server: Running) -> None:
    before = server.server.kv_policy()
    rounds = generate(server)["meta_info"]["kv_policy"]["rounds"]
    after = server.server.kv_policy()
    changed = {key: after[key] - before[key] for key in ("rounds", "evicted_tokens")}
    evicted = rounds * INTERVAL - stagger(server, tokens_of(PROMPT))
    assert changed == {"rounds": rounds, "evicted_tokens": evicted}
    assert after["requests_evicted"] == before["requests_evicted"] + 1
    assert [after[key] for key in ("policy", "mode", "budget", "interval")] == [
        "triattention",
        "per-head",
        BUDGET,
        INTERVAL,
    ]
    log = server.server.log.read_text()
    assert re.search(r"Decode batch.*evicted: [1-9]\d*, kv-rounds: [1-9]", log)
    start = rf"KV policy: triattention, mode per-head, budget {BUDGET}, .*{server.stats}"
    assert len(re.findall(start, log)) == 1


@ONE
@pytest.mark.parametrize(
    ("settings", "said"),
    [({"budget": 0}, "--kv-budget 0"), ({"colour": "red"}, "'colour'"), ({"policy": "x"}, "'x'")],
)
def test_bad_settings_of_a_request(server: Running, settings: dict[str, Any], said: str) -> None:
    params = {"max_new_tokens": 4, "custom_params": {"kv_policy": settings}}
    response = server.server.post("/generate", text=PROMPT, sampling_params=params)
    assert response.status_code == 400
    assert said in response.text


WORKLOAD = [
    *(Ask(tokens_of(f"{PROMPT} {index % 3}"), 40 + 30 * index) for index in range(6)),
    Ask(tokens_of(PROMPT * 5), 60),
]
NEVER = {"budget": 4096}


@pytest.mark.parametrize("server", ["stock"], indirect=True)
def test_stock_answers(server: Running, stock_answers: dict[str, object]) -> None:
    """SGLang without the plugin; recorded for `test_never_triggered`."""
    assert "kv_policy" not in server.server.internal_state()
    assert "Applied" not in server.server.log.read_text()
    stock_answers["alone"] = [compared(server, request) for request in WORKLOAD]


@ONE
def test_never_triggered(server: Running, stock_answers: dict[str, object]) -> None:
    """A budget larger than the output: byte for byte what stock SGLang says."""
    server.server.flush_cache()
    rounds = server.server.kv_policy()["rounds"]
    asks = [Ask(request.prompt, request.tokens, NEVER) for request in WORKLOAD]
    assert [compared(server, request) for request in asks] == stock_answers["alone"]
    assert server.server.kv_policy()["rounds"] == rounds


def compared(server: Running, request: Ask) -> tuple[object, ...]:
    answer = send(server, request)
    return answer.ids, answer.logprobs.tolist(), answer.text, answer.meta["cached_tokens"]
