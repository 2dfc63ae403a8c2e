"""The README is true: its code runs, its traced lines stand in the package, its links lead on."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()


def blocks(language, text=README):
    return re.findall(rf"^ *```{language}\n(.*?)^ *```", text, re.DOTALL | re.MULTILINE)


def section(title):
    return README.split(f"\n## {title}")[1].split("\n## ")[0]


def test_the_code_runs_from_top_to_bottom(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    train, step, check, stepping = blocks("python", section("Use"))
    names = {}
    exec(train, names)
    exec(step, names)
    exec(stepping, names)
    assert (tmp_path / "trace.html").exists()
    exec("layer, x = model[0], train.x[:1]", names)
    (with_loops,) = [code for code in blocks("python") if 'use("reference")' in code]
    exec(with_loops, names)
    assert names["trainer"].history[-1]["test_accuracy"] > 0.94
    assert (tmp_path / "weights.safetensors").exists()
    capsys.readouterr()
    lines = check.splitlines()
    exec("\n".join(line.removeprefix(">>> ") for line in lines if line.startswith(">>> ")), names)
    assert capsys.readouterr().out.splitlines() == [
        line for line in lines if not line.startswith(">>> ")
    ]


def test_the_traced_lines_stand_in_the_package():
    trace = section("One op, from the notebook to the kernel and back")
    conv2d = (ROOT / "minicnn/ops/conv2d.py").read_text()
    (code,) = [code for code in blocks("python", trace) if "im2col_numpy" in code]
    for line in code.splitlines():
        assert line.strip() in conv2d
    assert 'pick("conv2d", VERSIONS, x).forward(x, w, b, win, groups)' in trace
    assert 'pick("conv2d", VERSIONS, x).forward(x, w, b, win, groups)' in conv2d
    call = "ops.conv2d_forward(x, self.weight, self.bias, **self.options)"
    assert call in trace
    assert call in (ROOT / "minicnn/layers/conv.py").read_text()


@pytest.mark.parametrize("link", re.findall(r"\]\(([^)#]+)\)", README))
def test_links_lead_on(link):
    assert (ROOT / link).exists()
