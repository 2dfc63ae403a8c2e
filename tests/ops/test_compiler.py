"""Compiling kernels: in half the time, and with a cache that may fail."""

import warnings

import numpy as np
import pytest

numba = pytest.importorskip("numba", reason="Numba is not installed")

from minicnn.ops import compiler  # noqa: E402  (needs Numba)


def double(x):
    return 2 * x


@pytest.fixture
def fresh_warning(monkeypatch):
    monkeypatch.setattr(compiler, "_warned", False)


@pytest.fixture
def cache_folder(monkeypatch, tmp_path):
    monkeypatch.setattr(numba.config, "CACHE_DIR", str(tmp_path))
    return tmp_path


def test_compiled_code_is_kept_and_found(cache_folder, fresh_warning):
    assert compiler.kernel()(double).alone()(21) == 42
    assert list(cache_folder.rglob("*.nbi"))
    again = compiler.kernel()(double).alone()
    assert again(21) == 42
    assert sum(again.stats.cache_hits.values()) == 1


def test_a_changed_kernel_elsewhere_is_compiled_anew(cache_folder, monkeypatch, fresh_warning):
    assert compiler.kernel()(double).alone()(21) == 42
    monkeypatch.setattr(compiler, "_FINGERPRINT", "another source")
    again = compiler.kernel()(double).alone()
    assert again(21) == 42
    assert not again.stats.cache_hits


def test_no_place_for_a_cache_gives_one_warning(monkeypatch, fresh_warning):
    def nowhere(*args):
        raise RuntimeError("cannot cache function: no locator available")

    monkeypatch.setattr(compiler._Cache, "__init__", nowhere)
    with pytest.warns(RuntimeWarning, match="cache fails: .*NUMBA_CACHE_DIR"):
        first = compiler.kernel()(double).alone()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        second = compiler.kernel()(double).alone()
    assert (first(1), second(2.5)) == (2, 5.0)


def test_a_cache_that_cannot_be_written_gives_one_warning(monkeypatch, cache_folder, fresh_warning):
    def full(*args):
        raise OSError(28, "No space left on device")

    function = compiler.kernel()(double).alone()
    monkeypatch.setattr(compiler.FunctionCache, "save_overload", full)
    with pytest.warns(RuntimeWarning, match="No space left"):
        assert function(21) == 42


def test_a_damaged_cache_is_passed_over(cache_folder, fresh_warning):
    assert compiler.kernel()(double).alone()(21) == 42
    for index in cache_folder.rglob("*.nbi"):
        index.write_bytes(index.read_bytes()[:-9])
    with pytest.warns(RuntimeWarning, match="cache fails"):
        assert compiler.kernel()(double).alone()(21) == 42


def test_a_cache_whose_files_were_mixed_up_is_passed_over(cache_folder, fresh_warning):
    """Two processes that fill it at once may do that; Numba would run the wrong code."""
    first = compiler.kernel()(double).alone()
    assert (first(21), first(2.5)) == (42, 5.0)
    one, other = cache_folder.rglob("*.nbc")
    contents = one.read_bytes(), other.read_bytes()
    other.write_bytes(contents[0])
    one.write_bytes(contents[1])
    for value in (21, 2.5):
        assert compiler.kernel()(double).alone()(value) == 2 * value


# ---------------------------------------------------------------- parts of kernels


@compiler.kernel()
def square(x):
    return x * x


@compiler.kernel()
def add_squares(x, out):
    for i in range(x.size):
        out[0] += square(x[i])


@compiler.kernel(parallel=True)
def squares_of_halves(x, out):
    for t in numba.prange(2):
        half = out[t]
        add_squares(x[t * x.size // 2 : (t + 1) * x.size // 2], half)


def test_a_kernel_and_its_parts_run_as_written(cache_folder):
    out = np.zeros((2, 1))
    squares_of_halves(np.arange(6.0), out)
    assert out.tolist() == [[0 + 1 + 4], [9 + 16 + 25]]


def test_a_part_can_be_called_from_python_before_and_after_a_kernel_has_it(cache_folder):
    assert square(3.0) == 9
    out = np.zeros((2, 1))
    squares_of_halves(np.arange(6.0), out)
    assert square(5.0) == 25
    total = np.zeros(1)
    add_squares(np.arange(4.0), total)
    assert total[0] == 14


def test_only_whole_kernels_get_machine_code_and_optimisation(cache_folder, monkeypatch):
    optimised = []
    run = compiler._Library._optimize_final_module

    def watched(library):
        if not library._is_part():
            optimised.append(library.name)
        run(library)

    monkeypatch.setattr(compiler._Library, "_optimize_final_module", watched)
    squares_of_halves(np.arange(6, dtype=np.float32), np.zeros((2, 1), np.float32))
    assert [name for name in optimised if "NRT" not in name and "nrt" not in name] == [
        "squares_of_halves"
    ]
    code = squares_of_halves.inspect_llvm(squares_of_halves.signatures[-1])
    counted = [line for line in code.split("\n") if "call" in line and "NRT_incref" in line]
    assert not counted  # two threads would contend for the counters


def test_arrays_of_the_caller_are_freed(cache_folder):
    """Their references are counted where they come from Python, and nowhere else."""
    import sys

    x, out = np.arange(6.0), np.zeros((2, 1))
    before = sys.getrefcount(x), sys.getrefcount(out)
    for _ in range(10):
        squares_of_halves(x, out)
    assert (sys.getrefcount(x), sys.getrefcount(out)) == before


def test_compiling_leaves_numba_as_it_was(cache_folder):
    usual = compiler.cpu_target.target_context.codegen()._library_class
    assert not issubclass(usual, compiler._Library)
    assert compiler.kernel(parallel=True)(halve)(np.ones(3)) is None
    assert compiler.cpu_target.target_context.codegen()._library_class is usual
    with pytest.raises(numba.TypingError):
        compiler.kernel(parallel=True)(halve)("text")
    assert compiler.cpu_target.target_context.codegen()._library_class is usual


def halve(x):
    for i in numba.prange(x.size):
        x[i] /= 2


def test_what_is_missing_is_told_once_and_before_it_is_compiled(cache_folder, fresh_warning):
    told = []
    with compiler.when_missing(lambda: told.append(1)):
        assert compiler.kernel()(double).alone()(21) == 42
        assert compiler.kernel()(double).alone()(2.5) == 5.0
    assert told == [1]
    with compiler.when_missing(lambda: told.append(1)):
        assert compiler.kernel()(double).alone()(21) == 42
    assert told == [1]
