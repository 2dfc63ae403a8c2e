"""How Numba compiles kernels, and keeps them on disk.

`kernel` is `numba.njit` with the project's settings, in half the time, and with a disk cache that
knows more than Numba's own: it also looks at the other files of kernels, and it may be missing,
full, broken or forbidden without harm. Much here overrides what Numba does not document: where a
release of Numba changes it, `tests/ops/test_compiler.py` says so.
"""

from __future__ import annotations

import hashlib
import re
import warnings
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import numba
from llvmlite.binding import parse_assembly
from numba.core.caching import FunctionCache
from numba.core.cgutils import normalize_ir_text
from numba.core.codegen import JITCodeLibrary
from numba.core.compiler_lock import global_compiler_lock
from numba.core.cpu_options import ParallelOptions
from numba.core.registry import CPUDispatcher, cpu_target
from numba.core.sigutils import normalize_signature

from minicnn.ops import vector

# Numba's own ideas of what may run in parallel, or before a loop that it thinks independent: it
# does not see what a function called in the loop writes, and moved a read of that to the front.
_IDEAS = "comprehension", "reduction", "inplace_binop", "setitem", "numpy", "stencil", "fusion"
PRANGE_ALONE: Any = ParallelOptions(dict.fromkeys(_IDEAS, False))

_warned = False
_missing: list[Callable[[], None]] = []  # what `when_missing` is to call


def kernel(parallel: bool = False, inline: bool = False) -> Callable[[Callable[..., Any]], Any]:
    """Return a decorator that compiles a function on its first call, without the interpreter.

    Arithmetic is IEEE: no fastmath, and a division by zero gives an infinity. A parallel kernel
    does in parallel what `numba.prange` says, and nothing else. One that is not parallel becomes a
    part of those that call it; with `inline`, LLVM always puts it there: a call costs some 0.1 us
    where a plan of many arrays is handed over.
    """

    def decorate(function: Callable[..., Any]) -> Any:
        def dispatcher(whole: bool) -> Any:
            options: dict[str, Any] = {
                "parallel": PRANGE_ALONE if parallel else False,
                "forceinline": inline,
                "error_model": "numpy",
                "no_cfunc_wrapper": True,
                "no_cpython_wrapper": not whole,
            }
            made: Any = numba.njit(function, **options)
            compile_ = made.compile

            def compile_quickly(signature: Any) -> Any:
                with _compiling(whole):
                    return compile_(signature)

            made.compile = compile_quickly
            if whole:
                try:
                    made._cache = _Cache(function)
                except (RuntimeError, OSError, AttributeError) as error:
                    _warn_uncached(error)
            return made

        if parallel:
            return dispatcher(whole=True)
        part = dispatcher(whole=False)
        part.__class__ = _Part
        part.alone = cache(lambda: dispatcher(whole=True))
        return part

    return decorate


@contextmanager
def when_missing(action: Callable[[], None]) -> Iterator[None]:
    """Call `action` before the first kernel in the block that the disk cache lacks is compiled."""
    _missing[:] = [action]
    try:
        yield
    finally:
        _missing.clear()


class _Part(CPUDispatcher):
    """A kernel that becomes part of others; called from Python, it is compiled by itself."""

    alone: Callable[[], Any]

    def __call__(self, *args: Any) -> Any:
        return self.alone()(*args)


@contextmanager
def _compiling(whole: bool) -> Iterator[None]:
    """Let the compiler optimise and emit whole kernels, and leave out their parts.

    Numba makes machine code of every function, and optimises it again within each function that
    calls it. What only becomes a part of a kernel needs neither: that halves the time.
    """
    codegen = cpu_target.target_context.codegen()
    with global_compiler_lock:
        usual, codegen._library_class = codegen._library_class, _Whole if whole else _Library
        try:
            yield
        finally:
            codegen._library_class = usual


_COUNTS = re.compile(r"\s*call void @\"?NRT_(inc|dec)ref")


class _Library(JITCodeLibrary):
    """The code of a part: as the front end makes it, to be linked into kernels."""

    def add_ir_module(self, ir_module: Any) -> None:
        """Leave out the counting of references, except where arrays are made or come from Python.

        Two threads that count the arrays of their caller, in one place in memory, wait for each
        other longer than a small piece of work takes.
        """
        text = str(ir_module)
        if "NRT_MemInfo_alloc" in text or '@"_ZN7cpython' in text:
            super().add_ir_module(ir_module)
            return
        lines = [line for line in text.split("\n") if not _COUNTS.match(line)]
        module = parse_assembly(normalize_ir_text("\n".join(lines)))
        module.name = ir_module.name
        self.add_llvm_module(module)

    def _optimize_functions(self, ll_module: Any) -> None:
        ll_module.data_layout = self._codegen._data_layout

    def _is_part(self) -> bool:
        return True

    def _optimize_final_module(self) -> None:
        if not self._is_part():
            super()._optimize_final_module()

    def _finalize_final_module(self) -> None:
        if not self._is_part():
            super()._finalize_final_module()
            return
        # Numba writes to a global of each function, its environment: no more than that is needed.
        module = parse_assembly(str(self._codegen._create_empty_module(self.name)))
        names = [g.name for g in self._final_module.global_variables if "NumbaEnv" in g.name]
        lines = (f'@"{name}" = common global i8* null' for name in names)
        module.link_in(parse_assembly("\n".join(lines)))
        self._finalize_dynamic_globals()
        cleanup = self._codegen._add_module(module)
        if cleanup:
            weakref.finalize(self, cleanup)
        self._finalized = True

    def get_pointer_to_function(self, name: str) -> int:
        self._ensure_finalized()
        return 0 if self._is_part() else super().get_pointer_to_function(name)


class _Whole(_Library):
    """The code of a kernel, or of a loop in it that runs in parallel, which is a part of it."""

    def _is_part(self) -> bool:
        return "parfor" in self.name or "ufunc" in self.name


class _Cache(FunctionCache):
    """Numba's disk cache; every problem with it means compiling anew, and one warning."""

    def _index_key(self, sig: Any, codegen: Any) -> Any:
        return (*super()._index_key(sig, codegen), _FINGERPRINT)

    def load_overload(self, sig: Any, target_context: Any) -> Any:
        found = None
        try:
            found = super().load_overload(sig, target_context)
            # Two processes that begin to fill a cache may give one name to two files.
            if found is not None and found.signature.args != normalize_signature(sig)[0]:
                found = None
        except Exception as error:  # a damaged file raises anything that pickle can raise
            _warn_uncached(error)
        if found is None and _missing:
            _missing.pop()()
        return found

    def save_overload(self, sig: Any, data: Any) -> None:
        try:
            super().save_overload(sig, data)
        except Exception as error:
            _warn_uncached(error)


def _warn_uncached(error: BaseException) -> None:
    global _warned
    if not _warned:
        _warned = True
        warnings.warn(
            f"numba: kernels are compiled anew in every process, as the cache fails: {error} "
            "(fix: let NUMBA_CACHE_DIR name a writable folder)",
            RuntimeWarning,
            stacklevel=3,
        )


def _fingerprint() -> str:
    """Return what compiled code depends on beside its own file: the other files of kernels."""
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.glob("*.py")):
        source = path.read_bytes()
        if b"numba" in source:
            digest.update(source)
    digest.update(repr((numba.__version__, vector.CHECKED, vector.VECTOR_BYTES)).encode())
    return digest.hexdigest()


_FINGERPRINT = _fingerprint()
