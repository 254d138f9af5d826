"""See queries and keys where a model hands them to attention."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

from sglang_tri.errors import KvPolicyError

if TYPE_CHECKING:
    from sglang.srt.layers.radix_attention import RadixAttention

    from sglang_tri.statistics.moments import Moments


def attention_layers(model: torch.nn.Module, layers: int) -> list[RadixAttention]:
    """The attention layers of `model`, one for each layer of its KV cache.

    Raises:
        KvPolicyError: layers are missing, doubled, or differ in their heads.
    """
    from sglang.srt.layers.radix_attention import RadixAttention

    found = [module for module in model.modules() if isinstance(module, RadixAttention)]
    heads = {(m.tp_q_head_num, m.tp_k_head_num, m.head_dim) for m in found}
    if sorted(m.layer_id for m in found) != list(range(layers)) or len(heads) != 1:
        raise KvPolicyError(
            f"--kv-stats auto cannot measure {type(model).__name__}: it has {len(found)} attention "
            f"layers of {len(heads)} geometries for {layers} layers of KV cache. "
            "Give --kv-stats FILE."
        )
    return found


@contextmanager
def captured(
    layers: list[RadixAttention], moments: Moments, progress: Callable[[int], object]
) -> Iterator[None]:
    """Inside, `moments` counts every token that passes through `layers`.

    Args:
        progress: called with the number of tokens, after each layer.
    """
    signature = inspect.signature(type(layers[0]).forward)

    def see(layer: RadixAttention, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        call = signature.bind(layer, *args, **kwargs).arguments
        if call["k"] is None:
            raise KvPolicyError(
                f"--kv-stats auto cannot measure layer {layer.layer_id}: its attention is given no "
                "keys. Give --kv-stats FILE."
            )
        positions = call["forward_batch"].positions
        moments.add(layer.layer_id, call["q"], call["k"], positions)
        progress(len(positions))

    handles = [layer.register_forward_pre_hook(see, with_kwargs=True) for layer in layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
