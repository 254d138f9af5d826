"""Queries and keys as attention gets them; models that cannot be measured are refused by name."""

from __future__ import annotations

import contextlib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from sglang.srt.layers.radix_attention import RadixAttention

from sglang_tri.errors import KvPolicyError
from sglang_tri.patches.versions.v0_5_17 import measuring


def attention(layer: int, heads: int = 4) -> RadixAttention:
    return RadixAttention(heads, 16, 1.0, 2, layer_id=layer)


@pytest.mark.parametrize(
    "layers",
    [
        [attention(0)],
        [attention(0), attention(0)],
        [attention(0), attention(2)],
        [attention(0), attention(1), attention(2)],
        [attention(0), attention(1, heads=8)],
        [],
    ],
)
def test_other_layers_than_the_cache_has(layers: list[RadixAttention]) -> None:
    with pytest.raises(KvPolicyError, match="cannot measure ModuleList"):
        measuring.attention_layers(torch.nn.ModuleList(layers), 2)


class Seen:
    """Stands for the sums."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []

    def add(self, *call: Any) -> None:
        self.calls.append(call)


def test_positional_and_named_arguments(monkeypatch: pytest.MonkeyPatch) -> None:
    """Models call attention either way; afterwards nobody listens."""
    monkeypatch.setattr(RadixAttention, "forward", _forward)
    layers = measuring.attention_layers(torch.nn.ModuleList([attention(1), attention(0)]), 2)
    batch, seen = SimpleNamespace(positions="ppp"), Seen()
    progress: list[int] = []
    with measuring.captured(layers, seen, progress.append):  # type: ignore[arg-type]
        layers[0]("q", "k", "v", batch)
        layers[1]("q", k="k", v="v", forward_batch=batch, save_kv_cache=False)
        with pytest.raises(KvPolicyError, match=r"layer 1.*given no keys"):
            layers[0]("q", None, None, batch)
    layers[0]("q", "k", "v", batch)
    assert seen.calls == [(1, "q", "k", "ppp"), (0, "q", "k", "ppp")]
    assert progress == [3, 3]
    assert not any(layer._forward_pre_hooks for layer in layers)


def _forward(
    self: Any, q: Any, k: Any, v: Any, forward_batch: Any, save_kv_cache: bool = True
) -> None: ...


def test_prefill_graphs_are_put_back() -> None:
    runner: Any = SimpleNamespace(prefill_cuda_graph_runner="graphs")
    with contextlib.suppress(RuntimeError), measuring.eager_prefill(runner):
        assert runner.prefill_cuda_graph_runner is None
        raise RuntimeError
    assert runner.prefill_cuda_graph_runner == "graphs"


@pytest.mark.parametrize(
    ("chunk", "context", "pool", "expected"),
    [
        (2048, 32768, 100_000, 2048),
        (-1, 32768, 100_000, 16384),
        (None, 32768, 100_000, 16384),
        (8192, 4096, 100_000, 4096),
        (8192, 32768, 3000, 1500),
    ],
)
def test_longest_prefill(chunk: int | None, context: int, pool: int, expected: int) -> None:
    config = SimpleNamespace(context_len=context)
    scheduler: Any = SimpleNamespace(
        server_args=SimpleNamespace(chunked_prefill_size=chunk, max_prefill_tokens=16384),
        tp_worker=SimpleNamespace(model_runner=SimpleNamespace(model_config=config)),
        max_total_num_tokens=pool,
    )
    assert measuring.longest_prefill(scheduler) == expected


def test_the_tokenizer_of_a_server_that_has_none(servers: Any, tmp_path: Path) -> None:
    """With --skip-tokenizer-init it is loaded for this alone."""

    def without(path: str) -> Any:
        args = SimpleNamespace(
            tokenizer_path=path, tokenizer_mode="auto", trust_remote_code=False, revision=None
        )
        return SimpleNamespace(tokenizer=None, server_args=args)

    found = measuring.tokenizer(without(str(servers.model("qwen3"))))
    assert found.encode("abc") == [97, 98, 99]
    with pytest.raises(KvPolicyError, match=f"{tmp_path} needs its tokenizer"):
        measuring.tokenizer(without(str(tmp_path)))
