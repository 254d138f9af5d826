"""What the policy cannot run with, by name, with the nearest recipe that works.

All of this is known before the model loads; `loading.check` what only a loaded engine knows.
"""

from __future__ import annotations

import importlib.metadata
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from sglang_tri.config import KvPolicyConfig
from sglang_tri.errors import KvPolicyError
from sglang_tri.patches.versions import TESTED_VERSIONS, serving
from sglang_tri.patches.versions.interface import ModelConfig, ServerArgs


@dataclass(frozen=True)
class Refusal:
    """One feature that the policy cannot run with.

    Attributes:
        feature: its name, as docs/refusals.md lists it.
        found: from the server's arguments or model, the offending setting, or "" if all is well.
        reason: why it cannot work.
        recipe: what to do instead.
    """

    feature: str
    found: Callable[[Any], str]
    reason: str
    recipe: str

    def check(self, subject: Any) -> None:
        """Raise `KvPolicyError` if `subject` has the feature."""
        found = self.found(subject)
        if found:
            raise KvPolicyError(
                f"--kv-policy does not work with {found} ({self.feature}): {self.reason}. "
                f"{self.recipe}"
            )


def _option(
    feature: str,
    name: str,
    reason: str,
    recipe: str = "",
    off: tuple[Any, ...] = (None, False),
) -> Refusal:
    """Of a server argument whose value is not one of `off`."""
    flag = "--" + name.replace("_", "-")

    def found(server_args: ServerArgs) -> str:
        value = getattr(server_args, name)
        if value in off:
            return ""
        return flag if value is True else f"{flag} {value}"

    return Refusal(feature, found, reason, recipe or f"Leave {flag} out.")


def _parallel(feature: str, name: str, reason: str, recipe: str = "") -> Refusal:
    """Of a size of which only 1 works."""
    return _option(feature, name, reason, recipe or f"Use --{name.replace('_', '-')} 1.", (1,))


def _switch(feature: str, name: str, reason: str, recipe: str = "") -> Refusal:
    """Of a switch of SGLang's in the environment."""

    def found(_: Any) -> str:
        return f"{name}={os.environ[name]}" if serving.switch(name) else ""

    return Refusal(feature, found, reason, recipe or f"Unset {name}.")


def _model(
    feature: str, reason: str, has: Callable[[ModelConfig], Any], shown: str, recipe: str = ""
) -> Refusal:
    """Of a model; `shown` is what messages call it."""
    recipe = recipe or "Serve another model, or leave --kv-policy out."
    return Refusal(feature, lambda model: shown if has(model) else "", reason, recipe)


_KEYED = "pages would be stored under tokens that they no longer hold"
_OWN_STREAM = "it writes or reads slots outside the forward stream"
_OWN_LENGTHS = "it takes slot counts from token counts"
_UNTESTED = "it has not been tested"
_COUNTS_SLOTS = "it counts slots, not positions"


def _fp4_or_mxfp8(server_args: ServerArgs) -> str:
    dtype = server_args.kv_cache_dtype
    return f"--kv-cache-dtype {dtype}" if "fp4" in dtype or "mxfp8" in dtype else ""


# fmt: off
SERVER_ARGS = (
    _option("speculative decoding", "speculative_algorithm",
            "it prepares decode batches by itself"),
    _option("PD disaggregation", "disaggregation_mode",
            "rows are transferred by their token count",
            "Serve prefill and decode in one server.", off=("null",)),
    _option("hierarchical cache", "enable_hierarchical_cache", _OWN_STREAM),
    _option("LMCache", "enable_lmcache", _KEYED),
    _option("FlexKV", "enable_flexkv", _KEYED),
    _option("external radix cache", "radix_cache_backend", _KEYED),
    _option("KV events", "kv_events_config", _KEYED),
    _option("streaming sessions", "enable_streaming_session", _OWN_LENGTHS,
            "Use ordinary sessions, or send the whole conversation."),
    _option("session radix cache", "enable_session_radix_cache", _UNTESTED),
    _option("mixed chunk", "enable_mixed_chunk", _OWN_LENGTHS,
            "Leave --enable-mixed-chunk out; chunked prefill works."),
    _parallel("pipeline parallelism", "pp_size", "its scheduler loop fills batches by itself"),
    _parallel("tensor parallelism", "tp_size", _UNTESTED,
              "Use --tp-size 1, and one server for each GPU."),
    _parallel("data parallelism", "dp_size", _UNTESTED,
              "Use --dp-size 1, and one server for each GPU."),
    _option("DP attention", "enable_dp_attention", _UNTESTED),
    _parallel("decode context parallelism", "dcp_size",
              "a request's slots lie on several ranks"),
    _parallel("attention context parallelism", "attn_cp_size", _UNTESTED),
    _option("Ray", "use_ray", "its actors load no plugins"),
    _parallel("several tokenizer workers", "tokenizer_worker_num", "they load no plugins"),
    _option("PD multiplexing", "enable_pdmux", _OWN_STREAM),
    _option("two-batch overlap", "enable_two_batch_overlap", _UNTESTED),
    _option("unified memory pool", "enable_unified_memory", "it moves slots by itself"),
    _option("HiSparse", "enable_hisparse", _OWN_STREAM),
    _option("page-major KV layout", "enable_page_major_kv_layout",
            "rows of one layer are not contiguous"),
    _option("diffusion language models", "dllm_algorithm", "they decode in blocks",
            "Serve an autoregressive model."),
    _option("KV canary", "kv_canary", "it expects slots to stay where they were written",
            off=("none",)),
    _option("routed experts", "enable_return_routed_experts", _OWN_LENGTHS),
    _option("indexer top-k", "enable_return_indexer_topk", _OWN_LENGTHS),
    Refusal("FP4 or MXFP8 KV cache", _fp4_or_mxfp8, "scales are stored beside the rows",
            "Use --kv-cache-dtype auto, bfloat16, fp8_e4m3 or fp8_e5m2."),
    _switch("post-capture KV sizing", "SGLANG_ENABLE_POST_CAPTURE_KV_SIZING",
            "it leaves no memory for work outside CUDA graphs"),
    _switch("HND KV pool", "SGLANG_USE_HND_KVCACHE", "a slot is not one contiguous row"),
    _switch("C++ radix tree", "SGLANG_EXPERIMENTAL_CPP_RADIX_TREE", _UNTESTED),
    _option("SMG gRPC server", "smg_grpc_mode", "its process loads no plugins",
            "Leave --smg-grpc-mode out; the HTTP server works."),
    _switch("Rust server", "SGLANG_RUST_SERVER", "it loads no plugins"),
    _option("deterministic inference", "enable_deterministic_inference", _UNTESTED),
)
# fmt: on


def _rope_type(model: ModelConfig) -> str:
    kind = serving.rope_settings(model)["rope_type"]
    return "" if kind in ("default", "linear", "llama3", "yarn") else f"RoPE type {kind!r}"


def _has_window(model: ModelConfig) -> bool:
    kinds = getattr(model.hf_text_config, "layer_types", None) or ()
    return model.is_hybrid_swa or "sliding_attention" in kinds


# fmt: off
MODEL_CONFIG = (
    _model("embedding models", "they generate nothing",
           lambda model: not model.is_generation, "an embedding model"),
    _model("encoder-decoder", "encoder slots precede the prompt",
           lambda model: model.is_encoder_decoder, "an encoder-decoder model"),
    _model("M-RoPE", "positions are not one number per token",
           lambda model: model.model_is_mrope, "M-RoPE"),
    _model("multimodal", _UNTESTED, lambda model: model.is_multimodal, "a multimodal model"),
    _model("MLA", "all heads share one latent row",
           serving.has_latent_attention, "multi-head latent attention"),
    _model("sliding window", "attention kernels count slots of the window, not positions",
           _has_window, "layers with a sliding window"),
    _model("hybrid SSM", "their state cannot forget tokens",
           serving.has_recurrent_layers, "state-space or linear-attention layers"),
    _model("dual-chunk attention", _COUNTS_SLOTS,
           lambda model: getattr(model.hf_config, "dual_chunk_attention_config", None),
           "dual-chunk attention"),
    _model("local attention", _COUNTS_SLOTS,
           lambda model: model.is_local_attention_model or model.attention_chunk_size,
           "local attention"),
    Refusal("other RoPE types", _rope_type, "the score needs its frequencies",
            "Supported are default, linear, llama3, YaRN and partial rotary."),
)
# fmt: on


def check_version(settings: KvPolicyConfig) -> None:
    """Refuse SGLang versions that this release was not tested with."""
    version = importlib.metadata.version("sglang")
    if version not in TESTED_VERSIONS and not settings.allow_untested_sglang:
        raise KvPolicyError(
            f"--kv-policy was not tested with SGLang {version}: install "
            f"{' or '.join(TESTED_VERSIONS)}, or add --kv-allow-untested-sglang."
        )


def check_server_args(server_args: ServerArgs) -> None:
    for refusal in SERVER_ARGS:
        refusal.check(server_args)


def check_model_config(model: ModelConfig) -> None:
    for refusal in MODEL_CONFIG:
        refusal.check(model)
