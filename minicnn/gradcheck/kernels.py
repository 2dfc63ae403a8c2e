"""Check a kernel of your own (NumPy, CuPy, PyTorch, ctypes) against an op of this package.

Plain arrays in and out. The output is compared with the reference's, and the gradients with
finite differences of the reference in float64, at the very numbers that the kernel was given.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from minicnn import ops
from minicnn.backend import use
from minicnn.gradcheck import suspects, verdicts
from minicnn.gradcheck.catalog import OPS, Op, Sizes
from minicnn.gradcheck.check import (
    Case,
    GradcheckReport,
    Settings,
    _alike,
    _not_repeatable,
    _written,
    examine,
)
from minicnn.gradcheck.differences import STEP, STREAM, Check, compare, tolerance
from minicnn.gradcheck.hints import Evidence, Hint, guess
from minicnn.gradcheck.shrink import Smallest, lengths, shrink

# What counts as equal, and the format whose rounding is no bug.
PRECISIONS = {
    "float64": (1e-6, 1e-7, None),
    "float32": (1e-4, 1e-5, "float32"),
    "float16": (1e-2, 1e-3, "float16, bfloat16 or TF32"),
}

Kernel = Callable[..., Any]


class Question(NamedTuple):
    """One case to check a kernel on."""

    op: str
    forward: Kernel | None
    backward: Kernel | None
    sizes: Sizes
    options: dict[str, Any]  # all of them
    passed: tuple[str, ...]  # those that the kernel is given
    dtype: str
    seed: int
    convert: Callable[[np.ndarray], Any] | None
    bias: bool

    @property
    def spec(self) -> Op:
        return OPS[self.op]

    @property
    def pair(self) -> tuple[Kernel, Kernel]:
        """The op of this package."""
        return own_pair(self.op)


def own_pair(op: str) -> tuple[Kernel, Kernel]:
    """The pair of this package: ``forward(**arrays, **options) -> (y, cache)``, and backward.

    It runs in NumPy, whatever version a kernel chooses for calls of its own.
    """
    own = OPS[op].pair or (getattr(ops, f"{op}_forward"), getattr(ops, f"{op}_backward"))
    return _in_numpy(own[0]), _in_numpy(own[1])


def _in_numpy(f: Kernel) -> Kernel:
    def call(*args: Any, **kwargs: Any) -> Any:
        with use("numpy"):
            return f(*args, **kwargs)

    return call


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
    report = _answer(question, diagnose=True, steps=steps)
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


# ------------------------------------------------------------ one case


def _answer(q: Question, diagnose: bool, steps: bool = False) -> GradcheckReport:
    rtol, atol, known = PRECISIONS[q.dtype]
    how = Settings(STEP, rtol, atol, None, steps, np.random.default_rng([q.seed, STREAM]), diagnose)
    options = {**q.options, **q.spec.derived(q.sizes)}
    arrays = {
        name: a.astype(q.dtype) if a.dtype.kind == "f" else a
        for name, a in q.spec.arrays(q.sizes, options, q.seed, q.bias).items()
    }
    points = {name: a.astype("f8") if a.dtype.kind == "f" else a for name, a in arrays.items()}
    y = np.asarray(q.pair[0](**points, **options)[0])
    # What the kernel is given is what counts, rounded as it may be.
    dy = how.rng().standard_normal(y.shape).astype(q.dtype).astype("f8")
    if not y.ndim:  # a loss: far from zero
        dy = np.asarray(1 + np.abs(dy)).astype(q.dtype).astype("f8")
    call = suspects.Call(q.op, q.pair, points, options, dy)
    checks, faults = _check_passes(q, call, arrays, y, how, known)
    if all(check.ok for check in checks) and q.spec.ties and q.backward and diagnose:
        checks += _check_ties(q, options)
    return GradcheckReport(tuple(checks), tuple(faults))


def _check_passes(
    q: Question,
    call: suspects.Call,
    arrays: dict[str, np.ndarray],
    y: np.ndarray,
    how: Settings,
    known: str | None,
) -> tuple[list[Check], list[Hint]]:
    passed = {name: call.options[name] for name in (*q.passed, *q.spec.derived(q.sizes))}
    checks: list[Check] = []
    faults: list[Hint] = []
    given = {name: q.convert(a.copy()) if q.convert else a.copy() for name, a in arrays.items()}

    def unchanged(who: str) -> list[Hint]:
        return _written(who, list(arrays), [_to_numpy(a) for a in given.values()],
                        list(arrays.values()))  # fmt: skip

    cache: tuple[Any, ...] | None = None
    if q.forward is not None:
        result = q.forward(*given.values(), **passed)
        if isinstance(result, tuple) and len(result) == 2:
            result, cache = result[0], (result[1],)
        checks.append(_check_values(np.asarray(_to_numpy(result), "f8"), y, how, call))
        faults += unchanged("forward")
    if q.backward is None:
        return checks, faults
    names = [name for name in q.spec.inputs if name in arrays]

    def pull(dy: np.ndarray) -> list[np.ndarray]:
        assert q.backward is not None
        handed = np.array(dy, q.dtype)
        theirs = q.convert(handed) if q.convert else handed
        if cache is not None:
            grads = q.backward(theirs, *cache)
        else:
            grads = q.backward(theirs, *given.values(), **passed)
        grads = grads if isinstance(grads, tuple | list) else (grads,)
        found = [np.array(_to_numpy(g), "f8") for g in grads if g is not None]
        if len(found) != len(names):
            raise ValueError(
                f"check_{q.op}: backward: expected {len(names)} gradients, to "
                f"{', '.join(names)}, got {len(found)}"
            )
        if not np.array_equal(_to_numpy(theirs), np.array(dy, q.dtype)):
            faults.append(Hint("writes input", "backward: dy: it was written to; work on a copy"))
        return found

    grads = pull(call.dy)
    again = grads
    if how.diagnose:
        faults += _not_repeatable([f"d{name}" for name in names], grads, pull(call.dy))
        # In the kernel's own format FACTOR * dy is rounded: take what it is given.
        larger = (verdicts.FACTOR * call.dy).astype(q.dtype).astype("f8")
        again = [g / verdicts.FACTOR for g in pull(larger)]
        faults += unchanged("backward") if not faults else []
    for name, g, g2 in zip(names, grads, again):
        x = call.arrays[name]
        case = Case(
            f"d{name}",
            lambda: call.pair[0](**call.arrays, **call.options)[0],
            x,
            call.dy,
            g,
            g2 if g2.shape == x.shape else None,
            lambda name=name: suspects.of(call, name),  # type: ignore[misc]
            known,
        )
        checks.append(examine(case, how))
    return checks, list(dict.fromkeys(faults))


def _check_values(got: np.ndarray, y: np.ndarray, how: Settings, call: suspects.Call) -> Check:
    labels = ("yours", "reference")
    if got.shape != y.shape:
        text = f"expected y of shape {y.shape}, got {got.shape}"
        nothing = Check("y", False, np.inf, (), np.nan, np.nan, verdict="bug", labels=labels)
        return nothing._replace(hints=(Hint("shape", text),), arrays=(got, y))
    check = compare("y", got, y, how.rtol, how.atol)._replace(labels=labels)
    if check.ok:
        return check
    slack = tolerance(y, how.rtol, how.atol)
    bad = ~(np.abs(got - y) <= slack)
    e = Evidence("y", got, y, slack, bad, None, None, y, y)
    hints = guess(e, suspects.of_values(call)) if how.diagnose else ()
    return check._replace(verdict="bug", hints=hints)


def _check_ties(q: Question, options: dict[str, Any]) -> list[Check]:
    """Where maxima are equal, any of them may win, but only one."""
    assert q.backward is not None
    rng = np.random.default_rng([q.seed, STREAM])
    shape = q.spec.shapes(q.sizes, options)["x"]
    x = rng.integers(0, 3, shape).astype(q.dtype)
    y, cache = q.pair[0](x.astype("f8"), **options)
    dy = rng.standard_normal(y.shape).astype(q.dtype)
    expected = q.pair[1](dy.astype("f8"), cache)
    passed = {name: options[name] for name in q.passed}
    convert = q.convert or (lambda a: a)
    if q.forward is not None and isinstance(result := q.forward(convert(x), **passed), tuple):
        got = q.backward(convert(dy), result[1])
    else:
        got = q.backward(convert(dy), convert(x), **passed)
    got = np.asarray(_to_numpy(got[0] if isinstance(got, tuple | list) else got), "f8")
    rtol, atol, _ = PRECISIONS[q.dtype]
    check = compare("dx at ties", got, expected, rtol, atol)._replace(
        labels=("yours", "reference")
    )  # fmt: skip
    if check.ok:
        return []
    sums = got.sum((2, 3)), expected.sum((2, 3))
    if _alike(*sums) or np.allclose(*sums, rtol=1e-3, atol=1e-4):
        text = "another of the equal maxima wins than the first one in row-major order"
        return [check._replace(ok=True, verdict="tie", hints=(Hint("tie", text),))]
    text = "each of several equal maxima gets the gradient: a comparison with the maximum finds all"
    return [check._replace(verdict="bug", hints=(Hint("ties", text),))]


def _to_numpy(a: Any) -> Any:
    """A NumPy array from one of NumPy, CuPy or PyTorch."""
    for method in ("detach", "cpu"):  # PyTorch
        a = getattr(a, method, lambda a=a: a)()
    return a.get() if type(a).__module__.partition(".")[0] == "cupy" else np.asarray(a)


# ------------------------------------------------------------ the smallest case


def _shrunk(q: Question, found: GradcheckReport) -> tuple[Smallest | None, tuple[Hint, ...]]:
    defaults = q.spec.options
    wanted = {(check.name, _fits(check)) for check in found.checks if not check.ok}

    def wrong(report: GradcheckReport) -> list[Check]:
        """The failures of the first kind: a wrong number there, no wrong shape here."""
        return [c for c in report.checks if not c.ok and (c.name, _fits(c)) in wanted]

    def fails(state: dict[str, Any]) -> bool:
        return bool(wrong(_answer(_with(q, state), diagnose=False)))

    def simpler(name: str, value: Any) -> Sequence[Any]:
        if name in q.sizes:
            return lengths(name, value)
        return [defaults[name]] if value != defaults[name] else []

    state = {**{name: q.options[name] for name in q.passed}, **q.sizes}
    try:
        state = shrink(state, simpler, fails)
        small = _with(q, state)
        report = _answer(small, diagnose=False)
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
            right = _answer(_with(q, {**smallest, name: plain}), diagnose=False).ok
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
