"""The imitated CuPy is as strict as the real one, and has nothing that the real one lacks."""

import inspect

import numpy as np
import pytest

from emulator import fake_cupy


@pytest.fixture
def cp():
    return fake_cupy.make()


@pytest.mark.parametrize(
    "mix",
    [
        np.asarray,
        lambda x: np.array([x, x]),
        lambda x: x + np.ones(3),
        lambda x: np.ones(3) + x,
        lambda x: np.add(np.ones(3), x),
        lambda x: np.add(x, x, out=np.empty(3)),
        lambda x: np.ones(3).__iadd__(x),
        lambda x: x.__iadd__(np.ones(3)),
        lambda x: x.__setitem__(slice(None), np.ones(3)),
        lambda x: np.ones(3).__setitem__(slice(None), x),
        lambda x: np.testing.assert_array_equal(x, np.ones(3)),
    ],
)
def test_numpy_and_cupy_do_not_mix(cp, mix):
    with pytest.raises(TypeError):
        mix(cp.ones(3))


def test_arrays_are_none_of_numpys_and_sums_are_arrays(cp):
    x = cp.asarray(np.arange(6.0).reshape(2, 3))
    assert not isinstance(x, np.ndarray)
    assert type(x).__module__ == "cupy"
    total = x.sum()
    assert isinstance(total, cp.ndarray)
    assert total.shape == ()
    assert float(np.float32(2) * total) == 30
    assert isinstance(np.exp(x), cp.ndarray)
    assert isinstance(np.sum(x, axis=0), cp.ndarray)
    np.testing.assert_array_equal(cp.asnumpy(x.T[1:]), [[1, 4], [2, 5]])
    x.T[1:] += 1
    np.testing.assert_array_equal(x.get(), [[0, 2, 3], [3, 5, 6]])


def test_only_what_cupy_takes_is_there(cp):
    with pytest.raises(AttributeError, match="no frompyfunc"):
        _ = cp.frompyfunc
    for call in (
        lambda: cp.sum(cp.ones(3), where=cp.ones(3, bool)),
        lambda: cp.ones(3).sum(initial=1),
    ):
        with pytest.raises(TypeError, match="unexpected keyword"):
            call()
    with pytest.raises(ValueError, match="Unsupported dtype"):
        cp.asarray(np.ones(3, ">f4"))
    with pytest.raises(ValueError, match="Unsupported dtype"):
        cp.asarray(np.array(["a"]))


def test_the_real_cupy_has_it_all():
    real = pytest.importorskip("cupy", reason="CuPy is not installed: nothing to compare with")
    if real.__name__ != "cupy" or "imitated" in real.__version__:
        pytest.skip("the imitation stands in for CuPy here")
    for name, allowed in fake_cupy.FUNCTIONS.items():
        function = getattr(real, name)
        try:
            parameters = inspect.signature(function).parameters
        except ValueError:  # written in Cython
            continue
        anything = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
        assert anything or allowed <= parameters.keys(), name
    for name in (*fake_cupy.UFUNCS, *fake_cupy.CUBLAS, "copyto", "asnumpy", "ascontiguousarray"):
        assert hasattr(real, name), name
    imitated = fake_cupy.make()
    for ours, theirs in (
        (imitated.ndarray, real.ndarray),
        (fake_cupy.Stream, real.cuda.Stream),
        (fake_cupy.MemoryPool, real.cuda.MemoryPool),
        (fake_cupy.Graph, real.cuda.Graph),
        (imitated.cuda.Device, real.cuda.Device),
    ):
        public = {name for name in dir(ours) if not name.startswith("_")} - {"count", "peak"}
        assert public <= {*dir(theirs), "spoilt"}, ours
    assert issubclass(real.cuda.memory.OutOfMemoryError, MemoryError)
    assert issubclass(real.cuda.runtime.CUDARuntimeError, RuntimeError)


# ---------------------------------------------------------------- graphs


def captured(cp, work):
    stream, pool = cp.cuda.Stream(), cp.cuda.MemoryPool()
    with stream, cp.cuda.using_allocator(pool.malloc):
        stream.begin_capture()
        try:
            work()
        finally:
            graph = stream.end_capture()
    return graph


def test_a_graph_runs_when_launched_on_what_is_there_then(cp):
    x, y = cp.ones(3), cp.zeros(2)

    def work():
        z = (x * 2).reshape(3, 1)  # (3, 1)
        y[...] = z[:2].sum()
        x.__iadd__(z[:, 0])
        cp.copyto(x, cp.zeros(3), where=x > 5)

    graph = captured(cp, work)
    assert x.tolist() == [1, 1, 1]  # nothing has run yet
    for expected in (([3, 3, 3], 4), ([0, 0, 0], 12), ([0, 0, 0], 0)):
        graph.launch()
        assert (x.tolist(), y.tolist()[0]) == expected
    x.fill(1)
    graph.launch()
    assert x.tolist() == [3, 3, 3]


@pytest.mark.parametrize(
    "read",
    [
        lambda x: float(x.sum()),
        lambda x: bool(x.any()),
        lambda x: x.get(),
        lambda x: x.item(),
        lambda x: x[x > 0],
        lambda x: x[np.array([0])],
    ],
)
def test_reading_spoils_a_capture(cp, read):
    x = cp.ones(1)
    stream, pool = cp.cuda.Stream(), cp.cuda.MemoryPool()
    with stream, cp.cuda.using_allocator(pool.malloc):
        stream.begin_capture()
        with pytest.raises(fake_cupy.CUDARuntimeError, match="not permitted"):
            read(x)
        with pytest.raises(fake_cupy.CUDARuntimeError, match="Invalidated"):
            stream.end_capture()
        read(x)  # all is well again


def test_what_else_a_capture_refuses(cp):
    x = cp.ones((2, 2))
    for product in (lambda: x @ x, lambda: cp.matmul(x, x), lambda: x.dot(x)):
        with pytest.raises(NotImplementedError, match="cuBLAS"):
            captured(cp, product)
    with pytest.raises(RuntimeError, match="default"):
        cp.cuda.Stream.null.begin_capture()
    stream = cp.cuda.Stream()
    with stream:
        stream.begin_capture()
        with pytest.raises(fake_cupy.CUDARuntimeError, match="default pool"):
            _ = x + 1
    with pytest.raises(fake_cupy.CUDARuntimeError):
        stream.end_capture()
    stream.begin_capture()
    with pytest.raises(fake_cupy.CUDARuntimeError, match="another stream"):
        x += 1


# ---------------------------------------------------------------- memory


def test_a_pool_counts_and_runs_out(cp):
    pool = cp.get_default_memory_pool()
    x = cp.zeros(1024, np.float32)
    assert pool.used_bytes() == 4096
    view = x[1:]
    del x
    assert pool.used_bytes() == 4096
    del view
    assert pool.used_bytes() == 0
    assert pool.total_bytes() == 4096
    pool.free_all_blocks()
    assert pool.total_bytes() == 0
    pool.set_limit(size=4096)
    with pytest.raises(fake_cupy.OutOfMemoryError, match="Out of memory allocating 4,608 bytes"):
        cp.zeros(1025, np.float32)
    other = cp.cuda.MemoryPool()
    with cp.cuda.using_allocator(other.malloc):
        y = cp.zeros(2000, np.float32)
    assert other.used_bytes() == 8192
    del y
    assert other.used_bytes() == 0
