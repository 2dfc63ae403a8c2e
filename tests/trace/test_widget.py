"""Edits of the live view: what they change, and that the first order predicts an SGD step."""

import numpy as np
import pytest

import minicnn as m
from minicnn.trace.widget import Edits


def build():
    model = m.Sequential(
        m.Conv2d(1, 2, 3, rng=1, dtype="f8"),
        m.Tanh(),
        m.Flatten(),
        m.Dropout(0.5, rng=4),
        m.Linear(32, 3, rng=2, dtype="f8"),
    )
    x = np.random.default_rng(0).normal(size=(2, 1, 6, 6))
    return model, m.trace(model, x, [1, 0])


def test_sgd_step_goes_as_predicted():
    _, t = build()
    edits = Edits(t)
    norm = sum(float((g**2).sum()) for n in ("0", "4") for g in t.backward(n).grads.values())
    edits.handle({"type": "sgd", "lr": 1e-5})
    # Dropout keeps its mask, else the loss would jump.
    assert edits.trace.loss - t.loss == pytest.approx(-1e-5 * norm, rel=1e-3)
    assert f"{-1e-5 * norm:.4g}" in edits.message


def test_a_pixel_changes_the_loss_as_its_gradient_says():
    _, t = build()
    edits = Edits(t)
    x = t.x[0, 0, 2, 3]
    edits.handle(
        {"type": "set", "name": "0", "letter": "x", "index": [0, 0, 2, 3], "value": x + 1e-6}
    )
    slope = (edits.trace.loss - t.loss) / 1e-6
    assert slope == pytest.approx(t.backward("0").outputs["dx"][0, 0, 2, 3], rel=1e-4)
    assert t.x[0, 0, 2, 3] == x


def test_what_cannot_be_leaves_all_as_it_was():
    model, t = build()
    edits = Edits(t)
    edits.handle({"type": "option", "name": "0", "option": "stride", "value": 2})
    assert edits.failed
    assert "features" in edits.message or "expected" in edits.message
    assert edits.trace is t
    assert model[0].options["stride"] == 1


def test_widget_answers_messages():
    pytest.importorskip("anywidget", reason="needs anywidget (pip install '.[notebooks]')")
    _, t = build()
    w = t.widget()
    w._on_change(w, {"type": "set", "name": "4", "letter": "b", "index": [1], "value": 3.0}, [])
    assert w.data["loss"] == w.edits.trace.loss != t.loss
