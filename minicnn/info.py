"""What minicnn runs on: versions, BLAS, processor, data and GPU, and how to get what is missing."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import minicnn

Line = tuple[str, str]  # a name and what is known about it

# Distributions by their names on PyPI, and what to do where one is missing.
INSTALL_AGAIN = "missing: pip install . in the checkout"
PACKAGES = {
    "numpy": INSTALL_AGAIN,
    "matplotlib": INSTALL_AGAIN,
    "pillow": INSTALL_AGAIN,
    "pooch": INSTALL_AGAIN,
    "safetensors": INSTALL_AGAIN,
    "threadpoolctl": INSTALL_AGAIN,
    "tqdm": INSTALL_AGAIN,
    "numba": "not installed: pip install numba to train faster",
    "torch": "not installed: pip install torch to run the comparisons with PyTorch",
}
CUPY = ("cupy-cuda13x", "cupy-cuda12x", "cupy")
VARIABLES = ("MINICNN_", "NUMBA_", "OMP_", "OPENBLAS_", "MKL_", "BLIS_", "CUDA_")


def report() -> str:
    """Return the text that ``minicnn info`` prints; nothing optional has to be installed."""
    sections = {
        "versions": versions(),
        "processor": processor(),
        "environment": environment(),
        "data": data_sets(),
        "GPU": gpu(),
    }
    lines = []
    for title, section in sections.items():
        lines.append(title)
        lines += [f"  {name:<14} {value}" for name, value in section]
    return "\n".join(lines)


def version_of(distribution: str) -> str | None:
    """Version of an installed distribution, found without importing it."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def installed() -> dict[str, str]:
    """Versions of Python, minicnn and the packages that are there."""
    found = {name: version_of(name) for name in (*PACKAGES, *CUPY)}
    return {"python": platform.python_version(), "minicnn": minicnn.__version__} | {
        name: version for name, version in found.items() if version
    }


def versions() -> Iterator[Line]:
    """Versions, and how to get the packages that are missing."""
    yield "system", platform.platform()
    yield "python", f"{platform.python_version()} ({sys.executable})"
    yield "minicnn", f"{minicnn.__version__} ({Path(minicnn.__file__).parent})"
    for name, hint in PACKAGES.items():
        yield name, version_of(name) or hint
    cupy = [f"{version} ({name})" for name in CUPY if (version := version_of(name))]
    hint = "not installed: pip install '.[cuda13]' (CUDA 12 driver: '.[cuda12]') for an NVIDIA GPU"
    yield "cupy", ", ".join(cupy) or hint


def threads() -> int:
    """Threads of the matrix products."""
    try:
        from threadpoolctl import threadpool_info
    except ImportError:
        return _usable_cores()
    blas = [pool["num_threads"] for pool in threadpool_info() if pool["user_api"] == "blas"]
    return max(blas, default=1)


def processor() -> Iterator[Line]:
    """Model, cores and thread pools."""
    yield "model", _cpu_model() or "unknown"
    yield "cores", f"{_usable_cores()} usable of {os.cpu_count()}"
    try:
        from threadpoolctl import threadpool_info
    except ImportError:
        yield "BLAS", "unknown without threadpoolctl"
        return
    for pool in threadpool_info():
        details = [
            pool["internal_api"],
            pool["version"] or "",
            f"{pool['num_threads']} threads",
            pool.get("threading_layer", ""),
            f"kernel {pool['architecture']}" if "architecture" in pool else "",
        ]
        name = {"blas": "BLAS", "openmp": "OpenMP"}.get(pool["user_api"], pool["user_api"])
        yield name, ", ".join(filter(None, details))


def environment() -> Iterator[Line]:
    """Variables that steer minicnn and the libraries under it."""
    found = sorted(name for name in os.environ if name.startswith(VARIABLES))
    for name in found:
        yield name, os.environ[name]
    if not found:
        yield "none", f"no variable set that starts with {', '.join(VARIABLES)}"


def data_sets() -> Iterator[Line]:
    """Which data sets are there, and where they are looked for."""
    from minicnn.data import mnist

    for name in minicnn.data.DATASETS:
        try:
            folders = [mnist.DIGITS_FOLDER] if name == "digits" else mnist.data_folders(name)
        except ImportError as error:
            yield name, f"unknown: {error}"
            continue
        place = next((folder for folder in folders if _is_complete(folder, mnist.NAMES)), None)
        yield (
            name,
            f"in {place}" if place else f"will be downloaded to {folders[0]} when first used",
        )


def _is_complete(folder: Path, names: tuple[str, ...]) -> bool:
    return all((folder / n).is_file() or (folder / n).with_suffix("").is_file() for n in names)


def gpu() -> Iterator[Line]:
    """Devices and driver, as the driver and CuPy see them."""
    yield from _nvidia_smi()
    try:
        cupy = minicnn.backend.cupy_or_error()
        runtime = cupy.cuda.runtime
        yield "CUDA", f"runtime {runtime.runtimeGetVersion()}, driver {runtime.driverGetVersion()}"
        for i in range(runtime.getDeviceCount()):
            device = runtime.getDeviceProperties(i)
            yield (
                f"device {i}",
                (
                    f"{device['name'].decode()}, {device['totalGlobalMem'] >> 20} MiB, "
                    f"compute capability {device['major']}.{device['minor']}"
                ),
            )
    except Exception as error:  # a broken CUDA installation raises nearly anything
        yield "CuPy", f"not usable: {error}"


def _nvidia_smi() -> Iterator[Line]:
    program = shutil.which("nvidia-smi")
    if program is None:
        yield "driver", "no nvidia-smi on the PATH: no NVIDIA driver (training runs on the CPU)"
        return
    command = [program, "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10)
        lines = (done.stdout if done.returncode == 0 else done.stdout + done.stderr).splitlines()
    except (OSError, subprocess.TimeoutExpired) as error:
        lines = [str(error)]
    for line in filter(None, map(str.strip, lines)):
        yield "nvidia-smi", line


def _usable_cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _cpu_model() -> str:
    """Name of the processor: from Linux, from macOS, or what Python knows."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            name, _, value = line.partition(":")
            if name.strip() == "model name":
                return value.strip()
    except OSError:
        pass
    if platform.system() == "Darwin":
        command = ["sysctl", "-n", "machdep.cpu.brand_string"]
        return subprocess.run(command, capture_output=True, text=True).stdout.strip()
    return platform.processor()
