"""RoPE of a model by its configuration, for statistics files that do not have it."""

from __future__ import annotations

import torch

from sglang_tri.errors import KvPolicyError
from sglang_tri.statistics.rope import Rope


def plain(theta: float, head_dim: int) -> Rope:
    """RoPE without scaling, all of the head rotated."""
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim
    return Rope(theta**-exponents, 1.0, head_dim, interleaved=False)


def of_model(model_path: str, interleaved: bool) -> Rope:
    """RoPE of a model in the Hugging Face layout.

    Args:
        interleaved: how components are paired; configurations do not say it.

    Raises:
        KvPolicyError: the configuration names none that transformers knows.
    """
    from transformers import AutoConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    config = AutoConfig.from_pretrained(model_path).get_text_config()
    settings = config.rope_parameters or {}
    kind = settings.get("rope_type", "default")
    heads = config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    if kind == "default" and "rope_theta" in settings:
        rotary = int(head_dim * settings.get("partial_rotary_factor", 1.0))
        frequencies = plain(settings["rope_theta"], rotary).frequencies
        return Rope(frequencies, 1.0, head_dim, interleaved)
    if kind not in ROPE_INIT_FUNCTIONS:
        raise KvPolicyError(f"--model-path {model_path} has RoPE of an unknown kind: {settings}.")
    frequencies, factor = ROPE_INIT_FUNCTIONS[kind](config, torch.device("cpu"))
    return Rope(frequencies.double(), float(factor), head_dim, interleaved)
