"""Recorded work: run once, captured once, replayed with what its arrays hold then."""

import numpy as np
import pytest

from minicnn import backend, to_cpu
from minicnn.gpu.blas import Blas
from minicnn.gpu.graph import CannotCapture, Recording


def recording_of(cupy, work):
    stream = cupy.cuda.Stream()
    return Recording(work, stream, Blas(stream))


def test_it_does_the_work_each_time(cupy):
    x, w = cupy.ones((1, 3)), cupy.full((3, 3), 2.0)
    calls = []

    def work():
        calls.append(backend.recording())
        x[...] = backend.matmul(x, w)

    recording = recording_of(cupy, work)
    for turn, expected in enumerate([6, 36, 216, 1296]):
        assert recording.captured == (turn > 1)
        recording.run()
        assert to_cpu(x).tolist() == [[expected] * 3]
    assert calls == [True, True]
    assert not backend.recording()
    w.fill(0)
    recording.run()
    assert not to_cpu(x).any()


def test_arrays_from_the_host_are_made_anew_for_each_run(cupy):
    total, rng = cupy.zeros(2), np.random.default_rng(0)
    signs = iter(range(9))

    def work():
        first = backend.from_host(total, lambda: rng.random(2))
        second = backend.from_host(total, lambda: np.full(2, (-1.0) ** next(signs)))
        total.__iadd__(first * second)

    recording, same = recording_of(cupy, work), np.random.default_rng(0)
    expected = np.zeros(2)
    for turn in range(5):
        recording.run()
        expected += same.random(2) * (-1.0) ** turn
        np.testing.assert_allclose(to_cpu(total), expected, rtol=1e-15)


def test_its_memory_is_its_own(cupy):
    """Arrays that others make and drop between launches do not touch the graph's."""
    x, y = cupy.arange(1000.0), cupy.zeros(1000)

    def work():
        a = x * 2
        b = a + 1
        y[...] = a * b

    recording = recording_of(cupy, work)
    used = cupy.get_default_memory_pool().used_bytes()
    for _ in range(4):
        recording.run()
        others = [cupy.full(1000, np.nan) for _ in range(4)]
        recording.run()
        del others
        np.testing.assert_array_equal(to_cpu(y), 2 * np.arange(1000) * (2 * np.arange(1000) + 1))
    assert recording.nbytes >= 3 * 8000
    assert cupy.get_default_memory_pool().used_bytes() == used


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda x: float(x.sum()), "StreamCapture|not permitted"),
        (lambda x: x @ x, "NotImplementedError: calling cuBLAS"),
        (lambda x: backend.array_module(x).asarray(np.ones(3)), "StreamCapture|not permitted"),
        (lambda x: 1 / 0, "ZeroDivisionError: division by zero"),
    ],
)
def test_what_cannot_be_captured_is_reported_and_changes_nothing(imitated, cupy, spoil, message):
    x, turn = cupy.ones((2, 2)), []

    def work():
        x.__iadd__(1)
        if turn:
            spoil(x)
        turn.append(1)

    recording = recording_of(cupy, work)
    recording.run()
    with pytest.raises(CannotCapture, match=message):
        recording.run()
    assert to_cpu(x).tolist() == [[2, 2], [2, 2]]
    assert not recording.captured
    assert not backend.recording()
    y = cupy.ones(2) + 1  # and work goes on as before
    assert to_cpu(y).tolist() == [2, 2]
