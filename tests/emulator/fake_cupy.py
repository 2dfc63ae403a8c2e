"""A module that behaves like ``cupy`` as far as minicnn uses it, on a machine without a GPU.

It is as strict as the real one where being lenient would hide a mistake:

- a CuPy array is no ``numpy.ndarray``; NumPy neither converts it nor computes with it, and an
  operation that mixes the two raises (``asarray``, ``set`` and ``get`` move numbers);
- reductions give arrays without axes, and not numbers;
- only functions that CuPy has, with the arguments that it takes, are there
  (tests/emulator/test_fake_cupy.py compares with CuPy where it is installed);
- between ``begin_capture`` and ``end_capture`` nothing is computed: what is queued on the stream
  is written down and runs on each ``launch``, with the arrays as they are then. To read a number
  on the host meanwhile raises and spoils the graph, and so do cuBLAS, memory from a pool that
  others take from, and work on another stream;
- memory pools count what they hold, and raise ``OutOfMemoryError`` beyond their limit.

What it does not imitate: that work is asynchronous, and what a GPU rounds otherwise.
"""

from __future__ import annotations

import operator
import time
import weakref
from contextlib import contextmanager
from types import ModuleType, SimpleNamespace

import numpy as np

DTYPES = "?bhilqBHILQefdFD"
UNIT = 512  # bytes: CuPy's pools hand out multiples of it

# Functions that give an array of the same name in NumPy; CuPy takes the arguments listed.
REDUCTION = frozenset({"axis", "dtype", "out", "keepdims"})
CREATION = frozenset({"shape", "dtype", "order"})
FUNCTIONS = {
    **dict.fromkeys(("sum", "prod", "mean", "argmax", "argmin"), REDUCTION),
    **dict.fromkeys(("max", "min", "amax", "amin", "any", "all"), REDUCTION - {"dtype"}),
    **dict.fromkeys(("var", "std"), REDUCTION | {"ddof"}),
    **dict.fromkeys(("zeros_like", "ones_like", "empty_like"), CREATION),
    **dict.fromkeys(("zeros", "ones", "empty"), CREATION),
    "stack": {"axis", "out"},
    "concatenate": {"axis", "out"},
    "split": {"axis"},
    "full": {"dtype"},
    "full_like": {"dtype"},
    "arange": {"dtype"},
    "eye": {"dtype"},
    "where": set(),
    "clip": {"out"},
    "take": {"axis", "out"},
    "pad": {"mode", "constant_values"},
    "cumsum": {"axis", "dtype", "out"},
    "nonzero": set(),
    "flip": {"axis"},
    "moveaxis": set(),
    "transpose": set(),
    "swapaxes": set(),
    "reshape": set(),
    "ravel": set(),
    "squeeze": {"axis"},
    "expand_dims": {"axis"},
    "broadcast_to": set(),
    "repeat": {"axis"},
    "tile": set(),
    "roll": {"axis"},
    "sort": {"axis"},
    "argsort": {"axis"},
    "bincount": {"minlength"},
    "copy": set(),
    "array_equal": set(),
    "allclose": {"rtol", "atol", "equal_nan"},
    "shape": set(),
    "ndim": set(),
    "size": set(),
    "result_type": set(),
    "may_share_memory": set(),
    "shares_memory": set(),
}
CUBLAS = ("matmul", "dot", "tensordot", "einsum", "inner", "vdot")
READS = ("nonzero", "array_equal", "allclose", "bincount")  # their result depends on values
UFUNCS = {
    name
    for name in dir(np)
    if isinstance(getattr(np, name), np.ufunc)
    and name not in ("isnat", "matvec", "spacing", "vecdot", "vecmat", "matmul")
}
SAME = (
    *("float16", "float32", "float64", "int8", "int16", "int32", "int64"),
    *("uint8", "uint16", "uint32", "uint64", "bool_", "dtype", "inf", "nan", "newaxis", "pi"),
)


class CUDARuntimeError(RuntimeError):
    """As ``cupy.cuda.runtime.CUDARuntimeError``."""


class OutOfMemoryError(MemoryError):
    """As ``cupy.cuda.memory.OutOfMemoryError``."""


class MemoryPool:
    """Counts the bytes that live arrays take; no memory of its own."""

    def __init__(self, allocator=None):
        self._limit, self._used, self._total = 0, 0, 0
        self.peak = 0  # of used bytes; the real pool does not tell

    def malloc(self, nbytes):
        taken = -(-nbytes // UNIT) * UNIT
        if self._limit and self._used + taken > self._limit:
            raise OutOfMemoryError(
                f"Out of memory allocating {taken:,} bytes (allocated so far: {self._used:,} "
                f"bytes, limit set to: {self._limit:,} bytes)."
            )
        self._used += taken
        self._total = max(self._total, self._used)
        self.peak = max(self.peak, self._used)
        return taken

    def _free(self, taken):
        self._used -= taken

    def free_all_blocks(self, stream=None):
        self._total = self._used

    def set_limit(self, size=None, fraction=None):
        self._limit = size or 0

    def get_limit(self):
        return self._limit

    def used_bytes(self):
        return self._used

    def total_bytes(self):
        return self._total

    def free_bytes(self):
        return self._total - self._used


class Machine:
    """What the imitated GPU is doing."""

    def __init__(self):
        self.default_pool = MemoryPool()
        self.pool = self.default_pool
        self.null = self.stream = Stream(self, null=True)
        self.capturing = None  # the stream that captures
        self.recorded = []
        self.spoilt = None
        self.reads = 0  # times that the host waited for a number
        self.uploads = 0  # times that numbers went to the device
        self.launches = 0  # of graphs

    def allocate(self, host):
        """Count a new array in the pool at hand, for as long as it lives."""
        if self.capturing and self.pool is self.default_pool:
            self.spoil(
                "an array of the default pool: others would be given its memory between launches"
            )
        pool = self.pool
        taken = pool.malloc(host.nbytes)
        weakref.finalize(host, pool._free, taken).atexit = False

    def reading(self):
        self.reads += 1
        if self.capturing:
            self.spoil("operation not permitted when stream is capturing")

    def uploading(self):
        self.uploads += 1
        if self.capturing:
            self.spoil("operation not permitted when stream is capturing")

    def spoil(self, why):
        self.spoilt = why
        raise CUDARuntimeError(f"cudaErrorStreamCaptureUnsupported: {why}")

    def queue(self, work):
        """Do `work` now, or note it down for the graph."""
        if not self.capturing:
            work()
        elif self.stream is not self.capturing:
            self.spoil("work on another stream")
        else:
            self.recorded.append(work)

    def refuse_cublas(self):
        if self.capturing:
            raise NotImplementedError(
                "calling cuBLAS API during stream capture is currently unsupported"
            )


class Graph:
    """As ``cupy.cuda.Graph``."""

    def __init__(self, machine, recorded):
        self._machine, self._recorded = machine, recorded

    def launch(self, stream=None):
        self._machine.launches += 1
        with np.errstate(all="ignore"):
            for work in self._recorded:
                work()

    def upload(self, stream=None):
        pass


class Stream:
    """As ``cupy.cuda.Stream``, in which everything is done at once."""

    count = 0

    def __init__(self, machine, null=False, non_blocking=False, ptds=False, priority=None):
        self._machine, self._outer = machine, []
        Stream.count += 1
        self.ptr = 0 if null else 0x1000 + Stream.count

    def __enter__(self):
        self._outer.append(self._machine.stream)
        self._machine.stream = self
        return self

    def __exit__(self, *exc):
        self._machine.stream = self._outer.pop()

    def use(self):
        self._machine.stream = self
        return self

    def synchronize(self):
        if self._machine.capturing is self:
            self._machine.spoil("operation not permitted when stream is capturing")

    def record(self, event=None):
        return event or SimpleNamespace(synchronize=lambda: None)

    def wait_event(self, event):
        pass

    def is_capturing(self):
        return self._machine.capturing is self

    def begin_capture(self, mode=None):
        if not self.ptr:
            raise RuntimeError("cannot capture on the default (legacy) stream")
        if self._machine.capturing:
            raise CUDARuntimeError("cudaErrorIllegalState: a capture is under way")
        self._machine.capturing, self._machine.recorded = self, []
        self._machine.spoilt = None

    def end_capture(self):
        machine = self._machine
        if machine.capturing is not self:
            raise CUDARuntimeError("cudaErrorIllegalState: the operation cannot be performed")
        machine.capturing, recorded, machine.recorded = None, machine.recorded, []
        if machine.spoilt:
            raise CUDARuntimeError(
                "cudaErrorStreamCaptureInvalidated: operation failed due to a previous error "
                "during capture"
            )
        return Graph(machine, recorded)


def make(memory=None):
    """Return a new module ``cupy`` with one imitated device of `memory` bytes (None: no limit).

    Besides what CuPy has it holds ``machine``, a `Machine`, to look behind the scenes.
    """
    machine = Machine()
    machine.default_pool.set_limit(size=memory)

    class ndarray:
        """As ``cupy.ndarray``: the numbers are in a NumPy array that only this module touches."""

        __slots__ = ("__weakref__", "_host")
        __hash__ = None
        __array_priority__ = 100

        def __init__(self, shape, dtype=float, memptr=None, strides=None, order="C"):
            self._host = np.empty(shape, dtype, order)
            machine.allocate(self._host)

        # ---- NumPy keeps out

        def __array__(self, dtype=None, copy=None):
            raise TypeError(
                "Implicit conversion to a NumPy array is not allowed. Please use `.get()` to "
                "construct a NumPy array explicitly."
            )

        def __array_ufunc__(self, ufunc, method, *inputs, **kwargs):
            if ufunc.__name__ == "matmul":
                machine.refuse_cublas()
            if method != "__call__":
                return NotImplemented
            return compute(ufunc, inputs, kwargs)

        def __array_function__(self, func, types, args, kwargs):
            if func.__name__ not in FUNCTIONS:
                raise TypeError(f"no implementation of {func.__name__} for cupy.ndarray")
            return getattr(module, func.__name__)(*args, **kwargs)

        # ---- to and from the host

        def get(self, stream=None, order="C", out=None, blocking=True):
            machine.reading()
            return self._host.copy(order)

        def set(self, arr, stream=None):
            if not isinstance(arr, np.ndarray):
                raise TypeError("Only numpy.ndarray can be set to cupy.ndarray")
            if arr.dtype != self.dtype:
                raise TypeError(f"{arr.dtype} array cannot be set to {self.dtype} array")
            if arr.shape != self.shape:
                raise ValueError(f"Shape mismatch. Old shape: {self.shape}, new shape: {arr.shape}")
            machine.uploading()
            self._host[...] = arr

        def item(self, *args):
            machine.reading()
            return self._host.item(*args)

        def tolist(self):
            machine.reading()
            return self._host.tolist()

        def tobytes(self, order="C"):
            machine.reading()
            return self._host.tobytes(order)

        def __bool__(self):
            machine.reading()
            return bool(self._host)

        def __int__(self):
            machine.reading()
            return int(self._host)

        def __float__(self):
            machine.reading()
            return float(self._host)

        def __index__(self):
            machine.reading()
            return operator.index(self._host)

        def __format__(self, spec):
            machine.reading()
            return format(self._host if self.ndim else self._host[()], spec)

        def __repr__(self):
            machine.reading()
            return repr(self._host)

        def __str__(self):
            machine.reading()
            return str(self._host)

        # ---- what is known without looking at the numbers

        shape = property(lambda self: self._host.shape)
        dtype = property(lambda self: self._host.dtype)
        ndim = property(lambda self: self._host.ndim)
        size = property(lambda self: self._host.size)
        itemsize = property(lambda self: self._host.itemsize)
        nbytes = property(lambda self: self._host.nbytes)
        strides = property(lambda self: self._host.strides)
        flags = property(lambda self: self._host.flags)
        device = property(lambda self: module.cuda.Device(0))
        T = property(lambda self: view(self._host.T))
        base = property(lambda self: None if self._host.base is None else view(self._host.base))

        @property
        def data(self):
            return SimpleNamespace(ptr=self._host.ctypes.data, device_id=0)

        def __len__(self):
            return len(self._host)

        def __iter__(self):
            return (self[i] for i in range(len(self)))

        # ---- parts and copies

        def __getitem__(self, index):
            host_index = indices(index)
            if any(isinstance(i, np.ndarray) and i.dtype == bool for i in flat(host_index)):
                machine.reading()  # the shape of the result depends on the numbers
            if all(isinstance(i, int | slice | None) for i in flat(host_index)):
                host_index = (*flat(host_index), ...)  # an element is a view without axes
            return compute(lambda a: a[host_index], (self,), {})

        def __setitem__(self, index, value):
            host_index, host_value = indices(index), operand(value)
            machine.queue(lambda: self._host.__setitem__(host_index, host_value))

        def fill(self, value):
            self[...] = value

        def copy(self, order="C"):
            return compute(lambda a: a.copy(order), (self,), {})

        def astype(self, dtype, order="K", casting=None, subok=None, copy=True):
            if not copy and self.dtype == dtype and order == "K":
                return self
            check_dtype(np.dtype(dtype))
            return compute(lambda a: a.astype(dtype, order), (self,), {})

        def view(self, dtype=None):
            return view(self._host.view() if dtype is None else self._host.view(dtype))

    ndarray.__module__, ndarray.__qualname__ = "cupy", "ndarray"

    # ------------------------------------------------------------ how everything is computed

    def view(host):
        a = ndarray.__new__(ndarray)
        a._host = host
        return a

    def operand(a):
        """Return what NumPy computes with for an array or a number; refuse NumPy's arrays."""
        if isinstance(a, ndarray):
            return a._host
        if isinstance(a, np.ndarray):
            raise TypeError(f"Unsupported type {type(a)}")
        if isinstance(a, list | tuple):
            return type(a)(operand(item) for item in a)
        return a

    def flat(index):
        return index if isinstance(index, tuple) else (index,)

    def indices(index):
        """Indices may be NumPy arrays, which are sent to the device, as CuPy does."""
        if isinstance(index, tuple):
            return tuple(indices(i) for i in index)
        if isinstance(index, np.ndarray | list):
            machine.uploading()
            return np.asarray(index)
        return index._host if isinstance(index, ndarray) else index

    def compute(function, args, kwargs):
        """Run a NumPy function now, or, while a graph is captured, whenever that is launched."""
        out = kwargs.get("out")
        if isinstance(out, tuple):
            (out,) = out
        args = [operand(a) for a in args]
        kwargs = {name: operand(a) for name, a in kwargs.items()}
        if out is not None:
            kwargs["out"] = operand(out)
            machine.queue(lambda: function(*args, **kwargs))
            return out
        with np.errstate(all="ignore"):
            result = function(*args, **kwargs)
        if isinstance(result, list | tuple):
            return type(result)(wrap(r, function, args, kwargs, i) for i, r in enumerate(result))
        return wrap(result, function, args, kwargs)

    def wrap(result, function, args, kwargs, part=None):
        if not isinstance(result, np.ndarray | np.generic):
            return result  # a shape, a dtype, a truth
        if isinstance(result, np.ndarray):
            sources = [a for a in leaves(args) if isinstance(a, np.ndarray)]
            if any(np.may_share_memory(result, a) for a in sources):
                return view(result)
        result = np.array(result)  # of its own memory, and never a number
        check_dtype(result.dtype)
        machine.allocate(result)
        if machine.capturing:

            def work():
                fresh = function(*args, **kwargs)
                result[...] = fresh if part is None else fresh[part]

            # Nothing has been computed yet; whole numbers are 0, as they may be indices.
            result.fill(np.nan if result.dtype.kind in "fc" else 0)
            machine.queue(work)
        return view(result)

    def leaves(args):
        for a in args:
            if isinstance(a, list | tuple):
                yield from leaves(a)
            else:
                yield a

    def check_dtype(dtype):
        if dtype.char not in DTYPES or not dtype.isnative:
            raise ValueError(f"Unsupported dtype {dtype}")

    # ------------------------------------------------------------ operators and methods

    def binary(function):
        return (
            lambda self, other: compute(function, (self, other), {}),
            lambda self, other: compute(function, (other, self), {}),
        )

    for name in [
        "add",
        "sub",
        "mul",
        "truediv",
        "floordiv",
        "mod",
        "pow",
        "and",
        "or",
        "xor",
        "lshift",
        "rshift",
        "matmul",
    ]:
        function = getattr(operator, f"__{name}__")
        if name == "matmul":

            def function(a, b, multiply=operator.matmul):
                machine.refuse_cublas()
                return multiply(a, b)

        forward, reflected = binary(function)
        setattr(ndarray, f"__{name}__", forward)
        setattr(ndarray, f"__r{name}__", reflected)
        if name != "matmul":
            setattr(ndarray, f"__i{name}__", in_place(machine, operand, f"__i{name}__"))
    for name in ["lt", "le", "eq", "ne", "gt", "ge"]:
        setattr(ndarray, f"__{name}__", binary(getattr(operator, f"__{name}__"))[0])
    for name in ["neg", "pos", "abs", "invert"]:
        function = getattr(operator, f"__{name}__")
        setattr(ndarray, f"__{name}__", lambda self, f=function: compute(f, (self,), {}))

    def method(name, allowed=None):
        def call(self, *args, **kwargs):
            check_arguments(f"ndarray.{name}", kwargs, allowed)
            if name in READS:
                machine.reading()
            if name in CUBLAS:
                machine.refuse_cublas()
            return compute(
                lambda a, *rest, **k: getattr(a, name)(*rest, **k), (self, *args), kwargs
            )

        return call

    for name in [
        "sum",
        "prod",
        "mean",
        "max",
        "min",
        "any",
        "all",
        "argmax",
        "argmin",
        "var",
        "std",
        "clip",
        "take",
        "cumsum",
    ]:
        setattr(ndarray, name, method(name, FUNCTIONS[name]))
    for name in [
        "reshape",
        "transpose",
        "swapaxes",
        "ravel",
        "flatten",
        "squeeze",
        "repeat",
        "nonzero",
        "dot",
    ]:
        setattr(ndarray, name, method(name, {"axis", "order"}))

    # ------------------------------------------------------------ the module

    class Module(ModuleType):
        def __getattr__(self, name):
            raise AttributeError(f"the imitation of CuPy has no {name}")

    module = Module("cupy")
    module.__version__ = "14.2.0 (imitated)"
    module.machine, module.ndarray = machine, ndarray
    for name in SAME:
        setattr(module, name, getattr(np, name))

    def provide(name, allowed):
        function = getattr(np, name)

        def call(*args, **kwargs):
            check_arguments(name, kwargs, allowed)
            if name in READS:
                machine.reading()
            if name in CUBLAS:
                machine.refuse_cublas()
            return compute(function, args, kwargs)

        call.__name__ = name
        setattr(module, name, call)

    for name, allowed in FUNCTIONS.items():
        provide(name, allowed)
    for name in UFUNCS:
        provide(name, {"out", "dtype"})
    for name in CUBLAS:
        provide(name, {"out", "axes"})

    def array(obj, dtype=None, copy=True, order="K", subok=False, ndmin=0, *, blocking=False):
        if isinstance(obj, ndarray):
            same = (dtype is None or obj.dtype == dtype) and (
                order in ("K", None) or obj.flags[f"{order}_CONTIGUOUS"]
            )
            if same and not copy:
                return obj
            return compute(lambda a: np.array(a, dtype, order=order or "K"), (obj,), {})
        if isinstance(obj, list | tuple) and any(isinstance(a, ndarray) for a in obj):
            return module.stack([array(a, dtype) for a in obj])
        host = np.array(obj, dtype, order="C" if order in ("K", None) else order, ndmin=ndmin)
        check_dtype(host.dtype)
        if not host.ndim:  # a number goes along with the kernel that writes it
            return compute(lambda: host, (), {})
        machine.uploading()
        machine.allocate(host)
        return view(host)

    def asarray(a, dtype=None, order=None, *, blocking=False):
        return array(a, dtype, copy=False, order=order)

    def ascontiguousarray(a, dtype=None):
        return array(a, dtype, copy=False, order="C", ndmin=1)

    def asnumpy(a, stream=None, order="C", out=None, *, blocking=True):
        return a.get() if isinstance(a, ndarray) else np.asarray(a)

    def copyto(dst, src, casting="same_kind", where=None):
        host, source = dst._host, operand(src)
        mask = True if where is None else operand(where)
        machine.queue(lambda: np.copyto(host, source, casting, where=mask))

    module.array, module.asarray, module.asnumpy = array, asarray, asnumpy
    module.ascontiguousarray, module.copyto = ascontiguousarray, copyto
    module.get_array_module = lambda *a: (
        module if any(isinstance(each, ndarray) for each in a) else np
    )
    module.get_default_memory_pool = lambda: machine.default_pool
    module.get_default_pinned_memory_pool = lambda: SimpleNamespace(free_all_blocks=lambda: None)

    class RawKernel:
        """A kernel of CUDA C, which runs on the CPU."""

        def __init__(self, code, name, options=(), **kwargs):
            self._function = RawModule(code=code, options=options)._module.get_function(name)

        @classmethod
        def _of(cls, function):
            kernel = cls.__new__(cls)
            kernel._function = function
            return kernel

        @property
        def max_dynamic_shared_size_bytes(self):
            return self._function.max_dynamic_shared_size_bytes

        @max_dynamic_shared_size_bytes.setter
        def max_dynamic_shared_size_bytes(self, size):
            self._function.max_dynamic_shared_size_bytes = size

        def __call__(self, grid, block, args, *, shared_mem=0, stream=None):
            host = tuple(operand(a) for a in args)
            function = self._function
            machine.queue(lambda: function(grid, block, host, shared_mem=shared_mem))

    class RawModule:
        """As ``cupy.RawModule``."""

        def __init__(self, *, code=None, path=None, options=(), backend="nvrtc", **kwargs):
            from emulator.cuda import RawModule as Compiled

            self._module = Compiled(code=code, options=options)

        def get_function(self, name):
            return RawKernel._of(self._module.get_function(name))

    module.RawKernel, module.RawModule = RawKernel, RawModule
    module.cuda = _cuda(machine)
    return module


def in_place(machine, operand, name):
    """Return the method that changes an array, now or when the graph is launched."""
    function = getattr(operator, name)

    def call(self, other):
        host, value = self._host, operand(other)

        def work():
            with np.errstate(all="ignore"):
                function(host, value)

        machine.queue(work)
        return self

    return call


def check_arguments(name, given, allowed):
    extra = set(given) - (allowed or set())
    if extra:
        raise TypeError(f"cupy.{name} got an unexpected keyword argument {sorted(extra)}")


def _cuda(machine):
    """The module ``cupy.cuda``."""
    cuda = ModuleType("cupy.cuda")

    class Device:
        id = 0
        compute_capability = "90"

        def __init__(self, device=0):
            pass

        def __enter__(self):
            return self

        def __exit__(self, *exc):
            pass

        def use(self):
            return self

        def synchronize(self):
            machine.stream.synchronize()

        @property
        def mem_info(self):
            total = machine.default_pool.get_limit() or 80 << 30
            return total - machine.default_pool.total_bytes(), total

        @property
        def attributes(self):
            return {"MultiProcessorCount": 132, "MaxSharedMemoryPerBlockOptin": 232448}

    class Event:
        def __init__(self, block=False, disable_timing=False, interprocess=False):
            pass

        def record(self, stream=None):
            self.time = time.perf_counter()

        def synchronize(self):
            pass

    def get_elapsed_time(start, end):
        """Milliseconds; everything is done at once, so the host's clock is the device's."""
        return 1e3 * (end.time - start.time)

    @contextmanager
    def using_allocator(allocator=None):
        before, machine.pool = machine.pool, allocator.__self__
        try:
            yield
        finally:
            machine.pool = before

    properties = {
        "name": b"Imitated GPU",
        "totalGlobalMem": 80 << 30,
        "major": 9,
        "minor": 0,
        "multiProcessorCount": 132,
    }
    cuda.runtime = SimpleNamespace(
        CUDARuntimeError=CUDARuntimeError,
        getDeviceCount=lambda: 1,
        getDevice=lambda: 0,
        getDeviceProperties=lambda i: dict(properties),
        runtimeGetVersion=lambda: 13000,
        driverGetVersion=lambda: 13000,
        memGetInfo=lambda: Device().mem_info,
        deviceSynchronize=lambda: machine.stream.synchronize(),
        streamCaptureModeRelaxed=2,
    )
    cuda.Device, cuda.Event, cuda.Graph = Device, Event, Graph
    cuda.Stream = lambda *args, **kwargs: Stream(machine, *args, **kwargs)
    cuda.Stream.null = machine.null
    cuda.get_current_stream = lambda: machine.stream
    cuda.get_elapsed_time = get_elapsed_time
    cuda.MemoryPool, cuda.using_allocator = MemoryPool, using_allocator
    cuda.memory = SimpleNamespace(
        OutOfMemoryError=OutOfMemoryError, MemoryPool=MemoryPool, CUDARuntimeError=CUDARuntimeError
    )
    cuda.is_available = lambda: True
    return cuda
