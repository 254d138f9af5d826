"""The command line of the serving benchmark, and the preset that takes minutes on one GPU."""

from __future__ import annotations

import random
from array import array
from dataclasses import replace

import pytest
import torch

from bench.load.workloads import CONSTRAINED, NEVER, POLICY, PRESETS, PRODUCTION, RICH, WAVES
from bench.models.dummy import SHAPES
from bench.serving import parse
from sglang_tri.config import KvPolicyConfig
from sglang_tri.request.region import Region, slots_for, stagger_slots

TINY, QUICK = PRESETS["tiny"], PRESETS["quick"]
BOTH = ["--arms", PRODUCTION, POLICY]


def arms(words: list[str]) -> list[str]:
    """Of the first pool: in the rich one, estimates change nothing."""
    pool, *_ = parse(words)[1].all_pools()
    return pool.arms


def test_what_the_command_line_changes() -> None:
    sizes = ["--budget", "16", "--interval", "24", "--outputs", "96", "80", "--pools", "4"]
    arguments, preset = parse([*sizes, *BOTH, "--limit", "90", "--", "--page-size", "4"])
    assert (preset.budget, preset.interval, preset.outputs) == (16, 24, [96, 80])
    assert [pool.arms for pool in preset.all_pools()] == [[PRODUCTION, POLICY]] * 2
    assert [pool.workloads[0].name for pool in preset.all_pools()] == [
        "reasoning 128+96",
        "reasoning 128+80",
    ]
    assert arguments.limit == 90
    assert preset.server == [*TINY.server, "--page-size", "4"]
    assert parse([])[1] == replace(TINY, server=[*TINY.server])
    assert parse(["--others-in"])[1].others_in == []


@pytest.mark.parametrize(
    ("words", "chosen"),
    [
        ([], [PRODUCTION, "clip 32", CONSTRAINED, POLICY]),
        (["--arms", POLICY, PRODUCTION], [PRODUCTION, POLICY]),
        (["--arms", CONSTRAINED], [PRODUCTION, CONSTRAINED, POLICY]),
        (["--arms", PRODUCTION, "--clips", "64"], [PRODUCTION, "clip 64", POLICY]),
        (["--clips", "7", "8"], [PRODUCTION, "clip 7", "clip 8", CONSTRAINED, POLICY]),
        (["--clips"], [PRODUCTION, CONSTRAINED, POLICY]),
        (["--pools", RICH], [PRODUCTION, CONSTRAINED, POLICY]),
    ],
)
def test_arms(words: list[str], chosen: list[str]) -> None:
    """Ratios compare the policy with production: both always run."""
    assert arms(words) == chosen


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--budget", "0"], "--budget: 0 is not a whole number of 1 or more"),
        (["--interval", "-8"], "--interval: -8 is not a whole number of 1 or more"),
        (["--outputs", "96", "many"], "--outputs: many is not a whole number of 1 or more"),
        (["--budget", "15"], "--budget: 15 is too small for the policy"),
        (["--interval", "8"], "--interval: 8 is too small for the policy"),
        (["--interval", "8"], "use 16 or more"),
        (["--arms", PRODUCTION, "r-kv"], "--arms: invalid choice: 'r-kv' (choose from"),
        (["--clips", "0"], "--clips: 0 is not a whole number of 1 or more"),
        (["--limit", "25"], "--limit: 25 is not a number of more than 25 seconds"),
        (["--limit", "nan"], "--limit: nan is not a number"),
        (["--pools", "5"], "--pools 5: tiny has 4, 8, 16, 32, rich"),
        (["--others-in", "6"], "--others-in 6: tiny has 4, 8, 16, 32, rich"),
        (["--pools", "4", "--workloads", "random"], "which have reasoning 128+160"),
    ],
)
def test_refusals(words: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Before anything is started; with the flag, the value, and what would work."""
    with pytest.raises(SystemExit) as refused:
        parse(words)
    assert refused.value.code == 2
    assert said in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize("present", [False, True])
def test_a_large_model_needs_a_gpu(
    present: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: present)
    if present:
        dummy = ["--load-format", "dummy"]
        assert parse(["--preset", "quick"])[1].server == [*QUICK.server, *dummy]
        path = ["--preset", "quick", "--model-path", "model"]
        assert parse(path)[1].server == [*QUICK.server]
        return
    with pytest.raises(SystemExit):
        parse(["--preset", "quick"])
    assert "needs a GPU, and torch finds none: use --preset tiny" in capsys.readouterr().err


def test_sizes_of_the_quick_preset() -> None:
    (pool,) = QUICK.all_pools()
    evicted, never = pool.workloads
    assert pool.slots == 64 + round(4.4 * (2 + 32 + 2048)) == 9225
    assert (evicted.requests, evicted.output) == (24, 2048)
    assert (never.requests, never.at_once) == (WAVES * 24, 24)
    # All at once: with the policy, and where nothing is evicted.
    settings = KvPolicyConfig(policy=POLICY, budget=QUICK.budget, interval=QUICK.interval)
    assert 64 + 24 * (2 + 32 + slots_for(settings, 2048, page_size=1)) < pool.slots
    assert never.pool_for(24) < pool.slots
    assert SHAPES["qwen3-8b"]["max_position_embeddings"] > 64 + 2 + 32 + 2048
    assert max(24, never.at_once) <= QUICK.most


@pytest.mark.parametrize("page_size", [1, 16])
@pytest.mark.parametrize(("budget", "interval"), [(256, 32), (32, 16), (16, 16), (2048, 128)])
def test_a_load_that_is_never_evicted_from(budget: int, interval: int, page_size: int) -> None:
    """However early the first round of a prompt is."""
    words = ["--budget", str(budget), "--interval", str(interval), "--workloads", NEVER]
    (pool,) = parse(words)[1].all_pools()
    (never,) = pool.workloads
    output = never.output
    assert 0 < output < budget
    settings = KvPolicyConfig(policy=POLICY, budget=budget, interval=interval)
    for seed in range(200):
        prompt = array("q", (random.Random(seed).randrange(256) for _ in range(40)))
        early = stagger_slots(settings, prompt, page_size)
        region = Region.open(settings, len(prompt), 0, page_size, early)
        assert len(prompt) + output < region.due_at
