"""Score cached keys against one virtual query and weights of moduli per query head."""

from __future__ import annotations

import torch

from sglang_tri.kernels import score_triton
from sglang_tri.kernels.backend import has_triton
from sglang_tri.kernels.pages import PagedBuffers, Pages
from sglang_tri.kernels.queries import Queries
from sglang_tri.kernels.scores import Scores
from sglang_tri.kernels.workspace import Workspace


def score(
    keys: PagedBuffers,
    pages: Pages,
    queries: Queries,
    positions: torch.Tensor,
    key_scale: torch.Tensor | None = None,
    workspace: Workspace | None = None,
    squared: bool = False,
    buffers: int = score_triton.BUFFERS,
) -> Scores:
    """Scores of every candidate of every due request, for all layers and query heads.

    `score = <query, key> + sum_f magnitude[f] |key_f|`: TriAttention (arXiv 2604.04921) with the
    mean over future offsets folded into the query, which is rotated to the request's position, so
    that the cached, rotated key is read as it is, once. Accumulates in float32. One launch on a
    GPU; on a CPU plain torch. With `squared` the second term is `sum_f variance[f] |key_f|^2`.

    Args:
        keys: of all layers, after RoPE; bfloat16, float16, float32, or an 8-bit float.
        pages: the candidates.
        queries: of the same layers; 1 to 16 query heads for each KV head.
        positions: int64 [requests], logical lengths.
        key_scale: float32 [layers], what stored keys are to be multiplied by; 1 without it.
        workspace: memory for the result; without it, it is allocated.
        squared: whether the squares of the moduli are weighed.
        buffers: on a GPU: 1, or 2 to load the next tile of keys while one is scored.

    Returns:
        The scores, on the device of the keys.

    Raises:
        ValueError: the arguments do not fit together, or a dtype is not supported.
    """
    _check(keys, queries, key_scale, buffers)
    if has_triton(keys.device):
        memory = Workspace.or_new(workspace, keys.device)
        return score_triton.launch(
            keys, pages, queries, positions, key_scale, memory, squared, buffers
        )
    return _reference(keys, pages, queries, positions, key_scale, squared)


def _check(
    keys: PagedBuffers, queries: Queries, key_scale: torch.Tensor | None, buffers: int
) -> None:
    shape = queries.layers, queries.heads, 2 * queries.pairs
    if len(keys) != queries.layers or keys.head_dim != 2 * queries.pairs:
        raise ValueError(
            f"queries [layers, heads, head_dim] {shape} do not fit {len(keys)} layers of keys of "
            f"{keys.head_dim} components"
        )
    if queries.heads % keys.heads or queries.heads // keys.heads > 16:
        raise ValueError(
            f"{queries.heads} query heads do not fit {keys.heads} KV heads: use 1 to 16 for each"
        )
    if keys.dtype not in score_triton.KEY_PIECES:
        raise ValueError(f"keys of {keys.dtype} cannot be scored")
    if key_scale is not None and key_scale.shape != (len(keys),):
        raise ValueError(f"key_scale {tuple(key_scale.shape)} has not one entry for each layer")
    if buffers not in (1, 2):
        raise ValueError(f"{buffers} buffers: use 1 or 2")


def _reference(
    keys: PagedBuffers,
    pages: Pages,
    queries: Queries,
    positions: torch.Tensor,
    key_scale: torch.Tensor | None,
    squared: bool,
) -> Scores:
    first, second = queries.components()
    weights = queries.weights(squared)
    rotated = queries.at(positions)
    group = queries.heads // keys.heads
    rows = rotated.new_zeros(queries.layers, pages.requests, queries.heads, pages.longest)
    for request in range(pages.requests):
        page, row = pages.rows(request)
        for layer, cache in enumerate(keys.layers):
            key = cache[page, row].float().transpose(0, 1)
            if key_scale is not None:
                key = key * key_scale[layer]
            modulus = torch.hypot(key[..., first], key[..., second])
            if squared:
                modulus = modulus.square()
            query = rotated[layer, request].view(keys.heads, group, -1)
            weight = weights[layer].view(keys.heads, group, -1)
            logit = query @ key.transpose(1, 2) + weight @ modulus.transpose(1, 2)
            rows[layer, request, :, : len(page)] = logit.flatten(0, 1)
    return Scores.of(rows, pages.counts())
