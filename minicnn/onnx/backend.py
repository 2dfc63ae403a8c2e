"""ONNX graphs executed by minicnn's ops: the interface of ``onnx.backend.base``.

Any runner that takes a backend can drive it, ``onnx.backend.test`` among them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from minicnn.backend import Array
from minicnn.onnx.nodes import Node, Unsupported, check, initializers, package
from minicnn.onnx.operators import OPERATORS


class BackendRep:
    """A graph that has been read and can be run many times; `Backend.prepare` makes it."""

    def __init__(self, model: Any) -> None:
        self._opset = check(model)
        graph = model.graph
        self._protos = list(graph.node)
        self._stored = initializers(graph)
        self._inputs = [i.name for i in graph.input if i.name not in self._stored]
        self._outputs = [o.name for o in graph.output]
        for i, proto in enumerate(self._protos):
            _supported(Node(proto, self._opset, i))
        self._last = {name: i for i, p in enumerate(self._protos) for name in p.input}

    def run(self, inputs: Any, **kwargs: Any) -> tuple[Array, ...]:
        """Run the graph.

        Parameters
        ----------
        inputs : sequence of array, mapping from name to array, or array
            In the order of the graph's inputs, without those whose value is stored.

        Returns
        -------
        tuple of array

        Raises
        ------
        Unsupported
            For what minicnn does not have; the message names node, operator and attribute.
        ValueError
            For inputs that do not fit.
        """
        if isinstance(inputs, np.ndarray):
            inputs = (inputs,)
        if not isinstance(inputs, Mapping):
            if len(inputs) > len(self._inputs):
                raise ValueError(
                    f"onnx: inputs: expected {len(self._inputs)} arrays, got {len(inputs)}"
                )
            inputs = dict(zip(self._inputs, inputs))
        missing = [name for name in self._inputs if name not in inputs]
        if missing:
            raise ValueError(f"onnx: inputs: expected an array for {missing[0]!r}, got none")
        values: dict[str, Any] = {**self._stored, **inputs}
        for i, proto in enumerate(self._protos):
            node = Node(proto, self._opset, i)
            results = run(node, [values[name] if name else None for name in node.inputs])
            values.update(zip(node.outputs, results))
            for name in node.inputs:  # keep nothing longer than it is read
                if self._last.get(name) == i and name not in self._outputs:
                    values.pop(name, None)
        return tuple(values[name] for name in self._outputs)


class Backend:
    """ONNX's view of minicnn, on the CPU; see ``onnx.backend.base.Backend``.

    Examples
    --------
    >>> import onnx  # doctest: +SKIP
    >>> Backend.run_model(onnx.load("net.onnx"), [x])  # doctest: +SKIP
    """

    @classmethod
    def supports_device(cls, device: str) -> bool:
        """Whether graphs run there: on "CPU" only."""
        return device.split(":")[0] == "CPU"

    @classmethod
    def is_compatible(cls, model: Any, device: str = "CPU", **kwargs: Any) -> bool:
        """Whether every operator of the graph is one that minicnn has."""
        nodes = (Node(proto, 0, i) for i, proto in enumerate(model.graph.node))
        return cls.supports_device(device) and all(
            n.domain in ("", "ai.onnx") and n.op in OPERATORS for n in nodes
        )

    @classmethod
    def prepare(cls, model: Any, device: str = "CPU", **kwargs: Any) -> BackendRep:
        """Check and read a model.

        Parameters
        ----------
        model : onnx.ModelProto
        device : str

        Raises
        ------
        Unsupported
            If it has operators that minicnn lacks, or another device is wanted.
        ValueError
            If it is no valid model, or keeps weights in other files.
        """
        if not cls.supports_device(device):
            raise Unsupported(f"onnx: device: expected 'CPU', got {device!r}")
        return BackendRep(model)

    @classmethod
    def run_model(
        cls, model: Any, inputs: Any, device: str = "CPU", **kwargs: Any
    ) -> tuple[Array, ...]:
        """Prepare a model and run it once."""
        return cls.prepare(model, device, **kwargs).run(inputs)

    @classmethod
    def run_node(
        cls,
        node: Any,
        inputs: Sequence[Array],
        device: str = "CPU",
        outputs_info: Any = None,
        **kwargs: Any,
    ) -> tuple[Array, ...]:
        """Run a single node on arrays, by the rules of `opset_version` (the newest otherwise)."""
        if not cls.supports_device(device):
            raise Unsupported(f"onnx: device: expected 'CPU', got {device!r}")
        onnx = package()
        opset = int(kwargs.get("opset_version", onnx.defs.onnx_opset_version()))
        wrapped = Node(node, opset, 0)
        _supported(wrapped)
        given = iter(inputs)
        return tuple(run(wrapped, [next(given) if name else None for name in node.input]))


def _supported(node: Node) -> None:
    if node.domain not in ("", "ai.onnx"):
        node.fail(f"domain: expected ONNX's own, got {node.domain!r}")
    if node.op not in OPERATORS:
        node.fail("expected an operator that minicnn has, got another")


def run(node: Node, inputs: Sequence[Array | None]) -> tuple[Array, ...]:
    """Run one node; errors name it."""
    try:
        results = OPERATORS[node.op](node, *inputs)
    except Unsupported:
        raise
    except (ValueError, TypeError, IndexError, OverflowError, AttributeError) as error:
        # An input that is left out, a rank or a type that the operator does not take.
        raise ValueError(f"{node.label}: {error}") from error
    node.finish()
    results = results if isinstance(results, tuple) else (results,)
    if len(results) < len([name for name in node.outputs if name]):
        node.fail(f"outputs: expected at most {len(results)}, got {len(node.outputs)}")
    return results
