"""Cached history is found under its own salt, key and adapter, however these are spelled."""

from __future__ import annotations

import json
from array import array
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sglang.srt.entrypoints.openai.serving_base import OpenAIServingBase
from sglang.srt.managers.schedule_batch import Req
from sglang.srt.sampling.sampling_params import SamplingParams

from sglang_tri.errors import KvPolicyError
from sglang_tri.patches import salts
from tests.client import tokens_of
from tests.conftest import Running
from tests.setups import BUDGET, INTERVAL

OVERLAP = pytest.mark.parametrize("server", ["page1-overlap", "page4-overlap"], indirect=True)
LONG = 2 * (BUDGET + INTERVAL)
WORDS = st.one_of(st.none(), st.text('ab",[]nul\\ ', max_size=4))
ADAPTERS = st.sampled_from([None, "a", "b", "ab", "null]"])
Scope = tuple[str | None, str | None, str | None]


def joined(salt: Any, key: Any) -> str | None:
    """What SGLang's OpenAI endpoints make of a request's salt and key."""
    request: Any = SimpleNamespace(cache_salt=salt, extra_key=key)
    return salts.join(OpenAIServingBase._compute_extra_key, None, request)  # type: ignore[arg-type]


def in_the_scheduler(scope: Scope) -> str | None:
    """What a request's prefixes are kept apart by, as SGLang's scheduler makes it."""
    salt, key, adapter = scope
    extra_key = salts.separated(joined(salt, key))
    req = Req("r", "", array("q", [1]), SamplingParams(), extra_key=extra_key, lora_id=adapter)
    found: str | None = req.extra_key
    return found


def normal(scope: Scope) -> Scope:
    """SGLang reads an empty salt or key as none."""
    salt, key, adapter = scope
    return salt or None, key or None, adapter


@given(st.tuples(WORDS, WORDS, ADAPTERS), st.tuples(WORDS, WORDS, ADAPTERS))
def test_equal_only_if_all_are_equal(one: Scope, other: Scope) -> None:
    same = normal(one) == normal(other)
    assert (in_the_scheduler(one) == in_the_scheduler(other)) == same


def test_without_salt_key_and_adapter_it_is_stock() -> None:
    assert in_the_scheduler((None, None, None)) is None
    assert in_the_scheduler((None, None, "a")) == "a"


def test_what_sglang_joins_stays_joined_for_others() -> None:
    assert joined("a", "b") == "ab"
    assert salts.separated(joined("a", "b")) != salts.separated("ab")


@pytest.mark.parametrize(
    ("salt", "key", "name"), [(["a"], None, "cache_salt"), (None, ["a"], "extra_key")]
)
def test_a_list_is_refused(salt: object, key: object, name: str) -> None:
    with pytest.raises(KvPolicyError, match=rf"{name} \['a'\]"):
        joined(salt, key)


def complete(server: Running, prompt: str, tokens: int = LONG, **fields: Any) -> tuple[str, int]:
    """The text of a completion, and how many tokens of its prompt were cached."""
    body = {"model": "tiny", "prompt": prompt, "max_tokens": tokens, "temperature": 0}
    response = server.server.post(
        "/v1/completions", **body, ignore_eos=True, return_cached_tokens_details=True, **fields
    )
    assert response.ok, response.text
    answer = response.json()
    details = answer["usage"]["prompt_tokens_details"] or {"cached_tokens": 0}
    return answer["choices"][0]["text"], details["cached_tokens"]


@OVERLAP
def test_history_never_crosses_a_salt(server: Running) -> None:
    """Nor does what was never compressed, while a policy is on."""
    begin = "Said under one salt. "
    text, _ = complete(server, begin, cache_salt="ab")
    longer = begin + text + " And then?"
    hits = server.server.kv_policy()["alias_hits"]
    strangers: list[dict[str, Any]] = [
        {"cache_salt": "a", "extra_key": "b"},
        {"extra_key": "ab"},
        {"cache_salt": "ab", "extra_key": "ab"},
        {"extra_key": json.dumps(["ab", None])},
        {},
    ]
    for fields in strangers:
        complete(server, longer, 2, **fields)
        body = {"input_ids": tokens_of(longer), "sampling_params": {"max_new_tokens": 2}}
        server.server.generate(**body, extra_key="ab")
        assert server.server.kv_policy()["alias_hits"] == hits, fields
    complete(server, longer, 2, cache_salt="ab")
    assert server.server.kv_policy()["alias_hits"] == hits + 1


@OVERLAP
def test_what_was_never_compressed_stays_apart_too(server: Running) -> None:
    prompt = "Said once, and never compressed. " * 3

    def cached(**fields: Any) -> int:
        body = {"input_ids": tokens_of(prompt), "sampling_params": {"max_new_tokens": 2}}
        if "cache_salt" not in fields:
            found = server.server.generate(**body, **fields)["meta_info"]["cached_tokens"]
        else:
            found = complete(server, prompt, 2, **fields)[1]
        return int(found)

    assert cached(cache_salt="pq") == 0
    assert cached(cache_salt="p", extra_key="q") == 0
    assert cached(extra_key="pq") == 0
    assert cached(extra_key="pq") > 0
