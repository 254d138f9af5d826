"""What the kernels share on the device: where candidates lie."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import triton
import triton.language as tl


def kernel(function: Callable[..., None]) -> Any:
    """`triton.jit` that looks at no argument's value or alignment.

    So there is one variant for each set of constants, and all can be compiled before a server is
    ready.
    """
    parameters = inspect.signature(function).parameters.items()
    runtime = [name for name, value in parameters if "constexpr" not in str(value.annotation)]
    return triton.jit(function, do_not_specialize=runtime)


@triton.jit
def candidates_of(indptr, last_page_len, skipped, request, PAGE_SIZE: tl.constexpr):
    """(first page, candidates, leading tokens that are none) of one request."""
    first = tl.load(indptr + request)
    pages = tl.load(indptr + request + 1) - first
    skip = tl.load(skipped + request)
    tokens = (pages - 1) * PAGE_SIZE + tl.load(last_page_len + request)
    return first, tl.maximum(tl.where(pages > 0, tokens - skip, 0), 0), skip


@triton.jit
def locate(
    indices,
    first,
    token,
    mask,
    PAGE_SIZE: tl.constexpr,
    PAGE_STRIDE: tl.constexpr,
    TOKEN_STRIDE: tl.constexpr,
):
    """int64 elements from a layer's beginning to the tokens' rows: a pool may pass 2^31 of them."""
    page = tl.load(indices + first + token // PAGE_SIZE, mask=mask, other=0).to(tl.int64)
    if PAGE_SIZE == 1:
        return page * PAGE_STRIDE
    return page * PAGE_STRIDE + (token % PAGE_SIZE).to(tl.int64) * TOKEN_STRIDE


@triton.jit
def cosine_and_sine(turns):
    """float32 cos and sin of float64 `turns` of a full circle, without local memory.

    Polynomials on an eighth of a turn to both sides: Moshier, Methods and Programs for
    Mathematical Functions, 1989.
    """
    quarter = tl.floor(turns * 4 + 0.5)
    x = ((turns - quarter * 0.25) * 6.283185307179586).to(tl.float32)
    z = x * x
    sine = x + x * z * (-1.6666654611e-1 + z * (8.3321608736e-3 - z * 1.9515295891e-4))
    cosine = 4.166664568298827e-2 + z * (-1.388731625493765e-3 + z * 2.443315711809948e-5)
    cosine = 1.0 - 0.5 * z + z * z * cosine
    quarter = (quarter - tl.floor(quarter * 0.25) * 4).to(tl.int32)
    swapped = (quarter & 1) == 1
    first = tl.where(swapped, sine, cosine)
    second = tl.where(swapped, cosine, sine)
    first = tl.where((quarter == 1) | (quarter == 2), -first, first)
    return first, tl.where(quarter >= 2, -second, second)
