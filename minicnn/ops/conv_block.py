"""Convolution, ReLU and max-pool in one: a block whose inner maps are never kept.

    z = conv2d(x, w, b)         u = max(z, 0)         y = max_pool2d(u)

with pool windows side by side (stride = kernel, no padding); a pool of 1 is none. All that the
backward has to know of z and u is one byte an output: which pixel of its window won, as
``p * KW + q``, or OFF where the ReLU has made all of them 0. With it,

    dz[winner of (n, f, i, j)] = dy[n, f, i, j]        and 0 elsewhere

and dx, dw and db are those of the convolution. At most one dz in a window is not 0, and kernels
can leave the others out (see conv_block_lists.py). Where z is NaN so is y, and the gradient goes
there.

Letters: N images, C channels, H W rows and columns, F filters, OH OW output of the convolution,
PH PW pooled output, KH KW pool window.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from minicnn.backend import Array, Version, array_module, as_arrays, pick
from minicnn.ops.conv2d import VERSIONS as CONV2D
from minicnn.ops.max_pool2d import VERSIONS as MAX_POOL2D
from minicnn.shapes import Pair, Window, check_ndim, check_shape, integer, pair, window

OFF = 255  # winner of a window in which the ReLU was off


class ConvBlockCache(NamedTuple):
    """What `conv_block_backward` needs from `conv_block_forward`."""

    x: Array  # (N, C, H, W)
    w: Array  # (F, C/G, KH, KW)
    has_bias: bool
    window: Window
    groups: int
    pool: Pair
    winner: Array  # (N, F, PH, PW) uint8


# ---------------------------------------------------------------- reference


def _composition(name: str) -> Version:
    """One plain op after the other, in one version of them all."""
    convolve, pool_ = CONV2D[name], MAX_POOL2D.get(name) or MAX_POOL2D["numpy"]

    def forward(
        x: Array, w: Array, b: Array | None, win: Window, groups: int, relu: bool, pool: Pair
    ) -> tuple[Array, Array]:
        xp = array_module(x)
        z = convolve.forward(x, w, b, win, groups)  # (N, F, OH, OW)
        OW = z.shape[3]
        y, at = pool_.forward(z, Window(pool, pool, ((0, 0), (0, 0)), (1, 1)))
        i, j = xp.arange(y.shape[2])[:, None], xp.arange(y.shape[3])
        winner = (at // OW - i * pool[0]) * pool[1] + at % OW - j * pool[1]  # (N, F, PH, PW)
        winner = winner.astype(np.uint8)
        if relu:  # the largest of the positive parts is the positive part of the largest
            off = y <= 0  # not NaN
            y[off], winner[off] = 0, OFF
        return y, winner

    def backward(
        dy: Array, winner: Array, x: Array, w: Array, win: Window, groups: int, pool: Pair
    ) -> tuple[Array, Array, Array]:
        OH, OW = win.output_size("conv_block", *x.shape[2:])
        return convolve.backward(_scatter(dy, winner, pool, OH, OW), x, w, win, groups)

    return Version(forward, backward)


def _scatter(dy: Array, winner: Array, pool: Pair, OH: int, OW: int) -> Array:
    """Return dz (N, F, OH, OW): every dy at its window's winner."""
    (KH, KW), (PH, PW) = pool, dy.shape[2:]
    dz = array_module(dy).zeros((*dy.shape[:2], OH, OW), dy.dtype)
    for k in range(KH * KW):
        p, q = divmod(k, KW)
        mine = array_module(dy).where(winner == k, dy, 0)
        dz[:, :, p : PH * KH : KH, q : PW * KW : KW] = mine
    return dz


# ---------------------------------------------------------------- numba (see conv_block_numba.py)


def _backward_numba(
    dy: Array, winner: Array, x: Array, w: Array, win: Window, groups: int, pool: Pair
) -> tuple[Array, Array, Array]:
    from minicnn.ops import conv_block_numba  # imports Numba: only when asked for

    # The lists leave out sums of zeros, which are zero only where all they multiply is finite.
    if groups == 1 and all(np.isfinite(a).all() for a in (dy, x, w)):
        return conv_block_numba.backward_first(dy, winner, x, w, win, pool)
    return VERSIONS["numpy"].backward(dy, winner, x, w, win, groups, pool)


# ---------------------------------------------------------------- cupy (see conv2d_cupy.py)


def _forward_cupy(
    x: Array, w: Array, b: Array | None, win: Window, groups: int, relu: bool, pool: Pair
) -> tuple[Array, Array]:
    from minicnn.ops import conv2d_cupy

    y_shape = (x.shape[0], w.shape[0], *win.output_size("conv_block", *x.shape[2:]))
    if pool[0] * pool[1] in conv2d_cupy.POOLS and conv2d_cupy.applies(x.shape, w, y_shape, groups):
        return conv2d_cupy.block_forward(x, w, b, win, groups, relu, pool)
    return _composition("cupy").forward(x, w, b, win, groups, relu, pool)


def _backward_cupy(
    dy: Array, winner: Array, x: Array, w: Array, win: Window, groups: int, pool: Pair
) -> tuple[Array | None, Array, Array]:
    from minicnn.ops import conv2d_cupy

    y_shape = (x.shape[0], w.shape[0], *win.output_size("conv_block", *x.shape[2:]))
    if not conv2d_cupy.applies(x.shape, w, y_shape, groups):
        return VERSIONS["numpy"].backward(dy, winner, x, w, win, groups, pool)
    return conv2d_cupy.block_backward(dy, winner, x, w, win, groups, pool)


# ---------------------------------------------------------------- versions, public pair

VERSIONS = {
    "reference": _composition("reference"),
    "numpy": _composition("numpy"),
    "numba": Version(_composition("numba").forward, _backward_numba),
    "cupy": Version(_forward_cupy, _backward_cupy),
}


def conv_block_forward(
    x: Array,
    w: Array,
    b: Array | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
    relu: bool = True,
    pool: Any = 1,
) -> tuple[Array, ConvBlockCache]:
    """Convolve, cut off below 0 with `relu`, and keep the largest of every pool window.

    Parameters
    ----------
    x : array, shape (N, C, H, W), float32 or float64
        N may be 0.
    w : array, shape (F, C/groups, KH, KW)
    b : array, shape (F,), optional
    stride, padding, dilation, groups
        Of the convolution: see `conv2d_forward`.
    relu : bool
    pool : int or pair of int
        Rows and columns of a pool window, less than 255 pixels; windows lie side by side, and
        rows and columns that fill none are left out.

    Returns
    -------
    y : array, shape (N, F, PH, PW)
    cache : ConvBlockCache
        For `conv_block_backward`. Its `winner` is the index of each maximum in its window in
        row-major order, the first of equal ones, or 255 where `relu` has cut it off.

    Raises
    ------
    ValueError
        For a wrong rank, channel count or geometry, or a kernel or a pool window that is larger
        than the map.
    TypeError
        For arrays that are not float, of several dtypes or on several devices.

    Examples
    --------
    >>> import numpy as np
    >>> x = np.array([[1.0, 5, -2, -2], [4, 3, -2, -1]]).reshape(1, 1, 2, 4)
    >>> y, cache = conv_block_forward(x, np.ones((1, 1, 1, 1)), pool=2)
    >>> y
    array([[[[5., 0.]]]])
    >>> cache.winner
    array([[[[  1, 255]]]], dtype=uint8)
    >>> dx, dw, db = conv_block_backward(np.array([[[[10.0, 20.0]]]]), cache)
    >>> dx
    array([[[[ 0., 10.,  0.,  0.],
             [ 0.,  0.,  0.,  0.]]]])
    """
    op = "conv_block"
    x, w, b = as_arrays(op, ("b",), x=x, w=w, b=b)
    check_ndim(op, "x", x, "(N, C, H, W)")
    check_ndim(op, "w", w, "(F, C/groups, KH, KW)")
    groups = integer(op, "groups", groups, 1)
    F, CG, *kernel = w.shape
    if not w.size or x.shape[1] != CG * groups or F % groups:
        raise ValueError(
            f"{op}: w: expected shape (F, {x.shape[1]} / groups, KH, KW) with groups a divisor of "
            f"F, got {w.shape} with groups {groups}"
        )
    if b is not None:
        check_shape(op, "b", b, (F,), "one per filter")
    win, pool = window(op, tuple(kernel), stride, padding, dilation), pair(op, "pool", pool, 1)
    size = win.output_size(op, *x.shape[2:])
    if pool[0] * pool[1] >= OFF or pool[0] > size[0] or pool[1] > size[1]:
        raise ValueError(
            f"{op}: pool: expected less than {OFF} pixels, and at most the {size[0]}x{size[1]} of "
            f"the convolution, got {pool}"
        )
    y, winner = pick(op, VERSIONS, x).forward(x, w, b, win, groups, bool(relu), pool)
    return y, ConvBlockCache(x, w, b is not None, win, groups, pool, winner)


def conv_block_backward(dy: Array, cache: ConvBlockCache) -> tuple[Array, Array, Array | None]:
    """Gradients of `conv_block_forward`.

    Parameters
    ----------
    dy : array, shape (N, F, PH, PW)
        Gradient of the loss to y.
    cache : ConvBlockCache
        From `conv_block_forward`.

    Returns
    -------
    dx : array, shape (N, C, H, W)
    dw : array, shape (F, C/groups, KH, KW)
    db : array, shape (F,), or None without a bias

    Raises
    ------
    ValueError, TypeError
        If `dy` differs from y in shape, or from x in dtype or device.
    """
    x, w, has_bias, win, groups, pool, winner = cache
    x, dy = as_arrays("conv_block_backward", x=x, dy=dy)
    check_shape("conv_block_backward", "dy", dy, winner.shape, "like y")
    version = pick("conv_block", VERSIONS, x)
    dx, dw, db = version.backward(dy, winner, x, w, win, groups, pool)
    return dx, dw, db if has_bias else None
