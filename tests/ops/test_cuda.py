"""Every CUDA source compiles, keeps its numbers in registers, and is part of the package."""

from configparser import ConfigParser
from fnmatch import fnmatch
from pathlib import Path

import numpy as np
import pytest

import devices
import minicnn
import nvrtc
from minicnn.ops import conv2d_cupy, cuda, linear_cupy

PACKAGE = Path(minicnn.__file__).parent
SMALL = dict(conv2d_cupy.TILES["float32"][-1].macros)
LARGE = dict(conv2d_cupy.TILES["float32"][0].macros)
DOUBLE = dict(conv2d_cupy.TILES["float64"][0].macros)
TENSOR, TENSOR_SMALL = (dict(tile.macros) for tile in conv2d_cupy.TENSOR_TILES)
ALONG = {"A_ALONG_K": 1, "B_ALONG_K": 0}
THREE = {"FIXED_K": 3, "FIXED_S": 1}
FORWARD, WEIGHTS = {"ONLY": "ONLY_conv2d_forward"}, {"ONLY": "ONLY_conv2d_weight_gradient"}

PLAIN = (
    *("conv2d_depthwise", "conv2d_parts", "elementwise", "im2col"),
    *("norm", "pool", "softmax", "optim"),
)
CASES = [
    *((name, dtype, {}) for dtype in ("float32", "float64") for name in PLAIN),
    ("linear", "float32", {**dict(linear_cupy.TILES["float32"][0].macros), **ALONG}),
    ("linear", "float64", {**dict(linear_cupy.TILES["float64"][0].macros), **ALONG}),
    ("conv2d", "float32", SMALL),
    ("conv2d", "float32", {**LARGE, **THREE, **WEIGHTS}),
    ("conv2d", "float64", DOUBLE),
    ("conv2d", "float32", {**TENSOR, **THREE, **FORWARD}),
    ("conv2d", "float32", TENSOR_SMALL),
]


def package(name):
    return "minicnn" if name == "optim" else "minicnn.ops"


@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
@pytest.mark.parametrize(
    ("name", "dtype", "macros"),
    CASES,
    ids=[f"{n}-{t}-{'-'.join(map(str, m.values()))}" for n, t, m in CASES],
)
def test_compiles_without_spills(name, dtype, macros, arch):
    if reason := nvrtc.missing():
        pytest.skip(reason)
    if arch == "sm_80" and (dtype == "float64" or (macros and macros is not SMALL)):
        pytest.skip("compiled for sm_90 only, to save time")
    exact = name == "optim"
    needs = nvrtc.compiled(
        cuda.source(name, package(name)), cuda.options(dtype, macros, exact), arch
    )
    for kernel, need in needs.items():
        print(f"{arch} {dtype} {kernel}: {need.registers} registers")
        assert need.spilled == 0, kernel
        assert need.frame == 0, kernel
        assert need.registers <= 128, kernel


def test_what_is_refused():
    if reason := nvrtc.missing():
        pytest.skip(reason)
    with pytest.raises(RuntimeError, match="refuses the source"):
        nvrtc.compiled("nonsense", (), "sm_90")


def test_every_source_is_listed_here_and_packaged():
    config = ConfigParser()
    config.read(PACKAGE.parent / "setup.cfg")
    if not config.has_section("options.package_data"):
        pytest.skip("an installed package has no setup.cfg")
    globs = config["options.package_data"]["minicnn"].split()
    sources = [p.relative_to(PACKAGE).as_posix() for p in PACKAGE.rglob("*.cu*")]
    assert {Path(s).stem for s in sources if s.endswith(".cu")} == {name for name, _, _ in CASES}
    for path in sources:
        assert any(fnmatch(path, glob) for glob in globs), path


def test_includes_are_taken_in():
    text = cuda.source("conv2d")
    assert '#include "' not in text
    assert text.index("copy_async") < text.index("multiply(Problem") < text.index("conv2d_forward")


def test_options():
    assert cuda.options(np.float32, {"TI": 4}) == ("-std=c++17", "-DREAL=float", "-DTI=4")
    assert "--fmad=false" in cuda.options("f8", exact=True)
    assert not any("fast_math" in o for o in cuda.options("f8"))


def test_a_module_is_compiled_once(monkeypatch):
    devices.use(monkeypatch)
    made = []

    class Counting(devices.Emulator):
        @staticmethod
        def RawModule(**kwargs):
            made.append(kwargs["options"])
            return devices.emulated.RawModule(**kwargs)

    monkeypatch.setattr(cuda, "runtime", lambda: Counting)
    x = np.arange(5.0, dtype="f4")
    for _ in range(2):
        cuda.each("elementwise", "relu_forward", x, x, x, 0.0, 0.0)
    cuda.each("elementwise", "relu_forward", np.zeros(0, "f4"), x, x, 0.0, 0.0)
    assert len(made) == 1
    y = x.astype("f8")
    cuda.each("elementwise", "relu_forward", y, y, y, 0.0, 0.0)
    assert made == [("-std=c++17", "-DREAL=float"), ("-std=c++17", "-DREAL=double")]


def test_sizes_that_fit():
    assert cuda.fits(2**30 - 1)
    assert not cuda.fits(5, 2**30)
    assert cuda.grid_fits(65535)
    assert not cuda.grid_fits(1, 65536)
