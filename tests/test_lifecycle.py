"""What only a loaded engine shows is checked before the server is ready."""

from __future__ import annotations

import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from sglang_tri.config import KvPolicyConfig
from sglang_tri.errors import KvPolicyError
from sglang_tri.patches import scheduler as hooks
from sglang_tri.patches.versions.v0_5_17 import loading, scheduling


class OtherCache:
    pass


def scheduler(**values: Any) -> Any:
    return SimpleNamespace(**values)


def test_another_prefix_cache() -> None:
    with pytest.raises(KvPolicyError, match="OtherCache"):
        loading._check_tree(OtherCache())


def test_another_pool() -> None:
    with pytest.raises(KvPolicyError, match="OtherCache"):
        loading._check_pool(OtherCache())


def test_a_window_in_one_layer() -> None:
    from sglang.srt.layers.radix_attention import RadixAttention

    def layer(number: int, window: int) -> RadixAttention:
        return RadixAttention(2, 16, 1.0, 1, layer_id=number, sliding_window_size=window)

    loading._check_windows(torch.nn.ModuleList([layer(0, -1), layer(1, -1)]))
    with pytest.raises(KvPolicyError, match=r"window of 128 tokens \(layer 1\)"):
        loading._check_windows(torch.nn.ModuleList([layer(0, -1), layer(1, 128)]))


@pytest.mark.parametrize("name", ["k_scale_float", "v_scale_float"])
def test_scales_of_stored_rows(name: str) -> None:
    """Where the cache has 8 bits, scores count what a stored row stands for."""
    from sglang.srt.layers.radix_attention import RadixAttention

    layers = [RadixAttention(2, 16, 1.0, 1, layer_id=number) for number in (1, 0)]
    model = torch.nn.ModuleList(layers)
    buffers = [torch.zeros(1), torch.zeros(1)]
    bytes_pool: Any = SimpleNamespace(
        k_buffer=buffers, dtype=torch.float8_e4m3fn, store_dtype=torch.uint8
    )
    plain_pool: Any = SimpleNamespace(
        k_buffer=buffers, dtype=torch.bfloat16, store_dtype=torch.bfloat16
    )
    assert loading._scale(model, bytes_pool, name) is None
    setattr(layers[0], name, 0.5)
    found = loading._scale(model, bytes_pool, name)
    assert found is not None
    assert found.tolist() == [1.0, 0.5]
    assert loading._scale(model, plain_pool, name) is None


@pytest.mark.parametrize(
    ("overlap", "barrier", "backend", "forced", "waits"),
    [
        (True, True, "fa3", "", False),
        (True, True, "flashinfer", "", False),
        (True, True, "triton", "", False),
        (True, True, "triton", "1", True),
        (True, True, "trtllm_mha", "", True),
        (True, False, "triton", "", True),
        (False, False, "trtllm_mha", "1", False),
    ],
)
def test_a_running_forward_pass_is_waited_for(
    monkeypatch: pytest.MonkeyPatch,
    overlap: bool,
    barrier: bool,
    backend: str,
    forced: str,
    waits: bool,
) -> None:
    """Where it may still read the slots that a round takes away, and SGLang does not wait."""
    steps: list[str] = []
    stream = SimpleNamespace(wait_stream=lambda other: steps.append(f"wait for {other}"))

    def planned(*args: Any) -> torch.Tensor:
        steps.append("plan")
        return torch.zeros(0, dtype=torch.int64)

    free = SimpleNamespace(free_segment=lambda *args, **kwargs: steps.append("free"))
    everything = SimpleNamespace(
        scheduler=scheduler(
            token_to_kv_pool_allocator=free,
            req_to_token_pool=SimpleNamespace(req_to_token=None),
            enable_overlap=overlap,
            schedule_stream=stream,
            forward_stream="forward",
            _war_barrier_enabled=barrier,
            server_args=SimpleNamespace(get_attention_backends=lambda: ("fa3", backend)),
        ),
        engine=SimpleNamespace(plan_rounds=planned),
    )
    monkeypatch.setenv(hooks.WAIT, forced)
    monkeypatch.setattr(hooks, "active", lambda: everything)
    hooks.evict([])
    assert steps == ["wait for forward"] * waits + ["plan", "free"]


# What SGLang records into a decode graph looks at nothing of these backends, or builds a table.
IN_GRAPHS = """
import importlib, sys, types
from sglang.srt.model_executor.forward_batch_info import ForwardMode

class Kernels(types.ModuleType):
    __path__ = []
    def __getattr__(self, name):
        return None

# They load on a GPU alone, and nothing is called here.
for name in ("sgl_kernel", "sgl_kernel.flash_attn", "sgl_kernel.sparse_flash_attn"):
    sys.modules[name] = Kernels(name)
batch = types.SimpleNamespace(forward_mode=ForwardMode.DECODE)
for module, name in (
    ("flashinfer_backend", "FlashInferAttnBackend"),
    ("flashattention_backend", "FlashAttentionBackend"),
    ("triton_backend", "TritonAttnBackend"),
    ("trtllm_mha_backend", "TRTLLMHAAttnBackend"),
):
    kind = getattr(importlib.import_module(f"sglang.srt.layers.attention.{module}"), name)
    backend = object.__new__(kind)
    try:
        backend.init_forward_metadata_in_graph(batch)
        print("nothing")
    except AttributeError:
        print("looks")
"""


@pytest.mark.slow
def test_who_reads_the_slot_table_inside_a_decode_graph() -> None:
    """FlashAttention 3 and 4 are one class."""
    from sglang.srt.server_args import ATTENTION_BACKEND_CHOICES

    done = subprocess.run([sys.executable, "-c", IN_GRAPHS], capture_output=True, text=True)
    assert done.stdout.split()[-4:] == ["nothing"] * 3 + ["looks"], done.stderr
    assert {"fa3", "fa4", "flashinfer", "triton"} == set(scheduling._READ_BEFORE_GRAPHS)
    assert set(scheduling._READ_BEFORE_GRAPHS) < set(ATTENTION_BACKEND_CHOICES)


def test_scratch_is_reserved_before_the_pool(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hooks, "_workspace", None)
    with pytest.raises(RuntimeError, match="before the policy's memory"):
        hooks._build(scheduler(), KvPolicyConfig("streaming"))
    runner: Any = SimpleNamespace(device="cpu")
    hooks.reserve_workspace(runner)
    assert hooks._workspace is not None
    assert hooks._workspace.size == 64 << 20
