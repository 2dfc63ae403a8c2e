"""Running kernels: scratch memory, calls made once, threads that meet."""

import itertools
import os
import subprocess
import sys
import threading
import time

import numpy as np
import pytest

numba = pytest.importorskip("numba", reason="Numba is not installed")

from minicnn.ops import jit  # noqa: E402  (needs Numba)


def record(x, scale, out, rows, tail):
    out[0] = scale * x.sum()
    out[1], out[2] = rows.shape[0], rows.shape[1]
    rows[:] = 1
    tail[:] = 7


def test_a_call_keeps_its_arguments_and_gets_scratch_memory_anew():
    out = np.zeros(3)
    x = np.arange(4.0)
    call = jit.Call(record, (jit.flat(x), 2.0, out), np.float64, [(3, 5), (1, 9, np.int32)])
    call()
    row = 8 + jit.GAP // 8  # numbers: five, rounded up to a cache line, and the gap
    assert out.tolist() == [12, 3, row]
    x[0] = 10
    call()
    assert out[0] == 32
    with jit.buffers(np.float64, 1 << 16):  # the memory grows, and lies elsewhere
        pass
    call.on(np.ones(4))()
    assert out.tolist() == [8, 3, row]


def test_a_compiled_call_takes_another_input():
    @jit.kernel()
    def total(x, scale):
        return scale * x.sum()

    x = np.arange(6.0)
    call = jit.Call(total, (jit.flat(x), 2.0), np.float64)
    assert [call(), call()] == [30, 30]
    x[0] = 5
    assert call() == 40
    assert [call.on(np.ones((2, 3)))(), call()] == [12, 12]
    odd = np.zeros(6 * 8 + 1, np.uint8)[1:].view(np.float64)  # not aligned
    odd[:] = 3
    assert [call.on(odd)(), call()] == [36, 36]
    assert call.on(np.ones(6))() == 12


def test_a_call_does_first_what_it_is_told():
    order = []
    call = jit.Call(lambda: order.append("kernel"), (), before=lambda: order.append("before"))
    call()
    assert order == ["before", "kernel"]


def test_rows_of_scratch_memory_lie_apart():
    seen = []
    sizes = [(2, 3), (4, 1, np.uint8), (1, 0), (2, 16, np.float32)]
    jit.Call(lambda *arrays: seen.extend(arrays), (), np.float64, sizes)()
    lines = []
    for a, (rows, size, *dtype) in zip(seen, sizes):
        assert a.shape[0] == rows
        assert a.shape[1] >= size
        assert a.dtype == (dtype[0] if dtype else np.float64)
        for row in a:
            if row.size:
                assert row.ctypes.data % jit.ALIGN == 0
                lines.append((row.ctypes.data, row.ctypes.data + size * row.itemsize))
    lines.sort()
    assert all(end + jit.GAP <= start for (_, end), (start, _) in itertools.pairwise(lines))


def test_buffers_are_aligned_disjoint_and_kept():
    with jit.buffers(np.float32, 5, 0, 100) as (a, b, c):
        assert [len(a), len(b), len(c)] == [5, 0, 100]
        assert a.ctypes.data % jit.ALIGN == c.ctypes.data % jit.ALIGN == 0
        assert not np.shares_memory(a, c)
        a[:], c[:] = 1, 2
        assert (a == 1).all()
        first = a.ctypes.data
    with jit.buffers(np.float64, 50) as (d,):
        assert d.ctypes.data == first


def test_one_thread_at_a_time_has_the_buffers():
    inside, clashes = [], []

    def work():
        for _ in range(10):
            with jit.buffers(np.float32, 10) as (a,):
                inside.append(1)
                clashes.append(len(inside) > 1)
                a[:] = 1
                time.sleep(0.001)  # lets the others run
                inside.pop()

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(clashes) == 40
    assert not any(clashes)


@pytest.mark.parametrize(("value", "ok"), [("1", True), ("0", False), ("x", False), ("999", False)])
def test_the_number_of_threads_is_the_users(value, ok):
    code = "from minicnn.ops import jit; import numba; print(numba.get_num_threads())"
    run = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"MINICNN_NUM_THREADS": value},
        capture_output=True,
        text=True,
    )
    if ok:
        assert run.stdout.strip() == value
    else:
        assert "MINICNN_NUM_THREADS: expected a whole number from 1 to" in run.stderr
