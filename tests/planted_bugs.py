"""Plant one bug at a time and see the test suite catch it.

    python tests/planted_bugs.py             # all of them
    python tests/planted_bugs.py conv2d pool # those whose file or description says so

Each bug is one change to one line of a copy of the package. The tests that mirror the changed
file run first, then, if they let it pass, the whole suite. Exits with 1 if a bug survives.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent


class Bug(NamedTuple):
    """A wrong line: `new` in place of `old`, which stands once in the file."""

    file: str
    old: str
    new: str
    what: str


BUGS = [
    # ------------------------------------------------------------ convolution
    Bug("ops/conv2d.py", "dcols = wg.swapaxes(1, 2) @ dyg", "dcols = -wg.swapaxes(1, 2) @ dyg",
        "conv2d: sign of dx"),
    Bug("ops/conv2d.py", "        dw += dyg @ cols", "        dw = dyg @ cols",
        "conv2d: dw of the last block only"),
    Bug("ops/conv2d.py", "sum(axis=2)", "mean(axis=2)",
        "conv2d: db off by the number of pixels"),
    Bug("ops/conv2d.py", "return dx, dw, db if cache.has_bias else None", "return dx, dw, db",
        "conv2d: a gradient for a bias that is not there"),
    Bug("ops/conv2d.py", "y[block] = (wg @ cols).reshape(F, -1, OH, OW).swapaxes(0, 1)",
        "y[block] = (wg @ cols).reshape(-1, F, OH, OW)",
        "conv2d: filters and images change places"),
    Bug("ops/conv2d.py", "    return a.reshape(groups, rows, a.size // (groups * rows))",
        "    return a.reshape(rows, groups, a.size // (groups * rows)).swapaxes(0, 1)",
        "conv2d: channels dealt out to the groups in turn"),
    Bug("ops/conv2d.py", "        y += b[:, None, None]", "        y += b[0]",
        "conv2d: one bias for all filters"),
    Bug("ops/im2col.py", "        x[:, :, rows, columns] += cols", "        x[:, :, rows, columns] = cols",
        "col2im: = in place of +="),
    Bug("ops/im2col.py", "return array_module(x).ascontiguousarray(x[:, :, top : HP - bottom, left : WP - right])",
        "return array_module(x).ascontiguousarray(x[:, :, bottom : HP - top, left : WP - right])",
        "col2im: top and bottom padding change places"),
    Bug("ops/im2col.py", "rows = slice(p * DH, p * DH + (OH - 1) * SH + 1, SH)",
        "rows = slice(p, p + (OH - 1) * SH + 1, SH)",
        "im2col: dilation of the rows forgotten"),
    Bug("ops/im2col.py", "slice(q * DW, q * DW + (OW - 1) * SW + 1, SW)",
        "slice(q * DW, q * DW + (OW - 1) * SH + 1, SH)",
        "im2col: the rows' stride for the columns"),
    Bug("ops/conv_transpose2d.py", "dx[block] = (wg @ cols)", "dx[block] = 2 * (wg @ cols)",
        "conv_transpose2d: dx off by a factor"),
    Bug("ops/conv_transpose2d.py", "        dw += xg @ cols", "        dw = xg @ cols",
        "conv_transpose2d: dw of the last block only"),
    # ------------------------------------------------------------ geometry
    Bug("shapes.py", "return DH * (KH - 1) + 1, DW * (KW - 1) + 1", "return DH * KH, DW * KW",
        "window: extent off by dilation - 1"),
    Bug("shapes.py", "return top + H + bottom, left + W + right", "return 2 * top + H, 2 * left + W",
        "window: asymmetric padding taken as symmetric"),
    Bug("shapes.py", "if ceil and steps * stride >= size + before:", "if ceil and steps * stride > size + before:",
        "window: ceil_mode keeps a window that starts in the padding"),
    Bug("shapes.py", "tuple((t // 2, t - t // 2) for t in total)", "tuple((t - t // 2, t // 2) for t in total)",
        "window: 'same' puts the odd row first"),
    # ------------------------------------------------------------ pooling
    Bug("ops/max_pool2d.py", "        passed &= ~hit\n        count += passed", "        count += passed\n        passed &= ~hit",
        "max_pool2d: winner off by one tap"),
    Bug("ops/max_pool2d.py", "dx[at[some]] += dy[some]", "dx[at[some]] = dy[some]",
        "max_pool2d: overlapping windows overwrite each other"),
    Bug("ops/max_pool2d.py", "padded = pad(x, win, -np.inf)", "padded = pad(x, win, 0.0)",
        "max_pool2d: padding of 0 beats negative values"),
    Bug("ops/avg_pool2d.py", "    drows = _spread(dy / divisor, wide", "    drows = _spread(dy, wide",
        "avg_pool2d: gradient not divided"),
    Bug("ops/adaptive_avg_pool2d.py", "dx[_at(axis, chosen)] += dy", "dx[_at(axis, chosen)] = dy",
        "adaptive_avg_pool2d: overlapping bins overwrite each other"),
    # ------------------------------------------------------------ linear, activations, softmax
    Bug("ops/linear.py", "return dy @ w, dy.T @ x, dy.sum(", "return dy @ w, dy.T @ x, dy.mean(",
        "linear: db is a mean"),
    Bug("ops/activations.py", "lambda xp, dy, y: _masked(dy, y > 0),", "lambda xp, dy, y: _masked(dy, y >= 0),",
        "relu: everything passes back"),
    Bug("ops/activations.py", "lambda xp, dy, x, slope: dy * (x > 0) + slope * dy * ~(x > 0),",
        "lambda xp, dy, x, slope: dy * (x > 0) + dy * ~(x > 0),",
        "leaky_relu: slope forgotten in the backward"),
    Bug("ops/activations.py", "    return dy * (below + x * bell)", "    return dy * below",
        "gelu: product rule forgotten"),
    Bug("ops/softmax.py", "return y * (dy - (dy * y).sum(axis=dim, keepdims=True))", "return 0 * dy",
        "softmax: gradient of zero, which passes with dy = 1"),
    Bug("ops/softmax.py", "y = array_module(x).exp(x - x.max(axis=dim, keepdims=True))",
        "y = array_module(x).exp(x)",
        "softmax: overflow for large inputs"),
    # ------------------------------------------------------------ losses
    Bug("ops/losses.py", "loss, share = loss / total, xp.where(total == 0, 0, 1 / total)",
        "loss, share = loss / total, 1.0",
        "losses: gradient of the sum for the loss of the mean"),
    Bug("ops/losses.py", "lambda g, x, t: g * 2 * (x - t),\n    ),\n    \"l1_loss\": (\n        lambda x, t: abs(x - t),\n        lambda g, x, t: g * array_module",
        "lambda g, x, t: g * (x - t),\n    ),\n    \"l1_loss\": (\n        lambda x, t: abs(x - t),\n        lambda g, x, t: g * array_module",
        "mse_loss: factor 2 forgotten"),
    Bug("ops/cross_entropy.py", "return a * (-g[:, None] if g.ndim else -g)", "return a * (g[:, None] if g.ndim else g)",
        "nll_loss: sign of the gradient"),
    # ------------------------------------------------------------ normalisation
    Bug("ops/normalize.py", "array_module(g).multiply(xhat, (sum_gx / -M).astype(g.dtype), out=dx)",
        "dx = array_module(g).zeros_like(g)",
        "normalisation: the path through the variance forgotten"),
    Bug("ops/normalize.py", "    dx -= (sum_g / M).astype(g.dtype)\n", "",
        "normalisation: the path through the mean forgotten"),
    Bug("ops/batch_norm.py", "    if training:\n        dx, db, dw = normalize_backward", "    if not training:\n        dx, db, dw = normalize_backward",
        "batch_norm: the gradients of training and evaluation change places"),
    Bug("layers/norm.py", "            training or mean is None,", "            mean is None,",
        "BatchNorm2d: running statistics in training"),
    Bug("layers/norm.py", "self.buffers[\"running_var\"][...] = var", "pass",
        "BatchNorm2d: running variance never stored"),
    Bug("layers/norm.py", "        return self._normalise(x, training=False)[0]", "        return self._normalise(x, self.training)[0]",
        "BatchNorm2d: inference with the batch's statistics"),
    # ------------------------------------------------------------ layers and models
    Bug("layers/base.py", "self.grads[name] += g", "self.grads[name][...] = g",
        "Layer: gradient overwritten, not added"),
    Bug("layers/conv.py", "bound = 1 / np.sqrt(fans(shape)[0])", "bound = 1 / np.sqrt(fans(shape)[1])",
        "Conv2d: initial weights by fan_out"),
    Bug("layers/linear.py", "self.add_grads(weight=dw, bias=db)", "self.add_grads(weight=dw)",
        "Linear: bias never trained"),
    Bug("layers/dropout.py", "return ops.dropout_forward(x, self.p, training=False)[0]",
        "return ops.dropout_forward(x, self.p, True, self.rng)[0]",
        "Dropout: drops in inference"),
    Bug("layers/sequential.py", "            return dx + dy", "            return dx",
        "Residual: gradient of the shortcut forgotten"),
    Bug("layers/sequential.py", "dy = self.layers[i].backward(dy, cache[i])", "dy = self.layers[i].backward(dy, cache[-1 - i])",
        "Sequential: caches in the wrong order"),
    Bug("layers/base.py", "            layer.training = mode", "            layer.training = True",
        "Layer: eval() has no effect"),
    Bug("layers/base.py", "return {name: a.copy() for name, a in self._state().items()}", "return self._state()",
        "Layer: state_dict hands out the arrays themselves"),
    Bug("init.py", "fan = fans(shape)[mode == \"fan_out\"]", "fan = fans(shape)[mode == \"fan_in\"]",
        "init: fan_in and fan_out change places"),
    # ------------------------------------------------------------ training
    Bug("optim.py", "    return lr / (1 - beta1**n), math", "    return lr, math",
        "Adam: bias correction of the mean forgotten"),
    Bug("optim.py", "beta2**n), 1 - lr * weight_decay", "beta2**n), 1 - weight_decay",
        "AdamW: weight decay not scaled by the learning rate"),
    Bug("schedules.py", "            return _cosine(first_lr, self.max_lr, step / peak)", "            return _cosine(self.max_lr, first_lr, step / peak)",
        "OneCycleLR: down where it should go up"),
    Bug("plan/fused.py", "if self.shortcut else dy", "if self.shortcut and need_dx else dy",
        "plan: no gradient for the shortcut of the first residual"),
    Bug("plan/fused.py", "            last.relu_gradient(dy.data, self._y, d)\n", "            d[...] = dy.data\n",
        "plan: the ReLU behind a convolution forgotten on the way back"),
    Bug("plan/build.py", "    if max(Counter(id(layer) for _, layer in model.modules()).values()) > 1:", "    if False:",
        "plan: a layer in two places gets one place's gradient"),
    Bug("ops/last.py", "    return shift[:channels] + s, np.maximum(q - s * s, 0)",
        "    return shift[:channels] + s, np.maximum(q, 0)",
        "plan: batch variance about the first pixels' mean"),
    Bug("ops/conv2d_winograd.py", "R - 1 - top, R - 1 - left", "top, left",
        "winograd: padding of dx"),
    Bug("ops/vector.py", "e.b.and_(_larger(e, best_, v_), e.b.fcmp_ordered(\"ord\", best_, best_))",
        "_larger(e, best_, v_)",
        "max-pool in Numba: the last NaN wins"),
    Bug("optim_numba.py", "    g = add(g, mul(rate, p))\n    m = add", "    m = add",
        "Adam in Numba: weight decay forgotten"),
    Bug("plan/stages.py", "        layer.zero_grad()\n", "",
        "Trainer: gradients add up over the steps"),
    Bug("progress.py", "        self.loss += loss * samples", "        self.loss += loss",
        "Trainer: a short last batch weighs as much as a full one"),
    Bug("train.py", "        self.model.train()\n", "",
        "Trainer: training in evaluation mode"),
    Bug("gradcheck/differences.py", "np.asarray(np.abs(analytic - numeric) / tol", "np.asarray((analytic - numeric) / tol",
        "gradcheck: a gradient that is too small passes"),
    Bug("gradcheck/verdicts.py", "if low - slack <= analytic <= high + slack:", "if True:",
        "gradcheck: any number will do at a kink"),
    Bug("gradcheck/verdicts.py", "return None if met.any() else k", "return k",
        "gradcheck: the wrong side of a kink close by passes as a kink"),
    Bug("gradcheck/hints.py", "return bool(close.all()) and _largest(", "return _largest(",
        "gradcheck: the first guess is taken for the bug"),
    Bug("gradcheck/question.py", "if alike(*sums) or np.allclose(*sums, rtol=1e-3, atol=1e-4):", "if True:",
        "gradcheck: every maximum at a tie may win"),
    Bug("plots/attribution.py", "(before - after)[:, None, None]", "(after - before)[:, None, None]",
        "occlusion: a rise for a fall"),
    Bug("plots/inside.py", "first += ((np.array(win.extent) - 1) / 2 - before) * jump",
        "first += ((np.array(win.extent) - 1) / 2) * jump",
        "plot_grad_cam: the padding moves the map"),
    # ------------------------------------------------------------ data and files
    Bug("data/idx.py", "    if stream.read(1):", "    if False:",
        "read_idx: bytes after the end accepted"),
    Bug("data/batches.py", "np.random.default_rng([self.seed, epoch])", "np.random.default_rng(self.seed)",
        "Batches: the same order in every epoch"),
    Bug("data/batches.py", "for i in range(start, len(self)):", "for i in range(0, len(self)):",
        "Batches: a resumed epoch starts anew"),
    Bug("data/augment.py", "y[flipped] = y[flipped, :, :, ::-1]", "y[flipped] = y[flipped, :, ::-1]",
        "Augment: flips upside down"),
    Bug("checkpoint.py", "        if digests.get(name) != _digest(a):", "        if False:",
        "load: damaged weights accepted"),
    Bug("checkpoint.py", "    optimizer.lr = state[\"lr\"]\n", "",
        "checkpoint: the learning rate is forgotten"),
    Bug("checkpoint.py", "            rng.bit_generator.state = state[\"generators\"][name]", "            pass",
        "checkpoint: random generators start anew"),
    Bug("checkpoint.py", "    if _digests(path, metadata).get(TRAINING) != _text_digest(text):", "    if False:",
        "checkpoint: a flipped bit in the history is not noticed"),
    Bug("checkpoint.py", "        optimizer.load_state_dict(before[1])\n", "",
        "checkpoint: half a training loaded after an error"),
    Bug("runs.py", "        for old in self.checkpoints()[:-keep]:", "        for old in self.checkpoints()[keep:]:",
        "runs: the oldest checkpoints are kept"),
    Bug("runs.py", "key=lambda i: _merit(history[i])", "key=lambda i: i",
        "runs: the last epoch for the best one"),
    Bug("runs.py", "        sweep(folder, age=0)\n", "",
        "runs: leftovers of killed processes stay"),
    Bug("interrupts.py", "        handlers[number](number, frame)", "        pass",
        "interrupts: a deferred signal is lost"),
    Bug("train.py", "                generator.state = state\n", "                pass\n",
        "trainer: a failed step moves the random generators on"),
    Bug("ops/jit.py", "    if _forked:", "    if False:",
        "numba: a forked process enters kernels"),
    Bug("files.py", "        os.replace(part, path)", "        path.write_bytes(part.read_bytes())\n        part.write_bytes(b\"\")",
        "replacing: the old file is overwritten in place"),
    # ------------------------------------------------------------ ONNX
    Bug("onnx/exporter.py", "        \"pads\": (top, left, bottom, right),", "        \"pads\": (top, bottom, left, right),",
        "export: padding in another order than ONNX's"),
    Bug("onnx/importer.py", "    w = w if node.take(\"transB\", 0) else w.T  # (O, I)", "    w = w if not node.take(\"transB\", 0) else w.T  # (O, I)",
        "load: weights of a Gemm transposed the wrong way"),
    Bug("onnx/nodes.py", "        if tensor.data_location == onnx.TensorProto.EXTERNAL or tensor.external_data:",
        "        if False:",
        "load: weights taken from other files"),
    Bug("onnx/graph.py", "grads[r] = dx if grads[r] is None else grads[r] + dx", "grads[r] = dx",
        "Graph: the gradients of a value that two layers read not added"),
    # ------------------------------------------------------------ GPU
    Bug("gpu/training.py", "            rates[0] = good", "            rates[0] = 1",
        "GPU: a bad step changes the parameters"),
    Bug("gpu/training.py", "xp.copyto(a, old, where=bad)", "pass",
        "GPU: a bad step changes the running statistics"),
    Bug("gpu/training.py", "xp.where(finite | (tally[BAD] >= 0), ", "xp.where(finite, ",
        "GPU: a later bad step takes the place of the first"),
    Bug("gpu/training.py", "        self.trainer.optimizer.step_count -= undone\n", "",
        "GPU: steps that did nothing are counted"),
    Bug("gpu/training.py", "for generator, state in zip(generators, states[unread - undone]):", "for generator, state in ():",
        "GPU: steps that did nothing move the random generators on"),
    Bug("gpu/training.py", "if same and signature == self._signature:", "if same and self._signature:",
        "GPU: a recorded step runs with settings of old"),
    Bug("gpu/training.py", "all(map(_is, arrays, self._arrays))", "True",
        "GPU: a recorded step works on arrays that the model has no more"),
    Bug("gpu/training.py", "flat.fill(0)", "pass",
        "GPU: gradients add up from step to step"),
    Bug("gpu/graph.py", "                array.set(make())", "                pass",
        "GPU: every launch drops the same"),
    Bug("gpu/graph.py", "self._cupy.cuda.using_allocator(self._pool.malloc), recorded(self)", "recorded(self)",
        "GPU: others write into a graph's memory"),
    Bug("gpu/blas.py", "self.how, leading = TRANSPOSED, a.strides[2]", "self.how, leading = TRANSPOSED, a.strides[1]",
        "GPU: product of a transposed matrix with the wrong leading dimension"),
    Bug("gpu/blas.py", "            c.fill(0)", "            pass",
        "GPU: an empty sum is whatever was there"),
    Bug("gpu/parts.py", ".ones_like(value) * share, cache", ".ones_like(value), cache",
        "GPU: parts of a batch all weigh 1"),
    Bug("gpu/parts.py", "            generator.state = state\n", "            pass\n",
        "GPU: a try that failed moves the random generators on"),
    Bug("gpu/parts.py", "problem = error.with_traceback(None)", "problem = error",
        "GPU: what a failed try held is not freed"),
    Bug("gpu/plan.py", "or layer.options[\"ceil_mode\"]:", "or False:",
        "GPU: the last windows of a pool left out"),
    Bug("gpu/plan.py", "type(layers[0]) is not Conv2d", "not isinstance(layers[0], Conv2d)",
        "GPU: the forward of a subclass passed over"),
    Bug("gpu/update.py", "o.dampening if o.step_count > 1 else 0.0", "o.dampening",
        "GPU: SGD's first step is damped"),
    Bug("ops/cross_entropy.py", "        a = xp.where(bad[:, None], np.nan, a)", "        pass",
        "GPU: a label out of range passes in a recorded step"),
]  # fmt: skip


def tests_of(file: str) -> str:
    """Path of the test file that mirrors a file of the package."""
    path = Path(file)
    return str(Path("tests") / path.with_name(f"test_{path.name}"))


def caught_by(bug: Bug) -> str:
    """Run the tests with the bug planted; say what failed first, or "" if nothing did."""
    with tempfile.TemporaryDirectory() as name:
        copy = Path(name)
        ignore = shutil.ignore_patterns("__pycache__")
        for part in ("minicnn", "tests"):
            shutil.copytree(ROOT / part, copy / part, ignore=ignore)
        for part in ("setup.cfg", "README.md"):
            shutil.copy(ROOT / part, copy)
        target = copy / "minicnn" / bug.file
        target.write_text(target.read_text().replace(bug.old, bug.new))
        one_thread = {f"{name}_NUM_THREADS": "1" for name in ("NUMBA", "OMP", "OPENBLAS")}
        environment = os.environ | one_thread | {"PYTHONPATH": str(copy)}
        command = [
            sys.executable,
            *["-m", "pytest", "-x", "-q", "--no-header", "-p", "no:cacheprovider"],
        ]
        # Two test files look at the sources and would see any change.
        mirror = tests_of(bug.file)
        suites = [
            [
                "tests",
                *(
                    f"--ignore=tests/{name}"
                    for name in ("test_planted_bugs.py", "test_readme.py", "notebooks")
                ),
            ]
        ]
        if (copy / mirror).exists():
            suites.insert(0, [mirror])
        for tests in suites:
            run = subprocess.run(
                [*command, *tests], cwd=copy, env=environment, capture_output=True, text=True
            )
            failed = [line for line in run.stdout.splitlines() if line.startswith("FAILED")]
            if failed:
                return failed[0].split(" - ")[0].removeprefix("FAILED ")
            if run.returncode:
                raise RuntimeError(f"{bug.what}: pytest broke off:\n{run.stdout}{run.stderr}")
    return ""


def main() -> int:
    """Plant the bugs that the command line names."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("words", nargs="*", help="plant only bugs that say one of these words")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="how many at a time")
    arguments = parser.parse_args()
    words = arguments.words or [""]
    bugs = [bug for bug in BUGS if any(word in bug.file or word in bug.what for word in words)]
    survived = 0
    with ThreadPoolExecutor(arguments.jobs) as pool:
        for i, (bug, test) in enumerate(zip(bugs, pool.map(caught_by, bugs)), 1):
            print(f"{i:2}/{len(bugs)} {bug.what}: {test or 'SURVIVED'}", flush=True)
            survived += not test
    print(f"{len(bugs) - survived} of {len(bugs)} planted bugs caught")
    return 1 if survived else 0


if __name__ == "__main__":
    sys.exit(main())
