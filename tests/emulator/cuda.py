"""Runs CUDA C++ kernels on the CPU, so that they can be tested where there is no GPU.

`RawModule` stands in for ``cupy.RawModule``: the host compiler builds the source with cuda_shim.h
in front, and a launch runs it on NumPy arrays. It is strict where a GPU is not:

- arguments have to match the kernel's parameters in number, kind and size;
- every array lies in memory of its own, up against a page that may not be touched, with NaN in
  between: a read or write outside is an error or gives NaN, and a write between is noticed;
- shared memory starts as NaN in every block; a barrier that some threads miss is an error.
"""

import ctypes
import hashlib
import os
import re
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path

import numpy as np
import pytest

SHIM = Path(__file__).with_name("cuda_shim.h")
FLAGS = ("-x", "c++", "-std=c++17", "-O1", "-ffp-contract=off", "-fno-strict-aliasing", "-w")
SHARED_LIMIT = 48 << 10  # bytes a block gets without asking, as on the device
SHARED_MOST = 227 << 10  # and with asking, on sm_90
PAGE = 4096
KERNEL = re.compile(r"__global__\s+void\s+(?:__launch_bounds__\([^)]*\)\s*)?(\w+)\s*\(")
DYNAMIC = re.compile(r"extern\s+__shared__\s+([\w ]+?)\s+(\w+)\[\];")

POINTER = r"\1 *\2 = (\1 *)emu::dynamic;"
LAUNCHER = """
extern "C" int emu_launch_{name}(emu::Launch *l, void **args) {{
  return emu::run(l, [](void *a) {{ emu::call({name}, (void **)a); }}, args);
}}
extern "C" const char *emu_signature_{name}() {{ return emu::signature({name}); }}
"""


class CudaError(RuntimeError):
    """What on a device would be a failed launch, a fault or a hang."""


def compiler():
    """Return the host's C++ compiler, or None."""
    return shutil.which(os.environ.get("CXX", "g++"))


def folder():
    """Where compiled kernels are kept between runs."""
    path = Path(tempfile.gettempdir()) / f"minicnn-emulator-{os.getuid()}"
    path.mkdir(mode=0o700, exist_ok=True)
    return path


def build(code, options=()):
    """Compile `code`, unless that has been done, and return the library's path."""
    # Of a source with several kernels all are built at once, which takes no longer here.
    defines = [o for o in options if o.startswith("-D") and not o.startswith("-DONLY=")]
    text = f'{SHIM.read_text()}\n#line 1 "kernels.cu"\n{DYNAMIC.sub(POINTER, code)}\n'
    parts = [Path(__file__).read_text(), text, *defines]
    key = hashlib.sha256("\0".join(parts).encode()).hexdigest()[:32]
    library = folder() / f"{key}.so"
    if not library.exists():
        with tempfile.TemporaryDirectory(dir=folder()) as work:
            made = Path(work) / "kernels.so"
            expanded = _compile(["-E", "-P", *defines], code)  # macros may define kernels
            launchers = (
                LAUNCHER.format(name=name) for name in sorted(set(KERNEL.findall(expanded)))
            )
            _compile([*defines, "-shared", "-fPIC", "-o", made], text + "".join(launchers))
            made.replace(library)  # two processes may build the same
    return library


def _compile(arguments, text):
    if compiler() is None:
        pytest.skip("no C++ compiler (g++), which the emulator of CUDA kernels needs")
    command = [compiler(), *FLAGS, *arguments, "-"]
    done = subprocess.run(command, input=text, capture_output=True, text=True)
    if done.returncode:
        raise CudaError(f"the host compiler refuses the kernel:\n{done.stderr[:4000]}")
    return done.stdout


@cache
def load(library):
    return ctypes.CDLL(str(library))


@cache
def _libc():
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
    libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
    return libc


class Guarded:
    """A copy of an array in memory of its own, between pages that nobody may touch."""

    def __init__(self, a):
        if not a.flags.c_contiguous:
            raise CudaError(f"expected a C-contiguous array, got strides {a.strides}")
        self.original, self.size = a, a.nbytes
        room = -(-max(a.nbytes, 1) // PAGE) * PAGE
        self.length = room + 2 * PAGE
        self.base = _libc().mmap(None, self.length, 3, 0x22, -1, 0)  # private, anonymous
        _libc().mprotect(self.base, PAGE, 0)
        _libc().mprotect(self.base + PAGE + room, PAGE, 0)
        self.inside = np.frombuffer(
            (ctypes.c_ubyte * room).from_address(self.base + PAGE), np.uint8
        )
        self.start = room - -(-a.nbytes // 16) * 16  # 16 bytes is what a float4 needs
        self.pointer = self.base + PAGE + self.start
        self.inside[...] = 0xFF
        self.data[...] = np.frombuffer(a.tobytes(), np.uint8)

    @property
    def data(self):
        return self.inside[self.start : self.start + self.size]

    def intact(self):
        """Tell whether nothing was written beside the array."""
        outside = self.inside[: self.start], self.inside[self.start + self.size :]
        return all((part == 0xFF).all() for part in outside)

    def store(self):
        """Copy the values back to the original."""
        self.original.reshape(-1).view(np.uint8)[...] = self.data

    def free(self):
        del self.inside
        _libc().munmap(self.base, self.length)


class _Launch(ctypes.Structure):
    _fields_ = [
        ("grid", ctypes.c_uint * 3),
        ("block", ctypes.c_uint * 3),
        ("shared", ctypes.c_int64),
        ("where", ctypes.c_int64 * 4),
        ("message", ctypes.c_char * 256),
    ]


def _three(size):
    size = (size,) if isinstance(size, int) else tuple(int(n) for n in size)
    return (*size, 1, 1)[:3]


class Function:
    """One kernel, called as ``kernel(grid, block, args, shared_mem=0)``."""

    launches = 0  # of all kernels, for tests that count them

    def __init__(self, library, name):
        self.name = name
        try:
            self._launch = getattr(library, f"emu_launch_{name}")
        except AttributeError:
            raise CudaError(f"no kernel {name!r} in the module") from None
        describe = getattr(library, f"emu_signature_{name}")
        describe.restype = ctypes.c_char_p
        self.parameters = [(s[0], int(s[1:])) for s in describe().decode().split()]
        self.max_dynamic_shared_size_bytes = SHARED_LIMIT

    def __call__(self, grid, block, args, shared_mem=0, stream=None):
        grid, block = _three(grid), _three(block)
        if not (min(*grid, *block) >= 1 and grid[0] < 2**31 and max(grid[1:]) <= 65535):
            raise CudaError(f"{self.name}: no grid of {grid} blocks of {block}")
        if np.prod(block) > 1024 or block[2] > 64:
            raise CudaError(f"{self.name}: {block} are more threads than a block may have")
        if shared_mem > min(self.max_dynamic_shared_size_bytes, SHARED_MOST):
            raise CudaError(f"{self.name}: {shared_mem} bytes of shared memory were not granted")
        if len(args) != len(self.parameters):
            raise CudaError(
                f"{self.name}: expected {len(self.parameters)} arguments, got {len(args)}"
            )
        guarded, values = {}, []
        try:
            for i, (arg, parameter) in enumerate(zip(args, self.parameters)):
                values.append(self._argument(i, arg, *parameter, guarded))
            pointers = (ctypes.c_void_p * max(1, len(values)))(*(v.ctypes.data for v in values))
            launch = _Launch(grid, block, shared_mem)
            code = self._launch(ctypes.byref(launch), pointers)
            Function.launches += 1
            if code:
                raise CudaError(self._explain(code, launch, guarded, args))
            for i, (copy, writable) in guarded.values():
                if not copy.intact():
                    raise CudaError(f"{self.name}: argument {i}: written outside the array")
                if writable:
                    copy.store()
        finally:
            for _, (copy, _) in guarded.values():
                copy.free()

    def _argument(self, i, arg, kind, size, guarded):
        """Return the argument's value as a NumPy scalar array; arrays are copied to `guarded`."""
        what = f"{self.name}: argument {i}"
        if isinstance(arg, np.ndarray):
            if kind not in "rw":
                raise CudaError(f"{what}: expected a number of {size} bytes, got an array")
            if arg.itemsize != size:
                raise CudaError(f"{what}: expected items of {size} bytes, got {arg.dtype}")
            key = arg.ctypes.data, arg.nbytes
            if key in guarded:
                copy, writable = guarded[key][1]
                guarded[key] = i, (copy, writable or kind == "w")
            else:
                copy = Guarded(arg)
                guarded[key] = i, (copy, kind == "w")
            return np.array(copy.pointer, np.uint64)
        if not isinstance(arg, np.generic):
            arg = np.int64(arg) if isinstance(arg, int) else np.float64(arg)  # as CuPy does
        if kind in "rw":
            if arg.dtype.kind not in "iu" or arg.itemsize != 8:
                raise CudaError(f"{what}: expected an array or an address, got {arg!r}")
        elif arg.itemsize != size or (arg.dtype.kind == "f") != (kind == "f"):
            raise CudaError(f"{what}: expected {kind}{size}, got {arg.dtype}")
        return np.array(arg)

    def _explain(self, code, launch, guarded, args):
        message = launch.message.decode()
        if code == 1:
            return f"{self.name}: divergent barrier: {message}"
        if code == 3:
            return f"{self.name}: {message}: asynchronous copies that are never waited for"
        address = launch.where[0]
        if launch.where[1] <= address < launch.where[2]:
            return f"{self.name}: {message}: outside the dynamic shared memory"
        for i, (copy, _) in guarded.values():
            if copy.base <= address < copy.base + copy.length:
                offset = (address - copy.pointer) // args[i].itemsize
                return f"{self.name}: {message}: argument {i}: element {offset} of {args[i].size}"
        return f"{self.name}: {message}: fault at address {address:#x}"


class RawModule:
    """CUDA C++ source, compiled for the CPU; the interface of ``cupy.RawModule``."""

    def __init__(self, *, code, options=(), **_):
        self._library = load(build(code, tuple(options)))

    def get_function(self, name):
        return Function(self._library, name)


class RawKernel(Function):
    """One kernel with its source; the interface of ``cupy.RawKernel``."""

    def __init__(self, code, name, options=(), **_):
        super().__init__(load(build(code, tuple(options))), name)
