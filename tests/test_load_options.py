"""The command line of the serving benchmark, and the preset that takes minutes on one GPU."""

from __future__ import annotations

import random
from array import array

import pytest
import torch

from bench.load.arms import CONSTRAINED, POLICY, PRODUCTION, clip
from bench.load.options import parse
from bench.load.presets import PRESETS, WAVES
from bench.load.workloads import NEVER
from bench.models.dummy import SHAPES
from sglang_tri.config import KvPolicyConfig
from sglang_tri.request.region import Region, slots_for, stagger_slots

TINY, QUICK = PRESETS["tiny"], PRESETS["quick"]
BOTH = ["--arms", PRODUCTION, POLICY]


def test_what_the_command_line_changes() -> None:
    sizes = ["--budget", "16", "--interval", "24", "--outputs", "96", "80", "--pools", "4"]
    arguments, preset = parse([*sizes, *BOTH, "--limit", "90", "--", "--page-size", "4"], "")
    assert (preset.budget, preset.interval, preset.outputs) == (16, 24, [96, 80])
    assert preset.arms == [PRODUCTION, POLICY]
    assert [pool.workloads[0].name for pool in preset.pools()] == [
        "reasoning 128+96",
        "reasoning 128+80",
    ]
    assert (arguments.limit, arguments.server_arguments) == (90, ["--page-size", "4"])
    assert parse([], "")[1] == TINY


@pytest.mark.parametrize(
    ("words", "arms"),
    [
        (["--arms", POLICY, "clip 64", PRODUCTION, POLICY], [POLICY, clip(64), PRODUCTION]),
        (["--clips", "7", "8"], [PRODUCTION, CONSTRAINED, POLICY, clip(7), clip(8)]),
        (["--clips"], [PRODUCTION, CONSTRAINED, POLICY]),
    ],
)
def test_arms(words: list[str], arms: list[str]) -> None:
    assert parse(words, "")[1].arms == arms


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--budget", "0"], "--budget: 0 is not a whole number of 1 or more"),
        (["--interval", "-8"], "--interval: -8 is not a whole number of 1 or more"),
        (["--outputs", "96", "many"], "--outputs: many is not a whole number of 1 or more"),
        (["--budget", "15"], "--budget 15 is too small for the policy"),
        (["--interval", "8"], "--interval 8 is too small for the policy"),
        (["--interval", "8"], "use 16 or more"),
        (["--arms", PRODUCTION, "r-kv"], "--arms: r-kv is no arm: use production, 'clip N'"),
        (["--arms", PRODUCTION, POLICY, "clip 0"], "--arms: clip 0 is no arm"),
        (["--arms", CONSTRAINED, POLICY], "--arms constrained triattention: ratios compare"),
        (["--arms", CONSTRAINED, POLICY], "so add production"),
        (["--arms", CONSTRAINED], "so add production and triattention"),
        ([*BOTH, "--clips", "8"], "--clips: not allowed with argument --arms"),
        (["--limit", "25"], "--limit: 25 is not a number of more than 25 seconds"),
        (["--limit", "nan"], "--limit: nan is not a number"),
        (["--pools", "5"], "--pools 5: tiny has 4, 8, 16, 32, rich"),
        (["--pools", "4", "--workloads", "random"], "which have reasoning 128+160"),
    ],
)
def test_refusals(words: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Before anything is started; with the flag, the value, and what would work."""
    with pytest.raises(SystemExit) as refused:
        parse(words, "")
    assert refused.value.code == 2
    assert said in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize("present", [False, True])
def test_a_large_model_needs_a_gpu(
    present: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: present)
    if present:
        assert parse(["--preset", "quick"], "")[1].server == [*QUICK.server, *QUICK.own]
        return
    with pytest.raises(SystemExit):
        parse(["--preset", "quick"], "")
    assert "needs a GPU, and torch finds none: use --preset tiny" in capsys.readouterr().err


def test_sizes_of_the_quick_preset() -> None:
    (pool,) = QUICK.pools()
    evicted, never = pool.workloads
    assert pool.slots == 64 + round(4.4 * (2 + 32 + 2048)) == 9225
    assert (evicted.requests, evicted.output) == (24, 24 * 2048)
    assert (never.requests, never.sizes["max-concurrency"]) == (WAVES * 24, 24)
    # All at once: with the policy, and where nothing is evicted.
    settings = KvPolicyConfig(policy=POLICY, budget=QUICK.budget, interval=QUICK.interval)
    assert 64 + 24 * (2 + 32 + slots_for(settings, 2048, page_size=1)) < pool.slots
    assert never.pool_for(24) < pool.slots
    assert SHAPES["qwen3-8b"]["max_position_embeddings"] > 64 + 2 + 32 + 2048
    assert max(24, never.sizes["max-concurrency"]) <= QUICK.most


@pytest.mark.parametrize("page_size", [1, 16])
@pytest.mark.parametrize(("budget", "interval"), [(256, 32), (32, 16), (16, 16), (2048, 128)])
def test_a_load_that_is_never_evicted_from(budget: int, interval: int, page_size: int) -> None:
    """However early the first round of a prompt is."""
    words = ["--budget", str(budget), "--interval", str(interval), "--workloads", NEVER]
    (pool,) = parse(words, "")[1].pools()
    (never,) = pool.workloads
    output = never.sizes["gsp-output-len"]
    assert 0 < output < budget
    settings = KvPolicyConfig(policy=POLICY, budget=budget, interval=interval)
    for seed in range(200):
        prompt = array("q", (random.Random(seed).randrange(256) for _ in range(40)))
        early = stagger_slots(settings, prompt, page_size)
        region = Region.open(settings, len(prompt), 0, page_size, early)
        assert len(prompt) + output < region.due_at
