"""A policy is one file: that of docs/policies.md, and others that say what they need."""

from __future__ import annotations

import importlib.util
import math
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from hypothesis import given, settings

from bench.server import Server
from sglang_tri import config
from sglang_tri.config import KvPolicyConfig
from sglang_tri.errors import KvPolicyError
from sglang_tri.kernels.moves import MODES
from sglang_tri.kernels.scores import Scores
from sglang_tri.policies import POLICIES
from sglang_tri.policies.base import Candidates, Policy, ScoringPolicy
from sglang_tri.request.request import Request
from sglang_tri.round import warmup
from sglang_tri.round.run import KvCache, RoundSize
from tests.client import tokens_of
from tests.kernels import test_rounds as rounds
from tests.kernels.conftest import backend as backend
from tests.kernels.conftest import device as device
from tests.kernels.conftest import on_triton as on_triton
from tests.kernels.layouts import Paged, paged
from tests.kernels.test_rounds import BUDGET, HEADS, INTERVAL, LAYERS, RECENT

ROOT = Path(__file__).resolve().parents[1]
EXAMPLE = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "policies.md").read_text(), re.S)[0]
PROMPTS = [7, 0, 16]
SCALE = torch.tensor([0.5, 4.0, 1.0])
FP8 = torch.float8_e4m3fn


@pytest.fixture
def register(monkeypatch: pytest.MonkeyPatch) -> Callable[[type[Policy]], None]:
    """Makes a policy known, as if it were in a file of its own."""

    def known(policy: type[Policy]) -> None:
        monkeypatch.setitem(POLICIES, policy.name, policy)
        names = ("none", *POLICIES)
        flags = (replace(f, choices=names) if f.name == "policy" else f for f in config.FLAGS)
        monkeypatch.setattr(config, "FLAGS", tuple(flags))

    return known


@pytest.fixture
def value_norm(tmp_path: Path, register: Callable[[type[Policy]], None]) -> type[ScoringPolicy]:
    """The documentation's policy."""
    path = tmp_path / "value_norm.py"
    path.write_text(EXAMPLE)
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    register(module.ValueNorm)
    found: type[ScoringPolicy] = module.ValueNorm
    return found


def settings_of(policy: str, mode: str, normalize: bool = True) -> KvPolicyConfig:
    return replace(rounds.SETTINGS, policy=policy, eviction_mode=mode, normalize=normalize)


class Marked(rounds.Server):
    """Rounds in a cache in which each key's first component is its token's position."""

    def open(self, prompts: list[int]) -> list[Request]:
        """Requests whose first candidates are written."""
        made = self.requests(prompts)
        for row, request in enumerate(made):
            self.write(row, request, request.regions[-1].start)
        return made

    def write(self, row: int, request: Request, first: int) -> None:
        """New tokens in the slots from `first` on to where the next round is due."""
        last, delta = request.regions[-1].due_at, request.regions[-1].delta
        slots = self.table[row, first:last].long()
        for index, buffer in enumerate(self.buffers):
            fresh = torch.randn(len(slots), *buffer.shape[1:])
            if buffer.dtype == torch.uint8:
                fresh = fresh.to(FP8).view(torch.uint8)
            buffer[slots] = fresh.to(buffer)
            if index < LAYERS:
                marks = torch.arange(first + delta, last + delta)
                buffer[slots, :, 0] = marks[:, None].to(buffer)

    def to_fp8(self) -> None:
        """K and V as bytes that hold 8-bit floats, and scales of V."""
        self.buffers = [buffer.to(FP8).view(torch.uint8) for buffer in self.buffers]
        keys, values = self.buffers[:LAYERS], self.buffers[LAYERS:]
        cache = KvCache.of(keys, values, self.page_size, FP8, value_scale=SCALE)
        self.engine.cache = cache

    def rows(self, row: int, request: Request, last: int) -> list[torch.Tensor]:
        """Copies of the rows of its slots up to `last`, of K and V of all layers."""
        slots = self.table[row, request.regions[-1].start : last].long()
        return [buffer[slots].cpu() for buffer in self.buffers]


def surviving(values: list[torch.Tensor], settings: KvPolicyConfig, kept: int) -> torch.Tensor:
    """What the documented policy keeps, spelled out: int64 [layers, heads, kept], ascending.

    Args:
        values: of each layer the candidates' values [candidates, heads, head_dim].
    """
    norms = torch.stack([value.double().square().sum(-1).sqrt() for value in values])
    if settings.normalize:
        norms = (norms - norms.mean(1, keepdim=True)) / norms.std(1, correction=0, keepdim=True)
    if settings.eviction_mode == "union":
        norms = norms.amax((0, 2), keepdim=True)
    elif settings.eviction_mode == "per-head":
        norms = norms.mean(0, keepdim=True)
    norms = norms.expand(LAYERS, -1, HEADS).clone()
    norms[:, -RECENT:] = torch.inf
    return norms.topk(kept, 1).indices.sort(1).values.transpose(1, 2)


@pytest.mark.parametrize("fp8", [False, True])
@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("page_size", [1, 4])
def test_the_documented_policy_keeps_the_longest_values(
    value_norm: type[ScoringPolicy], page_size: int, mode: str, normalize: bool, fp8: bool
) -> None:
    settings = settings_of("value-norm", mode, normalize)
    server = Marked(torch.device("cpu"), page_size, settings)
    if fp8:
        server.to_fp8()
    requests = server.open(PROMPTS)
    due = [request.regions[-1].due_at for request in requests]
    before = [server.rows(*each) for each in zip(range(3), requests, due, strict=True)]
    server.round(requests)
    for row, (request, rows) in enumerate(zip(requests, before, strict=True)):
        values = [value.view(FP8) if fp8 else value for value in rows[LAYERS:]]
        if fp8:
            values = [value.float() * scale for value, scale in zip(values, SCALE, strict=True)]
        expected = surviving(values, settings, BUDGET)
        after = server.rows(row, request, request.regions[-1].start + BUDGET)
        for layer in range(LAYERS):
            for head in range(HEADS):
                of_head = [rows[at][:, head] for at in (layer, LAYERS + layer)]
                found = [after[at][:, head] for at in (layer, LAYERS + layer)]
                number = (found[0][:, 0] - of_head[0][0, 0]).long()
                assert number.sort().values.tolist() == expected[layer, head].tolist()
                assert number[-RECENT:].tolist() == [*range(len(of_head[0]))][-RECENT:]
                assert all(torch.equal(b[number], a) for a, b in zip(found, of_head, strict=True))


@settings(deadline=None, max_examples=100)
@given(paged(most=20))
def test_candidates_are_gathered(case: Paged) -> None:
    """From pages anywhere, behind a prompt that ends inside of one."""
    layer = torch.arange(math.prod(case.buffer(HEADS, 3))).view(case.buffer(HEADS, 3))
    (view,) = case.buffers([layer]).layers
    pages = case.pages()
    found = pages.gather(view)
    assert found.shape == (pages.requests, pages.longest, HEADS, 3)
    for request, count in enumerate(case.counts):
        wanted = [view[place].tolist() for place in case.places(request)]
        assert found[request, :count].tolist() == wanted


class Positioned(ScoringPolicy):
    """The longest values, by a policy that notes positions, and what they should be."""

    name = "positioned"
    needs_positions = True
    seen: ClassVar[list[tuple[torch.Tensor, torch.Tensor]]] = []

    def score(self, candidates: Candidates) -> Scores:
        assert candidates.positions is not None
        pages, counts = candidates.pages, candidates.pages.counts()
        kinds = (candidates.positions, candidates.keys, candidates.values)
        found, keys, values = (torch.stack([*map(pages.gather, kind.layers)]) for kind in kinds)
        for request, count in enumerate(counts.tolist()):
            of = slice(None), request, slice(count)
            self.seen.append((found[of][..., 0].long().cpu(), keys[of][..., 0].long().cpu()))
        return Scores.of(values.float().norm(dim=-1).transpose(2, 3), counts)


@pytest.mark.parametrize("page_size", [1, 4])
@pytest.mark.parametrize("parts", [False, True])
@pytest.mark.parametrize("mode", MODES)
def test_positions_are_right_in_all_rounds(
    device: torch.device,
    register: Callable[[type[Policy]], None],
    monkeypatch: pytest.MonkeyPatch,
    mode: str,
    parts: bool,
    page_size: int,
) -> None:
    """Three rounds with new tokens between them, which take the slots that became free."""
    register(Positioned)
    monkeypatch.setattr(Positioned, "seen", [])
    size = RoundSize(LAYERS, 4, HEADS, mode == MODES[1], BUDGET + INTERVAL, BUDGET).least_bytes
    server = Marked(device, page_size, settings_of("positioned", mode), size if parts else None)
    requests = server.open(PROMPTS)
    for number in range(3):
        if number:
            for row, request in enumerate(requests):
                server.write(row, request, request.regions[-1].start + BUDGET)
        before = len(Positioned.seen)
        server.round(requests)
        seen = Positioned.seen[before:]
        assert len(seen) == 3 * (LAYERS if parts else 1)
        assert all(torch.equal(found, wanted) for found, wanted in seen)
        heads_differ = any((found[..., :1] != found).any() for found, _ in seen)
        assert heads_differ == (number > 0 and mode != "union")


def test_positions_that_are_not_remembered_are_refused(
    register: Callable[[type[Policy]], None],
) -> None:
    """By a server of another policy, whose requests may ask for one that needs them."""
    register(Positioned)
    engine = rounds.Server(torch.device("cpu")).engine
    with pytest.raises(KvPolicyError, match="start it with --kv-policy positioned"):
        engine.check_runnable(settings_of("positioned", "union"))
    warmup.warm_up(engine, warmup.all_settings(engine.settings, per_request=True))


def test_positions_need_nothing_new_after_the_warm_up(
    on_triton: torch.device,
    value_norm: type[ScoringPolicy],
    register: Callable[[type[Policy]], None],
) -> None:
    """The kernels run, since torch's `compact` would load what writes positions as well."""
    register(type("Placed", (value_norm,), {"name": "placed", "needs_positions": True}))
    settings = settings_of("placed", "per-head")
    server = rounds.Server(on_triton, 4, settings)
    server.engine._observer = None
    with rounds.Operations() as warmed:
        warmup.warm_up(server.engine, [settings])
    with rounds.Operations() as used:
        server.run(PROMPTS)
    assert used.seen <= warmed.seen


class Odd(ScoringPolicy):
    """Refuses an even budget."""

    name = "odd"

    @classmethod
    def check_settings(cls, settings: KvPolicyConfig) -> None:
        if settings.budget % 2 == 0:
            raise KvPolicyError(f"--kv-budget {settings.budget} is even.")

    def score(self, candidates: Candidates) -> Scores:
        raise NotImplementedError


def test_a_policy_refuses_settings(register: Callable[[type[Policy]], None]) -> None:
    with pytest.raises(KvPolicyError, match="'odd' is not known"):
        KvPolicyConfig(policy="odd", budget=33)
    register(Odd)
    settings = KvPolicyConfig(policy="odd", budget=33)
    with pytest.raises(KvPolicyError, match="--kv-budget 34 is even"):
        KvPolicyConfig(policy="odd", budget=34)
    with pytest.raises(KvPolicyError, match="--kv-budget 34 is even"):
        settings.with_overrides({"budget": 34})


@pytest.fixture
def dropped(tmp_path: Path) -> dict[str, str]:
    """Environment of programs that find a copy of the package with one file more."""
    package = tmp_path / "installed" / "sglang_tri"
    shutil.copytree(ROOT / "sglang_tri", package, ignore=shutil.ignore_patterns("__pycache__"))
    (package / "policies" / "value_norm.py").write_text(EXAMPLE)
    # Without the folder that a program starts in.
    return {"PYTHONPATH": str(package.parent), "PYTHONSAFEPATH": "1"}


def test_a_file_in_the_folder_is_enough(dropped: dict[str, str]) -> None:
    code = (
        "import argparse; from sglang_tri import config, policies;"
        "parser = argparse.ArgumentParser(); config.add_arguments(parser);"
        "parsed = parser.parse_args(['--kv-policy', 'value-norm']);"
        "settings = config.from_namespace(parsed);"
        "print(settings.policy, settings.calibrates, *sorted(policies.POLICIES))"
    )
    command, environment = [sys.executable, "-c", code], {**os.environ, **dropped}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert result.stdout.split() == ["value-norm", "False", *sorted([*POLICIES, "value-norm"])]


@pytest.mark.server
def test_a_server_runs_it(servers: Any, dropped: dict[str, str], tmp_path: Path) -> None:
    """Without statistics, of which it needs none."""
    arguments = ["--kv-policy", "value-norm", "--kv-budget", "40", "--kv-interval", "20"]
    arguments += ["--max-total-tokens", "2048"]
    prompt = tokens_of("A policy is one file.")
    params = {"max_new_tokens": 200, "temperature": 0, "ignore_eos": True}
    with Server(servers.model("qwen3"), arguments, tmp_path / "log", dropped) as server:
        answer = server.generate(input_ids=prompt, sampling_params=params)
        report = server.kv_policy()
    assert answer["meta_info"]["kv_policy"]["rounds"] >= 7
    assert report["policy"] == "value-norm"
    assert report["statistics"] is None
    assert report["resident_generated_max"] <= 60
