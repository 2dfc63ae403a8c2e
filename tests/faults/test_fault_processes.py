"""Signals to a training in a process of its own, and a cache folder that cannot be written."""

import os
import signal
import subprocess
import sys

import pytest

from minicnn import Linear, Trainer
from minicnn.interrupts import caught, deferred
from minicnn.optim import SGD
from minicnn.runs import Run

TRAIN = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import kill_resume
from minicnn.train import Trainer
update = Trainer._update
def slowly(trainer, x, y):  # says when it is in the midst of an update, and waits for a while
    print(trainer.optimizer.step_count, flush=True)
    if trainer.optimizer.step_count == 8:
        import time
        time.sleep(0.5)
    return update(trainer, x, y)
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


# ------------------------------------------------------------ in this process


class Interrupted(SGD):
    """Gets a Ctrl-C when the first of its parameters has been updated, and not the second."""

    def _update(self, p, g, state, t):
        super()._update(p, g, state, t)
        if p.ndim == 2:
            signal.raise_signal(signal.SIGINT)


@pytest.fixture(autouse=True)
def default_handlers():
    before = {n: signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)}
    signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def test_ctrl_c_in_an_update_leaves_no_half_of_it():
    import numpy as np

    x, y = np.ones((4, 3), np.float32), np.array([0, 1, 0, 1])
    models = [Linear(3, 2, rng=0) for _ in range(2)]
    calm, hasty = (
        Trainer(models[0], SGD(models[0], 0.1)),
        Trainer(models[1], Interrupted(models[1], 0.1)),
    )
    calm.step(x, y)
    with pytest.raises(KeyboardInterrupt):
        hasty.step(x, y)
    for name, a in models[0].state_dict().items():
        np.testing.assert_array_equal(models[1].state_dict()[name], a)

    for model in models:
        model.load_state_dict(Linear(3, 2, rng=1).state_dict())
    calm.fit((x, y), epochs=1, batch_size=2, progress=False)
    for _ in range(2):  # two updates, each ends in a Ctrl-C, and no other is lost or made twice
        with pytest.raises(KeyboardInterrupt):
            hasty.fit((x, y), epochs=1, batch_size=2, progress=False)
    hasty.fit((x, y), epochs=1 - hasty.position.epoch, batch_size=2, progress=False)
    for name, a in models[0].state_dict().items():
        np.testing.assert_array_equal(models[1].state_dict()[name], a)
    assert hasty.history[0]["train_loss"] == calm.history[0]["train_loss"]


def test_deferred_signals_come_after_the_block():
    came = []
    signal.signal(signal.SIGTERM, lambda number, frame: came.append(number))
    with deferred():
        signal.raise_signal(signal.SIGTERM)
        assert came == []
    assert came == [signal.SIGTERM]
    done = []
    with pytest.raises(KeyboardInterrupt), deferred():  # noqa: PT012
        signal.raise_signal(signal.SIGINT)
        done.append(True)
    assert done


def test_a_second_signal_interrupts_what_catches_the_first():
    with pytest.raises(KeyboardInterrupt), caught() as received:  # noqa: PT012
        signal.raise_signal(signal.SIGTERM)
        assert received == [signal.SIGTERM]
        signal.raise_signal(signal.SIGINT)
    assert received == [signal.SIGTERM, signal.SIGINT]


def test_signals_that_are_ignored_stay_ignored():
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with caught() as received, deferred():
        signal.raise_signal(signal.SIGINT)
    assert received == []


def test_a_thread_may_train():
    import threading

    entered = []

    def work():
        with deferred(), caught() as received:
            entered.append(received)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert entered == [[]]


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
