"""Check a kernel of your own (NumPy, CuPy, PyTorch, ctypes) against an op of this package.

Plain arrays in and out. The output is compared with the reference's, and the gradients with
finite differences of the reference in float64, at the very numbers that the kernel was given.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from minicnn import ops
from minicnn.gradcheck.catalog import OPS
from minicnn.gradcheck.differences import Check
from minicnn.gradcheck.hints import Hint
from minicnn.gradcheck.question import PRECISIONS, Kernel, Question, answer
from minicnn.gradcheck.report import GradcheckReport
from minicnn.gradcheck.shrink import Smallest, lengths, shrink


def own_kernel(op: str) -> tuple[Kernel, Kernel]:
    """The pair of this package as a kernel to check, in the version that `use` chooses."""
    spec = OPS[op]
    forward, backward = spec.pair or (getattr(ops, f"{op}_forward"), getattr(ops, f"{op}_backward"))
    names = list(spec.shapes(spec.sizes(dict(spec.options)), dict(spec.options)))
    return lambda *arrays, **options: forward(**dict(zip(names, arrays)), **options), backward


def check_kernel(
    op: str,
    forward: Kernel | None,
    backward: Kernel | None = None,
    *,
    size: Mapping[str, int] | None = None,
    dtype: str = "float64",
    seed: int = 0,
    convert: Callable[[np.ndarray], Any] | None = None,
    bias: bool = True,
    steps: bool = False,
    **options: Any,
) -> GradcheckReport:
    """Check the forward and the backward pass of a kernel against an op.

    Parameters
    ----------
    op : str
        One of `OPS`, such as "conv2d".
    forward : callable or None
        ``forward(*arrays, **options) -> y``, or ``-> (y, cache)``. None leaves it out.
    backward : callable, optional
        ``backward(dy, *arrays, **options) -> gradients``, one for each differentiable array; or
        ``backward(dy, cache)`` if `forward` returns a cache.
    size : mapping of str to int, optional
        Sizes other than the default ones, such as ``{"N": 1, "KH": 5}``.
    dtype : {"float64", "float32", "float16"}
        What the kernel is given. The tolerances follow it, and rounding of that format is told
        from a bug.
    seed : int
        Draws the numbers.
    convert : callable, optional
        Makes the kernel's arrays from NumPy's, such as ``torch.from_numpy``. What comes back is
        converted by itself.
    bias : bool
        False leaves the optional array `b` out.
    steps : bool
        Also follow the error over step sizes where a gradient is right.
    **options
        Of the op, such as ``stride=2``. The kernel is given those that are named here, as
        keywords, and none of the others.

    Returns
    -------
    GradcheckReport
        With the smallest failing sizes and options, found by shrinking.

    Raises
    ------
    ValueError
        For an unknown op, size or option, or a missing gradient.
    TypeError
        If there is neither a forward nor a backward.
    """
    who = f"check_{op}"
    if op not in OPS:
        raise ValueError(f"gradcheck: op: expected one of {', '.join(OPS)}, got {op!r}")
    if not (callable(forward) or callable(backward)):
        raise TypeError(f"{who}: forward, backward: expected a function, got {forward!r}")
    if dtype not in PRECISIONS:
        raise ValueError(f"{who}: dtype: expected one of {', '.join(PRECISIONS)}, got {dtype!r}")
    spec = OPS[op]
    _refuse_unknown(who, "option", options, spec.options)
    every = {**spec.options, **options}
    sizes = spec.sizes(every)
    _refuse_unknown(who, "size", size or {}, sizes)
    sizes |= size or {}
    passed = tuple(dict.fromkeys((*spec.required, *options)))
    question = Question(
        op, forward, backward, sizes, every, passed, dtype, seed, convert, bias
    )  # fmt: skip
    report = answer(question, diagnose=True, steps=steps)
    if report.verdict == "bug":
        smallest, needs = _shrunk(question, report)
        report = report._replace(smallest=smallest, notes=needs)
    return report


def _refuse_unknown(
    who: str, what: str, given: Mapping[str, Any], known: Mapping[str, Any]
) -> None:
    for name in given:
        if name not in known:
            listed = ", ".join(known) or "none"
            raise ValueError(f"{who}: {name}: expected one of the {what}s {listed}")


# ------------------------------------------------------------ the smallest case


def _shrunk(q: Question, found: GradcheckReport) -> tuple[Smallest | None, tuple[Hint, ...]]:
    defaults = q.spec.options
    wanted = {(check.name, _fits(check)) for check in found.checks if not check.ok}

    def wrong(report: GradcheckReport) -> list[Check]:
        """The failures of the first kind: a wrong number there, no wrong shape here."""
        return [c for c in report.checks if not c.ok and (c.name, _fits(c)) in wanted]

    def fails(state: dict[str, Any]) -> bool:
        return bool(wrong(answer(_with(q, state), diagnose=False)))

    def simpler(name: str, value: Any) -> Sequence[Any]:
        if name in q.sizes:
            return lengths(name, value)
        return [defaults[name]] if value != defaults[name] else []

    state = {**{name: q.options[name] for name in q.passed}, **q.sizes}
    try:
        state = shrink(state, simpler, fails)
        small = _with(q, state)
        report = answer(small, diagnose=False)
    except Exception:  # what fails only sometimes has no smallest case
        return None, ()
    bad = wrong(report)
    if not bad or bad[0].arrays is None:
        return None, ()
    arrays = q.spec.arrays(small.sizes, small.options, q.seed, q.bias)
    options = {name: state[name] for name in q.passed if state[name] != defaults[name]}
    shapes = {name: a.shape for name, a in arrays.items()}
    smallest = Smallest(shapes, options, bad[0].name, *bad[0].arrays, bad[0].labels)
    return smallest, tuple(_needs(q, state))


def _fits(check: Check) -> bool:
    return check.arrays is not None and check.arrays[0].shape == check.arrays[1].shape


def _with(q: Question, state: Mapping[str, Any]) -> Question:
    sizes = {name: state[name] for name in q.sizes}
    options = q.options | {name: state[name] for name in q.passed}
    return q._replace(sizes=sizes, options=options)


def _needs(q: Question, smallest: Mapping[str, Any]) -> list[Hint]:
    """Which option or size the failure hangs on: without it the kernel is right."""
    hints = []
    for name, value in smallest.items():
        plain = 1 if name in q.sizes else q.spec.options[name]
        if value == plain or name in ("H", "W", "KH", "KW"):
            continue
        try:
            right = answer(_with(q, {**smallest, name: plain}), diagnose=False).ok
        except Exception:  # no such case
            continue
        if right:
            what = {"N": "images", "C": "channels", "F": "filters"}.get(name, name)
            text = f"right with {name}={plain}, wrong with {name}={value}: look at the {what}"
            hints.append(Hint(f"needs {name}", text, False))
    return hints


# ------------------------------------------------------------ a function for each op


def _make(op: str) -> Callable[..., GradcheckReport]:
    spec = OPS[op]
    shapes = spec.shapes(*(lambda options: (spec.sizes(options), options))(dict(spec.options)))
    arrays = ", ".join(shapes)
    listed = "".join(f", {name}={value!r}" for name, value in spec.options.items())
    gradients = ", ".join(f"d{name}" for name in spec.inputs)

    def check(forward: Kernel | None, backward: Kernel | None = None, **options: Any) -> Any:
        return check_kernel(op, forward, backward, **options)

    check.__name__ = check.__qualname__ = f"check_{op}"
    check.__doc__ = f"""Check a kernel of your own against `minicnn.ops.{op}_forward`.

    ::

        forward({arrays}{listed}) -> y
        backward(dy, {arrays}{listed}) -> {gradients}

    or ``forward(...) -> (y, cache)`` with ``backward(dy, cache) -> {gradients}``. The kernel is
    given those options that the call names, as keywords{
        f", and always {', '.join(spec.required)}" if spec.required else ""
    }. {spec.note}

    Default shapes: {", ".join(f"{name} {shape}" for name, shape in shapes.items())}; ``size=``
    changes the sizes {", ".join(spec.sizes(dict(spec.options)))}.

    Parameters, Returns and Raises are those of `check_kernel`.
    """
    return check


check_conv2d = _make("conv2d")
check_conv_transpose2d = _make("conv_transpose2d")
check_max_pool2d = _make("max_pool2d")
check_avg_pool2d = _make("avg_pool2d")
check_adaptive_avg_pool2d = _make("adaptive_avg_pool2d")
check_linear = _make("linear")
check_relu = _make("relu")
check_leaky_relu = _make("leaky_relu")
check_elu = _make("elu")
check_sigmoid = _make("sigmoid")
check_tanh = _make("tanh")
check_gelu = _make("gelu")
check_silu = _make("silu")
check_softplus = _make("softplus")
check_softmax = _make("softmax")
check_log_softmax = _make("log_softmax")
check_batch_norm = _make("batch_norm")
check_layer_norm = _make("layer_norm")
check_group_norm = _make("group_norm")
check_dropout = _make("dropout")
check_flatten = _make("flatten")
check_nll_loss = _make("nll_loss")
check_cross_entropy = _make("cross_entropy")
check_mse_loss = _make("mse_loss")
check_l1_loss = _make("l1_loss")
check_bce_with_logits = _make("bce_with_logits")
