"""Pictures: what they show is read back from the figures, and nothing lies outside or overlaps."""

import subprocess
import sys

import numpy as np
import pytest
from matplotlib.colors import to_rgb

from figures import assert_legible
from minicnn.plots import (
    THEMES,
    confusion_matrix,
    plot_confusion,
    plot_filters,
    plot_history,
    plot_mistakes,
)

DIGITS = tuple("0123456789")
LONG = ("T-shirt/top", "$x_{$", "a very long name of a class", "Ankle boot", "Ähre")


def history(n, gap=0.02):
    losses = [1.2 / epoch for epoch in range(1, n + 1)]
    return [
        {
            "epoch": i + 1,
            "train_loss": loss,
            "test_loss": loss + gap,
            "train_accuracy": 1 - loss / 4,
            "test_accuracy": 1 - (loss + gap) / 4,
        }
        for i, loss in enumerate(losses)
    ]


def guesses(n, classes, wrong, seed=0):
    """Labels, and predictions of which about the share `wrong` is wrong."""
    rng = np.random.default_rng(seed)
    y = rng.integers(0, classes, n)
    return y, np.where(rng.random(n) < wrong, rng.integers(0, classes, n), y)


def pictures(n, channels=1, size=(28, 28), classes=10, seed=0):
    """Pictures, labels and probabilities that are as good as chance."""
    rng = np.random.default_rng(seed)
    x = rng.random((n, channels, *size), np.float32)
    return x, rng.integers(0, classes, n), rng.dirichlet(np.full(classes, 0.1), n)


FIGURES = {
    "history of 10": lambda theme: plot_history(history(10), theme=theme),
    "history of 1": lambda theme: plot_history(history(1), theme=theme),
    "history of 200": lambda theme: plot_history(history(200, 1e-5), theme=theme),
    "confusion of digits": lambda t: plot_confusion(*guesses(999, 10, 0.1), DIGITS, theme=t),
    "confusion of names": lambda t: plot_confusion(*guesses(9999, 5, 0.5), LONG, theme=t),
    "confusion of 1": lambda t: plot_confusion([0], [0], ["one"], theme=t),
    "confusion of 100": lambda t: plot_confusion(
        *guesses(3000, 100, 0.2), [f"class {i}" for i in range(100)], theme=t
    ),
    "filters": lambda t: plot_filters(np.random.default_rng(0).normal(size=(32, 1, 5, 5)), theme=t),
    "RGB filters": lambda t: plot_filters(np.ones((7, 3, 3, 3)), theme=t),
    "1x1 filter": lambda t: plot_filters(np.ones((1, 1, 1, 1)), theme=t),
    "mistakes": lambda t: plot_mistakes(*pictures(100), DIGITS, theme=t),
    "RGB mistakes": lambda t: plot_mistakes(*pictures(40, 3, (20, 36), 5), LONG, theme=t),
    "few mistakes": lambda t: plot_mistakes(*pictures(3), DIGITS, theme=t),
    "no mistake": lambda t: plot_mistakes(*pictures(0), DIGITS, theme=t),
}


@pytest.mark.parametrize("theme", THEMES)
@pytest.mark.parametrize("name", FIGURES)
def test_texts_are_inside_apart_and_legible(name, theme):
    assert_legible(FIGURES[name](theme), theme)


@pytest.mark.parametrize("name", FIGURES)
def test_an_unknown_theme_is_refused(name):
    with pytest.raises(ValueError, match="theme: expected one of light, dark, got 'blue'"):
        FIGURES[name]("blue")


def test_pyplot_is_left_alone():
    code = """
import io, sys
from minicnn.plots import plot_history
assert "matplotlib" not in sys.modules
plot_history([{"epoch": 1, "train_loss": 1.0}]).savefig(io.BytesIO())
assert "matplotlib" in sys.modules and "matplotlib.pyplot" not in sys.modules
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


# ------------------------------------------------------------ curves


def test_curves_show_the_history():
    records = history(5)
    for ax, what in zip(plot_history(records).axes, ("loss", "accuracy")):
        assert ax.get_title() == what
        for line, part in zip(ax.lines, ("train", "test")):
            np.testing.assert_array_equal(line.get_xdata(), [1, 2, 3, 4, 5])
            values = [record[f"{part}_{what}"] for record in records]
            np.testing.assert_array_equal(line.get_ydata(), values)


def test_the_last_values_stand_beside_the_curves():
    loss, accuracy = plot_history(history(10)).axes
    assert {text.get_text() for text in loss.texts} == {"train 0.1200", "test 0.1400"}
    assert {text.get_text() for text in accuracy.texts} == {"train 97.00%", "test 96.50%"}
    for ax in (loss, accuracy):
        by_part = {line.get_color(): line.get_ydata()[-1] for line in ax.lines}
        for text in ax.texts:
            assert text.xy == (10, by_part[text.get_color()])


def test_equal_curves_have_labels_apart():
    figure = plot_history(history(3, gap=0.0))
    figure.draw_without_rendering()
    for ax in figure.axes:
        a, b = (text.get_window_extent() for text in ax.texts)
        assert not a.overlaps(b)


@pytest.mark.parametrize("missing", [float("nan"), None])
def test_a_curve_without_values_has_no_label(missing):
    records = [record | {"test_loss": missing, "test_accuracy": missing} for record in history(3)]
    for record in records:
        del record["train_accuracy"]
    loss, accuracy = plot_history(records).axes
    assert [text.get_text() for text in loss.texts] == ["train 0.4000"]
    assert not accuracy.texts


def test_the_label_stands_at_the_last_value_there_is():
    records = history(3)
    records[2]["test_loss"] = float("nan")
    (label,) = (t for t in plot_history(records).axes[0].texts if t.get_text().startswith("test"))
    assert label.get_text() == "test 0.6200"
    assert label.xy == (2, 0.62)


def test_a_loss_of_zero_is_drawn_on_a_linear_scale():
    assert plot_history(history(3)).axes[0].get_yscale() == "log"
    figure = plot_history([*history(3), {"epoch": 4, "train_loss": 0.0, "test_loss": 0.1}])
    assert figure.axes[0].get_yscale() == "linear"


def test_no_history_is_refused():
    with pytest.raises(ValueError, match="history: expected at least one record"):
        plot_history([])


# ------------------------------------------------------------ confusion matrix


def test_confusion_matrix_counts():
    counts = confusion_matrix(np.array([0, 0, 2, 2, 2]), np.array([0, 1, 2, 2, 0]), 3)
    assert counts.tolist() == [[1, 1, 0], [0, 0, 0], [1, 0, 2]]


def test_counts_stand_in_their_cells():
    y, predicted = guesses(500, 10, 0.2)
    (ax,) = plot_confusion(y, predicted, DIGITS).axes
    counts = confusion_matrix(y, predicted, 10)
    texts = {text.get_position(): text.get_text() for text in ax.texts}
    for i, row in enumerate(counts):
        for j, count in enumerate(row):
            assert texts.pop((j, i), "0") == str(count)
        assert texts.pop((9.65, i)) == f"{row[i] / row.sum():.1%}"
    assert not texts
    right = np.trace(counts)
    assert ax.get_title() == f"{right} of 500 right ({right / 500:.2%})"
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("predicted", "true")


def test_large_counts_fit_their_cells():
    y = np.zeros(61_000, int)
    (ax,) = plot_confusion(y, y, DIGITS).axes
    assert "61k" in {text.get_text() for text in ax.texts}
    assert "none" in {text.get_text() for text in ax.texts}


@pytest.mark.parametrize("theme", THEMES)
def test_a_single_mistake_among_thousands_is_seen(theme):
    y = np.repeat(np.arange(10), 5000)
    predicted = y.copy()
    predicted[0] = 7
    (ax,) = plot_confusion(y, predicted, DIGITS, theme=theme).axes
    cells = ax.images[0].get_array()
    colours = THEMES[theme]
    np.testing.assert_allclose(cells[0, 7], to_rgb(colours.orange), atol=1e-6)
    np.testing.assert_allclose(cells[3, 3], to_rgb(colours.blue), atol=1e-6)
    np.testing.assert_allclose(cells[7, 0], to_rgb(colours.paper), atol=1e-6)


def test_more_mistakes_are_a_stronger_orange():
    y = np.zeros(103, int)
    predicted = np.repeat([0, 1, 2, 3], [88, 1, 4, 10])
    cells = plot_confusion(y, predicted, DIGITS).axes[0].images[0].get_array()
    far_from_paper = np.abs(cells[0] - to_rgb(THEMES["light"].paper)).sum(axis=1)
    assert far_from_paper[1] > 0.3  # the logarithm lifts even one
    assert (np.diff(far_from_paper[1:4]) > 0.1).all()


def test_every_class_has_a_name_and_many_have_room():
    (few,) = plot_confusion(*guesses(50, 5, 0.5), LONG).axes
    names = [label.get_text() for label in few.get_yticklabels()]
    assert names == ["T-shirt/top", "$x_{$", "a very long n…", "Ankle boot", "Ähre"]
    (many,) = plot_confusion(*guesses(500, 90, 0.5), [str(i) for i in range(90)]).axes
    assert [label.get_text() for label in many.get_xticklabels()] == [
        str(i) for i in range(0, 90, 3)
    ]
    assert not many.texts


def test_nothing_to_count():
    (ax,) = plot_confusion(np.zeros(0, int), np.zeros(0, int), DIGITS).axes
    assert ax.get_title() == "0 of 0 right"


@pytest.mark.parametrize(
    ("y", "predicted", "error", "message"),
    [
        ([0, 3], [0, 0], ValueError, "y: expected labels 0 to 2, got 3 at position 1"),
        ([0, 1], [0, -1], ValueError, "predicted: expected labels 0 to 2, got -1 at position 1"),
        ([0, 1], [0], ValueError, r"predicted: expected shape \(2,\)"),
        ([0.0, 1.0], [0, 1], TypeError, "y: expected integer labels, got float64"),
        ([[0, 1]], [0, 1], ValueError, "y: expected 1 axes"),
    ],
)
def test_bad_labels(y, predicted, error, message):
    with pytest.raises(error, match=message):
        plot_confusion(np.array(y), np.array(predicted), "abc")


# ------------------------------------------------------------ filters


def weights_in(sheet, columns, shape):
    """Read the weights back from the middle of the square that each of them has."""
    _, C, KH, KW = shape
    plane_h, plane_w = 8 * KH + 4, 8 * KW + 1
    out = np.empty(shape)
    for f, c, i, j in np.ndindex(shape):
        row = (f // columns) * plane_h + 2 + 8 * i + 4
        column = (f % columns) * (C * plane_w + 3) + 2 + c * plane_w + 8 * j + 4
        out[f, c, i, j] = sheet[row, column]
    return out


@pytest.mark.parametrize(
    ("shape", "columns"), [((32, 1, 5, 5), 8), ((7, 3, 3, 3), 2), ((6, 2, 2, 5), 2)]
)
def test_every_weight_is_in_its_place(shape, columns):
    weight = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    sheet = plot_filters(weight).axes[0].images[0].get_array().filled(np.nan)
    np.testing.assert_array_equal(weights_in(sheet, columns, shape), weight)


def test_one_signed_scale_for_all():
    weight = np.zeros((4, 1, 3, 3))
    weight[2, 0, 1, 1] = -5
    weight[3, 0, 0, 0] = 1
    figure = plot_filters(weight)
    (image,) = figure.axes[0].images
    assert image.get_clim() == (-5, 5)
    colours = THEMES["light"]
    for value, colour in ((-5, colours.blue), (0, colours.paper), (5, colours.orange)):
        assert np.abs(np.subtract(image.to_rgba(value)[:3], to_rgb(colour))).max() < 0.01
    assert len(figure.axes) == 2  # with the bar


def test_what_is_not_finite_is_gray_and_does_not_spoil_the_scale():
    weight = np.array([1.0, -2.0, np.nan, np.inf, -np.inf, 0.0]).reshape(1, 1, 2, 3)
    (image,) = plot_filters(weight).axes[0].images
    assert image.get_clim() == (-2, 2)
    seen = weights_in(image.get_array().filled(np.nan), 1, weight.shape)
    np.testing.assert_array_equal(seen.ravel(), [1, -2, np.nan, np.nan, np.nan, 0])
    faint = to_rgb(THEMES["light"].faint)
    np.testing.assert_allclose(image.get_cmap()(np.ma.masked)[:3], faint, atol=1e-6)


@pytest.mark.parametrize("value", [0.0, np.nan])
def test_filters_without_a_scale(value):
    (image,) = plot_filters(np.full((2, 1, 3, 3), value)).axes[0].images
    assert image.get_clim() == (-1, 1)


def test_bad_filters():
    with pytest.raises(ValueError, match=r"weight: expected 4 axes \(F, C, KH, KW\)"):
        plot_filters(np.ones((3, 3)))
    with pytest.raises(ValueError, match="weight: expected filters"):
        plot_filters(np.ones((0, 1, 3, 3)))


# ------------------------------------------------------------ mistakes


def test_the_surest_mistakes_come_first():
    x, y, probabilities = pictures(200)
    figure = plot_mistakes(x, y, probabilities, DIGITS, n=10)
    predicted, sure = probabilities.argmax(axis=1), probabilities.max(axis=1)
    wrong = [i for i in np.argsort(-sure, kind="stable") if predicted[i] != y[i]]
    assert len(figure.axes) == 10
    for ax, i in zip(figure.axes, wrong):
        np.testing.assert_array_equal(ax.images[0].get_array(), x[i, 0])
        assert ax.get_title() == str(y[i])
        assert ax.get_xlabel() == f"{predicted[i]}  {sure[i]:.0%}"
    title = figure.get_suptitle()
    assert title.startswith(f"The 10 surest of {len(wrong)} mistakes in 200 pictures\n")


def test_all_mistakes_if_there_are_few():
    x, y, _ = pictures(50)
    probabilities = np.eye(10)[y]
    probabilities[7] = np.roll(probabilities[7], 1)
    figure = plot_mistakes(x, y, probabilities, DIGITS)
    assert len(figure.axes) == 1
    assert figure.get_suptitle().startswith("1 mistake in 50 pictures\n")


def test_no_mistake_says_so():
    x, y, _ = pictures(1234)
    figure = plot_mistakes(x, y, np.eye(10)[y], DIGITS)
    assert not figure.axes
    assert figure.get_suptitle() == "No mistake in 1,234 pictures"


def test_colours_stay_and_gray_is_not_stretched(caplog):
    x, y, probabilities = pictures(30, channels=3)
    x[...] = np.array([0.9, 0.5, 1.2]).reshape(1, 3, 1, 1)
    shown = plot_mistakes(x, y, probabilities, DIGITS).axes[0].images[0].get_array()
    np.testing.assert_allclose(shown[3, 4], [0.9, 0.5, 1.0], atol=1e-6)
    assert not caplog.records  # Matplotlib logs what it has to clip
    gray = plot_mistakes(x[:, :1], y, probabilities, DIGITS).axes[0].images[0]
    assert gray.get_clim() == (0, 1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": np.zeros((5, 2, 4, 4))}, "x: expected 1 or 3 channels, got 2"),
        ({"x": np.zeros((5, 4, 4))}, "x: expected 4 axes"),
        ({"y": np.zeros(4, int)}, r"y: expected shape \(5,\)"),
        ({"y": np.full(5, 9)}, "y: expected labels 0 to 2, got 9 at position 0"),
        ({"probabilities": np.zeros((5, 4))}, r"probabilities: expected shape \(5, 3\)"),
        ({"n": 0}, "n: expected an integer >= 1, got 0"),
    ],
)
def test_bad_mistakes(change, message):
    x, y, probabilities = pictures(5, classes=3)
    good = {"x": x, "y": y, "probabilities": probabilities, "classes": "abc", "n": 2}
    with pytest.raises(ValueError, match=message):
        plot_mistakes(**(good | change))
