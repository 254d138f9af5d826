"""The score kernel for GPUs.

Every operand of a matrix product is written as a sum of bfloat16 pieces, so that tensor cores give
what float32 would: a bfloat16 or fp8 key is one piece, a query up to three, which lie side by side
in columns that the smallest tile has anyway.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from sglang_tri.kernels.backend import Traits, traits
from sglang_tri.kernels.device import candidates_of, cosine_and_sine, kernel, locate
from sglang_tri.kernels.moments_triton import add_places, add_tile, by_column
from sglang_tri.kernels.pages import PagedBuffers, Pages
from sglang_tri.kernels.queries import Queries
from sglang_tri.kernels.scores import SPLITS, Scores
from sglang_tri.kernels.workspace import Workspace

# bfloat16 pieces that hold a key of each dtype exactly.
KEY_PIECES = {
    torch.bfloat16: 1,
    torch.float8_e4m3fn: 1,
    torch.float8_e5m2: 1,
    torch.float8_e4m3fnuz: 1,
    torch.float8_e5m2fnuz: 1,
    torch.float16: 2,
    torch.float32: 3,
}
_TRITON = {
    torch.bfloat16: tl.bfloat16,
    torch.float8_e4m3fn: tl.float8e4nv,
    torch.float8_e5m2: tl.float8e5,
    torch.float8_e4m3fnuz: tl.float8e4b8,
    torch.float8_e5m2fnuz: tl.float8e5b16,
    torch.float16: tl.float16,
    torch.float32: tl.float32,
}
# 8-bit floats that are read bit by bit where the device does not know them.
_DECODED = {torch.float8_e4m3fn: "e4m3", torch.float8_e5m2: "e5m2"}
# Columns of the smallest tile that tensor cores multiply.
_COLUMNS = 16
# Tiles of keys in shared memory, unless a caller says otherwise.
BUFFERS = 1


def launch(
    keys: PagedBuffers,
    pages: Pages,
    queries: Queries,
    positions: torch.Tensor,
    key_scale: torch.Tensor | None,
    workspace: Workspace,
    squared: bool,
    buffers: int,
) -> Scores:
    """See `sglang_tri.kernels.score.score`."""
    shape = queries.layers, pages.requests, queries.heads
    rows = workspace.take(*shape, pages.longest, dtype=torch.float32)
    moments = workspace.take(3, *shape, SPLITS, dtype=torch.float32)
    if rows.numel() == 0:
        return Scores(rows, moments.zero_())
    score_kernel[(keys.heads * SPLITS, pages.requests, queries.layers)](
        rows,
        moments,
        keys.pointers,
        positions if key_scale is None else key_scale,
        pages.indptr,
        pages.indices,
        pages.last_page_len,
        pages.skipped,
        queries.centre,
        queries.weights(squared),
        queries.frequencies,
        positions,
        pages.longest,
        **variant(keys, queries, key_scale is not None, traits(keys.device), squared, buffers),
    )
    return Scores(rows, moments)


def variant(
    keys: PagedBuffers,
    queries: Queries,
    scaled: bool,
    device: Traits,
    squared: bool = False,
    buffers: int = BUFFERS,
) -> dict[str, object]:
    """Constants that the kernel is compiled for; none depends on a round.

    `scaled` says whether stored keys have scales, `squared` whether squares of moduli are weighed;
    for `buffers` see `sglang_tri.kernels.score.score`.
    """
    page, token, head = keys.strides
    group = queries.heads // keys.heads
    columns = triton.next_power_of_2(group)
    decode = "" if device.fp8 else _DECODED.get(keys.dtype, "")
    return {
        "KEY": tl.uint8 if decode else _TRITON[keys.dtype],
        "KEY_PIECES": KEY_PIECES[keys.dtype],
        "OPERAND": tl.bfloat16 if device.bf16 else tl.float32,
        "DECODE": decode,
        "SCALED": scaled,
        "SQUARED": squared,
        "HEADS": keys.heads,
        "GROUP": group,
        "GROUP_COLUMNS": columns,
        "PIECES": max(2, _COLUMNS // columns),
        "PAIRS": queries.pairs,
        "PAIRS_PADDED": max(16, triton.next_power_of_2(queries.pairs)),
        "ROTATED": queries.rotary_dim // 2,
        "INTERLEAVED": queries.interleaved,
        "PAGE_SIZE": keys.page_size,
        "PAGE_STRIDE": page,
        "TOKEN_STRIDE": token,
        "HEAD_STRIDE": head,
        "SPLITS": SPLITS,
        "BUFFERS": buffers,
        **_tiles(keys, columns, device, buffers),
    }


def _tiles(keys: PagedBuffers, columns: int, device: Traits, buffers: int) -> dict[str, int]:
    """How many keys a tile has, and how a program works on it."""
    wide, bytewise = keys.head_dim > 128 or columns > 8, keys.dtype.itemsize == 1
    # More would spill, or be loaded in pieces of 8 bytes.
    few = wide or (bytewise and device.warp == 32)
    if buffers == 1 or device.warp == 64:
        # AMD's compiler keeps the next tile in registers meanwhile.
        return {"BLOCK": 32 if few else 64, "num_warps": 4, "num_stages": 3}
    if device.tensor_memory:
        # Products of 64 keys would be added up there, which takes 4 times as many instructions.
        few = wide or not bytewise
    # Page indices and addresses come before keys, and take two of the stages.
    return {"BLOCK": 32 if few else 64, "num_warps": 2 if few else 4, "num_stages": 5}


@triton.jit
def _piece(x, index):
    """bfloat16 piece `index` of the sum that x is split into; 0 from the fourth on."""
    high = x.to(tl.bfloat16)
    rest = x - high.to(tl.float32)
    middle = rest.to(tl.bfloat16)
    low = (rest - middle.to(tl.float32)).to(tl.bfloat16)
    none = tl.zeros_like(high)
    return tl.where(index == 0, high, tl.where(index == 1, middle, tl.where(index == 2, low, none)))


@triton.jit
def _product(x, columns, total, PIECES: tl.constexpr, OPERAND: tl.constexpr):
    """total + x @ columns, with x [rows, inner] as a sum of pieces."""
    if PIECES == 1:
        total = tl.dot(x.to(OPERAND), columns.to(OPERAND), total)
    else:
        rest = x.to(tl.float32)
        for _ in tl.static_range(PIECES):
            part = rest.to(tl.bfloat16)
            total = tl.dot(part.to(OPERAND), columns.to(OPERAND), total)
            rest -= part.to(tl.float32)
    return total


@triton.jit
def _load(address, mask, DECODE: tl.constexpr):
    """Stored components; 8-bit floats from their bits, which are a float16's."""
    if DECODE == "e4m3":
        bits = tl.load(address, mask=mask, other=0).to(tl.uint16)
        half = ((bits & 0x80) << 8) | ((bits & 0x7F) << 7)
        value = half.to(tl.float16, bitcast=True).to(tl.float32) * 256
        value = tl.where((bits & 0x7F) == 0x7F, float("nan"), value)
    elif DECODE == "e5m2":
        bits = tl.load(address, mask=mask, other=0).to(tl.uint16) << 8
        value = bits.to(tl.float16, bitcast=True).to(tl.float32)
    else:
        value = tl.load(address, mask=mask, other=0.0)
    return value


@triton.jit
def _load_pairs(
    row,
    inside,
    PAIRS: tl.constexpr,
    PAIRS_PADDED: tl.constexpr,
    ROTATED: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    DECODE: tl.constexpr,
):
    """First and second components [rows, PAIRS_PADDED] of the keys at `row` [rows]."""
    if INTERLEAVED:
        component = tl.arange(0, 2 * PAIRS_PADDED)
        mask = inside[:, None] & (component < 2 * PAIRS)[None, :]
        whole = _load(row[:, None] + component[None, :], mask, DECODE)
        return tl.split(tl.reshape(whole, (row.shape[0], PAIRS_PADDED, 2)))
    pair = tl.arange(0, PAIRS_PADDED)
    mask = inside[:, None] & (pair < PAIRS)[None, :]
    if ROTATED == PAIRS:
        first, second = pair, pair + PAIRS
    else:
        first = tl.where(pair < ROTATED, pair, pair + ROTATED)
        second = tl.where(pair < ROTATED, pair + ROTATED, pair + PAIRS)
        if ROTATED % 8 == 0 and PAIRS % 8 == 0:
            first = tl.max_contiguous(tl.multiple_of(first, 8), 8)
            second = tl.max_contiguous(tl.multiple_of(second, 8), 8)
    return (
        _load(row[:, None] + first[None, :], mask, DECODE),
        _load(row[:, None] + second[None, :], mask, DECODE),
    )


@kernel
def score_kernel(
    rows,
    moments,
    key_pointers,
    key_scale,
    indptr,
    indices,
    last_page_len,
    skipped,
    centre,
    weights,
    frequencies,
    positions,
    longest,
    KEY: tl.constexpr,
    KEY_PIECES: tl.constexpr,
    OPERAND: tl.constexpr,
    DECODE: tl.constexpr,
    SCALED: tl.constexpr,
    SQUARED: tl.constexpr,
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    GROUP_COLUMNS: tl.constexpr,
    PIECES: tl.constexpr,
    PAIRS: tl.constexpr,
    PAIRS_PADDED: tl.constexpr,
    ROTATED: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    PAGE_STRIDE: tl.constexpr,
    TOKEN_STRIDE: tl.constexpr,
    HEAD_STRIDE: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK: tl.constexpr,
    BUFFERS: tl.constexpr,
):
    """One stretch of one request's candidates, for one layer and KV head: its scores and moments.

    Heads lie next to each other in the grid as they do in a token's row.
    """
    head = tl.program_id(0) % HEADS
    stretch = tl.program_id(0) // HEADS
    request = tl.program_id(1)
    layer = tl.program_id(2)
    requests = tl.num_programs(1)
    layers = tl.num_programs(2)

    page, count, skip = candidates_of(indptr, last_page_len, skipped, request, PAGE_SIZE)
    tiles = tl.cdiv(count, BLOCK)
    if BUFFERS == 1:
        length = tl.cdiv(tiles, SPLITS) * BLOCK
        begin = stretch * length
        end = tl.minimum(begin + length, count)
    else:
        begin = tiles * stretch // SPLITS * BLOCK
        end = tl.minimum(tiles * (stretch + 1) // SPLITS * BLOCK, count)

    column = tl.arange(0, GROUP_COLUMNS * PIECES)
    member = column % GROUP_COLUMNS
    piece = (column // GROUP_COLUMNS)[None, :]
    pair = tl.arange(0, PAIRS_PADDED)
    used = (pair < PAIRS)[:, None] & (member < GROUP)[None, :]
    query_head = (layer * HEADS + head) * GROUP + member
    weight = weights + query_head[None, :] * PAIRS + pair[:, None]
    weight = tl.load(weight, mask=used, other=0.0)
    parts = centre + query_head[None, :] * (2 * PAIRS) + pair[:, None]
    real = tl.load(parts, mask=used, other=0.0)
    imaginary = tl.load(parts + PAIRS, mask=used, other=0.0)
    if SCALED:
        scale = tl.load(key_scale + layer)
        weight, real, imaginary = weight * scale, real * scale, imaginary * scale
        if SQUARED:
            weight *= scale
    # Float32 would lose the phase of a frequency near 1 at positions of tens of thousands.
    turns = tl.load(positions + request).to(tl.float64) * 0.15915494309189535
    turns *= tl.load(frequencies + pair, mask=pair < PAIRS, other=0.0)
    cosine, sine = cosine_and_sine(turns[:, None])
    first_query = _piece(real * cosine - imaginary * sine, piece)
    second_query = _piece(real * sine + imaginary * cosine, piece)
    weight = _piece(weight, piece)

    keys = tl.load(key_pointers + layer).to(tl.pointer_type(KEY))
    keys = tl.multiple_of(keys, 16) + head * HEAD_STRIDE
    member = tl.arange(0, GROUP_COLUMNS)
    row = ((layer * requests + request).to(tl.int64) * HEADS + head) * GROUP + member
    if BUFFERS == 1:
        seen = tl.zeros((GROUP_COLUMNS,), tl.float32)
    else:
        seen = tl.zeros((BLOCK, GROUP_COLUMNS), tl.float32)
    mean = tl.zeros_like(seen)
    squares = tl.zeros_like(seen)
    for start in range(begin, end, BLOCK):
        candidate = start + tl.arange(0, BLOCK)
        inside = candidate < end
        place = locate(
            indices, page, skip + candidate, inside, PAGE_SIZE, PAGE_STRIDE, TOKEN_STRIDE
        )
        first, second = _load_pairs(
            keys + place, inside, PAIRS, PAIRS_PADDED, ROTATED, INTERLEAVED, DECODE
        )
        total = tl.zeros((BLOCK, GROUP_COLUMNS * PIECES), tl.float32)
        total = _product(first, first_query, total, KEY_PIECES, OPERAND)
        total = _product(second, second_query, total, KEY_PIECES, OPERAND)
        first, second = first.to(tl.float32), second.to(tl.float32)
        modulus = first * first + second * second
        if not SQUARED:
            modulus = tl.sqrt(modulus)
        total = _product(modulus, weight, total, 2 if KEY_PIECES == 1 else 3, OPERAND)
        score = tl.sum(tl.reshape(total, (BLOCK, PIECES, GROUP_COLUMNS)), 1)
        finite = tl.abs(score) < float("inf")
        score = tl.where(finite, score, float("-inf"))
        place = rows + row[None, :] * longest + candidate[:, None]
        tl.store(place, score, mask=inside[:, None] & (member < GROUP)[None, :])

        finite = finite & inside[:, None]
        if BUFFERS == 1:
            seen, mean, squares = add_tile(seen, mean, squares, score, finite)
        else:
            seen, mean, squares = add_places(seen, mean, squares, score, finite)
    if BUFFERS > 1:
        seen, mean, squares = by_column(seen, mean, squares)
    place = moments + row * SPLITS + stretch
    plane = (layers * requests).to(tl.int64) * (HEADS * GROUP * SPLITS)
    tl.store(place, seen, mask=member < GROUP)
    tl.store(place + plane, mean, mask=member < GROUP)
    tl.store(place + 2 * plane, squares, mask=member < GROUP)
