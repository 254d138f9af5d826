"""Every refusal in the tables is reachable and says what to do; tests/test_docs.py has the page."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from typing import Any

import pytest

from sglang_tri.config import KvPolicyConfig
from sglang_tri.errors import KvPolicyError
from sglang_tri.patches import refusals, server
from sglang_tri.patches.refusals import MODEL_CONFIG, SERVER_ARGS, Refusal

OFFENDING_ARGS: dict[str, dict[str, Any]] = {
    "speculative decoding": {"speculative_algorithm": "EAGLE"},
    "PD disaggregation": {"disaggregation_mode": "prefill"},
    "hierarchical cache": {"enable_hierarchical_cache": True},
    "LMCache": {"enable_lmcache": True},
    "FlexKV": {"enable_flexkv": True},
    "external radix cache": {"radix_cache_backend": "mine"},
    "KV events": {"kv_events_config": "{}"},
    "streaming sessions": {"enable_streaming_session": True},
    "session radix cache": {"enable_session_radix_cache": True},
    "mixed chunk": {"enable_mixed_chunk": True},
    "pipeline parallelism": {"pp_size": 2},
    "tensor parallelism": {"tp_size": 2},
    "SMG gRPC server": {"smg_grpc_mode": True},
    "data parallelism": {"dp_size": 2},
    "DP attention": {"enable_dp_attention": True},
    "decode context parallelism": {"dcp_size": 2},
    "attention context parallelism": {"attn_cp_size": 2},
    "Ray": {"use_ray": True},
    "several tokenizer workers": {"tokenizer_worker_num": 2},
    "PD multiplexing": {"enable_pdmux": True},
    "two-batch overlap": {"enable_two_batch_overlap": True},
    "unified memory pool": {"enable_unified_memory": True},
    "HiSparse": {"enable_hisparse": True},
    "page-major KV layout": {"enable_page_major_kv_layout": True},
    "diffusion language models": {"dllm_algorithm": "LowConfidence"},
    "KV canary": {"kv_canary": "log"},
    "routed experts": {"enable_return_routed_experts": True},
    "indexer top-k": {"enable_return_indexer_topk": True},
    "FP4 or MXFP8 KV cache": {"kv_cache_dtype": "mxfp8"},
    "deterministic inference": {"enable_deterministic_inference": True},
}
OFFENDING_ENVIRONMENT = {
    "post-capture KV sizing": "SGLANG_ENABLE_POST_CAPTURE_KV_SIZING",
    "HND KV pool": "SGLANG_USE_HND_KVCACHE",
    "Rust server": "SGLANG_RUST_SERVER",
    "C++ radix tree": "SGLANG_EXPERIMENTAL_CPP_RADIX_TREE",
}


@pytest.fixture(scope="module")
def server_args(servers: Any) -> Any:
    from sglang.srt.server_args import ServerArgs

    return ServerArgs(model_path=str(servers.model("qwen3")), device="cpu")


def refused(refusal: Refusal, subject: Any) -> str:
    with pytest.raises(KvPolicyError) as error:
        refusal.check(subject)
    message = str(error.value)
    assert refusal.feature in message
    assert refusal.reason in message
    assert refusal.recipe in message
    return message


def test_a_plain_server_is_not_refused(server_args: Any) -> None:
    refusals.check_server_args(server_args)
    refusals.check_model_config(server_args.get_model_config())


@pytest.mark.parametrize("refusal", SERVER_ARGS, ids=lambda row: row.feature)
def test_server_args(refusal: Refusal, server_args: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    if refusal.feature in OFFENDING_ENVIRONMENT:
        name = OFFENDING_ENVIRONMENT[refusal.feature]
        monkeypatch.setenv(name, "1")
        assert f"{name}=1" in refused(refusal, server_args)
        return
    for name, value in OFFENDING_ARGS[refusal.feature].items():
        monkeypatch.setitem(vars(server_args), name, value)
        message = refused(refusal, server_args)
        assert "--" + name.replace("_", "-") in message
        assert value is True or str(value) in message


@pytest.mark.parametrize("name", OFFENDING_ENVIRONMENT.values())
def test_switches_are_read_as_sglang_reads_them(
    name: str, server_args: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    (refusal,) = (row for row in SERVER_ARGS if OFFENDING_ENVIRONMENT.get(row.feature) == name)
    for value in ("false", "0", "no", "N"):
        monkeypatch.setenv(name, value)
        refusal.check(server_args)
    for value in ("true", "1", "yes", "Y"):
        monkeypatch.setenv(name, value)
        assert f"{name}={value}" in refused(refusal, server_args)


def offending_models(config: Any) -> dict[str, dict[str, Any]]:
    from sglang.srt.configs.model_config import AttentionArch
    from sglang.srt.configs.qwen3_next import Qwen3NextConfig

    def text_config(**values: Any) -> Any:
        return type(config)(**{**config.to_dict(), **values})

    dynamic = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
    chunked = text_config()
    chunked.dual_chunk_attention_config = {"chunk_size": 64}
    layers = config.num_hidden_layers
    return {
        "encoder-decoder": {"is_encoder_decoder": True},
        "M-RoPE": {"model_is_mrope": True},
        "multimodal": {"is_multimodal": True},
        "MLA": {"attention_arch": AttentionArch.MLA},
        "sliding window": {
            "hf_text_config": text_config(layer_types=["sliding_attention"] * layers)
        },
        "embedding models": {"is_generation": False},
        "hybrid SSM": {"hf_config": Qwen3NextConfig()},
        "dual-chunk attention": {"hf_config": chunked},
        "local attention": {"is_local_attention_model": True},
        "other RoPE types": {
            "hf_text_config": text_config(rope_parameters=dynamic, rope_scaling=dynamic)
        },
    }


@pytest.mark.parametrize("refusal", MODEL_CONFIG, ids=lambda row: row.feature)
def test_models(refusal: Refusal, server_args: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model = server_args.get_model_config()
    for name, value in offending_models(model.hf_text_config)[refusal.feature].items():
        monkeypatch.setattr(model, name, value)
    refused(refusal, model)


def test_unknown_versions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.metadata.version", lambda name: "0.5.99")
    with pytest.raises(KvPolicyError, match=r"0\.5\.99.*--kv-allow-untested-sglang"):
        refusals.check_version(KvPolicyConfig())
    refusals.check_version(KvPolicyConfig(allow_untested_sglang=True))


@pytest.mark.slow
def test_the_real_command_line(servers: Any) -> None:
    """Refused before anything is loaded: one line, non-zero exit."""
    command = [sys.executable, "-m", "sglang.launch_server"]
    command += ["--model-path", str(servers.model("qwen3"))]
    command += ["--kv-policy", "triattention", "--kv-stats", "no/such.pt"]
    environment = {**os.environ, "SGLANG_PLATFORM": ""}
    result = subprocess.run(
        command, capture_output=True, text=True, timeout=300, check=False, env=environment
    )
    assert result.returncode != 0
    assert "--kv-stats no/such.pt does not exist" in result.stderr.strip().splitlines()[-1]
    assert "Traceback" not in result.stderr
    assert "Load weight" not in result.stderr + result.stdout


def test_second_moments_that_a_file_lacks(servers: Any, server_args: Any) -> None:
    """Official files lack them."""
    official = str(servers.model("qwen3") / "stats.pt")
    settings = KvPolicyConfig(policy="triattention", stats=official)
    server.check_statistics(settings, server_args.get_model_config())
    asked = replace(settings, policy="triattention-variance")
    with pytest.raises(
        KvPolicyError, match=r"triattention-variance needs E\|q\|\^2.*--kv-stats auto"
    ):
        server.check_statistics(asked, server_args.get_model_config())


def test_reuse_without_a_prefix_cache(server_args: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Asked for, it is refused; by default there is just nothing to reuse."""
    monkeypatch.setitem(vars(server_args), "disable_radix_cache", True)
    asked = KvPolicyConfig.from_keywords({"kv_policy": "streaming", "kv_reuse": "continuation"})
    with pytest.raises(KvPolicyError, match=r"--kv-reuse continuation .*--disable-radix-cache"):
        server.check(server_args, asked)
    server.check(server_args, KvPolicyConfig.from_keywords({"kv_policy": "streaming"}))
