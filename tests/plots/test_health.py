"""How training is going: the numbers behind the pictures, and the pictures."""

import numpy as np
import pytest

from figures import assert_legible
from minicnn import BatchNorm2d, Conv2d, Flatten, Linear, ReLU, Sequential, Trainer, gradcheck, ops
from minicnn.optim import SGD
from minicnn.plots import (
    THEMES,
    LivePlot,
    UpdateRatio,
    dead_relus,
    gradient_flow,
    loss_landscape,
    plot_dead_relus,
    plot_gradient_flow,
    plot_loss_landscape,
    plot_steps,
    plot_update_ratio,
)

X = np.random.default_rng(0).random((8, 1, 6, 6)).astype("f4")
Y = np.arange(8) % 3


def network():
    return Sequential(
        Conv2d(1, 4, 3, rng=0), BatchNorm2d(4), ReLU(), Flatten(), Linear(64, 3, rng=1)
    )


def report(steps=True):
    pair = ops.tanh_forward, ops.tanh_backward
    right = gradcheck(pair, X[0, 0].astype("f8"), steps=steps)
    wrong = gradcheck((pair[0], lambda dy, c: 1.1 * pair[1](dy, c)), X[0, 0].astype("f8"))
    return right._replace(checks=right.checks + wrong.checks if steps else right.checks)


def trained(epochs=2):
    """A live plot and the update ratios of a short run."""
    model, live, ratios = network(), LivePlot(), UpdateRatio()
    trainer = Trainer(model, SGD(model, lr=0.1))
    trainer.fit((X, Y), (X, Y), epochs=epochs, batch_size=2, callbacks=[live, ratios])
    return live, ratios, trainer


def live_figure(theme):
    live, _, _ = trained()
    drawn = LivePlot(theme=theme)
    drawn.losses, drawn.epochs = live.losses, live.epochs
    return drawn.figure()


FIGURES = {
    "gradient flow": lambda t: plot_gradient_flow(network(), X, Y, theme=t),
    "update ratio": lambda t: plot_update_ratio({"a": [0.01, 0.02], "b": [1e-4, 1e-5]}, theme=t),
    "dead ReLUs": lambda t: plot_dead_relus(network(), X, theme=t),
    "landscape": lambda t: plot_loss_landscape(network(), X, Y, points=5, theme=t),
    "steps": lambda t: plot_steps(report(), theme=t),
    "live": live_figure,
    "live before the first step": lambda t: LivePlot(theme=t).figure(),
}


@pytest.mark.filterwarnings("ignore:No artists with labels:UserWarning")
@pytest.mark.parametrize("theme", THEMES)
@pytest.mark.parametrize("name", FIGURES)
def test_texts_are_inside_apart_and_legible(name, theme):
    assert_legible(FIGURES[name](theme), theme)


@pytest.mark.parametrize("name", FIGURES)
def test_an_unknown_theme_is_refused(name):
    with pytest.raises(ValueError, match="theme: expected one of light, dark, got 'blue'"):
        FIGURES[name]("blue")


def test_gradient_flow_is_the_size_of_each_gradient_and_changes_nothing():
    model = network()
    model[2].eval()
    for _, _, g in model.named_params():
        g[...] = 5
    before = model.state_dict()
    found = gradient_flow(model, X, Y)
    assert [layer.training for layer in model] == [True, True, False, True, True]
    assert all((g == 5).all() for _, _, g in model.named_params())
    for name, a in model.state_dict().items():
        np.testing.assert_array_equal(a, before[name], name)

    model.train()
    model.zero_grad()
    y, caches = model.forward(X)
    loss, cache = ops.cross_entropy_forward(y, Y)
    model.backward(ops.cross_entropy_backward(np.ones_like(loss), cache), caches)
    assert list(found) == ["0.weight", "4.weight"]
    for name, _, g in model.named_params():
        if name in found:
            np.testing.assert_allclose(found[name], np.sqrt(np.mean(g.astype("f8") ** 2)), 1e-4)


def test_bars_are_as_long_as_their_numbers():
    figure = plot_gradient_flow(network(), X, Y)
    (ax,) = figure.axes
    found = gradient_flow(network(), X, Y)
    np.testing.assert_allclose([bar.get_width() for bar in ax.patches], list(found.values()))
    assert [label.get_text() for label in ax.get_yticklabels()] == list(found)
    assert ax.yaxis_inverted(), "the first layer is at the top"


def test_update_ratios_of_known_steps():
    class Stub:
        model = Sequential(Linear(2, 2, rng=0, dtype="f8"))

    layer = Stub.model[0]
    layer.weight = np.full((2, 2), 2.0)
    watch = UpdateRatio()
    watch.on_step(Stub, 0.0)
    layer.params["weight"] -= 0.02
    watch.on_step(Stub, 0.0)
    layer.params["weight"] -= 0.198
    watch.on_step(Stub, 0.0)
    assert list(watch.ratios) == ["0.weight"], "biases are left out"
    np.testing.assert_allclose(watch.ratios["0.weight"], [0.01, 0.1])


def test_update_ratios_of_a_run():
    _, watch, trainer = trained(epochs=2)
    assert {len(values) for values in watch.ratios.values()} == {trainer.optimizer.step_count - 1}
    (ax,) = plot_update_ratio(watch.ratios).axes
    for line, values in zip(ax.lines, watch.ratios.values()):
        np.testing.assert_array_equal(line.get_ydata(), values)
    with pytest.raises(ValueError, match="ratios: expected at least one step, got none"):
        plot_update_ratio({})


def test_dead_units_are_zero_for_every_picture():
    model = Sequential(Conv2d(1, 4, 1, rng=0), ReLU(), Flatten(), Linear(144, 5, rng=0), ReLU())
    model[0].weight = np.array([1, -1, 1, -1]).reshape(4, 1, 1, 1)
    model[0].bias = np.array([0, -1, -0.999, 2])
    model[3].weight = np.zeros((5, 144))
    model[3].bias = np.array([1, -1, -1, -1, 1])
    x = X.copy()
    x[3, 0, 2, 2] = 1  # a single pixel keeps channel 2 alive
    assert dead_relus(model, x) == {"1": 0.25, "4": 0.6}
    with pytest.raises(ValueError, match="model: expected a ReLU, got none"):
        plot_dead_relus(model[:1], x)


def test_the_landscape_has_the_loss_in_the_middle_and_leaves_the_weights():
    model = network()
    before = model.state_dict()
    found = loss_landscape(model, X, Y, points=5, span=0.5)
    for name, a in model.state_dict().items():
        np.testing.assert_array_equal(a, before[name])
    here = float(ops.cross_entropy_forward(model(X), Y)[0])
    np.testing.assert_allclose(found[2, 2], here, rtol=1e-6)
    assert found.shape == (5, 5)
    assert len(np.unique(found)) == 25
    np.testing.assert_array_equal(loss_landscape(model, X, Y, points=5, span=0.5), found)
    assert not np.allclose(loss_landscape(model, X, Y, points=5, span=0.5, rng=1), found)


def test_directions_are_as_long_as_the_filters():
    """At span 1 a step along one direction moves each filter by its own length."""
    model = Sequential(Flatten(), Linear(36, 3, rng=0, dtype="f8"))
    seen = []

    def forward(outputs, targets):
        seen.append(model[1].weight.copy())
        return 0.0, None

    loss_landscape(model, X.astype("f8"), Y, (forward, None), points=3)
    weight, moved = seen[4], seen[5]
    lengths = np.linalg.norm(weight, axis=1)
    np.testing.assert_allclose(np.linalg.norm(moved - weight, axis=1), lengths)


def test_an_error_on_the_way_puts_the_weights_back():
    model = network()
    before = model.state_dict()

    def forward(outputs, targets):
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        loss_landscape(model, X, Y, (forward, None))
    for name, a in model.state_dict().items():
        np.testing.assert_array_equal(a, before[name])


def test_steps_are_drawn_as_they_were_measured():
    found = report()
    (ax,) = plot_steps(found).axes
    assert (ax.get_xscale(), ax.get_yscale()) == ("log", "log")
    for line, check, colour in zip(ax.lines, found.checks, ("blue", "orange")):
        np.testing.assert_array_equal(line.get_xdata(), [s.step for s in check.steps])
        np.testing.assert_allclose(line.get_ydata(), [max(s.error, 1e-17) for s in check.steps])
        assert line.get_color() == getattr(THEMES["light"], colour)
    with pytest.raises(ValueError, match="report: expected one with steps"):
        plot_steps(report(steps=False))


# ------------------------------------------------------------ live


def test_the_live_plot_keeps_every_loss_and_every_epoch():
    live, _, trainer = trained(epochs=3)
    assert len(live.losses) == trainer.optimizer.step_count == 12
    assert [step for step, _ in live.epochs] == [4, 8, 12]
    loss, accuracy = live.figure().axes
    np.testing.assert_array_equal(loss.lines[0].get_ydata(), live.losses)
    np.testing.assert_allclose(
        loss.lines[2].get_ydata(), [record["test_loss"] for record in trainer.history]
    )
    for line, part in zip(accuracy.lines, ("train", "test")):
        expected = [record[f"{part}_accuracy"] for record in trainer.history]
        np.testing.assert_allclose(line.get_ydata(), expected)
    smoothed = loss.lines[1].get_ydata()
    assert smoothed[0] == pytest.approx(live.losses[0])
    assert np.ptp(smoothed) < np.ptp(live.losses)


def test_in_a_notebook_one_output_is_updated(monkeypatch):
    ipython = pytest.importorskip("IPython.display", reason="IPython is not installed")
    shown = []

    class Handle:
        def update(self, picture):
            shown.append(picture)

    def display(picture, display_id):
        assert display_id
        shown.append(picture)
        return Handle()

    monkeypatch.setattr(ipython, "display", display)
    monkeypatch.setitem(__import__("sys").modules, "ipykernel", object())
    live = LivePlot(seconds=0)
    live.on_step(None, 1.0)
    live.on_step(None, 0.5)
    live.on_epoch(None, {"epoch": 1, "train_accuracy": 0.5, "test_loss": 0.4, "test_accuracy": 0.6})
    assert len(shown) == 3
    assert all(picture.data.startswith(b"\x89PNG") for picture in shown)
    rare = LivePlot(seconds=3600)
    shown.clear()
    for _ in range(5):
        rare.on_step(None, 1.0)
    assert len(shown) == 1, "at most one in that time"


def test_outside_of_a_notebook_nothing_is_shown(capsys):
    trained(epochs=1)
    assert "PNG" not in capsys.readouterr().out
