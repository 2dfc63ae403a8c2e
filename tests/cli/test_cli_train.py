"""``minicnn train`` from the arguments to the files."""

import hashlib
import json
import math
import resource

import numpy as np
import pytest
from PIL import Image

from minicnn import checkpoint
from minicnn.cli.text import picture
from minicnn.config import MODELS
from minicnn.data import Augment
from minicnn.gpu.training import GpuSteps
from minicnn.optim import SGD, Adam, AdamW, RMSprop
from minicnn.runs import Run
from minicnn.train import Trainer

RED = "$a_{$"  # no formula, though Matplotlib could take it for one
PICTURES = ("curves", "confusion", "filters", "mistakes")
RESULTS = {"config.json", "history.jsonl", "weights.safetensors", "best.safetensors"}
FILES = RESULTS | {f"{n}.png" for n in PICTURES}


def digest(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


def files(folder):
    """What is in the folder of a run, apart from checkpoints."""
    return {path.name for path in folder.iterdir()} - {path.name for path in checkpoints(folder)}


def checkpoints(folder):
    return sorted(folder.glob("checkpoint-*.safetensors"))


@pytest.fixture
def photos(tmp_path):
    """A folder of pictures of several sizes: red and green, each with a black spot."""
    rng = np.random.default_rng(0)
    for split, n in (("train", 12), ("test", 4)):
        for channel, name in enumerate((RED, "green")):
            (tmp_path / "photos" / split / name).mkdir(parents=True)
            for i in range(n):
                x = rng.integers(0, 80, (20 + i, 24, 3), np.uint8)
                x[..., channel] += 150
                x[6:14, 8:16] = 0
                Image.fromarray(x).save(tmp_path / "photos" / split / name / f"{i}.png")
    return tmp_path / "photos"


def test_a_run_leaves_everything(cli, tmp_path, records):
    folder = tmp_path / "runs" / "a"
    status, out, err = cli("train", "--epochs", 2, "--lr", 0.01, "--out", folder)
    assert status == 0

    assert files(folder) == FILES
    for name in PICTURES:
        with Image.open(folder / f"{name}.png") as image:
            image.load()
            assert min(image.size) > 90
            assert len(image.convert("RGB").getcolors(1 << 20)) > 2
        assert str(folder / f"{name}.png") in out
    history = records(folder)
    assert [record["epoch"] for record in history] == [1, 2]
    assert history[1]["train_loss"] < history[0]["train_loss"]
    last = history[-1]
    assert f"test accuracy {last['test_accuracy']:.2%}, loss {last['test_loss']:.4f}" in out

    run = Run(folder)
    state = checkpoint.load_arrays(folder / "weights.safetensors")
    assert set(state) == set(run.config.build().state_dict())
    x, y, _ = run.config.load("test")
    accuracy = (run.load_model()(x).argmax(axis=1) == y).mean()
    assert accuracy == pytest.approx(last["test_accuracy"])

    for text in ("digits: 600", "200 to test, 1x28x28, 10 classes", "Conv2d ReLU MaxPool2d"):
        assert text in out
    for text in ("adamw: lr 0.01, weight decay 0.01, onecycle", "2 epochs, batches of 64", "cpu, "):
        assert text in out
    assert out.endswith(f"next: minicnn predict PICTURE --run {folder}\n")
    assert err.count("\n") == 2
    assert "epoch 2/2: train" in err


def test_config_says_how_to_repeat_the_run(cli, tmp_path, no_pictures):
    assert cli("train", "--epochs", 1, "--seed", 3, "--quiet", "--out", "r")[0] == 0
    found = json.loads((tmp_path / "r" / "config.json").read_text())
    assert found["dataset"] == "digits"
    assert found["classes"] == list("0123456789")
    assert (found["channels"], found["image_size"]) == (1, [28, 28])
    assert (found["invert"], found["crop"]) == ("auto", "auto")
    assert found["options"] == {
        "augment": "digits",
        "batch_size": 64,
        "channels": 1,
        "checkpoint_every": 100,
        "clip_norm": None,
        "crop": "auto",
        "dataset": "digits",
        "debug": False,
        "device": "cpu",
        "epochs": 1,
        "image_size": [28, 28],
        "invert": "auto",
        "keep": 2,
        "label_smoothing": 0.0,
        "lr": 0.003,
        "momentum": None,
        "optimizer": "adamw",
        "out": "r",
        "quiet": True,
        "schedule": "onecycle",
        "seed": 3,
        "warmup": 0,
        "weight_decay": 0.01,
    }
    assert found["versions"]["numpy"] == np.__version__


def test_quiet_prints_the_result_alone(cli, no_pictures):
    status, out, err = cli("train", "--epochs", 1, "--quiet", "--out", "r")
    assert (status, err) == (0, "")
    assert out.startswith("test accuracy ")
    assert out.endswith(" s\n")
    assert "after 1 epoch in" in out
    assert out.count("\n") == 1


def test_the_folder_is_named_after_data_and_time(cli, tmp_path, no_pictures):
    assert cli("train", "--epochs", 1, "--quiet")[0] == 0
    (folder,) = (tmp_path / "runs").iterdir()
    assert folder.match("digits-[0-9]*-[0-9]*")


def test_the_seed_decides_the_weights(cli, tmp_path, no_pictures):
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        argv = ("--epochs", 1, "--augment", "digits", "--seed", seed, "--quiet")
        assert cli("train", *argv, "--out", name)[0] == 0
    a, b, c = (checkpoint.load_arrays(tmp_path / n / "weights.safetensors") for n in "abc")
    for name in a:
        np.testing.assert_array_equal(a[name], b[name])
        assert (a[name] != c[name]).any()


def test_a_folder_of_pictures(cli, photos, tmp_path, records):
    argv = ("--dataset", "photos", "--image-size", 20, 24, "--epochs", 4, "--lr", 0.03)
    status, out, err = cli("train", *argv, "--out", "run of photos")
    assert status == 0, err
    assert f"{photos}: 24 to train and 8 to test, 3x20x24, 2 classes" in out
    assert "--run 'run of photos'" in out
    folder = tmp_path / "run of photos"
    assert files(folder) == FILES
    config = Run(folder).config
    assert config.classes == (RED, "green")
    assert config.dataset == str(photos)
    # Pictures of such a run are read as those it was trained on.
    assert (config.invert, config.crop) == (False, False)
    assert records(folder)[-1]["test_accuracy"] == 1
    assert cli("evaluate", "--run", folder)[0] == 0
    red = photos / "test" / RED / "0.png"
    assert f"{red}: {RED}" in cli("predict", red, "--run", folder)[1]


def test_gray_pictures_and_one_size_for_both(cli, photos, tmp_path, no_pictures):
    argv = ("--dataset", photos, "--channels", 1, "--image-size", 18, "--epochs", 1, "--quiet")
    assert cli("train", *argv, "--out", "r")[0] == 0
    run = Run(tmp_path / "r")
    assert (run.config.channels, run.config.image_size) == (1, (18, 18))
    # Light pictures of such a run are not taken for paper, inverted and cut out.
    out = cli("predict", photos / "test" / "green" / "0.png", "--show", "--run", "r")[1]
    assert out.startswith("\n".join(picture(run.config.load("test").x[4])))


def test_the_splits_of_a_folder_must_have_the_same_classes(cli, photos, tmp_path):
    (photos / "test" / RED).rename(photos / "test" / "blue")
    status, out, err = cli("train", "--dataset", photos, "--out", "r")
    assert (status, out) == (1, "")
    assert "(test): classes: expected 2 ($a_{$, green), got 2 (blue, green)" in err
    assert not (tmp_path / "r").exists()


def test_pictures_that_are_too_small_for_the_network(cli, photos, monkeypatch, tmp_path):
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    status, _, err = cli("train", "--dataset", photos, "--image-size", 12, "--out", "r")
    assert status == 1
    assert err.count("\n") == 1
    assert "conv2d" in err.lower()
    assert "in layer 3" in err


@pytest.mark.parametrize("out", ["file/run", "/proc/minicnn-run", "file"])
def test_an_unwritable_folder_is_refused_before_any_work(out, cli, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("not a folder")

    def work(*args):
        raise AssertionError("data was loaded first")

    monkeypatch.setattr("minicnn.cli.train.load_split", work)
    status, printed, err = cli("train", "--out", out)
    assert (status, printed) == (1, "")
    assert err.startswith(f"minicnn: error: {out}: expected a folder that can be written to, got: ")
    assert err.count("\n") == 1


def test_a_folder_that_holds_a_run_is_refused_and_left_alone(cli, trained):
    before = {path: digest(path) for path in trained.iterdir()}
    status, out, err = cli("train", "--out", trained)
    assert (status, out) == (1, "")
    assert err.count("\n") == 1
    assert f"{trained}: expected a new folder" in err
    assert "choose another --out" in err
    assert {path: digest(path) for path in trained.iterdir()} == before


def in_epoch_two(monkeypatch, fault):
    """Let augmentation do something in the second epoch, whose first batch is the 11th."""
    calls = []

    def augment(x, rng):
        calls.append(1)
        return fault(x) if len(calls) > 10 else x

    monkeypatch.setattr("minicnn.cli.train.parse_augment", lambda text: augment)


def assert_keeps_epoch_one(folder, records):
    assert [record["epoch"] for record in records(folder)] == [1]
    run = Run(folder)
    x, y, _ = run.config.load("test")
    accuracy = (run.load_model()(x).argmax(axis=1) == y).mean()
    assert accuracy == pytest.approx(records(folder)[0]["test_accuracy"])
    assert files(folder) == RESULTS


def test_a_nan_ends_the_run_and_the_epochs_before_it_are_kept(cli, tmp_path, monkeypatch, records):
    in_epoch_two(monkeypatch, lambda x: x * np.float32(np.nan))
    status, _, err = cli("train", "--epochs", 3, "--out", "r")
    assert status == 1
    error = err.splitlines()[-1]
    assert error.startswith("minicnn: error: Trainer.step: step 10: the loss is nan; first in the")
    assert error.endswith("; r keeps the weights after epoch 1")
    assert_keeps_epoch_one(tmp_path / "r", records)


def test_ctrl_c_ends_the_run_and_the_epochs_before_it_are_kept(cli, tmp_path, monkeypatch, records):
    def stop(x):
        raise KeyboardInterrupt

    in_epoch_two(monkeypatch, stop)
    status, _, err = cli("train", "--epochs", 3, "--out", "r")
    assert status == 130
    assert err.splitlines()[-1] == (
        "minicnn: stopped; r keeps the weights after epoch 1; go on with: minicnn train --resume r"
    )
    assert_keeps_epoch_one(tmp_path / "r", records)


def test_a_full_disk_leaves_the_epochs_before_it_whole(cli, tmp_path, monkeypatch, records):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)

    def fill(x):
        resource.setrlimit(resource.RLIMIT_FSIZE, (2000, limits[1]))
        return x

    in_epoch_two(monkeypatch, fill)
    try:
        status, _, err = cli("train", "--epochs", 3, "--quiet", "--out", "r")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert status == 1
    assert err.count("\n") == 1
    assert "File too large" in err
    assert "r keeps the weights after epoch 1; go on with: minicnn train --resume r" in err
    assert_keeps_epoch_one(tmp_path / "r", records)


def test_nothing_is_said_to_be_kept_in_the_first_epoch(cli, tmp_path, monkeypatch, no_pictures):
    monkeypatch.setattr(
        "minicnn.cli.train.parse_augment", lambda text: lambda x, rng: x * np.float32(np.nan)
    )
    status, _, err = cli("train", "--out", "r")
    assert status == 1
    assert "keeps" not in err
    assert files(tmp_path / "r") == {"config.json"}
    monkeypatch.setattr("minicnn.cli.train.parse_augment", lambda text: lambda x, rng: x)
    assert cli("train", "--epochs", 1, "--out", "r")[0] == 0  # nothing was in the way


def test_cuda_without_cupy_says_what_is_missing(cli, tmp_path, monkeypatch):
    status, out, err = cli("train", "--device", "cuda", "--out", "r")
    assert (status, out) == (1, "")
    assert "CuPy is not installed" in err
    assert "cuda13" in err
    assert not (tmp_path / "r").exists()


@pytest.fixture
def begin(monkeypatch, cli):
    """Give a command line's trainer, and what `fit` was asked for, without training."""

    def begin(*argv):
        asked = {}

        def fit(trainer, train, test, **options):
            asked.update(options, trainer=trainer)
            raise RuntimeError("enough")

        monkeypatch.setattr(Trainer, "fit", fit)
        assert cli("train", *argv)[::2] == (1, "minicnn: error: enough\n")
        return asked

    return begin


@pytest.mark.parametrize(
    ("argv", "kind", "expected"),
    [
        ([], AdamW, {"lr": 3e-3, "weight_decay": 0.01}),
        (["--weight-decay", "0.1"], AdamW, {"weight_decay": 0.1}),
        (["--optimizer", "sgd"], SGD, {"lr": 0.05, "momentum": 0.9, "weight_decay": 0}),
        (["--optimizer", "sgd", "--momentum", "0", "--lr", "2"], SGD, {"lr": 2, "momentum": 0}),
        (["--optimizer", "adam"], Adam, {"lr": 3e-3, "weight_decay": 0}),
        (["--optimizer", "rmsprop"], RMSprop, {"lr": 1e-3, "momentum": 0}),
        (["--optimizer", "rmsprop", "--momentum", "0.5"], RMSprop, {"momentum": 0.5}),
    ],
    ids=str,
)
def test_optimizers(argv, kind, expected, begin):
    optimizer = begin(*argv)["trainer"].optimizer
    assert type(optimizer) is kind
    assert {name: getattr(optimizer, name) for name in expected} == pytest.approx(expected)


def test_schedules_run_over_all_updates(begin):
    argv = ("--epochs", 4, "--batch-size", 50, "--lr", 0.1)  # 600 pictures: 48 updates
    rates = {
        name: begin(*argv, "--schedule", name)["trainer"].schedule
        for name in ("constant", "step", "cosine", "onecycle")
    }
    assert [rates["constant"](step) for step in (0, 47)] == [0.1, 0.1]
    assert [rates["step"](step) for step in (15, 16, 47)] == pytest.approx([0.1, 0.01, 0.001])
    assert rates["cosine"](24) == pytest.approx(0.05)
    assert max(map(rates["onecycle"], range(48))) == pytest.approx(0.1, rel=0.01)
    assert rates["onecycle"](47) < 1e-5
    warm = begin(*argv, "--schedule", "constant", "--warmup", 9)["trainer"].schedule
    assert warm(0) == pytest.approx(0.01)


def test_what_the_trainer_is_asked_for(begin):
    asked = begin(
        "--epochs", 7, "--batch-size", 9, "--seed", 5, "--clip-norm", 2, "--augment", "none"
    )
    assert {name: asked[name] for name in ("epochs", "batch_size", "seed", "augment")} == {
        "epochs": 7,
        "batch_size": 9,
        "seed": 5,
        "augment": None,
    }
    assert asked["trainer"].clip_norm == 2
    expected = MODELS["mnist_cnn"](5, 1, 10, (28, 28))[0].weight
    np.testing.assert_array_equal(asked["trainer"].model[0].weight, expected)
    assert asked["progress"]
    assert not begin("--quiet")["progress"]
    assert begin("--augment", "shift=3,flip")["augment"] == Augment(shift=3, flip=True)


def test_label_smoothing_reaches_the_loss(begin):
    scores, labels = np.array([[4.0, 0.0]]), np.array([0])
    hard, soft = (
        begin("--label-smoothing", s)["trainer"].loss[0](scores, labels)[0] for s in (0, 0.5)
    )
    assert hard == pytest.approx(math.log1p(math.exp(-4)))
    assert soft == pytest.approx(0.75 * hard + 0.25 * (hard + 4))


@pytest.mark.parametrize(("augment", "device"), [("none", "auto"), ("shift=1", "cuda")])
def test_training_on_the_gpu_equals_the_cpu(cupy, cli, tmp_path, no_pictures, augment, device):
    for place, shown in (("cpu", "cpu"), (device, "cuda")):
        status, out, _ = cli(
            *("train", "--epochs", 1, "--augment", augment, "--device", place, "--out", shown)
        )
        assert status == 0
        assert f"device     {shown}" in out
    here, there = ([*read_history(tmp_path / name)] for name in ("cpu", "cuda"))
    for a, b in zip(here, there, strict=True):
        for name in a.keys() - {"seconds"}:
            assert b[name] == pytest.approx(a[name], rel=1e-3), name


def test_a_run_on_the_gpu_goes_on_there(cupy, cli, tmp_path, monkeypatch, no_pictures):
    options = "train", "--epochs", 1, "--checkpoint-every", 2, "--device", "cuda"
    assert cli(*options, "--out", "whole")[0] == 0
    step = GpuSteps.step

    def fail(self, x, y, position, again):
        if position.batch == 5:
            raise OSError("the power went")
        return step(self, x, y, position, again)

    with monkeypatch.context() as m:
        m.setattr(GpuSteps, "step", fail)
        assert cli(*options, "--out", "cut")[0] == 1
    assert cli("train", "--resume", "cut")[0] == 0
    whole, cut = ([*read_history(tmp_path / name)] for name in ("whole", "cut"))
    for a, b in zip(whole, cut, strict=True):
        assert b["test_loss"] == pytest.approx(a["test_loss"], rel=1e-3)


def read_history(folder):
    return Run(folder).read_history()
