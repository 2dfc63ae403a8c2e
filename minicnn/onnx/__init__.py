"""ONNX: networks to and from the interchange format, and a backend that runs graphs on our ops.

>>> import minicnn as mc
>>> import minicnn.onnx  # needs the extra: pip install '.[onnx]'
>>> model = mc.Sequential(mc.Conv2d(1, 4, 3, rng=0), mc.ReLU(), mc.Flatten(), mc.Linear(16, 3))
>>> minicnn.onnx.export(model, "net.onnx", (1, 4, 4))  # doctest: +SKIP
>>> model = minicnn.onnx.load("net.onnx")  # doctest: +SKIP

The package ``onnx`` is imported when one of these is first called.
"""

from minicnn.onnx.backend import Backend, BackendRep
from minicnn.onnx.exporter import OPSET, export
from minicnn.onnx.graph import Graph
from minicnn.onnx.importer import load
from minicnn.onnx.nodes import Unsupported

__all__ = ["OPSET", "Backend", "BackendRep", "Graph", "Unsupported", "export", "load"]
