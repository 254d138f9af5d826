"""Frequencies come from SGLang's own rotary modules, and agree with what those do to a key."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from sglang.srt.layers.radix_attention import RadixAttention

from sglang_tri.errors import KvPolicyError
from sglang_tri.kernels.pairs import frequency_pairs
from sglang_tri.patches.versions.v0_5_17 import rotary

HEAD_DIM, LENGTH = 64, 2048
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 256,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512}
KINDS: dict[str, dict[str, Any]] = {
    "default": {},
    "interleaved": {"is_neox_style": False},
    "linear": {"rope_scaling": {"rope_type": "linear", "factor": 4.0}},
    "llama3": {"rope_scaling": LLAMA3},
    "yarn": {"rope_scaling": YARN},
    "partial rotary": {"partial_rotary_factor": 0.5},
}


@pytest.fixture(scope="module", autouse=True)
def sglang_context(servers: Any) -> None:
    """SGLang's rotary modules look at the published server arguments."""
    from sglang.srt.server_args import ServerArgs, set_global_server_args_for_scheduler

    set_global_server_args_for_scheduler(ServerArgs(model_path=str(servers.model("qwen3"))))


def make(**arguments: Any) -> Any:
    from sglang.srt.layers.rotary_embedding import get_rope

    return get_rope(HEAD_DIM, HEAD_DIM, LENGTH, 10000, dtype=torch.float32, **arguments)


@pytest.mark.parametrize("kind", KINDS)
def test_agrees_with_the_module(kind: str) -> None:
    module = make(**KINDS[kind])
    found = rotary.read_rope(module)
    keys = torch.randn(9, HEAD_DIM, generator=torch.Generator().manual_seed(0))
    positions = torch.arange(9) * 200
    _, rotated = module.forward_native(positions, keys.clone(), keys.clone())

    first, second = frequency_pairs(HEAD_DIM, found.rotary_dim, found.interleaved)
    frequencies = torch.zeros(HEAD_DIM // 2, dtype=torch.float64)
    factor = torch.ones(HEAD_DIM // 2, dtype=torch.float64)
    frequencies[: found.rotary_dim // 2] = found.frequencies
    factor[: found.rotary_dim // 2] = found.factor
    turn = torch.polar(factor.expand(9, -1), positions[:, None] * frequencies)
    expected = torch.complex(keys[:, first].double(), keys[:, second].double()) * turn
    actual = torch.complex(rotated[:, first].double(), rotated[:, second].double())
    torch.testing.assert_close(actual, expected, rtol=0, atol=2e-3)
    assert (found.factor > 1) == (kind == "yarn")
    assert found.rotary_dim == (HEAD_DIM // 2 if kind == "partial rotary" else HEAD_DIM)


def test_other_kinds_are_refused() -> None:
    dynamic = make(rope_scaling={"rope_type": "dynamic", "factor": 2.0})
    with pytest.raises(KvPolicyError, match="DynamicNTKScalingRotaryEmbedding"):
        rotary.read_rope(dynamic)


def test_a_table_that_disagrees_is_refused() -> None:
    """Whatever a module is called: its own table has the last word."""
    module = make(rope_scaling={**YARN, "factor": 3.0})
    rotary.read_rope(module)
    module.cos_sin_cache = module.cos_sin_cache * 1.01
    with pytest.raises(KvPolicyError, match="YaRN"):
        rotary.read_rope(module)


def test_one_rotary_module_for_all_layers() -> None:
    layers = torch.nn.ModuleList([make(), make()])
    assert rotary.find_rotary(layers) is layers[0]
    with pytest.raises(KvPolicyError, match="one rotary embedding"):
        rotary.find_rotary(torch.nn.ModuleList([make(), make(rope_scaling=LLAMA3)]))
    with pytest.raises(KvPolicyError, match="none"):
        rotary.find_rotary(torch.nn.Linear(2, 2))


class Attention(torch.nn.Module):
    def __init__(self, layer: int, turns: bool) -> None:
        super().__init__()
        self.attn = RadixAttention(2, HEAD_DIM, 1.0, 1, layer_id=layer)
        self.rotary_emb = make() if turns else None


def test_layers_without_rope() -> None:
    """Scores take one set of frequencies; a model whose attention does not hold RoPE is not one."""
    both = torch.nn.ModuleList([Attention(0, True), Attention(1, True)])
    rotary.find_rotary(both)
    outside = torch.nn.ModuleList([Attention(0, False), Attention(1, False), make()])
    rotary.find_rotary(outside)
    some = torch.nn.ModuleList([Attention(0, True), Attention(1, False), Attention(2, False)])
    with pytest.raises(KvPolicyError, match=r"none in layers \[1, 2\]"):
        rotary.find_rotary(some)
