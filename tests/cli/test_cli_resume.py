"""``minicnn train`` that is ended early, and ``--resume``."""

import json
import os
import re
import signal

import numpy as np
import pytest

from minicnn import checkpoint, config
from minicnn.runs import KeepRun, Run
from minicnn.train import Trainer

pytestmark = pytest.mark.usefixtures("no_pictures")

# 3 epochs of 5 batches.
ARGV = ("--epochs", 3, "--batch-size", 120, "--augment", "digits", "--seed", 5, "--quiet")


def result(folder):
    """All that a run comes to: weights, the best ones, history, and the last checkpoint."""
    run = Run(folder)
    paths = [run.checkpoints()[-1], folder / "weights.safetensors", folder / "best.safetensors"]
    arrays = {
        (path.name, name): a.tobytes()
        for path in paths
        for name, a in checkpoint.load_arrays(path).items()
    }
    history = [{k: v for k, v in line.items() if k != "seconds"} for line in run.read_history()]
    return arrays, history


@pytest.fixture(scope="module")
def cached():
    return {}


@pytest.fixture
def undisturbed(cli, tmp_path, cached):
    """What the run comes to if nothing happens."""
    if not cached:
        assert cli("train", *ARGV, "--out", tmp_path / "undisturbed")[0] == 0
        cached.update(result=result(tmp_path / "undisturbed"))
    return cached["result"]


def ended(cli, step, *numbers, argv=ARGV):
    """Run the command line, with signals to this process in the midst of one update."""
    update = Trainer._update

    def interrupted(trainer, *args):
        done = update(trainer, *args)
        if trainer.optimizer.step_count == step:
            for number in numbers:
                os.kill(os.getpid(), number)
        return done

    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(Trainer, "_update", interrupted)
        return cli("train", *argv, "--out", "r")


@pytest.mark.parametrize("step", [1, 5, 7, 15])  # in, before and after an epoch; the last one
def test_a_signal_in_an_update_and_then_resume(step, cli, tmp_path, undisturbed):
    number = (signal.SIGINT, signal.SIGTERM)[step % 2]
    status, out, err = ended(cli, step, number)
    assert (status, out) == (128 + number, "")
    assert err == (
        f"minicnn: stopped by {number.name} after update {step}; "
        "go on with: minicnn train --resume r\n"
    )
    run = Run(tmp_path / "r")
    assert run.checkpoints()[-1].name == f"checkpoint-{step:08}.safetensors"
    assert not (tmp_path / "r" / ".lock").exists()

    assert cli("train", "--resume", "r", "--quiet")[0] == 0
    assert result(tmp_path / "r") == undisturbed


def test_a_second_signal_ends_it_at_once(cli, tmp_path):
    status, _, err = ended(cli, 7, signal.SIGTERM, signal.SIGINT)
    assert status == 130
    assert err == (
        "minicnn: stopped; r keeps the weights after epoch 1; "
        "go on with: minicnn train --resume r\n"
    )
    assert Run(tmp_path / "r").checkpoints()[-1].name == "checkpoint-00000005.safetensors"


def test_handlers_are_given_back(cli):
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    ended(cli, 2, signal.SIGTERM)
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


def test_a_finished_run_is_finished_again(cli, tmp_path, undisturbed):
    assert cli("train", *ARGV, "--out", "r")[0] == 0
    status, out, _ = cli("train", "--resume", "r")
    assert status == 0
    assert "test accuracy" in out
    assert result(tmp_path / "r") == undisturbed


def test_a_run_that_was_killed_before_its_first_checkpoint(cli, tmp_path, undisturbed, monkeypatch):
    def die(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(KeepRun, "begin", die)
        assert cli("train", *ARGV, "--out", "r")[0] == 130
    assert [path.name for path in (tmp_path / "r").iterdir()] == ["config.json"]
    assert cli("train", "--resume", "r", "--quiet")[0] == 0
    assert result(tmp_path / "r") == undisturbed


def test_checkpoints_as_often_as_asked_for(cli, tmp_path):
    ended(cli, 14, signal.SIGINT, argv=(*ARGV, "--checkpoint-every", 3, "--keep", 4))
    steps = [path.name[-14:-12] for path in Run(tmp_path / "r").checkpoints()]
    assert steps == ["09", "10", "12", "14"]
    cli("train", "--resume", "r", "--quiet", "--keep", 1)
    assert [path.name[-14:-12] for path in Run(tmp_path / "r").checkpoints()] == ["15"]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (("--lr", 0.5), "argument --lr: expected 0.003, with which the run in r began, got 0.5"),
        (("--epochs", 4), "argument --epochs: expected 3, .* got 4 \\(fix: leave it out\\)"),
        (("--seed", 0), "argument --seed: expected 5"),
        (("--dataset", "mnist"), "argument --dataset: expected digits"),
        (("--momentum", 0.5), "argument --momentum: expected None"),
        (("--image-size", 20), "argument --image-size: expected .28, 28., .* got .20, 20."),
        (("--out", "q"), "argument --out: expected none with --resume"),
    ],
    ids=lambda value: str(value[0]) if isinstance(value, tuple) else "",
)
def test_options_of_another_run_are_refused(argv, message, cli, tmp_path):
    ended(cli, 2, signal.SIGINT)
    before = result_files(tmp_path / "r")
    status, out, err = cli("train", "--resume", "r", *argv)
    assert (status, out) == (2, "")
    assert re.match(f"minicnn: error: {message}", err), err
    assert result_files(tmp_path / "r") == before


def result_files(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_the_same_options_may_be_repeated(cli, tmp_path, undisturbed):
    ended(cli, 2, signal.SIGINT)
    assert cli("train", *ARGV, "--dataset", "digits", "--resume", "r")[0] == 0
    assert result(tmp_path / "r") == undisturbed


def test_other_data_are_noticed(cli, tmp_path, monkeypatch):
    ended(cli, 2, signal.SIGINT)
    load = config.load

    def changed(name, split):
        data = load(name, split)
        x = data.x.copy()
        x[-1, 0, 0, 0] += np.float32(1e-3)
        return data._replace(x=x)

    monkeypatch.setattr(config, "load", changed)
    status, _, err = cli("train", "--resume", "r")
    assert status == 1
    assert "digits (train): expected the data that the run in r began with, got others" in err


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"options": {}}, "r/config.json: options: expected dataset, got none"),
        ({"optimizer": "magic"}, "options: optimizer: expected one of sgd, adam, adamw"),
        ({"weight_decay": 0.5}, "weight_decay: expected a trainer with 0.01, got one with 0.5"),
        ({"augment": "magic"}, "augment"),
    ],
    ids=str,
)
def test_a_changed_config_is_named(change, message, cli, tmp_path):
    ended(cli, 2, signal.SIGINT)
    path = tmp_path / "r" / "config.json"
    found = json.loads(path.read_text())
    if "options" in change:
        found |= change
    else:
        found["options"] |= change
    path.write_text(json.dumps(found))
    status, _, err = cli("train", "--resume", "r", "--quiet")
    assert status == 1
    assert message in err
    assert err.count("\n") == 1


def test_no_run_to_resume(cli, tmp_path):
    status, _, err = cli("train", "--resume", "none")
    assert status == 1
    assert "none: expected the folder of a run, got no config.json" in err
    assert not (tmp_path / "none").exists()
