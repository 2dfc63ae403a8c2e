"""Signals to a training in a process of its own, and a cache folder that cannot be written."""

import os
import signal
import subprocess
import sys

import pytest

from minicnn.runs import Run

TRAIN = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import kill_resume
from minicnn.train import Trainer
update = Trainer._update
def slowly(trainer, *args):  # says when it is in the midst of an update, and waits for a while
    print(trainer.optimizer.step_count, flush=True)
    if trainer.optimizer.step_count == 8:
        import time
        time.sleep(0.5)
    return update(trainer, *args)
if sys.argv[2] == "slowly":
    Trainer._update = slowly
    import os
    os.devnull = "/dev/stdout"
kill_resume.child(sys.argv[3:], kill_resume.NEVER)
"""


def start(how, *argv):
    tests = os.path.dirname(os.path.dirname(__file__))
    return subprocess.Popen(
        [sys.executable, "-c", TRAIN, tests, how, *map(str, argv)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # A shell's background job ignores SIGINT, and so would its children.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs signals")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_in_an_update(number, tmp_path):
    import kill_resume

    folder = tmp_path / "r"
    with start("slowly", *kill_resume.ARGV, "--out", folder) as process:
        for line in process.stdout:
            if line == "8\n":
                break
        process.send_signal(number)
        _, err = process.communicate(timeout=60)
    assert process.returncode == 128 + number, err
    assert err == (
        f"minicnn: stopped by {number.name} after update 9; "
        f"go on with: minicnn train --resume {folder}\n"
    )
    assert Run(folder).checkpoints()[-1].name == "checkpoint-00000009.safetensors"
    for argv in (["train", "--resume", folder], [*kill_resume.ARGV, "--out", tmp_path / "whole"]):
        with start("at once", *argv) as process:
            _, err = process.communicate(timeout=60)
            assert process.returncode == 0, err
    assert kill_resume.result(folder) == kill_resume.result(tmp_path / "whole")


# ------------------------------------------------------------ Numba's cache


@pytest.mark.parametrize("folder", ["/proc/none", "file"])
def test_without_a_cache_folder_kernels_run_with_one_warning(folder, tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "__pycache__").touch()  # a file where Numba would make a folder
    (tmp_path / "kernels.py").write_text(
        "from minicnn.ops.jit import kernel\n"
        "@kernel()\ndef double(v):\n    return 2 * v\n"
        "@kernel()\ndef triple(v):\n    return 3 * v\n"
        "print(double(2), triple(2))\n"
    )
    environment = {
        **os.environ,
        "NUMBA_CACHE_DIR": str(tmp_path / folder),
        "HOME": "/proc/none",  # root could make a folder elsewhere
        "XDG_CACHE_HOME": "/proc/none",
    }
    done = subprocess.run(
        [sys.executable, tmp_path / "kernels.py"],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == "4 6\n"
    assert done.stderr.count("RuntimeWarning: numba: kernels are compiled anew") == 1
