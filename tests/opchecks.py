"""What every op is held to, whichever version runs. Test files draw the cases and call these.

`arrays` are the differentiable inputs, in the order in which the backward returns gradients;
`kwargs` are the op's other arguments. The upstream gradient is drawn from a stream of its own:
from ``default_rng(seed)`` it would equal arrays that a test drew there.
"""

from functools import partial

import numpy as np
import pytest

from minicnn import gradcheck, use
from minicnn.gradcheck import STREAM, adjoint_gap
from strategies import laid_out, normal


def both_ways(version, forward, backward, arrays, seed, layout="C", **kwargs):
    """Run forward and backward with a random upstream gradient: (y, dy, gradients)."""
    with use(version):
        y, cache = forward(*(None if a is None else laid_out(a, layout) for a in arrays), **kwargs)
        dy = normal(np.random.default_rng([seed, STREAM]), np.shape(y), y.dtype)
        grads = backward(laid_out(dy, layout) if dy.ndim else dy, cache)
    return y, dy, grads if isinstance(grads, tuple) else (grads,)


def assert_equals_reference(version, forward, backward, arrays, seed, **kwargs):
    """Values, gradients, dtypes and absent gradients are the reference's."""
    dtype = arrays[0].dtype
    y, _, grads = both_ways(version, forward, backward, arrays, seed, **kwargs)
    ye, _, expected = both_ways("reference", forward, backward, arrays, seed, **kwargs)
    tolerance = 1e-5 if dtype == np.float32 else 1e-12
    for got, want in zip((y, *grads), (ye, *expected), strict=True):
        if want is None:
            assert got is None
        else:
            assert got.dtype == dtype
            assert got.shape == want.shape
            np.testing.assert_allclose(got, want, rtol=tolerance, atol=10 * tolerance)


def assert_gradients(version, forward, backward, arrays, seed, **kwargs):
    """Every element of every gradient equals its central difference."""
    assert all(a.dtype == np.float64 for a in arrays)
    with use(version):
        report = gradcheck((partial(forward, **kwargs), backward), *arrays, rng=seed)
    assert len(report.checks) == len(arrays)
    assert report, report


def assert_adjoint(version, forward, backward, arrays, seed, **kwargs):
    """For an op that is linear in each of `arrays`: <A x, dy> = <x, A* dy> to rounding."""
    y, dy, grads = both_ways(version, forward, backward, arrays, seed, **kwargs)
    for a, da in zip(arrays, grads):
        assert adjoint_gap(y, dy, a, da) < 1e-14


def assert_layout_free(version, forward, backward, arrays, seed, layout, **kwargs):
    """Memory layout and byte order change no bit, and no input is modified."""
    before = [a.tobytes() for a in arrays if a is not None]
    y, _, grads = both_ways(version, forward, backward, arrays, seed, **kwargs)
    y2, _, grads2 = both_ways(version, forward, backward, arrays, seed, layout=layout, **kwargs)
    for a, b in zip((y, *grads), (y2, *grads2)):
        if a is not None:
            assert a.dtype == b.dtype
            assert a.tobytes() == b.tobytes()
    assert [a.tobytes() for a in arrays if a is not None] == before, "an input was modified"


def assert_any_threads(version, forward, backward, arrays, seed, **kwargs):
    """One and two threads give the same bits; the arrays should be worth two."""
    numba = pytest.importorskip("numba", reason="Numba is not installed")
    if numba.config.NUMBA_NUM_THREADS < 2:
        pytest.skip("one core")
    before, bits = numba.get_num_threads(), []
    try:
        for threads in (1, 2):
            numba.set_num_threads(threads)
            y, _, grads = both_ways(version, forward, backward, arrays, seed, **kwargs)
            bits.append([a.tobytes() for a in (y, *grads)])
    finally:
        numba.set_num_threads(before)
    assert bits[0] == bits[1]


def assert_equals_torch(torch, forward, backward, arrays, seed, torch_function, **kwargs):
    """Values and gradients equal those of `torch_function` on the same float64 arrays."""
    y, dy, grads = both_ways("numpy", forward, backward, arrays, seed, **kwargs)
    leaves = [None if a is None else torch.tensor(a, requires_grad=True) for a in arrays]
    ty = torch_function(*leaves)
    ty.backward(torch.tensor(dy, dtype=ty.dtype))
    np.testing.assert_allclose(y, ty.detach().numpy(), rtol=1e-10, atol=1e-12)
    for grad, leaf in zip(grads, leaves):
        if leaf is not None:
            np.testing.assert_allclose(grad, leaf.grad.numpy(), rtol=1e-9, atol=1e-11)
