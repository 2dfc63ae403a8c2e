"""The folder of a run: what is read and written, and who may."""

import json
import math
import os
import shutil
import time
import tracemalloc

import numpy as np
import pytest

from minicnn import checkpoint, locks
from minicnn.config import Config
from minicnn.optim import SGD
from minicnn.runs import KeepRun, Run, latest, new_run, resume_run
from minicnn.train import Trainer


def config(**changes):
    settings = {"dataset": "digits", "classes": ("a", "b"), "channels": 1, "image_size": (16, 16)}
    return Config(**(settings | changes))


def finished(folder, seed=0):
    """A run with weights and a history of one epoch."""
    with new_run(folder) as run:
        run.write_config(config())
        checkpoint.save(run.config.build(seed), run.folder / "weights.safetensors")
        run.write_history([{"epoch": 1, "test_loss": 0.5}])
    return run


def test_config_comes_back(tmp_path):
    written = config(
        crop="auto", label_smoothing=0.1, options={"out": tmp_path}, versions={"a": "1"}
    )
    run = Run(tmp_path)
    run.write_config(written)
    assert run.config is written
    read = Run(tmp_path).config
    assert read == config(
        crop="auto", label_smoothing=0.1, options={"out": str(tmp_path)}, versions={"a": "1"}
    )


def test_a_folder_without_a_run_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="expected the folder of a run, got no config"):
        _ = Run(tmp_path / "none").config


def test_history_comes_back_and_is_json(tmp_path):
    history = [{"epoch": 1, "lr": 1e-7, "test_loss": math.nan}, {"epoch": 2, "test_loss": math.inf}]
    Run(tmp_path).write_history(history)
    lines = (tmp_path / "history.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == [
        {"epoch": 1, "lr": 1e-7, "test_loss": None},
        {"epoch": 2, "test_loss": None},
    ]
    read = Run(tmp_path).read_history()
    assert read[0]["lr"] == 1e-7
    assert math.isnan(read[0]["test_loss"])
    assert math.isnan(read[1]["test_loss"])


@pytest.mark.parametrize("text", ["{", "1\n", '{"epoch": 1}\n{"epo'])
def test_a_damaged_history_is_named(text, tmp_path):
    (tmp_path / "history.jsonl").write_text(text)
    with pytest.raises(ValueError, match="expected one JSON object a line"):
        Run(tmp_path).read_history()


def test_the_model_comes_back(tmp_path):
    run = finished(tmp_path / "r", seed=5)
    expected = config().build(5).state_dict()
    for name, a in Run(run.folder).load_model().state_dict().items():
        np.testing.assert_array_equal(a, expected[name])


@pytest.mark.parametrize(
    "change",
    [{"image_size": (2**20, 2**20)}, {"channels": 10**9}, {"classes": ("a",) * 10**6}],
    ids=["image_size", "channels", "classes"],
)
def test_a_config_of_another_network_takes_no_memory(change, tmp_path):
    """A damaged config is no reason to ask for more than the file of weights holds."""
    run = finished(tmp_path)
    run.write_config(config(**change))
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match=r"weights\.safetensors: .*config\.json: .*got"):
            run.load_model()
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 2 * (tmp_path / "weights.safetensors").stat().st_size + (16 << 20)


def trainer_in(folder, seed=3):
    run = Run(folder)
    run.write_config(config())
    model = run.config.build(seed)
    return run, Trainer(model, SGD(model, lr=0.1))


def epoch(trainer, keep, accuracy):
    trainer.optimizer.step()
    trainer.history.append({"epoch": len(trainer.history) + 1, "test_accuracy": accuracy})
    for _, p, _ in trainer.model.named_params():
        p += 1
    keep.on_epoch(trainer, trainer.history[-1])


def names(folder, pattern="*"):
    return sorted(path.name for path in folder.glob(pattern))


def test_epochs_are_kept_as_they_come(tmp_path):
    run, trainer = trainer_in(tmp_path)
    keep = KeepRun(run)
    assert keep.kept == 0
    epoch(trainer, keep, 0.5)
    assert keep.kept == 1
    assert run.read_history() == trainer.history
    x = np.ones((1, 1, 16, 16), np.float32)
    np.testing.assert_array_equal(run.load_model()(x), trainer.model(x))


def test_the_best_epoch_is_kept_too(tmp_path):
    """The first of two equals; an epoch without a test is never better."""
    run, trainer = trainer_in(tmp_path)
    keep, biases = KeepRun(run), []
    for accuracy in (math.nan, 0.5, 0.8, 0.7, 0.8, math.nan):
        epoch(trainer, keep, accuracy)
        biases.append(checkpoint.load_arrays(tmp_path / "best.safetensors")["0.bias"][0])
    first = biases[0]
    assert [b - first for b in biases] == pytest.approx([0, 1, 2, 2, 2, 2])


def test_the_last_checkpoints_stay(tmp_path):
    run, trainer = trainer_in(tmp_path)
    keep = KeepRun(run, every=2, keep=3)
    keep.begin(trainer)
    for _ in range(9):
        trainer.optimizer.step()
        keep.on_step(trainer, 0.0)
    expected = [f"checkpoint-{n:08}.safetensors" for n in (4, 6, 8)]
    assert names(tmp_path, "checkpoint*") == expected
    assert [path.name for path in run.checkpoints()] == expected
    again = trainer_in(tmp_path, seed=4)[1]
    run.restore(again)
    assert again.optimizer.step_count == 8


def test_a_damaged_checkpoint_gives_way_to_the_one_before(tmp_path):
    run, trainer = trainer_in(tmp_path)
    for _ in range(2):
        trainer.optimizer.step()
        path = run.write_checkpoint(trainer, keep=2)
    path.write_bytes(path.read_bytes()[:-1])
    again = trainer_in(tmp_path, seed=4)[1]
    with pytest.warns(UserWarning, match="00002.* got: .*; an earlier checkpoint is used"):
        run.restore(again)
    assert again.optimizer.step_count == 1
    run.checkpoints()[0].write_bytes(b"")
    with (
        pytest.warns(UserWarning, match="earlier"),
        pytest.raises(checkpoint.DamagedError, match="00001"),
    ):
        run.restore(again)


def test_another_trainer_is_no_reason_to_try_an_older_checkpoint(tmp_path):
    run, trainer = trainer_in(tmp_path)
    for _ in range(2):
        trainer.optimizer.step()
        run.write_checkpoint(trainer, keep=2)
    trainer.clip_norm = 1.0
    with pytest.raises(ValueError, match=r"00002.*clip_norm: expected a trainer with None"):
        run.restore(trainer)


def test_a_run_without_checkpoints(tmp_path):
    run, trainer = trainer_in(tmp_path)
    run.restore(trainer)  # ended before its first one
    assert trainer.optimizer.step_count == 0
    run.write_history([{"epoch": 1}])
    with pytest.raises(FileNotFoundError, match=r"expected a checkpoint-.*, got none"):
        run.restore(trainer)


def test_too_little_room_is_noticed_at_the_start(tmp_path, monkeypatch):
    run, trainer = trainer_in(tmp_path)
    usage = shutil.disk_usage(tmp_path)._replace(free=1_000)
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage)
    with pytest.raises(OSError, match=r"expected [\d,]+ bytes of free space .*, got 1,000"):
        KeepRun(run).begin(trainer)


# ------------------------------------------------------------ who may write


def test_a_new_folder_is_made_and_locked_only_inside(tmp_path):
    folder = tmp_path / "a" / "b"
    with new_run(folder) as run:
        assert run.folder == folder
        assert folder.is_dir()
        run.write_config(config())
    assert [path.name for path in folder.iterdir()] == ["config.json"]


def test_what_killed_writes_left_is_swept_at_the_start(tmp_path):
    finished(tmp_path / "r")
    before = names(tmp_path / "r")
    (tmp_path / "r" / f".weights.safetensors.{'0a' * 16}.part").touch()
    (tmp_path / "r" / ".mine.part").touch()
    with resume_run(tmp_path / "r"):
        assert names(tmp_path / "r") == sorted([*before, ".lock", ".mine.part"])


def test_without_locks_it_works_all_the_same(tmp_path, monkeypatch):
    monkeypatch.setattr(locks, "fcntl", None)
    finished(tmp_path / "r")
    with pytest.raises(FileExistsError, match="holds a run"), new_run(tmp_path / "r"):
        pass


# ------------------------------------------------------------ the newest


@pytest.mark.parametrize("name", ["weights.safetensors", "history.jsonl"])
def test_results_are_never_overwritten(name, tmp_path):
    (tmp_path / name).write_text("results")
    with (
        pytest.raises(FileExistsError, match=f"holds a run \\({name}\\); choose another --out"),
        new_run(tmp_path),
    ):
        pass
    assert (tmp_path / name).read_text() == "results"
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_checkpoints_are_results_unless_nothing_was_done_yet(tmp_path):
    (tmp_path / "notes.txt").touch()
    (tmp_path / "checkpoint-00000000.safetensors").touch()
    with new_run(tmp_path):
        assert names(tmp_path) == [".lock", "notes.txt"]
    (tmp_path / "checkpoint-00000007.safetensors").touch()
    with (
        pytest.raises(FileExistsError, match=r"\(checkpoint-00000007.safetensors\); choose"),
        new_run(tmp_path),
    ):
        pass
    assert names(tmp_path) == ["checkpoint-00000007.safetensors", "notes.txt"]


def test_only_a_run_is_resumed_and_by_one_process(tmp_path):
    with pytest.raises(FileNotFoundError, match="got no config"), resume_run(tmp_path / "none"):
        pass
    assert not (tmp_path / "none").exists()
    finished(tmp_path / "r")
    before = names(tmp_path / "r")
    with (
        resume_run(tmp_path / "r"),
        pytest.raises(FileExistsError, match=f"process {os.getpid()} on .* is at work$"),
        resume_run(tmp_path / "r"),
    ):
        pass
    assert names(tmp_path / "r") == before


def test_a_folder_of_other_things_may_be_used(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with new_run(tmp_path):
        pass
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_latest_is_the_one_whose_weights_were_written_last(tmp_path):
    for i, name in enumerate(("old", "new", "middle")):
        run = finished(tmp_path / name)
        when = time.time() - 100 * abs(i - 1) - i
        os.utime(run.folder / "weights.safetensors", (when, when))
    (tmp_path / "unfinished").mkdir()
    Run(tmp_path / "unfinished").write_config(config())
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "weights.safetensors").write_text("of another program")
    assert latest(tmp_path).folder == tmp_path / "new"


def test_no_run_at_all(tmp_path):
    with pytest.raises(FileNotFoundError, match="expected a folder with runs, got none"):
        latest(tmp_path / "runs")
