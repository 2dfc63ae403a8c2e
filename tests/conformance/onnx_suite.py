"""ONNX's own backend tests, run through `minicnn.onnx.Backend`.

The package onnx carries the cases: one node each, models that PyTorch exported, and nine well
known networks with made-up weights. A case is in scope if minicnn has the operator as an op of
its own, images are 2-D, numbers are float32 or float64, and no random generator is pinned. A case
in scope must pass; one that is not may also be refused, by name.
"""

from __future__ import annotations

import warnings
from collections import Counter
from functools import cache
from typing import Any, NamedTuple

import numpy as np

KINDS = ("node", "pytorch-converted", "pytorch-operator", "simple")
# Operators of which minicnn has an op, with the index of the input that has to be (N, C, H, W).
OURS = {
    "Conv", "ConvTranspose", "MaxPool", "AveragePool", "GlobalAveragePool", "BatchNormalization",
    "LayerNormalization", "GroupNormalization", "InstanceNormalization", "Gemm", "MatMul", "Relu",
    "LeakyRelu", "Elu", "Sigmoid", "Tanh", "Gelu", "Softplus", "Softmax", "LogSoftmax", "Dropout",
    "Flatten", "NegativeLogLikelihoodLoss", "SoftmaxCrossEntropyLoss", "Col2Im",
}  # fmt: skip
WINDOWED = {"Conv", "ConvTranspose", "MaxPool", "AveragePool", "GlobalAveragePool", "Col2Im"}


class Outcome(NamedTuple):
    """What became of a case."""

    kind: str
    name: str
    operators: frozenset[str]
    why_not: str  # why the case is out of scope; "" if it is in scope
    result: str  # "passed", "failed" or "refused"
    detail: str


@cache
def cases() -> list[Any]:
    """All cases, as onnx makes them; its generators warn of overflow."""
    from onnx.backend.test.loader import load_model_tests

    with warnings.catch_warnings(), np.errstate(all="ignore"):
        warnings.simplefilter("ignore")
        return [(kind, case) for kind in KINDS for case in load_model_tests(kind=kind)]


def model_and_data(case: Any) -> tuple[Any, list[tuple[list[Any], list[Any]]]]:
    """The model and its pairs of inputs and expected outputs."""
    import onnx
    from onnx import numpy_helper

    if case.model is not None:
        return case.model, [
            ([_plain(a) for a in inputs], [_plain(a) for a in outputs])
            for inputs, outputs in case.data_sets
        ]
    from pathlib import Path

    folder = Path(case.model_dir)
    sets = []
    for data in sorted(folder.glob("test_data_set_*")):
        pair = []
        for part in ("input", "output"):
            paths = sorted(data.glob(f"{part}_*.pb"), key=lambda p: int(p.stem.split("_")[1]))
            tensors = []
            for path in paths:
                tensor = onnx.TensorProto()
                tensor.ParseFromString(path.read_bytes())
                tensors.append(numpy_helper.to_array(tensor))
            pair.append(tensors)
        sets.append(tuple(pair))
    return onnx.load(folder / "model.onnx"), sets


def _plain(a: Any) -> Any:
    from onnx import TensorProto, numpy_helper

    return numpy_helper.to_array(a) if isinstance(a, TensorProto) else a


def out_of_scope(model: Any, name: str) -> str:
    """Say why a case is out of scope, or return ""."""
    from onnx import TensorProto

    nodes = model.graph.node
    operators = {n.op_type for n in nodes}
    if "_expanded" in name:
        return "an operator spelled out in others"
    if any(n.domain not in ("", "ai.onnx") for n in nodes):
        return "operators outside of ONNX's own domain (trees, strings, training)"
    if len(nodes) == 1 and not operators <= OURS:
        return "an operator that minicnn has no op for"
    if not operators & OURS:
        return "an operator that minicnn has no op for"
    types = [i.type for i in model.graph.input] + [o.type for o in model.graph.output]
    if any(not t.HasField("tensor_type") for t in types):
        return "sequences or optional values"
    first = model.graph.input[0].type.tensor_type
    if first.elem_type not in (TensorProto.FLOAT, TensorProto.DOUBLE):
        return "numbers other than float32 and float64"
    for node in nodes:
        if node.op_type == "Dropout" and len(node.input) > 2 and "zero_ratio" not in name:
            return "a pinned random generator (dropout in training)"
    windowed = operators & WINDOWED
    if windowed:
        kernels = [a.ints for n in nodes for a in n.attribute if a.name == "kernel_shape"]
        if "Col2Im" in operators:
            return "" if "5d" not in name else "images that are not 2-D"
        if len(first.shape.dim) != 4 or any(len(k) != 2 for k in kernels):
            return "images that are not 2-D"
    others = operators - OURS - {"Constant", "Reshape", "Transpose", "Squeeze", "Unsqueeze", "Add",
                                 "Mul", "Sub", "Neg", "Split"}  # fmt: skip
    return "an operator that minicnn has no op for" if others else ""


def outcome(kind: str, case: Any) -> Outcome:
    """Run one case."""
    from onnx.backend.test.runner import Runner

    from minicnn.onnx import Backend, Unsupported

    model, sets = model_and_data(case)
    operators = frozenset(n.op_type for n in model.graph.node)
    why = out_of_scope(model, case.name)
    result, detail = "passed", ""
    try:
        rep = Backend.prepare(model, "CPU")
        for inputs, expected in sets:
            Runner.assert_similar_outputs(expected, rep.run(inputs), case.rtol, case.atol)
    except Unsupported as error:
        result, detail = "refused", str(error)
    except Exception as error:
        result, detail = "failed", f"{type(error).__name__}: {error}"
    return Outcome(kind, case.name, operators, why, result, " ".join(detail.split())[:300])


@cache
def outcomes() -> list[Outcome]:
    """Run every case."""
    with warnings.catch_warnings(), np.errstate(all="ignore"):
        warnings.simplefilter("ignore")
        return [outcome(kind, case) for kind, case in cases()]


def table() -> str:
    """The outcome as Markdown."""
    lines = ["| ONNX suite | cases | in scope | passed | failed | not supported |",
             "| --- | --- | --- | --- | --- | --- |"]  # fmt: skip
    for kind in KINDS:
        some = [o for o in outcomes() if o.kind == kind]
        scope = [o for o in some if not o.why_not]
        ok = Counter(o.result for o in scope)
        refused = sum(o.result == "refused" for o in some)
        extra = sum(o.result == "passed" for o in some if o.why_not)
        lines.append(
            f"| {kind} | {len(some)} | {len(scope)} | {ok['passed']} (and {extra} out of scope) | "
            f"{sum(o.result == 'failed' for o in some)} | {refused} |"
        )
    lines += ["", "| not supported because of | cases |", "| --- | --- |"]
    reasons = Counter(o.why_not for o in outcomes() if o.result == "refused")
    lines += [f"| {reason or 'NOT EXPLAINED'} | {n} |" for reason, n in reasons.most_common()]
    return "\n".join(lines)
