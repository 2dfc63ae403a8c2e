"""Which version runs, what counts as an array, and where arrays live."""

import sys
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest

from minicnn import Conv2d, backend, to_cpu, to_gpu, use
from minicnn.backend import Version, as_arrays, pick, prefer

TABLE = {name: Version(None, name) for name in backend.VERSIONS}
X = np.zeros(3)


class FakeCupyArray:
    """Stands in for a CuPy array where only its type counts."""

    dtype = np.dtype(np.float64)


FakeCupyArray.__module__ = "cupy.core"


def picked(x, table=TABLE):
    return pick("op", table, x).backward


def test_arrays_decide_by_default():
    assert picked(X) == "numpy"
    assert picked(FakeCupyArray()) == "cupy"


def test_prefer_and_use():
    with prefer("numba"):
        assert picked(X) == "numba"
        assert picked(FakeCupyArray()) == "cupy"
        with use("reference"):
            assert picked(X) == "reference"
        assert picked(X) == "numba"
    assert picked(X) == "numpy"


def test_use_lasts_without_a_with_block_and_nests():
    use("numba")
    try:
        with use(None):
            assert picked(X) == "numpy"
        assert picked(X) == "numba"
    finally:
        use(None)
    assert picked(X) == "numpy"


def test_choice_is_given_back_after_an_error():
    with pytest.raises(ZeroDivisionError), use("reference"):
        raise ZeroDivisionError
    with pytest.raises(ZeroDivisionError), prefer("numba"):
        raise ZeroDivisionError
    assert picked(X) == "numpy"


def test_an_op_without_the_version_runs_numpy():
    table = {name: TABLE[name] for name in ("reference", "numpy")}
    for name in ("numba", "numpy"):
        with use(name):
            assert picked(X, table) == "numpy"
    assert picked(FakeCupyArray(), table) == "numpy"


@pytest.mark.parametrize(
    ("version", "x", "message"),
    [
        ("reference", FakeCupyArray(), "op: x: expected a NumPy array for version 'reference'"),
        ("numba", FakeCupyArray(), "op: x: expected a NumPy array for version 'numba'"),
        ("cupy", X, "op: x: expected a CuPy array for version 'cupy', got a NumPy array"),
    ],
)
def test_a_version_that_cannot_run_there_is_refused(version, x, message):
    with use(version), pytest.raises(TypeError, match=message):
        picked(x)


def test_unknown_version_is_named():
    with pytest.raises(ValueError, match=r"use: version: expected one of .* got 'fast'"):
        use("fast")
    assert picked(X) == "numpy"


def test_as_arrays_converts_layout_and_byte_order_only():
    x = np.arange(6, dtype=">f4").reshape(2, 3).T
    y, none = as_arrays("op", ("b",), x=x, b=None)
    assert none is None
    assert y.flags.c_contiguous
    assert y.dtype == np.float32
    assert y.dtype.isnative
    np.testing.assert_array_equal(y, x)
    (scalar,) = as_arrays("op", x=np.float64(2))
    assert scalar.shape == ()
    plain = np.zeros((2, 2))
    assert np.shares_memory(as_arrays("op", x=plain)[0], plain)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"x": [1.0]}, "op: x: expected a NumPy or CuPy array, got list .*fix: numpy.asarray"),
        ({"x": None}, "op: x: expected a NumPy or CuPy array, got NoneType"),
        ({"x": X, "w": None}, "op: w: expected a NumPy or CuPy array, got NoneType"),
        ({"x": 1.0}, "op: x: expected a NumPy or CuPy array, got float"),
        ({"x": np.zeros(2, np.float16)}, "op: x: expected float32 or float64, got float16"),
        ({"x": np.zeros(2, np.int32)}, "op: x: expected float32 or float64, got int32"),
        ({"x": np.zeros(2, complex)}, "op: x: expected float32 or float64, got complex128"),
        ({"x": np.zeros(2, object)}, "op: x: expected float32 or float64, got object"),
        ({"x": X, "w": X.astype("f4")}, "op: w: expected float64 like x, got float32"),
    ],
)
def test_bad_arrays_are_named(arrays, message):
    with pytest.raises(TypeError, match=message):
        as_arrays("op", **arrays)


def test_mixed_devices_are_named(monkeypatch):
    monkeypatch.setattr(backend, "_as_float", lambda op, name, a: a)
    with pytest.raises(TypeError, match="op: w: expected a NumPy array like x, got a CuPy array"):
        as_arrays("op", x=X, w=FakeCupyArray())


def test_gpu_without_cupy_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "cupy", None)
    with pytest.raises(RuntimeError, match=r"CuPy is not installed .*\[cuda13\]"):
        to_gpu(X)
    assert to_cpu(X) is X


def fake_cupy(count):
    """A cupy module whose runtime finds `count` devices, or raises that error."""

    class CUDARuntimeError(RuntimeError):
        pass

    def get_device_count():
        if isinstance(count, str):
            raise CUDARuntimeError(count)
        return count

    module = ModuleType("cupy")
    runtime = SimpleNamespace(getDeviceCount=get_device_count, CUDARuntimeError=CUDARuntimeError)
    module.cuda = SimpleNamespace(runtime=runtime)
    module.asarray = lambda a: ("on the GPU", a)
    return module


@pytest.mark.parametrize("count", [0, "no driver"])
def test_gpu_without_a_device_says_so(monkeypatch, count):
    monkeypatch.setitem(sys.modules, "cupy", fake_cupy(count))
    with pytest.raises(RuntimeError, match="CuPy finds no CUDA device"):
        to_gpu(X)


def test_layers_move_with_all_they_hold(monkeypatch):
    monkeypatch.setitem(sys.modules, "cupy", fake_cupy(1))
    layer = Conv2d(1, 1, 2, rng=0)
    weight = layer.weight
    assert to_gpu(layer) is layer
    assert layer.weight == ("on the GPU", weight)
    assert set(layer.grads) == {"weight", "bias"}
    assert layer.grads["bias"][0] == "on the GPU"


def test_import_needs_numpy_only():
    """Run in a fresh interpreter, where nothing else has been imported yet."""
    import subprocess

    code = (
        "import sys, minicnn\n"
        "heavy = {'numba', 'cupy', 'matplotlib', 'tqdm', 'pooch', 'PIL', 'safetensors', 'torch'}\n"
        "sys.exit(', '.join(sorted(heavy & set(sys.modules))) or None)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"import minicnn imported {done.stderr}"
