"""What the policy cannot run with, by name, with the nearest recipe that works.

All of this is known before the model loads; `lifecycle` checks what only a loaded engine knows.
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
        feature: its name, as the README lists it.
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


def _option(name: str, off: tuple[Any, ...] = (None, False)) -> Callable[[Any], str]:
    """Finds a server argument whose value is not one of `off`."""
    flag = "--" + name.replace("_", "-")

    def found(server_args: Any) -> str:
        value = getattr(server_args, name)
        if value in off:
            return ""
        return flag if value is True else f"{flag} {value}"

    return found


def _larger_than_one(name: str) -> Callable[[Any], str]:
    flag = "--" + name.replace("_", "-")
    return lambda server_args: (
        f"{flag} {getattr(server_args, name)}" if getattr(server_args, name) > 1 else ""
    )


def _environment(name: str) -> Callable[[Any], str]:
    """Finds a switch of SGLang's that is on."""
    return lambda _: f"{name}={os.environ[name]}" if serving.switch(name) else ""


_KEYED = "pages would be stored under tokens that they no longer hold"
_OWN_STREAM = "it writes or reads slots outside the forward stream"
_OWN_LENGTHS = "it takes slot counts from token counts"

SERVER_ARGS = (
    Refusal(
        "speculative decoding",
        _option("speculative_algorithm"),
        "it prepares decode batches by itself",
        "Leave --speculative-algorithm out.",
    ),
    Refusal(
        "PD disaggregation",
        _option("disaggregation_mode", ("null",)),
        "rows are transferred by their token count",
        "Serve prefill and decode in one server.",
    ),
    Refusal(
        "hierarchical cache",
        _option("enable_hierarchical_cache"),
        _OWN_STREAM,
        "Leave --enable-hierarchical-cache out.",
    ),
    Refusal("LMCache", _option("enable_lmcache"), _KEYED, "Leave --enable-lmcache out."),
    Refusal("FlexKV", _option("enable_flexkv"), _KEYED, "Leave --enable-flexkv out."),
    Refusal(
        "external radix cache",
        _option("radix_cache_backend"),
        _KEYED,
        "Leave --radix-cache-backend out.",
    ),
    Refusal("KV events", _option("kv_events_config"), _KEYED, "Leave --kv-events-config out."),
    Refusal(
        "streaming sessions",
        _option("enable_streaming_session"),
        _OWN_LENGTHS,
        "Use ordinary sessions, or send the whole conversation.",
    ),
    Refusal(
        "session radix cache",
        _option("enable_session_radix_cache"),
        "it has not been tested",
        "Leave --enable-session-radix-cache out.",
    ),
    Refusal(
        "mixed chunk",
        _option("enable_mixed_chunk"),
        _OWN_LENGTHS,
        "Leave --enable-mixed-chunk out; chunked prefill works.",
    ),
    Refusal(
        "pipeline parallelism",
        _larger_than_one("pp_size"),
        "its scheduler loop fills batches by itself",
        "Use --pp-size 1.",
    ),
    Refusal(
        "tensor parallelism",
        _larger_than_one("tp_size"),
        "it has not been tested",
        "Use --tp-size 1, and one server for each GPU.",
    ),
    Refusal(
        "data parallelism",
        _larger_than_one("dp_size"),
        "it has not been tested",
        "Use --dp-size 1, and one server for each GPU.",
    ),
    Refusal(
        "DP attention",
        _option("enable_dp_attention"),
        "it has not been tested",
        "Leave --enable-dp-attention out.",
    ),
    Refusal(
        "decode context parallelism",
        _larger_than_one("dcp_size"),
        "a request's slots lie on several ranks",
        "Use --dcp-size 1.",
    ),
    Refusal(
        "attention context parallelism",
        _larger_than_one("attn_cp_size"),
        "it has not been tested",
        "Use --attn-cp-size 1.",
    ),
    Refusal("Ray", _option("use_ray"), "its actors load no plugins", "Leave --use-ray out."),
    Refusal(
        "several tokenizer workers",
        _larger_than_one("tokenizer_worker_num"),
        "they load no plugins",
        "Use --tokenizer-worker-num 1.",
    ),
    Refusal("PD multiplexing", _option("enable_pdmux"), _OWN_STREAM, "Leave --enable-pdmux out."),
    Refusal(
        "two-batch overlap",
        _option("enable_two_batch_overlap"),
        "it has not been tested",
        "Leave --enable-two-batch-overlap out.",
    ),
    Refusal(
        "unified memory pool",
        _option("enable_unified_memory"),
        "it moves slots by itself",
        "Leave --enable-unified-memory out.",
    ),
    Refusal("HiSparse", _option("enable_hisparse"), _OWN_STREAM, "Leave --enable-hisparse out."),
    Refusal(
        "page-major KV layout",
        _option("enable_page_major_kv_layout"),
        "rows of one layer are not contiguous",
        "Leave --enable-page-major-kv-layout out.",
    ),
    Refusal(
        "diffusion language models",
        _option("dllm_algorithm"),
        "they decode in blocks",
        "Serve an autoregressive model.",
    ),
    Refusal(
        "KV canary",
        _option("kv_canary", ("none",)),
        "it expects slots to stay where they were written",
        "Leave --kv-canary out.",
    ),
    Refusal(
        "routed experts",
        _option("enable_return_routed_experts"),
        _OWN_LENGTHS,
        "Leave --enable-return-routed-experts out.",
    ),
    Refusal(
        "indexer top-k",
        _option("enable_return_indexer_topk"),
        _OWN_LENGTHS,
        "Leave --enable-return-indexer-topk out.",
    ),
    Refusal(
        "FP4 or MXFP8 KV cache",
        lambda args: (
            f"--kv-cache-dtype {args.kv_cache_dtype}"
            if any(kind in args.kv_cache_dtype for kind in ("fp4", "mxfp8"))
            else ""
        ),
        "scales are stored beside the rows",
        "Use --kv-cache-dtype auto, bfloat16, fp8_e4m3 or fp8_e5m2.",
    ),
    Refusal(
        "post-capture KV sizing",
        _environment("SGLANG_ENABLE_POST_CAPTURE_KV_SIZING"),
        "it leaves no memory for work outside CUDA graphs",
        "Unset SGLANG_ENABLE_POST_CAPTURE_KV_SIZING.",
    ),
    Refusal(
        "HND KV pool",
        _environment("SGLANG_USE_HND_KVCACHE"),
        "a slot is not one contiguous row",
        "Unset SGLANG_USE_HND_KVCACHE.",
    ),
    Refusal(
        "C++ radix tree",
        _environment("SGLANG_EXPERIMENTAL_CPP_RADIX_TREE"),
        "it has not been tested",
        "Unset SGLANG_EXPERIMENTAL_CPP_RADIX_TREE.",
    ),
    Refusal(
        "SMG gRPC server",
        _option("smg_grpc_mode"),
        "its process loads no plugins",
        "Leave --smg-grpc-mode out; the HTTP server works.",
    ),
    Refusal(
        "Rust server",
        _environment("SGLANG_RUST_SERVER"),
        "it loads no plugins",
        "Unset SGLANG_RUST_SERVER.",
    ),
    Refusal(
        "deterministic inference",
        _option("enable_deterministic_inference"),
        "it has not been tested",
        "Leave --enable-deterministic-inference out.",
    ),
)


def _rope_type(model: Any) -> str:
    kind = serving.rope_settings(model)["rope_type"]
    return "" if kind in ("default", "linear", "llama3", "yarn") else f"RoPE type {kind!r}"


def _sliding_window(model: Any) -> str:
    kinds = set(getattr(model.hf_text_config, "layer_types", None) or ())
    if model.is_hybrid_swa or "sliding_attention" in kinds:
        return "layers with a sliding window"
    return ""


_OTHER_MODEL = "Serve another model, or leave --kv-policy out."

MODEL_CONFIG = (
    Refusal(
        "embedding models",
        lambda model: "" if model.is_generation else "an embedding model",
        "they generate nothing",
        _OTHER_MODEL,
    ),
    Refusal(
        "encoder-decoder",
        lambda model: "an encoder-decoder model" if model.is_encoder_decoder else "",
        "encoder slots precede the prompt",
        _OTHER_MODEL,
    ),
    Refusal(
        "M-RoPE",
        lambda model: "M-RoPE" if model.model_is_mrope else "",
        "positions are not one number per token",
        _OTHER_MODEL,
    ),
    Refusal(
        "multimodal",
        lambda model: "a multimodal model" if model.is_multimodal else "",
        "it has not been tested",
        _OTHER_MODEL,
    ),
    Refusal(
        "MLA",
        lambda model: "multi-head latent attention" if serving.has_latent_attention(model) else "",
        "all heads share one latent row",
        _OTHER_MODEL,
    ),
    Refusal(
        "sliding window",
        _sliding_window,
        "attention kernels count slots of the window, not positions",
        _OTHER_MODEL,
    ),
    Refusal(
        "hybrid SSM",
        lambda model: (
            "state-space or linear-attention layers" if serving.has_recurrent_layers(model) else ""
        ),
        "their state cannot forget tokens",
        _OTHER_MODEL,
    ),
    Refusal(
        "dual-chunk attention",
        lambda model: (
            "dual-chunk attention"
            if getattr(model.hf_config, "dual_chunk_attention_config", None)
            else ""
        ),
        "it counts slots, not positions",
        _OTHER_MODEL,
    ),
    Refusal(
        "local attention",
        lambda model: (
            "local attention"
            if model.is_local_attention_model or model.attention_chunk_size
            else ""
        ),
        "it counts slots, not positions",
        _OTHER_MODEL,
    ),
    Refusal(
        "other RoPE types",
        _rope_type,
        "the score needs its frequencies",
        "Supported are default, linear, llama3, YaRN and partial rotary.",
    ),
)


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
