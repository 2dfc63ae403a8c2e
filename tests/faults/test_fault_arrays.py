"""Faults in arrays that concern all ops at once."""

import os
import resource
import subprocess
import sys
import threading

import numpy as np
import pytest

from minicnn import Conv2d, Linear, MaxPool2d, ops, use
from minicnn.backend import VERSIONS

RNG = np.random.default_rng(0)


def draw(*shape):
    return RNG.normal(size=shape).astype(np.float32)


X = draw(3, 4, 6, 5)
LABELS = np.array([1, 0, 3])
SHARES = RNG.random((3, 4), np.float32)

# For every op: its arrays in order, then the other arguments.
CASES = {
    "adaptive_avg_pool2d": ([X], {"output_size": (2, 3)}),
    "avg_pool2d": ([X], {"kernel_size": 3, "padding": 1}),
    "batch_norm": ([X, draw(4), draw(4)], {}),
    "bce_with_logits": ([draw(3, 4), SHARES, SHARES, SHARES], {}),
    "conv_block": ([X, draw(6, 4, 3, 3), draw(6)], {"padding": 1, "pool": 2}),
    "conv2d": ([X, draw(6, 2, 3, 3), draw(6)], {"padding": 1, "groups": 2}),
    "conv_transpose2d": ([X, draw(4, 3, 3, 3), draw(6)], {"stride": 2, "groups": 2}),
    "cross_entropy": ([draw(3, 4), LABELS, SHARES[0]], {"label_smoothing": 0.1}),
    "dropout": ([X], {"rng": 0}),
    "elu": ([X], {}),
    "flatten": ([X], {}),
    "gelu": ([X], {}),
    "group_norm": ([X], {"num_groups": 2, "w": draw(4), "b": draw(4)}),
    "l1_loss": ([draw(3, 4), draw(3, 4)], {}),
    "layer_norm": ([X], {"normalized_shape": 5, "w": draw(5), "b": draw(5)}),
    "leaky_relu": ([X], {}),
    "linear": ([draw(3, 4), draw(5, 4), draw(5)], {}),
    "log_softmax": ([draw(3, 4)], {}),
    "max_pool2d": ([X], {"kernel_size": 3, "stride": 1, "padding": 1}),
    "mse_loss": ([draw(3, 4), draw(3, 4)], {}),
    "nll_loss": ([draw(3, 4), LABELS, SHARES[0]], {}),
    "relu": ([X], {}),
    "sigmoid": ([X], {}),
    "silu": ([X], {}),
    "softmax": ([draw(3, 4)], {}),
    "softplus": ([X], {}),
    "tanh": ([X], {}),
}


def read_only(a):
    """The same values in memory that nobody may write to."""
    return np.frombuffer(a.tobytes(), a.dtype).reshape(a.shape)


def test_no_op_is_missing():
    names = {name[: -len("_forward")] for name in ops.__all__ if name.endswith("_forward")}
    assert set(CASES) == names


@pytest.mark.parametrize("version", sorted({*VERSIONS} - {"cupy"}))
@pytest.mark.parametrize("op", CASES)
def test_read_only_input_works_and_no_input_is_changed(op, version):
    """Writable copies show what would be changed, read-only ones that nothing needs to be."""
    arrays, kwargs = CASES[op]
    forward, backward = getattr(ops, f"{op}_forward"), getattr(ops, f"{op}_backward")
    results = []
    for convert in (np.copy, read_only):
        named = {k: convert(v) if isinstance(v, np.ndarray) else v for k, v in kwargs.items()}
        given = [convert(a) for a in arrays]
        with use(version):
            y, cache = forward(*given, **named)
            y = np.asarray(y)
            dy = convert(np.ones(y.shape, y.dtype) + y / 4)
            held = [*given, *(v for v in named.values() if isinstance(v, np.ndarray)), dy]
            before = [a.tobytes() for a in [*arrays, *held[len(arrays) :]]]
            kept = y.tobytes()
            grads = backward(dy, cache)
        assert [a.tobytes() for a in held] == before, "an input was changed"
        assert y.tobytes() == kept, "the backward pass changed the output"
        grads = grads if isinstance(grads, tuple) else (grads,)
        results.append([None if a is None else np.asarray(a).tobytes() for a in (y, *grads)])
    assert results[0] == results[1]


@pytest.mark.parametrize("name", ["im2col", "col2im"])
def test_read_only_columns(name):
    x = read_only(X) if name == "im2col" else read_only(draw(4 * 9, 3 * 4 * 3))
    before = x.tobytes()
    y = ops.im2col(x, 3) if name == "im2col" else ops.col2im(x, (3, 4, 6, 5), 3)
    assert x.tobytes() == before
    y[...] = 0  # the result is one's own


# ------------------------------------------------------------ sizes


PIXELS, TAPS = np.zeros((1, 1, 4, 4), np.float32), np.zeros((1, 1, 2, 2), np.float32)
HUGE = {
    "conv2d": lambda n: ops.conv2d_forward(PIXELS, TAPS, padding=n),
    "conv2d, dilated": lambda n: ops.conv2d_forward(PIXELS, TAPS, dilation=n, padding=n),
    "conv2d, strided": lambda n: ops.conv2d_forward(PIXELS, TAPS, stride=n, padding=n),
    "conv_block": lambda n: ops.conv_block_forward(PIXELS, TAPS, padding=n),
    "conv_transpose2d": lambda n: ops.conv_transpose2d_forward(PIXELS, TAPS, stride=n),
    "conv_transpose2d, dilated": lambda n: ops.conv_transpose2d_forward(PIXELS, TAPS, dilation=n),
    "conv_transpose2d, padded": lambda n: ops.conv_transpose2d_forward(
        PIXELS, TAPS, stride=n, output_padding=n - 1
    ),
    "im2col": lambda n: ops.im2col(PIXELS, n, padding=n),
    "col2im": lambda n: ops.col2im(np.zeros((4, 1), np.float32), (1, 1, n, n), 2, stride=n),
    "col2im, images": lambda n: ops.col2im(np.zeros((4, 1), np.float32), (n, n, 2, 2), 2),
    "max_pool2d": lambda n: ops.max_pool2d_forward(PIXELS, n),
    "max_pool2d, padded": lambda n: ops.max_pool2d_forward(PIXELS, n, padding=n // 2),
    "avg_pool2d": lambda n: ops.avg_pool2d_forward(PIXELS, n, padding=n // 2),
    "adaptive_avg_pool2d": lambda n: ops.adaptive_avg_pool2d_forward(PIXELS, n),
    "adaptive_avg_pool2d, rows": lambda n: ops.adaptive_avg_pool2d_forward(PIXELS, (n, 1)),
    "Conv2d": lambda n: Conv2d(n, n, 1),
    "Linear": lambda n: Linear(n, n),
    "MaxPool2d": lambda n: MaxPool2d(n, padding=n // 2).output_shape((1, 1, 4, 4)),
}


@pytest.mark.parametrize("n", [2**20, 2**31, 2**32, 2**62, 2**64], ids="2^{}".format)
@pytest.mark.parametrize("version", ["reference", "numpy", "numba"])
@pytest.mark.parametrize("name", HUGE)
def test_sizes_that_no_memory_holds_are_refused_at_once(name, version, n):
    """2**32 squared is 0 for NumPy's product, and a loop over 2**31 places has no end."""
    with use(version), pytest.raises(ValueError, match=r"^\w+: \w+: expected .*, got "):
        HUGE[name](n)


def test_a_shape_whose_product_wraps_to_zero():
    assert np.prod((2**32, 2**32)) == 0, "NumPy has changed; this test shows nothing"
    with pytest.raises(ValueError, match="col2im: cols: expected shape"):
        ops.col2im(np.zeros((0, 0), np.float32), (2**32, 2**32, 1, 1), 1)


# ------------------------------------------------------------ memory

IM2COL = """
import resource, sys
import numpy as np
from minicnn import ops, use
x = np.zeros((64, 32, 32, 32), np.float32)     # 8 MB, and its columns 200 MB
w = np.ones((8, 32, 5, 5), np.float32)
with use("numpy"):
    ops.conv2d_backward(np.ones_like(ops.conv2d_forward(x[:1], w, padding=2)[0]),
                        ops.conv2d_forward(x[:1], w, padding=2)[1])
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + int(sys.argv[1]) * 2**20,) * 2)
if sys.argv[2] == "op":
    with use("numpy"):
        y, cache = ops.conv2d_forward(x, w, padding=2)
        dx, dw, db = ops.conv2d_backward(np.ones_like(y), cache)
    assert dw[0, 0, 2, 2] == 0 and dx.shape == x.shape
else:
    try:
        ops.im2col(x, 5, padding=2)
    except MemoryError as error:
        print(error)
"""


def limited(megabytes, what):
    return subprocess.run(
        [sys.executable, "-c", IM2COL, str(megabytes), what],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "OPENBLAS_NUM_THREADS": "1"},
    ).stdout


@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="needs Linux")
def test_a_convolution_whose_columns_do_not_fit_memory():
    limited(96, "op")


@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="needs Linux")
def test_columns_that_do_not_fit_memory_are_refused_with_their_size():
    assert "200. MiB" in limited(96, "im2col").replace("200 MiB", "200. MiB")


def test_the_limit_bites():
    """What the two tests above rest on: an array as large as the columns is refused."""
    assert resource.RLIM_INFINITY != 0
    with pytest.raises(subprocess.CalledProcessError):
        subprocess.run(
            [
                sys.executable,
                "-c",
                IM2COL.replace("ops.im2col(x, 5, padding=2)", "np.ones(50 << 20, 'f4')").replace(
                    "print(error)", "raise SystemExit(3)"
                ),
                "96",
                "im2col",
            ],
            check=True,
            capture_output=True,
        )


# ------------------------------------------------------------ Numba

CHECKED = """
import numpy as np
from minicnn import ops, use
from minicnn.ops import vector
assert vector.CHECKED
rng = np.random.default_rng(0)
for N, C, F, H, W, K, S, P, D, G in [
    (1, 1, 1, 5, 5, 3, 1, 0, 1, 1),
    (3, 3, 5, 7, 6, 3, 2, 1, 1, 1),
    (2, 4, 6, 9, 8, 3, 1, 2, 2, 2),
    (9, 17, 20, 6, 5, 5, 1, 2, 1, 1),
]:
    x = rng.random((N, C, H, W), np.float32)
    w = rng.random((F, C // G, K, K), np.float32)
    results = []
    for version in ("numpy", "numba"):
        with use(version):
            y, cache = ops.conv2d_forward(x, w, stride=S, padding=P, dilation=D, groups=G)
            results.append((y, *ops.conv2d_backward(np.ones_like(y), cache)[:2]))
    for a, b in zip(*results):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-3)
"""


def test_kernels_stay_inside_their_arrays():
    """With every access checked, over shapes that fill no vector and no band evenly."""
    environment = {**os.environ, "NUMBA_BOUNDSCHECK": "1"}
    subprocess.run([sys.executable, "-c", CHECKED], env=environment, check=True)


def test_threads_that_train_at_once():
    """Three Python threads, each with a network of its own, get what one gets alone."""
    from minicnn import Conv2d, Flatten, Linear, ReLU, Sequential, Trainer, optim

    x, y = draw(12, 1, 10, 10), np.arange(12) % 3

    def train(out):
        rng = np.random.default_rng(5)
        model = Sequential(Conv2d(1, 4, 3, rng=rng), ReLU(), Flatten(), Linear(256, 3, rng=rng))
        trainer = Trainer(model, optim.SGD(model, lr=0.01))
        trainer.fit((x, y), epochs=3, batch_size=4, progress=False)
        out.append({name: a.tobytes() for name, a in model.state_dict().items()})

    alone, together = [], []
    train(alone)
    threads = [threading.Thread(target=train, args=(together,)) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert together == alone * 3


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_fork_after_a_kernel_is_refused_clearly():
    script = """
import os, sys
import numpy as np
from minicnn import ops, use
x, w = np.ones((4, 1, 8, 8), np.float32), np.ones((2, 1, 3, 3), np.float32)

def conv(version):
    with use(version):
        return ops.conv2d_forward(x, w)[0].tobytes()

if sys.argv[1] == "before":
    expected = None
else:
    expected = conv("numba")
pid = os.fork()
if pid == 0:
    try:
        os._exit(conv("numba") != conv("numpy"))
    except RuntimeError as error:
        print(error, flush=True)
        os._exit(0 if expected is None or conv("numpy") == expected else 2)
assert os.waitpid(pid, 0)[1] == 0
assert conv("numba") == (expected or conv("numpy"))
"""
    refused, allowed = (
        subprocess.run(
            [sys.executable, "-c", script, when], capture_output=True, text=True, check=True
        ).stdout
        for when in ("after", "before")
    )
    assert refused.startswith("numba: expected a process that was started, got one forked after")
    assert "spawn" in refused
    assert allowed == ""
