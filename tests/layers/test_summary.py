"""The summary's numbers, counted by hand."""

import tracemalloc

import numpy as np
import pytest

from minicnn import (
    AdaptiveAvgPool2d,
    AvgPool2d,
    Conv2d,
    ConvTranspose2d,
    Flatten,
    Linear,
    MaxPool2d,
    ReLU,
    Residual,
    Sequential,
)
from minicnn.models import mnist_cnn, vgg_small


def test_reference_network_by_hand():
    summary = mnist_cnn().summary((1, 28, 28), batch_size=2)
    rows = {row.name: row for row in summary.layers}
    assert [row.output_shape for row in summary.layers] == [
        (2, 32, 24, 24),
        (2, 32, 24, 24),
        (2, 32, 12, 12),
        (2, 64, 8, 8),
        (2, 64, 8, 8),
        (2, 64, 4, 4),
        (2, 1024),
        (2, 128),
        (2, 128),
        (2, 10),
    ]
    assert rows["0"].formula == "floor((28+0+0-5)/1)+1 = 24"
    assert [rows[i].params for i in "0379"] == [832, 51264, 131200, 1290]
    assert summary.params == 184586
    assert rows["0"].macs == 2 * 32 * 24 * 24 * 25
    assert rows["3"].macs == 2 * 64 * 8 * 8 * 32 * 25
    assert rows["7"].macs == 2 * 1024 * 128
    assert rows["3"].im2col == 32 * 25 * 2 * 8 * 8
    assert summary.im2col_bytes == 4 * rows["3"].im2col
    assert [str(row.field) for row in summary.layers][:6] == [
        "5x5", "5x5", "6x6", "14x14", "14x14", "16x16",
    ]  # fmt: skip
    assert str(rows["7"].field) == "all"
    text = str(summary)
    assert "2x64x8x8" in text
    assert "184,586 parameters" in text
    assert "<table>" in summary._repr_html_()


@pytest.mark.parametrize(
    ("model", "shape", "batch"),
    [
        (mnist_cnn(rng=0), (1, 28, 28), 64),
        (mnist_cnn(rng=0), (1, 28, 28), 256),
        (vgg_small(rng=0), (3, 32, 32), 16),
        (Sequential(Flatten(), Linear(784, 999, rng=0), ReLU(), Linear(999, 5)), (784,), 512),
    ],
)
def test_the_peak_of_a_training_step_is_about_what_is_measured(model, shape, batch):
    x = np.random.default_rng(0).random((batch, *shape), np.float32)
    tracemalloc.start()
    try:
        y, caches = model.forward(x)
        model.backward(np.ones_like(y), caches)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    peak += x.nbytes + sum(p.nbytes + g.nbytes for _, p, g in model.named_params())
    assert 0.75 < peak / model.summary(shape, batch).training_bytes < 1.3


def test_receptive_field_measured_by_gradients():
    """The input pixels with a gradient from one output are as many as the summary says."""
    model = Sequential(
        Conv2d(1, 1, 3, stride=2, dilation=2, rng=0, dtype=np.float64),
        AvgPool2d(2, stride=1),
        Conv2d(1, 1, (2, 3), rng=1, dtype=np.float64),
    )
    x = np.random.default_rng(0).standard_normal((1, 1, 31, 31))
    y, caches = model.forward(x)
    dy = np.zeros_like(y)
    dy[0, 0, 2, 2] = 1
    rows, columns = np.nonzero(model.backward(dy, caches)[0, 0])
    field = model.summary((1, 31, 31)).layers[-1].field
    assert field.size == (np.ptp(rows) + 1, np.ptp(columns) + 1)


def test_nested_names_and_a_residual_block():
    block = Residual(Sequential(Conv2d(3, 8, 3, 2, 1), ReLU()), Conv2d(3, 8, 1, 2))
    model = Sequential(block, AdaptiveAvgPool2d(1), Flatten(), Linear(8, 2))
    summary = model.summary((3, 16, 16))
    assert [row.name for row in summary.layers] == [
        "0.body.0", "0.body.1", "0.shortcut", "0", "1", "2", "3",
    ]  # fmt: skip
    assert summary.layers[3].output_shape == (1, 8, 8, 8)
    assert str(summary.layers[4].field) == "all"
    assert summary.params == sum(p.size for _, p, _ in model.named_params())


def test_fields_of_shortcuts_transposed_convolutions_and_grids():
    def field(*layers):
        return str(Sequential(*layers).summary((1, 24, 24)).layers[-1].field)

    assert field(Residual(Conv2d(1, 1, 1), Conv2d(1, 1, 5, padding=2))) == "5x5"
    assert field(Conv2d(1, 1, 3), ConvTranspose2d(1, 1, 4, 2)) == "4x4"
    assert field(ConvTranspose2d(1, 1, 2, 2), Conv2d(1, 1, 3)) == "2x2"
    assert field(AdaptiveAvgPool2d((12, 5))) == "2x6"


def test_a_layer_in_two_places_counts_once():
    layer = Linear(3, 3)
    assert Sequential(layer, ReLU(), layer).summary((3,)).params == 12


def test_the_formula_says_when_a_window_is_dropped():
    row = MaxPool2d(2, 4, 1, ceil_mode=True).summary((1, 3, 3)).layers[0]
    assert row.formula == "ceil((3+1+1-2)/4)+1 - 1 in the padding = 1"
    row = MaxPool2d(2, 2, ceil_mode=True).summary((1, 5, 5)).layers[0]
    assert row.formula == "ceil((5+0+0-2)/2)+1 = 3"


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: ReLU().summary((3, 6.5)), TypeError, "summary: input_shape: .* got 6.5"),
        (lambda: ReLU().summary((3,), batch_size=0), ValueError, "summary: batch_size: .* got 0"),
        (lambda: Flatten(2, 1).summary((3, 4)), ValueError, "Flatten: start_dim, end_dim"),
        (
            lambda: ConvTranspose2d(1, 1, 1, padding=5).summary((1, 3, 3)),
            ValueError,
            "ConvTranspose2d: padding: expected to leave some output, got -7x-7",
        ),
    ],
)
def test_shapes_that_do_not_fit_are_named(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_sizes_beyond_64_bits_do_not_wrap():
    summary = Sequential(Linear(2**10, 2**10), ReLU()).summary((2**31, 2**31, 2**10))
    assert summary.macs == 2**82
    assert summary.activation_bytes == 2 * 4 * 2**72


def test_transposed_convolution():
    layer = ConvTranspose2d(4, 2, 3, stride=2, padding=1, output_padding=1)
    (row,) = layer.summary((4, 5, 7)).layers
    assert row.output_shape == (1, 2, 10, 14)
    assert row.macs == 4 * 5 * 7 * 2 * 9
