"""Read frequencies and factor from the engine's own rotary module."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from sglang_tri.errors import KvPolicyError
from sglang_tri.statistics.rope import Rope

if TYPE_CHECKING:
    from sglang.srt.layers.rotary_embedding.base import RotaryEmbedding

SUPPORTED = ("default", "linear", "llama3", "yarn", "partial rotary")
# Rows of the engine's table that the result is compared with: near, and as far as phases are exact.
_PROBES = (0, 1, 2, 7, 31)


def find_rotary(model: torch.nn.Module) -> RotaryEmbedding:
    """The one rotary module that all attention layers of `model` share.

    Raises:
        KvPolicyError: there is none, more than one kind, or one that is not supported.
    """
    found = {id(m): m for m in model.modules() if hasattr(m, "cos_sin_cache")}
    described = {_describe(module) for module in found.values()}
    if len(described) != 1:
        names = sorted(type(module).__name__ for module in found.values()) or ["none"]
        raise KvPolicyError(
            f"--kv-policy needs one rotary embedding for all layers, the model has {names}: "
            f"supported are {', '.join(SUPPORTED)}."
        )
    _check_all_layers_turn(model)
    return next(iter(found.values()))


def _check_all_layers_turn(model: torch.nn.Module) -> None:
    """Refuse models that rotate some layers only: scores take one set of frequencies for all."""
    from sglang.srt.layers.radix_attention import RadixAttention

    turning: dict[int, bool] = {}
    for owner in model.modules():
        for layer in owner.children():
            if isinstance(layer, RadixAttention):
                turning[layer.layer_id] = any(hasattr(c, "cos_sin_cache") for c in owner.children())
    still = sorted(layer for layer, turns in turning.items() if not turns)
    # Where no attention module holds its rotary embedding, the model does and turns all.
    if still and len(still) < len(turning):
        raise KvPolicyError(
            f"--kv-policy needs RoPE in every layer, the model has none in layers {still}: "
            "serve another model, or leave --kv-policy out."
        )


def read_rope(module: RotaryEmbedding) -> Rope:
    """Frequencies, factor and layout of `module`, checked against its own cos/sin table.

    Raises:
        KvPolicyError: a kind of RoPE that is not supported.
    """
    frequencies, factor = _read(module)
    rope = Rope(frequencies.double().cpu(), factor, module.head_size, not module.is_neox_style)
    _check_against_table(module, rope)
    return rope


def _read(module: RotaryEmbedding) -> tuple[torch.Tensor, float]:
    from sglang.srt.layers.rotary_embedding import base, rope_variant, yarn

    kind = type(module)
    if kind is yarn.YaRNScalingRotaryEmbedding:
        return module._compute_inv_freq(module.scaling_factor), module.mscale
    if kind is base.LinearScalingRotaryEmbedding and len(module.scaling_factors) == 1:
        return module._compute_inv_freq(module.base).double() / module.scaling_factors[0], 1.0
    if kind in (base.RotaryEmbedding, rope_variant.Llama3RotaryEmbedding):
        return module._compute_inv_freq(module.base), 1.0
    raise _unsupported(kind.__name__)


def _check_against_table(module: RotaryEmbedding, rope: Rope) -> None:
    table = module.cos_sin_cache
    cos, sin = table[list(_PROBES)].double().cpu().chunk(2, -1)
    phase = torch.tensor(_PROBES, dtype=torch.float64)[:, None] * rope.frequencies
    rounding = rope.factor * torch.finfo(table.dtype).eps
    tolerance = rounding + 4 * torch.finfo(torch.float32).eps * max(_PROBES)
    error = torch.maximum(
        (cos - rope.factor * phase.cos()).abs().max(), (sin - rope.factor * phase.sin()).abs().max()
    )
    if error > tolerance:
        raise _unsupported(type(module).__name__)


def _describe(module: torch.nn.Module) -> tuple[object, ...]:
    values = vars(module)
    return (type(module), *(values.get(n) for n in ("head_size", "rotary_dim", "base")))


def _unsupported(kind: str) -> KvPolicyError:
    return KvPolicyError(
        f"--kv-policy does not know the model's RoPE ({kind}): "
        f"supported are {', '.join(SUPPORTED)}."
    )
