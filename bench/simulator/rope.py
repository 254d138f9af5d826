"""Rotary position embedding, taken from the transformers module of the loaded model."""

from __future__ import annotations

import copy
from typing import Any

import torch
from transformers import PreTrainedModel

# These change their frequencies with the length, so a key has no rotation of its own.
_LENGTH_DEPENDENT = ("dynamic", "longrope")


class Rope:
    """Rotation of queries and keys, and the frequencies for scoring keys before rotation.

    Frequency pairs ("half" layout): of the first r = `rotary_dim` dimensions x[f] with
    x[f + r/2]; the remaining ones are never rotated and are paired half-wise among themselves.
    """

    def __init__(self, model: PreTrainedModel, head_dim: int) -> None:
        self.module = _rotary_module(model)
        self.head_dim = head_dim
        frequencies = self.module.inv_freq.detach().to(torch.float64)
        self.rotary_dim = 2 * frequencies.numel()
        still = (head_dim - self.rotary_dim) // 2
        if still < 0 or (head_dim - self.rotary_dim) % 2:
            raise ValueError(f"rotary dimension {self.rotary_dim} of head dimension {head_dim}")
        scale = float(self.module.attention_scaling)
        self.omega = torch.cat([frequencies, torch.zeros(still, dtype=torch.float64)])
        """Radians per position: float64 [head_dim / 2], zero for unrotated pairs."""
        self.scale = torch.cat(
            [
                torch.full_like(frequencies, scale),
                torch.ones(still, dtype=torch.float64),
            ]
        )
        """Attention factor that RoPE multiplies a query or key by: float64 [head_dim / 2]."""

    def rotate(self, x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Rotate x [heads, tokens, head_dim] at logical positions int64 [tokens]."""
        cos, sin = self.module(x, positions[None])
        part = x[..., : self.rotary_dim]
        first, second = part.chunk(2, dim=-1)
        turned = part * cos + torch.cat([-second, first], dim=-1) * sin
        return torch.cat([turned, x[..., self.rotary_dim :]], dim=-1)

    def rotate_back(self, x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """What `rotate` makes x [heads, tokens, head_dim] of."""
        back = self.rotate(x, -positions)
        factor = self.module.attention_scaling**2
        return torch.cat([back[..., : self.rotary_dim] / factor, x[..., self.rotary_dim :]], dim=-1)

    def pairs(self, x: torch.Tensor) -> torch.Tensor:
        """Unrotated x [..., head_dim] as complex128 [..., head_dim / 2]."""
        x = x.to(torch.float64)
        real, imag = x[..., : self.rotary_dim].chunk(2, dim=-1)
        rest_real, rest_imag = x[..., self.rotary_dim :].chunk(2, dim=-1)
        return torch.complex(
            torch.cat([real, rest_real], dim=-1), torch.cat([imag, rest_imag], dim=-1)
        )


def _rotary_module(model: PreTrainedModel) -> Any:
    """The model's rotary module, or its like where that one ignores partial_rotary_factor."""
    module = model.model.rotary_emb
    parameters = model.config.rope_parameters
    kind = parameters["rope_type"]
    if kind in _LENGTH_DEPENDENT:
        raise ValueError(f"rope type {kind!r} depends on the length: not supported")
    if kind != "default" or (parameters.get("partial_rotary_factor") or 1.0) == 1.0:
        return module
    # transformers' "default" takes no partial factor in these models; "linear" by 1 does.
    config = copy.deepcopy(model.config)
    config.rope_parameters = {**parameters, "rope_type": "linear", "factor": 1.0}
    return type(module)(config=config)
