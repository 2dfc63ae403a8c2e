"""Compiles CUDA sources to machine code where there is no device, and reads what they need.

NVRTC, from the wheel ``nvidia-cuda-nvrtc`` or a CUDA toolkit, works without a driver; else nvcc.
"""

import ctypes
import re
import shutil
import subprocess
import tempfile
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

# "Compiling entry function 'name' for 'sm_90'", then spills, then registers.
ENTRY = re.compile(
    r"Compiling entry function '(?P<name>\w+)'.*?"
    r"(?P<frame>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, "
    r"(?P<loads>\d+) bytes spill loads.*?Used (?P<registers>\d+) registers",
    re.DOTALL,
)


class Needs(NamedTuple):
    """What ptxas reports for one kernel."""

    registers: int
    spilled: int  # bytes
    frame: int  # bytes of local memory: an array that is not in registers


@cache
def library():
    """Return NVRTC, or None."""
    spec = find_spec("nvidia")
    roots = [*(spec.submodule_search_locations if spec else ()), "/usr/local"]
    for root in map(Path, roots):
        for path in sorted(root.glob("*/**/libnvrtc.so*")):
            if "alt" not in path.name and "builtins" not in path.name:
                try:
                    # Which it opens by name: some wheels leave finding it to whoever loads them.
                    for builtins in path.parent.glob("libnvrtc-builtins.so*"):
                        ctypes.CDLL(str(builtins))
                    return ctypes.CDLL(str(path))
                except OSError:
                    continue
    return None


def missing():
    """Return why nothing can be compiled here, or None."""
    if library() is None and shutil.which("nvcc") is None:
        return "neither NVRTC (pip install nvidia-cuda-nvrtc) nor nvcc"
    return None


def compiled(code, options, arch):
    """Compile for ``arch`` ("sm_90") and return {kernel: Needs}."""
    log = (_by_nvcc if library() is None else _by_nvrtc)(code, options, arch)
    needs = {
        m["name"]: Needs(int(m["registers"]), int(m["stores"]) + int(m["loads"]), int(m["frame"]))
        for m in ENTRY.finditer(log)
    }
    if not needs:
        raise RuntimeError(f"no kernel in the compiler's report:\n{log}")
    return needs


def _by_nvrtc(code, options, arch):
    nvrtc, program = library(), ctypes.c_void_p()
    nvrtc.nvrtcCreateProgram(ctypes.byref(program), code.encode(), b"kernels.cu", 0, None, None)
    flags = [*options, f"--gpu-architecture={arch}", "--ptxas-options=-v"]
    array = (ctypes.c_char_p * len(flags))(*(f.encode() for f in flags))
    failed = nvrtc.nvrtcCompileProgram(program, len(flags), array)
    size = ctypes.c_size_t()
    nvrtc.nvrtcGetProgramLogSize(program, ctypes.byref(size))
    log = ctypes.create_string_buffer(size.value)
    nvrtc.nvrtcGetProgramLog(program, log)
    nvrtc.nvrtcDestroyProgram(ctypes.byref(program))
    text = log.value.decode()
    if failed:
        raise RuntimeError(f"NVRTC refuses the source:\n{text[:4000]}")
    return text


def _by_nvcc(code, options, arch):
    with tempfile.TemporaryDirectory() as work:
        path = Path(work) / "kernels.cu"
        path.write_text(code)
        command = [
            "nvcc",
            *options,
            f"-arch={arch}",
            "-Xptxas=-v",
            "-cubin",
            "-o",
            "/dev/null",
            path,
        ]
        done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"nvcc refuses the source:\n{done.stderr[:4000]}")
    return done.stderr
