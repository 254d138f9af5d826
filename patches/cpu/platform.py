"""An out-of-tree SGLang platform for machines without an accelerator.

Unmodified SGLang serves on a CPU only with kernels built for that. Where this class is its platform
(see `activation`), it takes plain torch paths instead: slow, but the scheduler, the radix tree and
the KV pools are the real ones, so everything built on them runs and can be tested without a GPU.
"""

from __future__ import annotations

import logging
import os
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from sglang.srt.platforms.cpu import CpuSRTPlatform
from sglang.srt.platforms.device_mixin import PlatformEnum

from sglang_tri.cpu import multiplies_bfloat16

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from sglang.srt.layers.attention.base_attn_backend import AttentionBackend
    from sglang.srt.mem_cache.allocator.base import BaseTokenToKVPoolAllocator
    from sglang.srt.model_executor.model_runner import ModelRunner
    from sglang.srt.server_args import ServerArgs

logger = logging.getLogger(__name__)

# Slots of the KV pool unless a flag sizes it: host memory would hold millions of a small model,
# and SGLang copies the list of free slots whenever it frees some.
DEFAULT_MAX_TOTAL_TOKENS = 65536
# Processes of the server besides the one that runs the model: HTTP with tokenizer, detokenizer.
OTHER_PROCESSES = 2


class TorchCpuPlatform(CpuSRTPlatform):
    """SGLang on a CPU through torch alone.

    Being out-of-tree (`PlatformEnum.OOT`) makes every SGLang op take its `forward_native` path.
    Device, memory (of the whole host) and gloo answers are those of SGLang's CPU platform.
    """

    _enum = PlatformEnum.OOT
    # Threads that torch takes by itself; known once a process is set up to run a model.
    _all_threads: int | None = None

    def apply_server_args_defaults(self, server_args: ServerArgs) -> None:
        """Fill what was not asked for with values that suit a CPU; explicit flags stay.

        The attention backend becomes `torch_native`, also in place of `intel_amx` (SGLang's choice
        for a CPU, which needs kernels that are absent here). A model that `--dtype auto` would run
        in a half precision that this CPU has no instructions for runs in float32, which is faster
        then; a log line says so. The KV pool gets `DEFAULT_MAX_TOTAL_TOKENS` slots at most. An idle
        scheduler sleeps (a flag that can only be switched on) instead of spinning on a core that
        other processes could use. Grammars run on `llguidance`, LoRA adapters on `torch_native`, in
        place of `csgmv` (SGLang's choice, which is written in Triton).

        Raises:
            ValueError: `--grammar-backend xgrammar`, which kills the server on the first request
                that needs it (SGLang applies its masks on accelerators only), or
                `--enable-torch-compile`, which `init_backend` rules out.
        """
        if server_args.grammar_backend == "xgrammar":
            raise ValueError(
                "SGLang cannot use xgrammar on a CPU: pass --grammar-backend llguidance"
            )
        if server_args.enable_torch_compile:
            raise ValueError(
                "this platform runs without torch.compile: drop --enable-torch-compile"
            )
        if server_args.attention_backend in (None, "intel_amx"):
            server_args.attention_backend = "torch_native"
        model_config = server_args.get_model_config()
        if server_args.dtype == "auto" and _is_slow(model_config.dtype):
            logger.warning(
                "The model's %s is slow on this CPU: it is served in float32. --dtype chooses.",
                str(model_config.dtype).removeprefix("torch."),
            )
            server_args.dtype = "float32"
            model_config.dtype = torch.float32  # made from the flags before this was called
        if server_args.max_total_tokens is None and server_args.mem_fraction_static is None:
            server_args.max_total_tokens = DEFAULT_MAX_TOTAL_TOKENS
        server_args.sleep_on_idle = True
        if server_args.grammar_backend is None:
            server_args.grammar_backend = "llguidance"
        if server_args.lora_backend == "csgmv":
            server_args.lora_backend = "torch_native"

    def init_backend(self) -> None:
        """Set up torch in a process that runs a model: thread count, and no compilation.

        Threads take every core but those that the server's other processes need: at the end of
        each parallel operation all of them wait for one whose core was taken away, milliseconds
        at a time. OMP_NUM_THREADS overrides.

        Functions that SGLang and llguidance hand to `torch.compile` (masks, penalties) run as
        they are: compiling one takes half a minute, in the middle of serving, and a C++ compiler.

        `torch_native` attention becomes `attention.PrefixAttention`, and LoRA adapters are not
        pinned in memory.
        """
        from sglang.srt.layers.attention.attention_registry import register_attention_backend

        from sglang_tri.patches import hooks, table

        register_attention_backend("torch_native")(_make_attention)
        hooks.wrap(table.stage(table.CPU))
        torch.compiler.set_stance("force_eager")
        if "OMP_NUM_THREADS" not in os.environ and self._all_threads is None:
            self._all_threads = torch.get_num_threads()
            torch.set_num_threads(max(1, self._all_threads - OTHER_PROCESSES))

    @contextmanager
    def every_core(self) -> Iterator[None]:
        """Inside, torch computes on all cores, while the server's other processes do nothing."""
        serving = torch.get_num_threads()
        torch.set_num_threads(self._all_threads or serving)
        try:
            yield
        finally:
            torch.set_num_threads(serving)

    def get_default_attention_backend(self) -> str:
        """torch's scaled dot product attention, request by request."""
        return "torch_native"

    def get_device(self, device_id: int | None = None) -> str:
        """Name of the one device, as a string, which SGLang's device detection asks for."""
        return "cpu"

    def get_mha_kv_pool_cls(self) -> type:
        """SGLang's own pool of keys and values."""
        from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool

        return MHATokenToKVPool

    def get_mla_kv_pool_cls(self) -> type:
        """SGLang's own pool of compressed keys and values."""
        from sglang.srt.mem_cache.memory_pool import MLATokenToKVPool

        return MLATokenToKVPool

    def get_paged_allocator_cls(self) -> Callable[..., BaseTokenToKVPoolAllocator]:
        """What SGLang calls to make its slot allocator, at every page size."""
        from sglang_tri.patches.cpu.allocator import make_allocator

        return make_allocator


def _is_slow(dtype: torch.dtype) -> bool:
    return dtype == torch.float16 or (dtype == torch.bfloat16 and not multiplies_bfloat16())


def _make_attention(runner: ModelRunner) -> AttentionBackend:
    # Not while SGLang imports its model runner, which calls `init_backend` in passing.
    from sglang_tri.patches.cpu.attention import PrefixAttention

    return PrefixAttention(runner)
