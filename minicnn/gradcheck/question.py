"""One case of a kernel: what it is given, and how what it gives is compared."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from minicnn import ops
from minicnn.backend import use
from minicnn.gradcheck import suspects, verdicts
from minicnn.gradcheck.catalog import OPS, Op, Sizes
from minicnn.gradcheck.check import Case, Settings, examine
from minicnn.gradcheck.differences import STEP, STREAM, Check, compare, tolerance
from minicnn.gradcheck.hints import Evidence, Hint, guess
from minicnn.gradcheck.report import GradcheckReport
from minicnn.gradcheck.rules import alike, not_repeatable, written

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


def answer(q: Question, diagnose: bool, steps: bool = False) -> GradcheckReport:
    """Run a kernel on one case and compare all that it gives."""
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
        return written(who, list(arrays), [to_numpy(a) for a in given.values()],
                        list(arrays.values()))  # fmt: skip

    cache: tuple[Any, ...] | None = None
    if q.forward is not None:
        result = q.forward(*given.values(), **passed)
        if isinstance(result, tuple) and len(result) == 2:
            result, cache = result[0], (result[1],)
        checks.append(_check_values(np.asarray(to_numpy(result), "f8"), y, how, call))
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
        found = [np.array(to_numpy(g), "f8") for g in grads if g is not None]
        if len(found) != len(names):
            raise ValueError(
                f"check_{q.op}: backward: expected {len(names)} gradients, to "
                f"{', '.join(names)}, got {len(found)}"
            )
        if not np.array_equal(to_numpy(theirs), np.array(dy, q.dtype)):
            faults.append(Hint("writes input", "backward: dy: it was written to; work on a copy"))
        return found

    grads = pull(call.dy)
    again = grads
    if how.diagnose:
        faults += not_repeatable([f"d{name}" for name in names], grads, pull(call.dy))
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
    if not any(hint.exact for hint in hints) and _looks_rounded(got - y, y):
        text = "the differences are of the size of a 16-bit format or TF32, and point nowhere"
        return check._replace(verdict="precision", hints=(Hint("rounding", text),))
    return check._replace(verdict="bug", hints=hints)


def _looks_rounded(residual: np.ndarray, y: np.ndarray) -> bool:
    """Whether small differences have nothing to do with the values: a bug mostly follows them."""
    if not np.max(np.abs(residual)) <= max(verdicts.SHORT.values()) * np.max(np.abs(y)):
        return False
    together = abs(np.vdot(residual, y)) / (np.linalg.norm(residual) * np.linalg.norm(y))
    return bool(together < 0.7 and np.mean(residual != 0) > 0.5)


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
    got = np.asarray(to_numpy(got[0] if isinstance(got, tuple | list) else got), "f8")
    rtol, atol, _ = PRECISIONS[q.dtype]
    check = compare("dx at ties", got, expected, rtol, atol)._replace(
        labels=("yours", "reference")
    )  # fmt: skip
    if check.ok:
        return []
    sums = got.sum((2, 3)), expected.sum((2, 3))
    if alike(*sums) or np.allclose(*sums, rtol=1e-3, atol=1e-4):
        text = "another of the equal maxima wins than the first one in row-major order"
        return [check._replace(ok=True, verdict="tie", hints=(Hint("tie", text),))]
    text = "each of several equal maxima gets the gradient: a comparison with the maximum finds all"
    return [check._replace(verdict="bug", hints=(Hint("ties", text),))]


def to_numpy(a: Any) -> Any:
    """A NumPy array from one of NumPy, CuPy or PyTorch."""
    for method in ("detach", "cpu"):  # PyTorch
        a = getattr(a, method, lambda a=a: a)()
    return a.get() if type(a).__module__.partition(".")[0] == "cupy" else np.asarray(a)
