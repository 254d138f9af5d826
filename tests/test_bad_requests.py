"""Whatever a client sends is answered with 200 or 400, and the server goes on for everybody else.

Fuzzed are the fields that the hooks read, through the real HTTP server. `BAD_REQUESTS=1000` sends
more of each kind.
"""

from __future__ import annotations

import json
import os
import re
import uuid
from collections.abc import Iterator
from typing import Any

import pytest
import requests
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sglang_tri.config import FLAGS
from tests.client import tokens_of
from tests.conftest import Running
from tests.probing import ask

ONE = pytest.mark.parametrize("server", ["page1-overlap"], indirect=True)
EXAMPLES = int(os.environ.get("BAD_REQUESTS", "60"))
FUZZ = settings(
    max_examples=EXAMPLES,
    deadline=None,
    database=None,
    derandomize=True,
    suppress_health_check=list(HealthCheck),
)
PROMPT = "Whatever they send."
# Ends every output at its first character, whatever length a request asks for.
SHORT = {"temperature": 0, "stop": [chr(code) for code in range(32, 127)]}

TOO_LONG = 40000
MESSAGES = [{"role": "user", "content": PROMPT}]
ENDPOINTS: dict[str, dict[str, Any]] = {
    "/v1/completions": {"prompt": PROMPT},
    "/v1/chat/completions": {"messages": MESSAGES},
    "/v1/responses": {"input": PROMPT, "max_output_tokens": 4},
    "/v1/messages": {"messages": MESSAGES},
}
NUMBERS = st.one_of(
    st.integers(-3, 40),
    st.sampled_from([2**31, 2**63 - 1, 2**63, 2**64, -(2**63), 10**30, 1e300, 16.5, -0.0]),
    st.sampled_from([float("nan"), float("inf"), float("-inf")]),
)
SCALARS = st.one_of(st.none(), st.booleans(), NUMBERS, st.text(max_size=8))
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=4), inner, max_size=3)
    ),
    max_leaves=8,
)
NAMES = st.one_of(st.sampled_from([flag.name for flag in FLAGS]), st.text(max_size=6))
CHOICES = st.sampled_from(["none", "streaming", "random", "union", "per-head", "prompt", "auto"])
OWN = st.one_of(VALUES, st.dictionaries(NAMES, st.one_of(VALUES, CHOICES, NUMBERS), max_size=4))
SAMPLING = st.fixed_dictionaries(
    {},
    optional={
        "max_new_tokens": st.one_of(NUMBERS, VALUES),
        "min_new_tokens": st.one_of(NUMBERS, VALUES),
        "ignore_eos": VALUES,
        "custom_params": st.one_of(VALUES, st.fixed_dictionaries({"kv_policy": OWN})),
        # SGLang makes as many requests as it says, whatever memory that takes.
        "n": st.one_of(st.integers(-1, 3), st.sampled_from([None, True, 1.0, 1.5, "2", [2], {}])),
    },
)
GENERATE = st.fixed_dictionaries(
    {},
    optional={
        "input_ids": st.one_of(VALUES, st.lists(NUMBERS, max_size=5)),
        "rid": VALUES,
        "extra_key": VALUES,
        "lora_path": st.one_of(VALUES, st.sampled_from(["a", ["a"], [None]])),
        "lora_id": VALUES,
        "session_params": st.fixed_dictionaries({"id": st.text(max_size=5)}),
        "priority": st.one_of(NUMBERS, VALUES),
        "return_logprob": VALUES,
        "logprob_start_len": st.one_of(NUMBERS, VALUES),
        "positional_embed_overrides": VALUES,
    },
)
OPENAI = st.fixed_dictionaries(
    {},
    optional={
        "cache_salt": st.one_of(VALUES, st.text(max_size=3)),
        "extra_key": st.one_of(VALUES, st.text(max_size=3)),
        "custom_params": st.one_of(VALUES, st.fixed_dictionaries({"kv_policy": OWN})),
        "max_tokens": st.one_of(NUMBERS, VALUES),
        "max_output_tokens": st.one_of(NUMBERS, VALUES),
        "min_tokens": st.one_of(NUMBERS, VALUES),
        "ignore_eos": VALUES,
        "rid": VALUES,
        "lora_path": VALUES,
        "priority": st.one_of(NUMBERS, VALUES),
    },
)


@pytest.fixture(autouse=True)
def nothing_is_left(server: Running) -> Iterator[None]:
    yield
    assert server.server.flush_cache()
    report = ask(server.probe)
    assert report["free"] == report["size"]


def post(server: Running, path: str, body: Any) -> requests.Response:
    """As JSON, with whatever Python's own writer can write."""
    headers = {"Content-Type": "application/json"}
    url = server.server.url + path
    return requests.post(url, data=json.dumps(body), headers=headers, timeout=60)


def known(server: Running) -> list[int]:
    """The tokens of a request that has nothing wrong."""
    params = {"max_new_tokens": 6, "temperature": 0, "ignore_eos": True}
    ids: list[int] = server.server.generate(text=PROMPT, sampling_params=params)["output_ids"]
    return ids


def survives(server: Running, path: str, body: Any) -> None:
    expected = known(server)
    response = post(server, path, body)
    assert response.status_code in (200, 400), (response.status_code, response.text, body)
    assert response.status_code == 200 or response.text
    assert known(server) == expected


@ONE
@FUZZ
@given(params=SAMPLING)
def test_any_sampling_parameters(server: Running, params: dict[str, Any]) -> None:
    survives(server, "/generate", {"text": PROMPT, "sampling_params": {**SHORT, **params}})


@pytest.mark.parametrize("server", ["page1-overlap", "lora-page16"], indirect=True)
@FUZZ
@given(fields=GENERATE)
def test_any_fields_of_generate(server: Running, fields: dict[str, Any]) -> None:
    prompt = {} if "input_ids" in fields else {"text": PROMPT}
    survives(server, "/generate", {**prompt, "sampling_params": SHORT, **fields})


@ONE
@FUZZ
@given(params=st.one_of(VALUES, st.lists(st.just(SHORT), max_size=2)))
def test_anything_for_sampling_parameters(server: Running, params: object) -> None:
    """What is no object ends nowhere: these prompts are longer than the context."""
    survives(server, "/generate", {"input_ids": [65] * TOO_LONG, "sampling_params": params})


@ONE
@FUZZ
@given(params=st.lists(SAMPLING, min_size=1, max_size=3), fields=GENERATE)
def test_any_batch(server: Running, params: list[dict[str, Any]], fields: dict[str, Any]) -> None:
    """Prompts and lists of settings that need not be of one length."""
    fields = {name: value for name, value in fields.items() if name != "input_ids"}
    batch = [{**SHORT, **own} for own in params]
    survives(server, "/generate", {"text": [PROMPT] * 2, "sampling_params": batch, **fields})


@ONE
@pytest.mark.parametrize("path", ENDPOINTS)
@FUZZ
@given(fields=OPENAI)
def test_any_fields_of_other_endpoints(server: Running, path: str, fields: dict[str, Any]) -> None:
    survives(server, path, {"model": "tiny", "max_tokens": 4, **ENDPOINTS[path], **SHORT, **fields})


@ONE
@pytest.mark.parametrize("name", ["cache_salt", "extra_key"])
def test_a_salt_that_is_a_list(server: Running, name: str) -> None:
    before = server.server.kv_policy()["requests_refused"]
    body = {"model": "tiny", "prompt": PROMPT, "rid": f"bad-{name}", name: ["a"]}
    response = post(server, "/v1/completions", body)
    assert response.status_code == 400
    assert f"{name} ['a'] does not work" in response.text
    assert server.server.kv_policy()["requests_refused"] == before + 1
    assert len(lines(server, f"bad-{name}")) == 1


SEEN: list[tuple[str, dict[str, Any], dict[str, Any], list[str]]] = [
    ("a number", {"custom_params": {"kv_policy": 5}}, {}, ["custom_params['kv_policy']", "5"]),
    ("true", {"custom_params": {"kv_policy": True}}, {}, ["custom_params['kv_policy']", "True"]),
    ("a list", {"custom_params": {"kv_policy": ["budget"]}}, {}, ["['budget']", "object"]),
    ("half a token", {"max_new_tokens": 16.5}, {}, ["max_new_tokens 16.5", "whole number"]),
    ("no samples", {"n": "x"}, {}, ["n 'x'", "whole number"]),
    ("a list of one", {}, {"sampling_params": [SHORT]}, ["sampling_params [", "one object"]),
    ("an empty list", {}, {"sampling_params": []}, ["sampling_params [] is empty"]),
    ("a word", {"min_new_tokens": "x"}, {}, ["min_new_tokens 'x'", "whole number"]),
    ("a list of adapters", {}, {"lora_path": ["a"]}, ["lora_path ['a']", "one string"]),
    ("SGLang's name", {}, {"lora_id": '["victim", null]'}, ["lora_id", "victim", "send lora_path"]),
    ("a list of keys", {}, {"extra_key": ["a"]}, ["extra_key ['a']", "str"]),
    ("before the prompt", {}, {"return_logprob": True, "logprob_start_len": -7}, ["-7", "-1"]),
    ("no prompt", {}, {"input_ids": [[]]}, ["prompt is empty"]),
    ("no embeddings", {}, {"positional_embed_overrides": 5}, ["positional_embed_overrides 5"]),
]


@ONE
@pytest.mark.parametrize(
    ("params", "fields", "said"), [row[1:] for row in SEEN], ids=[row[0] for row in SEEN]
)
def test_refused_by_name(
    server: Running, params: dict[str, Any], fields: dict[str, Any], said: list[str]
) -> None:
    """Most of these end SGLang 0.5.17."""
    before = server.server.kv_policy()["requests_refused"]
    rid = uuid.uuid4().hex
    prompt = {} if "input_ids" in fields else {"text": PROMPT}
    body = {**prompt, "rid": rid, "sampling_params": {**SHORT, **params}, **fields}
    response = post(server, "/generate", body)
    assert response.status_code == 400
    message = response.json()["error"]["message"]
    assert all(words in message for words in said), message
    assert server.server.kv_policy()["requests_refused"] == before + 1
    assert len(lines(server, rid)) == 1
    assert all(words in lines(server, rid)[0] for words in said)


def lines(server: Running, rid: str) -> list[str]:
    """The lines of the server's log that name a request."""
    text = server.server.log.read_text()
    return [line for line in text.splitlines() if re.search(rf"rid='{rid}(_0)?'", line)]


@ONE
def test_refused_by_the_scheduler(server: Running) -> None:
    """What only a loaded engine knows is refused there: it is logged and counted alike."""
    before = server.server.kv_policy()["requests_refused"]
    body = {"input_ids": [65, 5000], "rid": "bad-token", "sampling_params": SHORT}
    assert post(server, "/generate", body).status_code == 400
    assert server.server.kv_policy()["requests_refused"] == before + 1
    (line,) = lines(server, "bad-token")
    assert "token 5000 at position 1" in line


@ONE
def test_what_sglang_serves_is_served(server: Running) -> None:
    """Values of other types that SGLang 0.5.17 takes, and no hook reads."""
    params = {**SHORT, "custom_params": {"mine": {"nested": [1]}}, "ignore_eos": 1, "n": 1.0}
    body = {"text": PROMPT, "sampling_params": params}
    for fields in ({"return_logprob": [True]}, {"logprob_start_len": -7}):
        assert post(server, "/generate", {**body, **fields}).status_code == 200


@ONE
def test_a_rid_that_is_a_path(server: Running) -> None:
    """Records of rounds are named after it."""
    params = {"max_new_tokens": 100, "temperature": 0, "ignore_eos": True}
    body = {"input_ids": tokens_of(PROMPT), "rid": "../\0" * 99, "sampling_params": params}
    response = post(server, "/generate", body)
    assert response.status_code == 200
    assert response.json()["meta_info"]["kv_policy"]["rounds"] > 0
