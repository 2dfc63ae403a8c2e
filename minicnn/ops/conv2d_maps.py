"""The convolution and its adjoint as one kind of map, axis by axis (for the CPU kernels).

Both read a source map and write a target map: x and y, or dy and dx. Along one axis, the adjoint
of ``y[i] += w[p] * x[i*S + p*D - before]`` is

    dx[h] += w[p] * dy[(h + before - p*D) / S]      for the taps p where S divides

and which taps these are depends on h modulo S alone. With h = start + i*S the adjoint is thus S
convolutions of stride 1 (phases), each with its own taps.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from minicnn.shapes import Window

PARTS_BYTES = 32 << 20  # partial weight gradients may take so much


class Geometry(NamedTuple):
    """Shapes of one direction of a convolution of (C, H, W) images to F filters."""

    adjoint: bool
    C: int
    H: int
    W: int
    F: int
    window: Window
    groups: int


class Phase(NamedTuple):
    """Along one axis: output ``start + i*step`` reads input ``i*scale + offset`` of each tap."""

    start: int
    step: int
    places: int
    scale: int
    taps: tuple[int, ...]
    offsets: tuple[int, ...]

    def meets(self, size: int) -> np.ndarray:
        """Tell which taps meet one of `size` pixels, not padding: (places, taps)."""
        at = np.arange(self.places)[:, None] * self.scale + np.array(self.offsets, int)
        return (at >= 0) & (at < size)


def _forward_axis(places: int, kernel: int, stride: int, dilation: int, before: int) -> list[Phase]:
    taps = tuple(range(kernel))
    return [Phase(0, 1, places, stride, taps, tuple(p * dilation - before for p in taps))]


def _adjoint_axis(size: int, kernel: int, stride: int, dilation: int, before: int) -> list[Phase]:
    """Invert ``h = i*stride + p*dilation - before``: one phase for every remainder of h."""
    phases = []
    for h in range(min(stride, size)):
        met = [(p, h + before - p * dilation) for p in range(kernel)]
        met = [(p, d // stride) for p, d in met if d % stride == 0]
        taps, at = tuple(p for p, _ in met), tuple(i for _, i in met)
        phases.append(Phase(h, stride, -(-(size - h) // stride), 1, taps, at))
    return phases


class Maps(NamedTuple):
    """Where one direction reads and writes: the source's and the target's channels and sizes."""

    source: tuple[int, int, int]  # channels, rows, columns
    target: tuple[int, int, int]
    source_group: int  # channels of one group
    target_group: int
    rows: list[Phase]
    columns: list[Phase]
    source_weight: int  # step in w from one source channel of a group to the next
    target_weight: np.ndarray  # (target channels,) where each begins in w


def maps_of(geometry: Geometry) -> Maps:
    """Describe the forward of a convolution, or its adjoint from dy to dx."""
    adjoint, C, H, W, F, win, groups = geometry
    OH, OW = win.output_size("conv2d", H, W)
    CG, FG = C // groups, F // groups
    taps = win.kernel[0] * win.kernel[1]
    axis, sizes = (_adjoint_axis, (H, W)) if adjoint else (_forward_axis, (OH, OW))
    rows, columns = (
        axis(size, *geometry, before)
        for size, geometry, (before, _) in zip(
            sizes, zip(win.kernel, win.stride, win.dilation), win.padding
        )
    )
    if adjoint:
        c = np.arange(C)
        begins = c // CG * (FG * CG * taps) + c % CG * taps
        return Maps((F, OH, OW), (C, H, W), FG, CG, rows, columns, CG * taps, begins)
    begins = np.arange(F) * (CG * taps)
    return Maps((C, H, W), (F, OH, OW), CG, FG, rows, columns, taps, begins)


def number_of_parts(items: int, part_bytes: int) -> int:
    """Return in how many parts `items` of a batch add up a weight gradient, a power of two.

    It depends on the shapes alone: any number of threads gives the same sum.
    """
    most = max(1, min(16, items, max(2, PARTS_BYTES // part_bytes)))
    return 1 << most.bit_length() - 1


def round_up(number: int, multiple: int) -> int:
    """Return the smallest multiple that is not below `number`."""
    return -(-number // multiple) * multiple
