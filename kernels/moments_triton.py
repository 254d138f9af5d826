"""Moments of columns of scores, tile by tile: count, mean, sum of squared distances from it."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def add_tile(seen, mean, squares, score, finite):
    """Moments of columns with those of one more tile: Chan, Golub, LeVeque 1983."""
    more = tl.sum(finite.to(tl.float32), 0)
    centre_of_more = tl.sum(tl.where(finite, score, 0.0), 0) / tl.maximum(more, 1.0)
    distance = tl.where(finite, score - centre_of_more[None, :], 0.0)
    step = centre_of_more - mean
    both = tl.maximum(seen + more, 1.0)
    squares += tl.sum(distance * distance, 0) + step * step * (seen * more / both)
    mean += step * (more / both)
    return seen + more, mean, squares


@triton.jit
def add_places(seen, mean, squares, score, finite):
    """Moments of each place in a tile with one more score there, waiting for no other thread.

    Welford, Note on a Method for Calculating Corrected Sums of Squares and Products, 1962.
    """
    seen += finite.to(tl.float32)
    step = tl.where(finite, score - mean, 0.0)
    mean += step / tl.maximum(seen, 1.0)
    squares += step * tl.where(finite, score - mean, 0.0)
    return seen, mean, squares


@triton.jit
def by_column(seen, mean, squares):
    """Moments of columns from those of the places in them."""
    total = tl.sum(seen, 0)
    centre = tl.sum(seen * mean, 0) / tl.maximum(total, 1.0)
    distance = mean - centre[None, :]
    return total, centre, tl.sum(squares + seen * distance * distance, 0)
