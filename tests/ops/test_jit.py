"""Compiling and running kernels: the cache may fail, threads may meet."""

import os
import subprocess
import sys
import threading
import time
import warnings

import numpy as np
import pytest

numba = pytest.importorskip("numba", reason="Numba is not installed")

from minicnn.ops import jit  # noqa: E402  (needs Numba)


def double(x):
    return 2 * x


@pytest.fixture
def fresh_warning(monkeypatch):
    monkeypatch.setattr(jit, "_warned", False)


@pytest.fixture
def cache_folder(monkeypatch, tmp_path):
    monkeypatch.setattr(numba.config, "CACHE_DIR", str(tmp_path))
    return tmp_path


def test_compiled_code_is_kept_and_found(cache_folder, fresh_warning):
    assert jit.kernel()(double).alone()(21) == 42
    assert list(cache_folder.rglob("*.nbi"))
    again = jit.kernel()(double).alone()
    assert again(21) == 42
    assert sum(again.stats.cache_hits.values()) == 1


def test_a_changed_vector_layer_is_compiled_anew(cache_folder, monkeypatch, fresh_warning):
    assert jit.kernel()(double).alone()(21) == 42
    monkeypatch.setattr(jit, "_FINGERPRINT", "another source")
    again = jit.kernel()(double).alone()
    assert again(21) == 42
    assert not again.stats.cache_hits


def test_no_place_for_a_cache_gives_one_warning(monkeypatch, fresh_warning):
    def nowhere(*args):
        raise RuntimeError("cannot cache function: no locator available")

    monkeypatch.setattr(jit._Cache, "__init__", nowhere)
    with pytest.warns(RuntimeWarning, match="cache fails: .*NUMBA_CACHE_DIR"):
        first = jit.kernel()(double).alone()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        second = jit.kernel()(double).alone()
    assert (first(1), second(2.5)) == (2, 5.0)


def test_a_cache_that_cannot_be_written_gives_one_warning(monkeypatch, cache_folder, fresh_warning):
    def full(*args):
        raise OSError(28, "No space left on device")

    function = jit.kernel()(double).alone()
    monkeypatch.setattr(jit.FunctionCache, "save_overload", full)
    with pytest.warns(RuntimeWarning, match="No space left"):
        assert function(21) == 42


def test_a_damaged_cache_is_passed_over(cache_folder, fresh_warning):
    assert jit.kernel()(double).alone()(21) == 42
    for index in cache_folder.rglob("*.nbi"):
        index.write_bytes(index.read_bytes()[:-9])
    with pytest.warns(RuntimeWarning, match="cache fails"):
        assert jit.kernel()(double).alone()(21) == 42


def test_a_cache_whose_files_were_mixed_up_is_passed_over(cache_folder, fresh_warning):
    """Two processes that fill it at once may do that; Numba would run the wrong code."""
    first = jit.kernel()(double).alone()
    assert (first(21), first(2.5)) == (42, 5.0)
    one, other = cache_folder.rglob("*.nbc")
    contents = one.read_bytes(), other.read_bytes()
    other.write_bytes(contents[0])
    one.write_bytes(contents[1])
    for value in (21, 2.5):
        assert jit.kernel()(double).alone()(value) == 2 * value


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
