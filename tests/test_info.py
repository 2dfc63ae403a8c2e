"""The report for bug reports: right where things are there, helpful where they are not."""

import importlib.metadata
import os
import platform
import sys
from types import SimpleNamespace

import numpy as np
import pytest

import minicnn
from minicnn import info

REPORTED = (*info.PACKAGES, *info.CUPY)


@pytest.fixture
def packages(monkeypatch):
    """Pretend that of all packages that are reported only the given ones are installed."""
    real = importlib.metadata.version

    def install(**versions):
        def version(name):
            if name in versions:
                return versions[name]
            if name in REPORTED:
                raise importlib.metadata.PackageNotFoundError(name)
            return real(name)

        monkeypatch.setattr(importlib.metadata, "version", version)

    return install


@pytest.fixture
def program(tmp_path, monkeypatch):
    """Put a shell script on the PATH as the only program there."""

    def program(name, script):
        path = tmp_path / "bin" / name
        path.parent.mkdir()
        path.write_text(f"#!/bin/sh\n{script}\n")
        path.chmod(0o755)
        monkeypatch.setenv("PATH", str(path.parent))

    return program


def test_versions_are_the_installed_ones():
    lines = dict(info.versions())
    assert lines["numpy"] == np.__version__
    assert lines["minicnn"].startswith(f"{minicnn.__version__} (")
    assert lines["python"].startswith(platform.python_version())
    found = info.installed()
    assert found["numpy"] == np.__version__
    assert found["python"] == platform.python_version()
    assert None not in found.values()


def test_torch_is_not_imported_to_find_its_version(packages, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)  # an import would fail
    packages(torch="2.99")
    assert dict(info.versions())["torch"] == "2.99"


def test_every_missing_package_comes_with_a_way_to_get_it(packages):
    packages()
    lines = dict(info.versions())
    for name in info.PACKAGES:
        assert "pip install" in lines[name]
        assert "minicnn" not in lines[name]  # on PyPI that is another project
    assert "'.[cuda13]'" in lines["cupy"]
    assert info.installed().keys() == {"python", "minicnn"}


def test_each_build_of_cupy_is_found(packages):
    packages(**{"cupy-cuda12x": "14.2.0"})
    assert dict(info.versions())["cupy"] == "14.2.0 (cupy-cuda12x)"


def test_the_report_needs_nothing_optional(packages, monkeypatch, tmp_path):
    packages()
    for name in ("threadpoolctl", "pooch", "cupy", "torch", "numba", "matplotlib", "PIL"):
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("MINICNN_DATA_DIR", raising=False)
    text = info.report()
    for line in (
        "BLAS           unknown without threadpoolctl",
        "no nvidia-smi on the PATH",
        "CuPy           not usable: CuPy is not installed (fix: pip install '.[cuda13]'",
        "digits         in ",
        "fashion-mnist  unknown: ",
    ):
        assert line in text
    assert info.threads() >= 1


def test_blas_and_cores():
    lines = list(info.processor())
    assert dict(lines)["model"] not in ("", "unknown") or platform.machine() != "x86_64"
    assert dict(lines)["cores"].endswith(f" usable of {os.cpu_count()}")
    pytest.importorskip("threadpoolctl")
    assert f"{info.threads()} threads" in dict(lines)["BLAS"]


def test_threads_follow_the_library():
    threadpoolctl = pytest.importorskip("threadpoolctl")
    with threadpoolctl.threadpool_limits(1, "blas"):
        assert info.threads() == 1


def test_variables_that_matter_are_shown(monkeypatch):
    for name in list(os.environ):
        if name.startswith(info.VARIABLES):
            monkeypatch.delenv(name)
    assert next(iter(info.environment()))[0] == "none"
    monkeypatch.setenv("MINICNN_DATA_DIR", "/data")
    monkeypatch.setenv("PASSWORD", "secret")
    assert dict(info.environment()) == {"MINICNN_DATA_DIR": "/data"}


def test_data_sets_that_are_there_and_that_are_not(monkeypatch, tmp_path):
    monkeypatch.setenv("MINICNN_DATA_DIR", str(tmp_path))
    lines = dict(info.data_sets())
    assert lines["mnist"] == f"will be downloaded to {tmp_path / 'mnist'} when first used"
    (tmp_path / "mnist").mkdir()
    for i, name in enumerate(minicnn.data.mnist.NAMES):
        assert "will be downloaded" in dict(info.data_sets())["mnist"]
        (tmp_path / "mnist" / (name if i % 2 else name.removesuffix(".gz"))).touch()
    assert dict(info.data_sets())["mnist"] == f"in {tmp_path / 'mnist'}"


@pytest.mark.parametrize(
    ("script", "expected"),
    [
        ("echo 'NVIDIA H100, 580.1, 81559 MiB'", "NVIDIA H100, 580.1, 81559 MiB"),
        ("echo 'no devices were found' >&2; exit 9", "no devices were found"),
    ],
)
def test_the_driver_answers_through_nvidia_smi(script, expected, program, monkeypatch):
    monkeypatch.setitem(sys.modules, "cupy", None)
    program("nvidia-smi", script)
    assert dict(info.gpu())["nvidia-smi"] == expected


class CUDARuntimeError(RuntimeError):
    pass


def fake_cupy(count):
    runtime = SimpleNamespace(
        getDeviceCount=count,
        runtimeGetVersion=lambda: 13000,
        driverGetVersion=lambda: 13010,
        getDeviceProperties=lambda i: {
            "name": b"Test GPU",
            "totalGlobalMem": 80 << 30,
            "major": 9,
            "minor": i,
        },
        CUDARuntimeError=CUDARuntimeError,
    )
    return SimpleNamespace(cuda=SimpleNamespace(runtime=runtime))


def test_devices_through_cupy(monkeypatch):
    monkeypatch.setitem(sys.modules, "cupy", fake_cupy(lambda: 2))
    lines = dict(info.gpu())
    assert lines["CUDA"] == "runtime 13000, driver 13010"
    assert lines["device 1"] == "Test GPU, 81920 MiB, compute capability 9.1"


def test_cupy_without_a_device(monkeypatch):
    def fail():
        raise CUDARuntimeError("cudaErrorNoDevice")

    monkeypatch.setitem(sys.modules, "cupy", fake_cupy(fail))
    assert "not usable: CuPy finds no CUDA device" in dict(info.gpu())["CuPy"]
