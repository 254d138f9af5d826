"""Query statistics: what TriAttention knows about a model's queries before RoPE."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass, field
from typing import Any

import torch

from sglang_tri.errors import KvPolicyError
from sglang_tri.statistics.rope import Rope


@dataclass(frozen=True)
class Statistics:
    """Means over calibration tokens before RoPE, per layer, head and frequency pair.

    Attributes:
        q_mean: complex64 [layers, query_heads, head_dim / 2], E[q_f].
        q_abs: float32 [layers, query_heads, head_dim / 2], E|q_f|.
        q_square: float32 [layers, query_heads, head_dim / 2], E|q_f|^2; official files lack it.
        q_norm: float32 [layers, query_heads], E||q|| of whole heads; official files lack it.
        k_mean: complex64 [layers, kv_heads, head_dim / 2], E[k_f]; official files lack it.
        rope: of the model that they were made with; official files lack it.
        metadata: plain values from the file, e.g. `model_name`, `rope_style`, `tokens`.
        path: where it was read from, for messages.
    """

    q_mean: torch.Tensor
    q_abs: torch.Tensor
    _: KW_ONLY
    q_square: torch.Tensor | None = None
    q_norm: torch.Tensor | None = None
    k_mean: torch.Tensor | None = None
    rope: Rope | None = None
    metadata: dict[str, Any] = field(default_factory=dict)
    path: str = ""

    @property
    def shape(self) -> tuple[int, int, int]:
        """(layers, query heads, head_dim)."""
        layers, heads, pairs = self.q_mean.shape
        return layers, heads, 2 * pairs

    @property
    def model_name(self) -> str | None:
        return self.metadata.get("model_name")

    @property
    def interleaved(self) -> bool:
        """Whether neighbours make a pair; halves do where the file does not say."""
        return self.metadata.get("rope_style") == "interleaved"

    def check_geometry(self, layers: int, query_heads: int, head_dim: int) -> None:
        """Raise `KvPolicyError` where the statistics cannot belong to the served model."""
        for what, found, wanted in zip(
            ("layers", "query heads per layer", "head size"),
            self.shape,
            (layers, query_heads, head_dim),
            strict=True,
        ):
            if found != wanted:
                raise self._other_model(f"has {found} {what}", f"has {wanted}")

    def check_rope(self, rope: Rope) -> None:
        """Raise `KvPolicyError` where the file says that the model's RoPE was another."""
        style = self.metadata.get("rope_style")
        if style is not None and style != rope.style:
            raise self._other_model(
                f"pairs RoPE components in {style!r} style", f"in {rope.style!r} style"
            )
        difference = None if self.rope is None else self.rope.difference(rope)
        if difference is not None:
            raise self._other_model(
                f"was made with RoPE of {difference[0]}", f"has {difference[1]}"
            )

    def check_rope_settings(self, settings: dict[str, Any]) -> None:
        """Compare what an official file may say of RoPE with the model's configuration.

        Args:
            settings: `rope_theta`, `rope_type`, and what else the model's configuration has.

        Raises:
            KvPolicyError: a value differs.
        """
        scaling = self.metadata.get("rope_scaling")
        stated = dict(scaling) if isinstance(scaling, dict) else {}
        outer = {name: self.metadata.get(name) for name in ("rope_theta", "rope_type")}
        stated |= {name: value for name, value in outer.items() if value is not None}
        for name, value in stated.items():
            if settings.get(name) not in (None, value):
                raise self._other_model(
                    f"was made with {name} {value}", f"has {name} {settings[name]}"
                )

    def _other_model(self, found: str, wanted: str) -> KvPolicyError:
        return KvPolicyError(
            f"{self.path} {found}, the model {wanted}: use statistics made for this model."
        )
