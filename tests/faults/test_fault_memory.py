"""Kernels stay inside their arrays, at full speed: see `guard_pages.py`."""

import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("numba", reason="Numba is not installed")
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="needs mprotect and Linux's pages")

SCRIPT = Path(__file__).with_name("guard_pages.py")


def run(*argv):
    return subprocess.run([sys.executable, SCRIPT, *argv], capture_output=True, text=True)


def test_a_guard_kills():
    """What the test below rests on."""
    done = run("touch")
    assert done.returncode == 0, done.stderr


def test_no_kernel_leaves_its_arrays():
    done = run("few")
    assert done.returncode == 0, done.stdout + done.stderr
    assert " calls between guards, 0 with other results" in done.stdout
