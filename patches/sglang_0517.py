"""What is particular to SGLang 0.5.17: where it keeps what the hooks read and write.

With the targets in `table`, this is what another version changes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sglang_tri.rounds import RequestState

if TYPE_CHECKING:
    import torch
    from sglang.srt.managers.schedule_batch import Req, ScheduleBatch

TESTED_VERSIONS = ("0.5.17",)

_STATE = "kv_policy_state"


def prefix_caches() -> tuple[type, ...]:
    """The classes of SGLang's default prefix cache, on and off."""
    from sglang.srt.mem_cache.chunk_cache import ChunkCache
    from sglang.srt.mem_cache.radix_cache import RadixCache

    return RadixCache, ChunkCache


def attach_state(req: Req, state: RequestState | None) -> None:
    setattr(req, _STATE, state)


def has_state(req: Req) -> bool:
    return _STATE in vars(req)


def state_of(req: Req) -> RequestState | None:
    """The policy's state of a request that has been queued; None where its policy is `none`."""
    state: RequestState | None = vars(req)[_STATE]
    return state


def physical_length(req: Req) -> int:
    """Slots in use by a running request."""
    return req.kv_committed_len


def set_physical_length(req: Req, length: int) -> None:
    req.kv_committed_len = length
    req.kv.kv_allocated_len = length


def shrink_batch(batch: ScheduleBatch, cut: torch.Tensor) -> None:
    """Subtract `cut`, int64 [requests] on the CPU, from the batch's physical lengths."""
    # New tensors: the previous step's forward pass may still read the old ones.
    batch.seq_lens_cpu = batch.seq_lens_cpu - cut
    batch.seq_lens = batch.seq_lens - cut.to(batch.seq_lens.device, non_blocking=True)
    batch.seq_lens_sum = None


def request_overrides(req: Req) -> dict[str, Any]:
    """Settings that a request brings itself, in `custom_params["kv_policy"]`."""
    params = req.sampling_params.custom_params
    return params.get("kv_policy", {}) if isinstance(params, dict) else {}


def publish_at_end(req: Req, key: str, value: dict[str, Any]) -> None:
    """Send `value` with the request's last token; it reaches the tokenizer manager by `key`."""
    # SGLang aligns these lists with the output tokens.
    padding = [None] * (len(req.output_ids_through_stop) - 1)
    req.customized_info = {**(req.customized_info or {}), key: [*padding, value]}
