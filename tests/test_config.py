"""Settings: one list of flags behind the command line and the Python API; bad ones are refused."""

from __future__ import annotations

import argparse
from typing import Any

import pytest

from sglang_tri import config
from sglang_tri.config import KvPolicyConfig
from sglang_tri.errors import KvPolicyError


def parse(*argv: str) -> KvPolicyConfig:
    parser = argparse.ArgumentParser()
    config.add_arguments(parser)
    return config.from_namespace(parser.parse_args(argv))


def test_defaults() -> None:
    settings = parse()
    assert settings == KvPolicyConfig()
    assert not settings.enabled
    assert not settings.explicit


def test_command_line_and_keywords_agree() -> None:
    argv = "--kv-policy streaming --kv-budget 64 --kv-interval 32 --kv-recent 20 --kv-sinks 2"
    more = "--kv-eviction-mode union --no-kv-normalize --kv-reuse prompt --kv-alias-limit 9"
    flags = parse(*argv.split(), *more.split())
    keywords = {
        "kv_policy": "streaming",
        "kv_budget": 64,
        "kv_interval": 32,
        "kv_recent": 20,
        "kv_sinks": 2,
        "kv_eviction_mode": "union",
        "kv_normalize": False,
        "kv_reuse": "prompt",
        "kv_alias_limit": 9,
    }
    assert flags == KvPolicyConfig.from_keywords(keywords)
    assert KvPolicyConfig(**flags.to_dict()) == flags
    assert flags.explicit == {name.removeprefix("kv_") for name in keywords}


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"budget": 0}, ["--kv-budget 0", "1 or more"]),
        ({"interval": 0}, ["--kv-interval 0", "1 or more"]),
        ({"recent": -1}, ["--kv-recent -1"]),
        ({"budget": 8, "recent": 9}, ["--kv-recent 9", "--kv-budget 8"]),
        ({"interval": 8, "recent": 9}, ["--kv-recent 9", "--kv-interval 8"]),
        ({"policy": "streaming", "budget": 20, "sinks": 21}, ["--kv-sinks 21", "--kv-budget 20"]),
        ({"policy": "streaming", "budget": 19}, ["--kv-sinks 4", "--kv-recent 16", "budget 19"]),
        (
            {"policy": "triattention", "recent": 15},
            ["--kv-recent 15", "--kv-reuse continuation", "16 or more", "--kv-reuse prompt"],
        ),
        ({"alias_limit": 0}, ["--kv-alias-limit 0", "1 or more"]),
        ({"reuse": "all"}, ["--kv-reuse 'all'", "continuation, prompt"]),
        ({"policy": "snapkv"}, ["--kv-policy 'snapkv'", "random, streaming, triattention"]),
        ({"eviction_mode": "all"}, ["--kv-eviction-mode 'all'", "union"]),
        ({"budget": 1.5}, ["--kv-budget 1.5", "int"]),
        ({"normalize": 1}, ["--kv-normalize 1", "bool"]),
        ({"stats": None}, ["--kv-stats None", "str"]),
        ({"calibration_text": 7}, ["--kv-calibration-text 7", "str"]),
        ({"calibration_tokens": 1023}, ["--kv-calibration-tokens 1023", "1024 or more"]),
    ],
)
def test_refused(settings: dict[str, Any], said: list[str]) -> None:
    with pytest.raises(KvPolicyError) as error:
        KvPolicyConfig(**settings)
    assert all(words in str(error.value) for words in said), str(error.value)


@pytest.mark.parametrize(
    "argv", ["--kv-policy triattention --kv-stats own.pt", "--kv-policy streaming"]
)
@pytest.mark.parametrize("flag", ["--kv-calibration-text a.txt", "--kv-calibration-tokens 2048"])
def test_calibration_that_would_not_happen(argv: str, flag: str) -> None:
    with pytest.raises(KvPolicyError, match=f"{flag} does nothing with {argv[:20]}"):
        parse(*argv.split(), *flag.split())
    assert parse("--kv-policy", "triattention", *flag.split()).calibrates
    assert not parse(*argv.split()).calibrates


def test_few_recent_tokens_need_no_reuse() -> None:
    assert not KvPolicyConfig(policy="triattention", recent=0, reuse="prompt").continues


def test_unknown_names_are_refused() -> None:
    with pytest.raises(KvPolicyError, match="bugdet"):
        KvPolicyConfig().with_overrides({"bugdet": 5})


@pytest.mark.parametrize("overrides", [5, True, None, ["budget"], "budget", 1e300, float("nan")])
def test_settings_that_are_no_object(overrides: object) -> None:
    with pytest.raises(KvPolicyError, match="is not an object of settings"):
        KvPolicyConfig().with_overrides(overrides)


def test_messages_are_short_whatever_was_sent() -> None:
    for overrides in ({"budget": "x" * 10**6}, {"x" * 10**6: 1}, {"policy": [[1] * 999] * 999}):
        with pytest.raises(KvPolicyError) as error:
            KvPolicyConfig().with_overrides(overrides)
        assert len(str(error.value)) < 400
