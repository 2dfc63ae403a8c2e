"""Activations: formulas, derivatives, and what happens at kinks, in the tails and at infinity."""

import decimal
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes

from minicnn import use
from minicnn.ops import activations
from minicnn.ops.activations import VERSIONS, relu_backward, relu_forward
from opchecks import (
    assert_equals_reference,
    assert_equals_torch,
    assert_gradients,
    assert_layout_free,
)
from strategies import distinct, dtypes, layouts, normal, seeds

NAN, INF = np.nan, np.inf
formulas = pytest.mark.parametrize("formula", VERSIONS)
versions = pytest.mark.parametrize(
    ("formula", "version"), [(f, v) for f, named in VERSIONS.items() for v in named]
)
shapes = array_shapes(max_dims=4, max_side=3)

# Other arguments to draw. Where beta * x meets the threshold softplus has a small step.
OPTIONS = {
    "leaky_relu": {"negative_slope": st.floats(-0.5, 2)},
    "elu": {"alpha": st.floats(-0.5, 2)},
    "gelu_tanh": {"approximate": st.just("tanh")},
    "softplus": {"beta": st.floats(0.5, 2)},
}


def pair(formula):
    """The public functions of a formula; gelu_tanh is gelu with another argument."""
    op = formula.removesuffix("_tanh")
    return getattr(activations, f"{op}_forward"), getattr(activations, f"{op}_backward")


def options(formula):
    return st.fixed_dictionaries(OPTIONS.get(formula, {}))


def run(formula, version, x, dy=None, **kwargs):
    """Return y, and dx for an upstream gradient of ones."""
    if formula == "gelu_tanh":
        kwargs["approximate"] = "tanh"
    forward, backward = pair(formula)
    with use(version):
        y, cache = forward(x, **kwargs)
        return y, backward(np.ones_like(y) if dy is None else dy, cache)


LN3 = math.log(3)
TANH_GELU = math.tanh(math.sqrt(2 / math.pi) * 1.044715)


@pytest.mark.parametrize(
    ("formula", "kwargs", "x", "y", "dx"),
    [
        ("relu", {}, [-2, 3], [0, 3], [0, 1]),
        ("leaky_relu", {}, [-2, 3], [-0.02, 3], [0.01, 1]),
        ("leaky_relu", {"negative_slope": 2}, [-2, 3], [-4, 3], [2, 1]),
        ("elu", {}, [-LN3, 3], [-2 / 3, 3], [1 / 3, 1]),
        ("elu", {"alpha": 6}, [-LN3, 3], [-4, 3], [2, 1]),
        ("sigmoid", {}, [-LN3, 0, LN3], [0.25, 0.5, 0.75], [3 / 16, 1 / 4, 3 / 16]),
        ("tanh", {}, [-LN3, 0, LN3], [-0.8, 0, 0.8], [0.36, 1, 0.36]),
        (
            "gelu",
            {},
            [-1, 0, 1],
            [-0.15865525393145707, 0, 0.8413447460685429],
            [0.15865525393145707 - 0.24197072451914337, 0.5, 1.0833154705876863],
        ),
        (
            "gelu_tanh",
            {},
            [-1, 0, 1],
            [-(1 - TANH_GELU) / 2, 0, (1 + TANH_GELU) / 2],
            # (1 + tanh) / 2 + x (1 - tanh^2) / 2 sqrt(2 / pi) (1 + 0.134145 x^2)
            [
                (1 - TANH_GELU) / 2 - (1 - TANH_GELU**2) / 2 * math.sqrt(2 / math.pi) * 1.134145,
                0.5,
                (1 + TANH_GELU) / 2 + (1 - TANH_GELU**2) / 2 * math.sqrt(2 / math.pi) * 1.134145,
            ],
        ),
        ("silu", {}, [0, LN3], [0, 0.75 * LN3], [0.5, 0.75 + LN3 * 3 / 16]),
        (
            "softplus",
            {},
            [-LN3, 0, LN3],
            [math.log(4 / 3), math.log(2), math.log(4)],
            [0.25, 0.5, 0.75],
        ),
        ("softplus", {"beta": 2}, [LN3 / 2], [math.log(4) / 2], [0.75]),
    ],
)
@pytest.mark.parametrize("version", VERSIONS["relu"])
def test_hand_computed_numbers(version, formula, kwargs, x, y, dx):
    got_y, got_dx = run(formula, version, np.array(x, float), **kwargs)
    np.testing.assert_allclose(got_y, y, rtol=1e-14)
    np.testing.assert_allclose(got_dx, dx, rtol=1e-13)


@versions
@given(data=st.data(), shape=shapes, seed=seeds, dtype=dtypes)
def test_versions_equal_the_reference(formula, version, data, shape, seed, dtype):
    x = 3 * normal(np.random.default_rng(seed), shape, dtype)
    kwargs = data.draw(options(formula))
    assert_equals_reference(version, *pair(formula), (x,), seed, **kwargs)


@versions
@given(data=st.data(), shape=shapes, seed=seeds)
def test_gradients_equal_finite_differences(formula, version, data, shape, seed):
    x = 10 * distinct(np.random.default_rng(seed), shape)  # at least 0.05 from the kinks at 0
    assert_gradients(version, *pair(formula), (x,), seed, **data.draw(options(formula)))


@versions
@given(shape=shapes, seed=seeds, layout=layouts, dtype=dtypes)
def test_memory_layout_changes_no_bit(formula, version, shape, seed, layout, dtype):
    x = normal(np.random.default_rng(seed), shape, dtype)
    assert_layout_free(version, *pair(formula), (x,), seed, layout)


@formulas
@given(data=st.data(), shape=shapes, seed=seeds)
def test_equals_pytorch(torch, formula, data, shape, seed):
    function = getattr(torch.nn.functional, formula.removesuffix("_tanh"))
    kwargs = data.draw(options(formula))
    x = 10 * normal(np.random.default_rng(seed), shape)  # beyond softplus's threshold as well
    assert_equals_torch(
        torch, *pair(formula), (x,), seed, lambda x: function(x, **kwargs), **kwargs
    )


@versions
@pytest.mark.parametrize("shape", [(), (0, 3), (2, 0)])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_no_axes_and_no_elements(formula, version, shape, dtype):
    for a in run(formula, version, np.ones(shape, dtype)):
        assert isinstance(a, np.ndarray)
        assert a.shape == shape
        assert a.dtype == dtype


# ---------------------------------------------------------------- kinks


@pytest.mark.parametrize("version", VERSIONS["relu"])
@pytest.mark.parametrize("zero", [0.0, -0.0])
def test_derivative_at_zero_is_the_one_on_the_left(version, zero):
    x = np.array([zero])
    assert run("relu", version, x)[1] == 0
    assert run("leaky_relu", version, x, negative_slope=0.25)[1] == 0.25
    assert run("elu", version, x, alpha=0.25)[1] == 0.25


@pytest.mark.parametrize("version", VERSIONS["softplus"])
def test_softplus_is_the_identity_above_its_threshold(version):
    below = 1.5
    above = np.nextafter(below, 2)
    y, dx = run("softplus", version, np.array([below, above]), beta=2, threshold=3)
    np.testing.assert_allclose(y, [math.log1p(math.exp(3)) / 2, above], rtol=1e-15)
    np.testing.assert_allclose(dx, [1 / (1 + math.exp(-3)), 1], rtol=1e-15)


# ---------------------------------------------------------------- extremes


@versions
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("far", [1e3, 1e4])
def test_large_numbers_neither_overflow_nor_turn_into_nan(formula, version, dtype, far):
    left = {"leaky_relu": (-0.01 * far, 0.01), "elu": (-1, 0), "tanh": (-1, 0)}
    right = {"sigmoid": (1, 0), "tanh": (1, 0)}
    y, dx = run(formula, version, np.array([-far, far], dtype))
    expected = np.array([left.get(formula, (0, 0)), right.get(formula, (far, 1))], dtype)
    np.testing.assert_allclose(np.stack([y, dx], axis=1), expected, rtol=1e-6)


@versions
def test_nan_passes(formula, version):
    y, dx = run(formula, version, np.array([NAN, 1.0]), dy=np.array([1.0, NAN]))
    np.testing.assert_array_equal(np.isnan(y), [True, False])
    assert np.isnan(dx[1])


@versions
def test_infinity_goes_where_the_formula_sends_it(formula, version):
    left = {"relu": 0, "leaky_relu": -INF, "elu": -1, "sigmoid": 0, "tanh": -1, "softplus": 0}
    right = {"sigmoid": 1, "tanh": 1}
    y, _ = run(formula, version, np.array([-INF, INF]))
    np.testing.assert_array_equal(y, [left.get(formula, NAN), right.get(formula, INF)])


def exact_normal(x):
    """P(x) and P'(x) from math.erfc and 40 digits, each right to the last place or two."""
    with decimal.localcontext(prec=40):
        exact = -decimal.Decimal(x) / decimal.Decimal(2).sqrt()
        z = float(exact)
        # math.erfc sees x / sqrt(2) rounded, which shifts its value by up to 1e-13 of it.
        rest = float(exact - decimal.Decimal(z))
        bell = float((-(decimal.Decimal(x) ** 2) / 2).exp()) / math.sqrt(2 * math.pi)
    return (math.erfc(z) - 2 / math.sqrt(math.pi) * math.exp(-z * z) * rest) / 2, bell


@pytest.mark.parametrize("version", ["numpy", "numba"])
def test_gelu_is_exact_in_both_tails(version):
    x = np.concatenate([np.linspace(-37, 37, 3001), np.linspace(-2, 2, 1001)])
    P, bell = np.array([exact_normal(v) for v in x.tolist()]).T
    y, dx = run("gelu", version, x)
    np.testing.assert_allclose(y, x * P, rtol=3e-15)
    # The two terms of the derivative cancel near its zero: compare with their size.
    assert np.max(np.abs(dx - (P + x * bell)) / (P + np.abs(x) * bell)) < 3e-15
    y, dx = run("gelu", version, x.astype("f4"))
    normal_range = np.abs(x) < 12  # beyond, P is too small for a float32
    wide = x.astype("f4").astype(float)
    P, bell = np.array([exact_normal(v) for v in wide.tolist()]).T
    np.testing.assert_allclose(y[normal_range], (wide * P)[normal_range], rtol=1e-6)
    assert np.max(np.abs(dx - (P + wide * bell))[normal_range]) < 1e-6


@pytest.mark.parametrize("version", VERSIONS["sigmoid"])
@pytest.mark.parametrize("formula", ["sigmoid", "silu", "elu", "softplus"])
def test_small_results_keep_their_digits(formula, version):
    y, dx = run(formula, version, np.array([-600.0, -1e-12]))
    e = math.exp(-600)
    expected = {
        "sigmoid": ([e, 0.5], [e, 0.25]),
        "silu": ([-600 * e, -5e-13], [-599 * e, 0.5]),
        "elu": ([-1, -1e-12], [e, 1]),
        "softplus": ([e, math.log(2)], [e, 0.5]),
    }
    np.testing.assert_allclose((y, dx), expected[formula], rtol=2e-12)


# ---------------------------------------------------------------- contract


def test_options_of_another_float_type_change_no_dtype():
    y, dx = run("leaky_relu", "numpy", np.float32([-1, 1]), negative_slope=np.float64(0.1))
    assert y.dtype == dx.dtype == np.float32
    np.testing.assert_array_equal(y, np.float32([-0.1, 1]))


@pytest.mark.parametrize(("formula", "kept"), [("relu", "y"), ("tanh", "y"), ("silu", "x")])
def test_cache_keeps_one_array_that_exists_anyway(formula, kept):
    x = np.ones(3)
    y, cache = pair(formula)[0](x)
    assert np.shares_memory(cache.kept, {"x": x, "y": y}[kept])
    assert not np.shares_memory(x, y)


X = np.zeros((2, 3))


@formulas
def test_bad_arrays_are_named(formula):
    op = formula.removesuffix("_tanh")
    forward, backward = pair(formula)
    for bad, got in ((X.astype("f2"), "float16"), (X.astype(int), "int64"), ([0.0], "list")):
        with pytest.raises(TypeError, match=rf"{op}: x: expected .*, got {got}"):
            forward(bad)
    y, cache = forward(X)
    with pytest.raises(ValueError, match=rf"{op}_backward: dy: expected shape \(2, 3\) \(like x\)"):
        backward(y[0], cache)
    with pytest.raises(TypeError, match=rf"{op}_backward: dy: expected float64 like x"):
        backward(y.astype("f4"), cache)


@pytest.mark.parametrize(
    ("formula", "kwargs", "error", "message"),
    [
        ("gelu", {"approximate": "erf"}, ValueError, "gelu: approximate: expected 'none' or"),
        ("leaky_relu", {"negative_slope": "0.1"}, TypeError, "negative_slope: expected a number"),
        ("elu", {"alpha": None}, TypeError, "elu: alpha: expected a number.*, got None"),
        ("elu", {"alpha": True}, TypeError, "elu: alpha: expected a number.*, got True"),
        ("softplus", {"beta": 0}, ValueError, "softplus: beta: expected a number > 0, got 0"),
        ("softplus", {"beta": NAN}, ValueError, "softplus: beta: expected .* > 0, got nan"),
        ("softplus", {"threshold": [1]}, TypeError, "softplus: threshold: expected a number"),
    ],
)
def test_bad_options_are_named(formula, kwargs, error, message):
    with pytest.raises(error, match=message):
        pair(formula)[0](X, **kwargs)


def test_another_version_can_run_the_backward():
    x, dy = normal(np.random.default_rng(0), (2, 3, 4)), normal(np.random.default_rng(1), (2, 3, 4))
    with use("reference"):
        _, cache = relu_forward(x)
    np.testing.assert_array_equal(relu_backward(dy, cache), np.where(x > 0, dy, 0))


@pytest.mark.parametrize("version", VERSIONS["relu"])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_relu_blocks_every_gradient_where_it_was_off(version, dtype):
    x = np.array([-1, -1, 0, NAN, 1, 1, -1], dtype)
    dy = np.array([NAN, INF, -INF, INF, INF, NAN, -2], dtype)
    with use(version):
        y, cache = relu_forward(x)
        dx = relu_backward(dy, cache)
    np.testing.assert_array_equal(y, np.array([0, 0, 0, NAN, 1, 1, 0], dtype))
    np.testing.assert_array_equal(dx, np.array([0, 0, 0, 0, INF, NAN, 0], dtype))
    assert not np.signbit(dx).any()


@pytest.mark.parametrize("version", VERSIONS["relu"])
def test_relu_of_many_numbers(version):
    """More than one piece of work for the threads, and a number left over."""
    x = normal(np.random.default_rng(0), 3 * 8192 + 1, np.float32)
    dy = normal(np.random.default_rng(1), x.shape, np.float32)
    with use(version):
        y, cache = relu_forward(x)
        dx = relu_backward(dy, cache)
    np.testing.assert_array_equal(y, np.where(x > 0, x, 0))
    np.testing.assert_array_equal(dx, np.where(x > 0, dy, 0))


@formulas
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("start", [0, 1])
def test_many_numbers(formula, dtype, start):
    """As above, from a place in memory where no vector begins, to a rest that fills none."""
    x = 3 * normal(np.random.default_rng(0), 3 * 8192 + 5, dtype)[start:]
    dy = normal(np.random.default_rng(1), x.size + start, dtype)[start:]
    y, dx = run(formula, "numba", x, dy=dy)
    expected, wanted = run(formula, "numpy", x.astype(float), dy=dy.astype(float))
    u = np.finfo(dtype).eps
    np.testing.assert_allclose(y, expected, rtol=8 * u, atol=4 * u)
    np.testing.assert_allclose(dx, wanted, rtol=0, atol=4 * u * abs(wanted).max())


@pytest.mark.parametrize("formula", ["elu", "gelu", "gelu_tanh", "sigmoid", "silu", "softplus"])
def test_numbers_of_any_size(formula):
    """Subnormal, tiny and huge: nothing overflows on the way to a result that does not."""
    sizes = np.float32([1e-45, 1e-40, 1e-20, 1e-3, 9, 50, 90, 1e3, 1e13, 1e25, 3e38])
    x = np.concatenate([-sizes, sizes])
    y, dx = run(formula, "numba", x)
    expected, wanted = run(formula, "reference", x.astype(float))
    np.testing.assert_allclose(y, expected.astype("f4"), rtol=1e-5, atol=1e-37)
    if formula != "sigmoid":  # whose y (1 - y) cancels where y is nearly 1
        np.testing.assert_allclose(dx, wanted.astype("f4"), rtol=1e-5, atol=1e-35)
    if "lu" in formula and formula != "elu":
        y, _ = run(formula, "numba", np.float32([0.0, -0.0]))
        expected, _ = run(formula, "reference", np.float32([0.0, -0.0]))
        np.testing.assert_array_equal(y.view("i4"), expected.view("i4"))


@pytest.mark.parametrize("version", VERSIONS["tanh"])
def test_tanh_is_odd_to_the_last_bit(version):
    x = normal(np.random.default_rng(0), 1000, np.float32)
    x[0] = 0.0
    y, _ = run("tanh", version, x)
    opposite, _ = run("tanh", version, -x)
    np.testing.assert_array_equal(opposite.view(np.int32), (-y).view(np.int32))
