"""The backward of conv_block on the CPU in Numba: which kernels run, and in which layout.

Maps with their channels in the lanes, (N, H, W, P) with P the channels rounded up to whole vectors
and zeros in the surplus, go to `conv_block_lists`. Images of few channels, (N, C, H, W), whose own
gradient nobody wants, go to `conv_block_lanes`, or to `conv_block_patches` where the kernel or
the pool is too large for it.
"""

from __future__ import annotations

import numpy as np

from minicnn.backend import Array
from minicnn.ops import conv_block_lanes, conv_block_lists, conv_block_patches
from minicnn.ops.conv2d_maps import round_up
from minicnn.ops.jit import Call
from minicnn.ops.vector import lanes
from minicnn.shapes import Pair, Window


def backward(
    x: Array,
    dy: Array,
    winner: Array,
    w: Array,
    dw: Array,
    db: Array,
    dx: Array | None,
    win: Window,
    pool: Pair,
    *,
    x_last: bool = True,
    accumulate: bool = False,
) -> None:
    """Write the gradients of a block of one group, or add dw and db with `accumulate`: see
    `gradients`."""
    gradients(x, dy, winner, w, dw, db, dx, win, pool, x_last=x_last, accumulate=accumulate)()


def gradients(
    x: Array,
    dy: Array,
    winner: Array,
    w: Array,
    dw: Array,
    db: Array,
    dx: Array | None,
    win: Window,
    pool: Pair,
    *,
    x_last: bool = True,
    accumulate: bool = False,
) -> Call:
    """Return what `backward` runs.

    Parameters
    ----------
    x : array, shape (N, H, W, P), or (N, C, H, W) unless `x_last`
    dy, winner : array, shape (N, PH, PW, slots)
        Gradient of the pooled map, and which pixel won: see `conv_block`. What the winner says
        where there is no filter does not matter.
    w, dw : array, shape (F, C, KH, KW)
    db : array, shape (F,)
    dx : array like x, or None
        None where it is not wanted; otherwise written, with zeros in surplus channels.
    """
    if x_last:
        return conv_block_lists.backward(x, dy, winner, w, dw, db, dx, win, pool, accumulate)
    if dx is not None:
        raise ValueError("conv_block: dx: expected None for x of shape (N, C, H, W)")
    small = conv_block_lanes.fits(win, pool, lanes(x.dtype))
    planes = conv_block_lanes if small else conv_block_patches
    return planes.weight_gradient(x, dy, winner, dw, db, win, pool, accumulate)


def backward_first(
    dy: Array, winner: Array, x: Array, w: Array, win: Window, pool: Pair
) -> tuple[Array, Array, Array]:
    """Return the gradients for arrays that are all (N, channels, rows, columns)."""
    dw, db = np.zeros_like(w), np.zeros(len(w), w.dtype)
    x_last = channels_last(x)
    dx = np.empty_like(x_last)
    backward(x_last, channels_last(dy), channels_last(winner, dy.dtype), w, dw, db, dx, win, pool)
    return np.ascontiguousarray(dx[..., : x.shape[1]].transpose(0, 3, 1, 2)), dw, db


def channels_last(a: Array, dtype: object = None) -> Array:
    """Return (N, C, H, W) as (N, H, W, P), P a multiple of the lanes of `dtype`."""
    N, C, H, W = a.shape
    out = np.zeros((N, H, W, round_up(C, lanes(dtype or a.dtype))), a.dtype)
    out[..., :C] = a.transpose(0, 2, 3, 1)
    return out
