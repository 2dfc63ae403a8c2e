"""conv2d on the CPU in Numba: which kernels run, and the pair for the dict of versions.

Vectors pay when their lanes are full. Where a group writes enough channels, the lanes are channels
(`conv2d_channels`). Where a group writes few, as for the dx of a grey image, the lanes are pixels
(`conv2d_planes`). Where every channel is a group, the lanes are pixels of one row if a row fills
them (`conv2d_depthwise`), else channels of many groups. Forward, dx and dw each choose.
"""

from __future__ import annotations

from types import ModuleType

import numpy as np

from minicnn.backend import Array
from minicnn.ops import conv2d_channels, conv2d_depthwise, conv2d_planes
from minicnn.ops.conv2d_maps import Geometry
from minicnn.ops.vector import lanes
from minicnn.shapes import Window


def forward(x: Array, w: Array, b: Array | None, win: Window, groups: int) -> Array:
    F = w.shape[0]
    y = np.empty((x.shape[0], F, *win.output_size("conv2d", *x.shape[2:])), x.dtype)
    geometry = _geometry(False, x, w, win, groups)
    _kernels(geometry, x).correlate(geometry, x, w, b, y)
    return y


def backward(dy: Array, x: Array, w: Array, win: Window, groups: int) -> tuple[Array, Array, Array]:
    return input_gradient(dy, x, w, win, groups), *weight_gradient(dy, x, w, win, groups)


def input_gradient(dy: Array, x: Array, w: Array, win: Window, groups: int) -> Array:
    """Return dx alone; of x only the shape matters."""
    dx = np.empty(x.shape, x.dtype)
    geometry = _geometry(True, x, w, win, groups)
    _kernels(geometry, x).correlate(geometry, dy, w, None, dx)
    return dx


def weight_gradient(dy: Array, x: Array, w: Array, win: Window, groups: int) -> tuple[Array, Array]:
    """Return dw and db alone; of w only the shape matters."""
    F = w.shape[0]
    dw, db = np.zeros(w.shape, x.dtype), np.zeros(F, x.dtype)
    if len(x):
        geometry = _geometry(False, x, w, win, groups)
        _kernels(geometry, x).weight_gradient(geometry, x, dy, dw, db)
    return dw, db


def _geometry(adjoint: bool, x: Array, w: Array, win: Window, groups: int) -> Geometry:
    _, C, H, W = x.shape
    return Geometry(adjoint, C, H, W, w.shape[0], win, groups)


def _kernels(geometry: Geometry, x: Array) -> ModuleType:
    L, groups = lanes(x.dtype), geometry.groups
    if conv2d_depthwise.applies(geometry, L):
        return conv2d_depthwise
    channels = (geometry.C if geometry.adjoint else geometry.F) // groups  # that a group writes
    if geometry.C == geometry.F == groups:
        channels = groups  # the lanes are channels of many groups
    return conv2d_planes if 2 * channels < L else conv2d_channels
