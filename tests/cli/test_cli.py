"""What all commands share: help, errors, exit status."""

import subprocess
import sys
import warnings

import pytest

import minicnn
from minicnn.cli import COMMANDS, main

NAMES = [command.__name__.rpartition(".")[2] for command in COMMANDS]


def python(*args, **kwargs):
    return subprocess.run([sys.executable, *args], capture_output=True, text=True, **kwargs)


@pytest.mark.parametrize("name", NAMES)
def test_help_shows_examples_and_each_option(name, cli):
    status, out, err = cli(name, "--help")
    assert (status, err) == (0, "")
    assert f"  minicnn {name}" in out.partition("example")[2]
    assert "--debug" in out


def test_help_of_train_shows_every_default(cli):
    out = cli("train", "--help")[1]
    for text in ("digits ", "mnist ", "fashion-mnist ", "a folder ", "sgd ", "momentum 0.9"):
        assert f"\n  {text}" in out or f" {text}" in out.partition("defaults by")[2]
    for text in ("(default: digits)", "(default: 0)", "runs/DATASET-DATE-TIME"):
        assert text in out


def test_overview_lists_every_command(cli):
    status, out, _ = cli("--help")
    assert status == 0
    assert all(f"\n    {name}" in out for name in NAMES)


def test_no_command_shows_the_help_and_is_an_error(cli):
    status, out, err = cli()
    assert (status, out) == (2, "")
    assert "minicnn train" in err


def test_version(cli):
    assert cli("--version")[:2] == (0, f"minicnn {minicnn.__version__}\n")


def test_the_module_runs_too():
    done = python("-m", "minicnn", "summary")
    assert done.returncode == 0
    assert "184,586 parameters" in done.stdout
    assert python("-m", "minicnn", "predict").returncode == 2


def test_help_imports_nothing_slow():
    code = """
import sys
from minicnn.cli import main
try:
    main(["train", "--help"])
finally:
    slow = {"matplotlib", "numba", "tqdm", "pooch", "PIL", "safetensors", "threadpoolctl", "cupy"}
    assert not slow & set(sys.modules), slow & set(sys.modules)
"""
    done = python("-c", code)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize(
    ("argv", "argument", "got"),
    [
        (["train", "--epochs", "0"], "--epochs", "'0'"),
        (["train", "--epochs", "2.5"], "--epochs", "'2.5'"),
        (["train", "--batch-size", "-1"], "--batch-size", "'-1'"),
        (["train", "--lr", "0"], "--lr", "'0'"),
        (["train", "--lr", "nan"], "--lr", "'nan'"),
        (["train", "--lr", "inf"], "--lr", "'inf'"),
        (["train", "--lr", "fast"], "--lr", "'fast'"),
        (["train", "--momentum", "2"], "--momentum", "'2'"),
        (["train", "--weight-decay", "-1"], "--weight-decay", "'-1'"),
        (["train", "--label-smoothing", "1.5"], "--label-smoothing", "'1.5'"),
        (["train", "--clip-norm", "0"], "--clip-norm", "'0'"),
        (["train", "--warmup", "-1"], "--warmup", "'-1'"),
        (["train", "--seed", "-1"], "--seed", "'-1'"),
        (["train", "--channels", "2"], "--channels", "2"),
        (["train", "--image-size", "0"], "--image-size", "'0'"),
        (["train", "--optimizer", "lion"], "--optimizer", "'lion'"),
        (["train", "--schedule", "sine"], "--schedule", "'sine'"),
        (["train", "--device", "tpu"], "--device", "'tpu'"),
        (["train", "--augment", "shift=x"], "--augment", "'x'"),
        (["train", "--augment", "rotate=999"], "--augment", "999"),
        (["train", "--dataset", "mnits"], "--dataset", "'mnits'"),
        (["train", "--epoch", "1"], "--epoch", "1"),
        (["train", "--image-size", "28"], "--image-size", "digits"),
        (["train", "--channels", "1"], "--channels", "digits"),
        (["train", "--momentum", "0.9"], "--momentum", "adamw"),
        (["train", "--momentum", "0.9", "--optimizer", "adam"], "--momentum", "adam"),
        (["train", "--warmup", "9"], "--warmup", "onecycle"),
        (["evaluate", "--split", "validation"], "--split", "'validation'"),
        (["evaluate", "--dataset", "mnits"], "--dataset", "'mnits'"),
        (["predict"], "IMAGE", ""),
        (["predict", "x.png", "--top", "0"], "--top", "'0'"),
        (["summary", "--input-shape", "1", "28"], "--input-shape", "3"),
        (["summary", "--input-shape", "1", "28", "0"], "--input-shape", "'0'"),
        (["summary", "--run", "x", "--input-shape", "1", "28", "28"], "--input-shape", "--run"),
        (["dance"], "COMMAND", "'dance'"),
    ],
    ids=" ".join,
)
def test_bad_arguments_exit_2_and_are_named_in_one_line(argv, argument, got, cli, tmp_path):
    status, out, err = cli(*argv)
    assert (status, out) == (2, "")
    assert err.startswith("minicnn: error: ")
    assert err.count("\n") == 1
    assert argument in err
    assert got in err
    assert not list(tmp_path.iterdir())


def failing(monkeypatch, error):
    def report():
        raise error

    monkeypatch.setattr("minicnn.cli.info.report", report)


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (ValueError("x: expected 1,\n  got 2"), "x: expected 1,; got 2"),
        (FileNotFoundError(2, "No such file", "a.png"), "a.png: No such file"),
        (OSError("the disk is full"), "the disk is full"),
        (MemoryError(), "MemoryError"),
        (ModuleNotFoundError("No module named 'matplotlib'"), "No module named 'matplotlib'"),
        (ArithmeticError("NaN"), "NaN"),
    ],
)
def test_an_expected_error_is_one_line_and_status_1(error, text, monkeypatch, cli):
    error.add_note("in layer 3: Conv2d")
    failing(monkeypatch, error)
    assert cli("info") == (1, "", f"minicnn: error: {text}; in layer 3: Conv2d\n")


def test_debug_shows_the_traceback(monkeypatch):
    failing(monkeypatch, ValueError("x"))
    with pytest.raises(ValueError, match="x"):
        main(["info", "--debug"])


def test_an_unexpected_error_is_not_hidden(monkeypatch):
    failing(monkeypatch, KeyError("x"))
    with pytest.raises(KeyError):
        main(["info"])


def test_ctrl_c_is_status_130(monkeypatch, cli):
    stop = KeyboardInterrupt()
    stop.add_note("runs/x keeps the weights after epoch 3")
    failing(monkeypatch, stop)
    expected = "minicnn: stopped; runs/x keeps the weights after epoch 3\n"
    assert cli("info") == (130, "", expected)


@pytest.mark.filterwarnings("default")
def test_a_warning_is_one_line(monkeypatch, cli):
    def report():
        warnings.warn("the cache folder\ncannot be written to", RuntimeWarning, stacklevel=1)
        return "done"

    monkeypatch.setattr("minicnn.cli.info.report", report)
    before = warnings.showwarning
    expected = "minicnn: warning: the cache folder cannot be written to\n"
    assert cli("info") == (0, "done\n", expected)
    assert warnings.showwarning is before


def test_a_reader_that_has_gone_is_no_error_message():
    process = subprocess.Popen(
        [sys.executable, "-m", "minicnn", "summary"], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    process.stdout.close()
    with process.stderr:
        assert process.stderr.read() == b""
    assert process.wait() == 1
