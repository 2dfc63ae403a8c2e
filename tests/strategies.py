"""Hypothesis strategies that the tests share: geometry, arrays and their memory layout."""

import numpy as np
from hypothesis import strategies as st

LAYOUTS = ("C", "F", "transposed", "reversed", "strided", "read-only", "big-endian")

seeds = st.integers(0, 2**32 - 1)
dtypes = st.sampled_from([np.float32, np.float64])
layouts = st.sampled_from(LAYOUTS)
pairs = st.tuples(st.integers(1, 3), st.integers(1, 3))
_two = st.tuples(st.integers(0, 2), st.integers(0, 2))
paddings = st.one_of(
    st.integers(0, 2),
    st.tuples(st.integers(0, 2), st.integers(0, 2)),
    st.tuples(
        st.tuples(st.integers(0, 2), st.integers(0, 2)),
        st.tuples(st.integers(0, 2), st.integers(0, 2)),
    ),
)


def normal(rng, shape, dtype=np.float64):
    """Normally distributed values of any dtype."""
    return rng.standard_normal(shape).astype(dtype)


def distinct(rng, shape, dtype=np.float64):
    """Values at least 0.01 apart, in random order: no ties, and none within 0.005 of zero."""
    size = int(np.prod(shape))
    values = (np.arange(size) - size // 2 + 0.5) * 0.01
    return rng.permutation(values).reshape(shape).astype(dtype)


def laid_out(a, layout):
    """Return an array equal to `a` that lies otherwise in memory."""
    if layout == "F":
        return np.asfortranarray(a)
    if layout == "transposed":
        return np.ascontiguousarray(a.T).T
    if layout == "reversed":
        flip = (slice(None, None, -1),) * a.ndim
        return np.ascontiguousarray(a[flip])[flip]
    if layout == "strided":
        wide = np.zeros((*a.shape[:-1], 2 * a.shape[-1]), a.dtype)
        wide[..., ::2] = a
        return wide[..., ::2]
    if layout == "read-only":
        a = a.copy()
        a.flags.writeable = False
        return a
    if layout == "big-endian":
        return a.astype(a.dtype.newbyteorder(">"))
    return a.copy()


@st.composite
def conv_cases(draw):
    """Shapes and keyword arguments of one convolution that fits: (x_shape, w_shape, kwargs)."""
    groups = draw(st.integers(1, 3))
    N, CG, FG = draw(st.integers(1, 2)), draw(st.integers(1, 2)), draw(st.integers(1, 2))
    kernel, stride, dilation = draw(pairs), draw(pairs), draw(pairs)
    padding = draw(paddings)
    (top, bottom), (left, right) = _pads(padding)
    least = [d * (k - 1) + 1 for k, d in zip(kernel, dilation)]
    H = draw(st.integers(max(1, least[0] - top - bottom), least[0] + 3))
    W = draw(st.integers(max(1, least[1] - left - right), least[1] + 3))
    kwargs = {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups}
    return (N, CG * groups, H, W), (FG * groups, CG, *kernel), kwargs


def _pads(padding):
    a, b = padding if isinstance(padding, tuple) else (padding, padding)
    return (a if isinstance(a, tuple) else (a, a)), (b if isinstance(b, tuple) else (b, b))


@st.composite
def pool_cases(draw, dilated=False, equal_sides=False):
    """Shape and keyword arguments of one pooling that fits: (x_shape, kwargs)."""
    kernel, dilation = draw(st.tuples(*[st.integers(1, 4)] * 2)), draw(pairs) if dilated else (1, 1)
    before, after = (tuple(draw(st.integers(0, k // 2)) for k in kernel) for _ in range(2))
    after = before if equal_sides else after
    # At least as many pixels as the dilation: no window steps over the whole map.
    least = [max(d, d * (k - 1) + 1 - b - a) for k, d, b, a in zip(kernel, dilation, before, after)]
    x_shape = (
        *draw(st.tuples(*[st.integers(1, 2)] * 2)),
        *(draw(st.integers(n, n + 4)) for n in least),
    )
    kwargs = {
        "kernel_size": kernel,
        "stride": draw(st.one_of(st.none(), pairs)),
        "padding": before if equal_sides else tuple(zip(before, after)),
        "ceil_mode": draw(st.booleans()),
    }
    return x_shape, {**kwargs, "dilation": dilation} if dilated else kwargs


@st.composite
def wide_pool_cases(draw, dilated=False):
    """Like `pool_cases`, on maps of one vector and more, with and without a rest."""
    (N, C, H, W), kwargs = draw(pool_cases(dilated=dilated))
    return (N, C, H + draw(st.integers(0, 9)), W + draw(st.integers(4, 45))), kwargs


# (N, C), (N, C, L) or (N, C, H, W)
channel_shapes = st.tuples(
    st.integers(1, 3), st.integers(1, 4), st.lists(st.integers(1, 3), max_size=2)
).map(lambda s: (s[0], s[1], *s[2]))
