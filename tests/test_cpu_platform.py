"""What the CPU platform tells SGLang."""

from __future__ import annotations

import contextlib
from types import SimpleNamespace

import pytest
import torch
from sglang.srt.mem_cache.allocator.paged import PagedTokenToKVPoolAllocator
from sglang.srt.platforms.interface import SRTPlatform

from sglang_tri import cpu
from sglang_tri.patches.cpu import platform as cpu_platform
from sglang_tri.patches.cpu.lora import Unpinned
from sglang_tri.patches.cpu.platform import TorchCpuPlatform


def _server_args(model_dtype: torch.dtype = torch.float16, **given: object) -> SimpleNamespace:
    """What the platform reads of ServerArgs, after SGLang's own CPU defaults."""
    config = SimpleNamespace(dtype=model_dtype)
    unset = {
        "attention_backend": "intel_amx",
        "dtype": "auto",
        "max_total_tokens": None,
        "mem_fraction_static": None,
        "sleep_on_idle": False,
        "grammar_backend": None,
        "lora_backend": "csgmv",
        "enable_torch_compile": False,
    }
    return SimpleNamespace(**{**unset, **given}, get_model_config=lambda: config)


def test_defaults_let_a_bare_command_line_work() -> None:
    args = _server_args()
    TorchCpuPlatform().apply_server_args_defaults(args)
    assert args.attention_backend == "torch_native"
    assert args.dtype == "float32"
    assert args.get_model_config().dtype == torch.float32
    assert args.max_total_tokens == cpu_platform.DEFAULT_MAX_TOTAL_TOKENS
    assert args.mem_fraction_static is None
    assert args.sleep_on_idle
    assert args.grammar_backend == "llguidance"
    assert args.lora_backend == "torch_native"


@pytest.mark.parametrize(
    ("instructions", "flag", "dtype"),
    [(True, "auto", torch.bfloat16), (False, "float32", torch.float32)],
)
def test_bfloat16_needs_instructions(
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    instructions: bool,
    flag: str,
    dtype: torch.dtype,
) -> None:
    monkeypatch.setattr(cpu_platform, "multiplies_bfloat16", lambda: instructions)
    args = _server_args(model_dtype=torch.bfloat16)
    TorchCpuPlatform().apply_server_args_defaults(args)
    assert args.dtype == flag
    assert args.get_model_config().dtype == dtype
    assert ("bfloat16 is slow on this CPU" in caplog.text) == (not instructions)
    given = _server_args(model_dtype=torch.bfloat16, dtype="bfloat16")
    TorchCpuPlatform().apply_server_args_defaults(given)
    assert given.dtype == "bfloat16"


@pytest.mark.parametrize("name", ["avx512_bf16", "amx_bf16", "bf16"])
def test_instructions_as_torch_names_them(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    for found in (True, False):
        capabilities = {"architecture": "any", "avx2": True, name: found}
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda seen=capabilities: seen)
        assert cpu.multiplies_bfloat16() == found


@pytest.mark.parametrize(
    "given",
    [
        {"attention_backend": "triton"},
        {"dtype": "float16"},
        {"max_total_tokens": 128},
        {"mem_fraction_static": 0.5},
        {"grammar_backend": "outlines"},
        {"lora_backend": "triton"},
    ],
)
def test_explicit_flags_win(given: dict[str, object]) -> None:
    args = _server_args(**given)
    TorchCpuPlatform().apply_server_args_defaults(args)
    assert {name: getattr(args, name) for name in given} == given
    if "mem_fraction_static" in given:
        assert args.max_total_tokens is None


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"grammar_backend": "xgrammar"}, "--grammar-backend llguidance"),
        ({"enable_torch_compile": True}, "drop --enable-torch-compile"),
    ],
)
def test_refuses_what_would_fail_while_serving(given: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TorchCpuPlatform().apply_server_args_defaults(_server_args(**given))


@pytest.fixture
def chosen_threads(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Thread counts that the platform sets; this process stays as it is."""
    chosen: list[int] = []
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(torch, "set_num_threads", chosen.append)
    monkeypatch.setattr(torch.compiler, "set_stance", lambda stance: None)
    return chosen


@pytest.mark.parametrize(("cores", "threads"), [(1, 1), (2, 1), (3, 1), (4, 2), (16, 14)])
def test_threads_leave_cores_for_the_other_processes(
    monkeypatch: pytest.MonkeyPatch, chosen_threads: list[int], cores: int, threads: int
) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: cores)
    TorchCpuPlatform().init_backend()
    assert chosen_threads == [threads]


def test_every_core_until_something_is_served(
    monkeypatch: pytest.MonkeyPatch, chosen_threads: list[int]
) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 8)
    platform = TorchCpuPlatform()
    platform.init_backend()
    monkeypatch.setattr(torch, "get_num_threads", lambda: chosen_threads[-1])
    platform.init_backend()
    with contextlib.suppress(RuntimeError), platform.every_core():
        raise RuntimeError
    assert chosen_threads == [6, 8, 6]


def test_omp_num_threads_wins(monkeypatch: pytest.MonkeyPatch, chosen_threads: list[int]) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    platform = TorchCpuPlatform()
    platform.init_backend()
    with platform.every_core():
        assert set(chosen_threads) <= {2}
    assert set(chosen_threads) <= {2}


@pytest.mark.usefixtures("chosen_threads")
def test_nothing_is_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    stances: list[str] = []
    monkeypatch.setattr(torch.compiler, "set_stance", stances.append)
    TorchCpuPlatform().init_backend()
    assert stances == ["force_eager"]


def test_nothing_is_pinned_for_adapters() -> None:
    weight = torch.ones(2)
    with Unpinned():
        assert weight.pin_memory() is weight
        assert torch.tensor([1, 2], pin_memory=True).tolist() == [1, 2]
        assert torch.zeros(2, dtype=torch.int32, pin_memory=True).dtype == torch.int32


def test_answers_of_the_platform() -> None:
    platform = TorchCpuPlatform()
    assert isinstance(platform, SRTPlatform)
    assert platform.is_out_of_tree()
    assert not platform.is_cpu()  # SGLang's CPU engine is something else
    assert platform.device_type == platform.get_device() == "cpu"
    assert platform.get_default_attention_backend() == "torch_native"
    assert platform.get_torch_distributed_backend_str() == "gloo"
    assert platform.get_dispatch_key_name() == "native"
    assert not platform.support_cuda_graph()
    assert not platform.support_piecewise_cuda_graph()
    assert not platform.is_pin_memory_available()
    free, total = platform.get_available_memory()
    assert 0 < free < total == platform.get_device_total_memory()


def test_pools_are_the_stock_ones() -> None:
    platform = TorchCpuPlatform()
    assert platform.get_mha_kv_pool_cls().__name__ == "MHATokenToKVPool"
    assert platform.get_mla_kv_pool_cls().__name__ == "MLATokenToKVPool"
    make = platform.get_paged_allocator_cls()
    allocator = make(
        64, page_size=4, dtype=torch.float32, device="cpu", kvcache=None, need_sort=False
    )
    assert isinstance(allocator, PagedTokenToKVPoolAllocator)
    assert allocator.available_size() == 64
