"""Batches depend on seed, epoch and number only."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from minicnn.data import Augment, Batches, Dataset


def pair(n):
    """Samples that can be told apart, with their number as label."""
    return np.arange(n * 4, dtype=np.float32).reshape(n, 1, 2, 2), np.arange(n)


def same(a, b):
    a, b = list(a), list(b)
    return len(a) == len(b) and all(
        np.array_equal(x, u) and np.array_equal(y, v) for (x, y), (u, v) in zip(a, b, strict=True)
    )


@given(
    n=st.integers(0, 20),
    batch_size=st.integers(1, 25),
    shuffle=st.booleans(),
    drop_last=st.booleans(),
    seed=st.integers(0, 2**70),
    epoch=st.integers(0, 3),
)
def test_every_sample_once(n, batch_size, shuffle, drop_last, seed, epoch):
    if drop_last and 0 < n < batch_size:
        batch_size = n
    x, y = pair(n)
    batches = Batches((x, y), batch_size, shuffle=shuffle, seed=seed, drop_last=drop_last)
    got = list(batches.epoch(epoch))
    assert len(got) == len(batches) == (n // batch_size if drop_last else -(-n // batch_size))
    assert all(len(b) == batch_size for _, b in got[:-1])
    seen = np.concatenate([b for _, b in got] or [y[:0]])
    assert len(set(seen.tolist())) == len(seen) == (len(batches) * batch_size if drop_last else n)
    for a, b in got:
        np.testing.assert_array_equal(a, x[b])
    if not shuffle:
        assert seen.tolist() == list(range(len(seen)))


@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize("augment", [None, Augment(shift=1, rotate=20, noise=0.1)])
def test_resuming_within_an_epoch_is_bit_identical(shuffle, augment):
    kwargs = {"batch_size": 4, "shuffle": shuffle, "augment": augment, "seed": 5}
    whole = list(Batches(pair(18), **kwargs).epoch(3))
    for start in range(6):
        assert same(Batches(pair(18), **kwargs).epoch(3, start), whole[start:])


def test_order_differs_between_epochs_and_seeds():
    def order(seed, epoch):
        return np.concatenate([y for _, y in Batches(pair(50), 8, seed=seed).epoch(epoch)])

    orders = [tuple(order(seed, epoch)) for seed in range(3) for epoch in range(3)]
    assert len(set(orders)) == 9


def test_augmentation_differs_between_batches_epochs_and_seeds():
    data = np.zeros((6, 1, 2, 2), np.float32), np.zeros(6, int)
    seen = [
        x.tobytes()
        for seed in range(2)
        for epoch in range(2)
        for x, _ in Batches(data, 2, seed=seed, augment=Augment(noise=1)).epoch(epoch)
    ]
    assert len(set(seen)) == 12


def test_no_augmentation_repeats_the_numbers_that_drew_the_order():
    draws = []

    def augment(x, rng):
        draws.append(tuple(rng.permutation(9)))
        return x

    batches = Batches(pair(9), 3, augment=augment, seed=1)
    order = tuple(np.concatenate([y for _, y in batches.epoch(2)]))
    assert order not in draws
    assert len(set(draws)) == 3


def test_iteration_is_epoch_0():
    batches = Batches(pair(10), 3)
    assert same(batches, batches.epoch(0))
    assert same(batches, batches)
    assert not same(batches, batches.epoch(1))


def test_in_order_yields_views():
    x, y = pair(4)
    assert all(np.shares_memory(a, x) for a, _ in Batches((x, y), 2, shuffle=False))


def test_data_stay_as_they_are():
    x, y = pair(6)
    x.flags.writeable = y.flags.writeable = False
    augment = Augment(shift=1, flip=True, noise=1, cutout=1)
    list(Batches(Dataset(x, y, ("a",)), 4, augment=augment))


X, Y = pair(6)


def test_augmentation_in_place_spares_the_data_set():
    x = np.ones((4, 1, 2, 2), np.float32)
    batches = Batches((x, np.arange(4)), 2, shuffle=False, augment=lambda x, rng: x.__imul__(0))
    assert not any(batch.any() for batch, _ in batches)
    assert (x == 1).all()


@pytest.mark.parametrize(
    ("data", "kwargs", "error", "message"),
    [
        (X, {}, TypeError, "data: expected a Dataset or a pair .* got ndarray"),
        ((X, Y[:5]), {}, ValueError, "y: expected 6 labels, one for each sample of x, got 5"),
        ((X, list(Y)), {}, TypeError, "y: expected an array of samples, got list"),
        ((np.float32(1), Y), {}, TypeError, "x: expected an array of samples, got float32"),
        ((X, Y), {"batch_size": 0}, ValueError, "batch_size: expected an integer >= 1, got 0"),
        ((X, Y), {"batch_size": 2.0}, TypeError, "batch_size: expected an integer"),
        ((X, Y), {"seed": -1}, ValueError, "seed: expected an integer >= 0, got -1"),
        (
            (X, Y),
            {"batch_size": 7, "drop_last": True},
            ValueError,
            "batch_size: expected at most 6",
        ),
    ],
)
def test_arguments_are_checked(data, kwargs, error, message):
    with pytest.raises(error, match=f"Batches: {message}"):
        Batches(data, **kwargs)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ((-1,), "epoch: expected an integer >= 0, got -1"),
        ((0, -1), "start: expected an integer >= 0, got -1"),
        ((0, 4), "start: expected at most 3, the number of batches, got 4"),
    ],
)
def test_epoch_is_checked_before_the_first_batch(args, message):
    with pytest.raises(ValueError, match=message):
        Batches(pair(6), 2).epoch(*args)
