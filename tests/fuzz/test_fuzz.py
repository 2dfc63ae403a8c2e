"""A short run of the fuzzer, and proof that it sees what it looks for."""

import os

import numpy as np
import pytest

from fuzz import run
from fuzz.mutations import MUTATIONS, mutate
from fuzz.targets import TARGETS, Target
from minicnn.runs import CONFIG, HISTORY, Run


@pytest.mark.parametrize("name", TARGETS)
def test_damaged_files_break_nothing(name):
    if name == "onnx":
        pytest.importorskip("onnx.checker", reason="the package onnx is not installed")
    verdicts, findings = run.fuzz(name, 250, seed=1)
    assert [f"{f.number}: {f.what}" for f in findings] == []
    assert sum(verdicts.values()) == 250
    assert verdicts["refused"] > 100  # else nothing was damaged
    assert verdicts["accepted"] > 0  # else nothing was read


def fake(read, wrong=lambda value, content, whole: ""):
    """A reader that copes with the whole file and misbehaves on others."""
    whole = bytes(range(200))
    return Target(
        ".x", lambda: [whole],
        lambda path: None if path.read_bytes() == whole else read(path),
        lambda value, content, w: wrong(value, content, w) if content != whole else "",
    )  # fmt: skip


def crash(path):
    os.abort()


def hang(path):
    while True:
        pass


def swallow(path):
    np.ones(40 << 20, np.uint8)


def nameless(path):
    raise ValueError("something is wrong")


def internal(path):
    raise KeyError("x")


@pytest.mark.parametrize(
    ("reader", "words"),
    [
        (fake(crash), "the process died"),
        (fake(hang), "no answer within"),
        (fake(swallow), "MB of memory for a file of"),
        (fake(nameless), "the error names neither file nor argument"),
        (fake(internal), "KeyError"),
        (fake(lambda path: 1, lambda value, content, whole: "one too many"), "one too many"),
    ],
    ids=["crash", "hang", "memory", "nameless", "internal", "wrong"],
)
def test_the_fuzzer_sees(reader, words, monkeypatch):
    monkeypatch.setattr(run, "SECONDS", 1)
    _, findings = run.fuzz("fake", 2, seed=0, target=reader)
    assert len(findings) == 2
    for finding in findings:
        assert words in finding.what
        assert (
            finding.content == mutate(reader.files(), np.random.default_rng([0, finding.number]))[1]
        )


def test_every_mutation_changes_something():
    for change in MUTATIONS:
        changed = 0
        for seed in range(20):
            data = bytearray(range(1, 201))
            change(data, np.random.default_rng(seed))
            changed += data != bytearray(range(1, 201))
        assert changed >= 15, change.__name__


def test_the_command_line(capsys):
    assert run.main(["idx", "--count", "40"]) == 0
    assert "| idx | 40 |" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        run.main(["nonsense"])


# What the fuzzer found.


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('"label_smoothing": "x"', "label_smoothing: expected a number"),
        ('"label_smoothing": 7', "label_smoothing: expected a number >= 0 and <= 1, got 7"),
        ('"dataset": 3', "dataset: expected str, got int"),
        ('"options": "x"', "options: expected dict, got str"),
        ('"invert": 2', "invert: expected true, false or 'auto', got 2"),
        ('"crop": []', r"crop: expected true, false or 'auto', got \[\]"),
        ('"crop": ' + "[" * 100_000, "recursion"),
    ],
)
def test_a_config_with_values_of_the_wrong_kind(text, words, tmp_path):
    good = '"dataset": "d", "classes": ["a"], "channels": 1, "image_size": 8'
    (tmp_path / CONFIG).write_text(f"{{{good}, {text}}}")
    with pytest.raises(ValueError, match=f"config.json: .*{words}"):
        _ = Run(tmp_path).config


@pytest.mark.parametrize("value", ['"x"', "true", "[1]", "{}", "[" * 100_000])
def test_a_history_with_values_of_the_wrong_kind(value, tmp_path):
    (tmp_path / HISTORY).write_text(f'{{"train_loss": {value}}}\n')
    with pytest.raises(ValueError, match=r"history.jsonl: expected one JSON object a line"):
        Run(tmp_path).read_history()
