"""Batches whose content depends on the seed, the epoch and the batch number, and on nothing else.

There is no running random state, so training that stopped at batch i of epoch e goes on with
``epoch(e, start=i)`` and sees, to the last bit, what it would have seen.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np

from minicnn.backend import Array, array_module, is_cupy
from minicnn.data.dataset import Dataset
from minicnn.shapes import integer


class Batches:
    """Cut a data set into batches, in a new random order for each epoch.

    Parameters
    ----------
    data
        A `Dataset` or a pair (x, y) of arrays: samples (N, ...) and their targets (N, ...).
    batch_size
        Samples in a batch; the last one of an epoch may have fewer.
    shuffle
        Draw an order for each epoch, or keep the order of `data`, whose slices are then
        yielded without a copy.
    seed
        Non-negative integer that fixes all orders and augmentations.
    augment
        Function ``(x, rng) -> x`` for each batch, such as `Augment`; None for none.
    drop_last
        Leave out the last batch of an epoch if it is not full.

    Raises
    ------
    TypeError
        x or y is not an array, a number is not an integer, or `augment` no function.
    ValueError
        Lengths that differ, a number out of range, or `drop_last` that would drop everything.

    Examples
    --------
    >>> x, y = np.zeros((5, 1, 2, 2), np.float32), np.arange(5)
    >>> [len(y) for x, y in Batches((x, y), batch_size=2)]
    [2, 2, 1]
    """

    def __init__(
        self,
        data: Dataset | tuple[Array, Array],
        batch_size: int = 64,
        *,
        shuffle: bool = True,
        seed: int = 0,
        augment: Callable[[np.ndarray, np.random.Generator], np.ndarray] | None = None,
        drop_last: bool = False,
    ) -> None:
        if not isinstance(data, tuple | list) or len(data) < 2:
            raise TypeError(
                f"Batches: data: expected a Dataset or a pair (x, y), got {type(data).__name__}"
            )
        self.x: Array = data[0]
        self.y: Array = data[1]
        self.batch_size = integer("Batches", "batch_size", batch_size, 1)
        self.shuffle = shuffle
        self.seed = integer("Batches", "seed", seed, 0)
        if not (augment is None or callable(augment)):
            raise TypeError(
                f"Batches: augment: expected a function (x, rng) -> x or None, got {augment!r} "
                "(fix for text: parse_augment)"
            )
        self.augment = augment
        self.drop_last = drop_last
        for name, array in (("x", self.x), ("y", self.y)):
            if not getattr(array, "shape", ()):
                raise TypeError(
                    f"Batches: {name}: expected an array of samples, got {type(array).__name__}"
                )
        if len(self.x) != len(self.y):
            raise ValueError(
                f"Batches: y: expected {len(self.x)} labels, one for each sample of x, "
                f"got {len(self.y)}"
            )
        if drop_last and 0 < len(self.x) < self.batch_size:
            raise ValueError(
                f"Batches: batch_size: expected at most {len(self.x)}, the number of samples, "
                f"with drop_last, got {batch_size}"
            )

    def __len__(self) -> int:
        """Batches in an epoch."""
        full, rest = divmod(len(self.x), self.batch_size)
        return full + (rest > 0 and not self.drop_last)

    def __iter__(self) -> Iterator[tuple[Array, Array]]:
        """The batches of epoch 0, the same each time; use `epoch` to train."""
        return self.epoch(0)

    def epoch(self, epoch: int, start: int = 0) -> Iterator[tuple[Array, Array]]:
        """Yield the batches (x, y) of an epoch.

        Parameters
        ----------
        epoch
            Number of the epoch, from 0.
        start
            Number of the first batch to yield, 0 to len(self).
        """
        integer("Batches.epoch", "epoch", epoch, 0)
        if integer("Batches.epoch", "start", start, 0) > len(self):
            raise ValueError(
                f"Batches.epoch: start: expected at most {len(self)}, the number of batches, "
                f"got {start}"
            )
        return self._from(epoch, start)

    def _from(self, epoch: int, start: int) -> Iterator[tuple[Array, Array]]:
        order = None
        if self.shuffle:
            order = np.random.default_rng([self.seed, epoch]).permutation(len(self.x))
            # Each array by an order that lies where it does: batches are gathered there.
            x_order, y_order = (_beside(a, order) for a in (self.x, self.y))
        for i in range(start, len(self)):
            chosen = slice(i * self.batch_size, (i + 1) * self.batch_size)
            if order is None:
                x, y = self.x[chosen], self.y[chosen]
            else:
                x, y = self.x[x_order[chosen]], self.y[y_order[chosen]]
            if self.augment is not None:
                # i + 1, because [seed, epoch, 0] is the generator that drew the order:
                # NumPy fills short seeds up with zeros.
                x = x.copy() if order is None else x  # a slice is the data set itself
                x = self.augment(x, np.random.default_rng([self.seed, epoch, i + 1]))
            yield x, y


def _beside(a: Array, order: np.ndarray) -> Array:
    return array_module(a).asarray(order) if is_cupy(a) else order
