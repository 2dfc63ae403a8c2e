"""The optimisers' updates in a recorded step are, to the last bit, those of `Optimizer.step`."""

import numpy as np
import pytest

from gpu_networks import OPTIMIZERS
from minicnn import Linear, to_cpu, to_gpu
from minicnn.gpu import update


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_it_moves_as_step_does_or_not_at_all(cupy, optimizer, dtype):
    pair = [to_gpu(Linear(5, 4, rng=0, dtype=dtype)) for _ in range(2)]
    plain, recorded = (OPTIMIZERS[optimizer](model) for model in pair)
    rng, rates = np.random.default_rng(0), {np.dtype(dtype): cupy.zeros(update.RATES, dtype)}
    for step in range(5):
        grads = {name: rng.standard_normal(p.shape) for name, p, _ in pair[0].named_params()}
        for model in pair:
            for name, _, g in model.named_params():
                g[...] = to_gpu(grads[name].astype(dtype))
        go = step != 2
        if go:
            plain.step()
            recorded.step_count += 1
        numbers = [go, *update.RULES[type(recorded)](recorded)]
        rates[np.dtype(dtype)].set(np.array(numbers, dtype))
        for key, move in update.moves(recorded, [g for _, _, g in pair[1].named_params()]).items():
            move(rates[key])
        for a, b in (
            (pair[0].state_dict(), pair[1].state_dict()),
            (plain.state_dict(), recorded.state_dict()),
        ):
            for name in a:
                np.testing.assert_array_equal(to_cpu(a[name]), to_cpu(b[name]), err_msg=name)
