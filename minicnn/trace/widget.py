"""The picture of a trace as a live widget: change a number, and the trace is made anew."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import numpy as np

from minicnn.trace.page import pack, script, source

if TYPE_CHECKING:
    from minicnn.trace.steps import Trace

_GLUE = """
export default { render({ model, el }) {
  const view = render(el, model.get("data"), (m) => model.send(m));
  const update = () => view.update(model.get("data"));
  model.on("change:data", update);
  return () => { view.stop(); model.off("change:data", update); };
} };
"""


class Edits:
    """A model and an input to change, and the trace after each change.

    Attributes
    ----------
    trace : Trace
        Of the model as it is now.
    message : str
        What the last change did, or why it could not be made.
    failed : bool
    """

    def __init__(self, trace: Trace) -> None:
        self.start = trace
        self.lr = 0.01
        self.handle({"type": "reset"})

    def handle(self, change: dict[str, Any]) -> None:
        """Make one change: ``set`` a number, an ``option`` of a layer, an ``sgd`` step, ``reset``.

        What cannot be traced leaves all as it was; `message` then says why.
        """
        from minicnn.trace.steps import Trace

        if change["type"] == "reset":
            self.trace, self.message, self.failed = self.start, "", False
            return
        before = self.trace.loss
        model, x = copy.deepcopy(self.trace.model), self.trace.x.copy()
        # Dropout's generator has moved on: go back to the draws of the trace that is compared.
        layers, olds = dict(model.modules()), dict(self.start.before.modules())
        for name, layer in layers.items():
            if hasattr(layer, "rng"):
                layer.rng = copy.deepcopy(olds[name].rng)  # type: ignore[attr-defined]
        expected = None
        try:
            if change["type"] == "set":
                index, value = tuple(change["index"]), float(change["value"])
                if change["letter"] == "x":
                    x[index] = value
                else:
                    key = {"w": "weight", "b": "bias"}[change["letter"]]
                    _find(model, change["name"]).params[key][index] = value
            elif change["type"] == "option":
                layer = _find(model, change["name"])
                self._set_option(layer, change["option"], change["value"])
            else:
                self.lr = float(change["lr"])
                expected = self._sgd(model)
            after = Trace(model, x, self.trace.target, self.trace.loss_name)
        except (ValueError, TypeError, KeyError, IndexError) as error:
            self.message, self.failed = f"Not possible here: {error}", True
            return
        self.trace, self.failed = after, False
        actual = after.loss - before
        self.message = f"loss {before:.6g} -> {after.loss:.6g}: changed by {actual:.4g}"
        if expected is not None:
            self.message += f", predicted -lr * sum of g^2 = {expected:.4g}"

    @staticmethod
    def _set_option(layer: Any, option: str, value: int) -> None:
        from minicnn.shapes import window

        options = layer.options | {option: int(value)}
        old = layer._window
        geometry = old._asdict() | {option: int(value)}
        layer._window = window(type(layer).__name__, *geometry.values())
        layer.options = options

    def _sgd(self, model: Any) -> float:
        """Step against the gradient in place; return the change of the loss to first order."""
        keys = {"weight": "dw", "bias": "db"}
        sums: dict[int, tuple[Any, Any]] = {}
        for node in self.trace.nodes:
            if node.layer is None or node.layer.children():
                continue
            layer = _find(model, node.name)
            for key, p in layer.params.items():
                g = self.trace.backward(node.name).grads[keys[key]]
                old = sums.get(id(p))
                sums[id(p)] = p, g if old is None else old[1] + g  # a layer may stand twice
        for p, g in sums.values():
            p -= (self.lr * g).astype(p.dtype)
        return -self.lr * sum(float(np.vdot(g.astype("f8"), g)) for _, g in sums.values())

    def data(self) -> dict[str, Any]:
        """Return what the view reads."""
        return pack(self.trace) | {
            "lr": self.lr,
            "message": self.message,
            "failed": self.failed,
        }


def _find(model: Any, name: str) -> Any:
    """Return the layer `name`; a model that is one layer is itself named "0" in its trace."""
    return dict(model.modules()).get(name, model)


def widget(trace: Trace) -> Any:
    """Return a live view of `trace`; see `Trace.widget`."""
    try:
        import anywidget
        import traitlets
    except ImportError as error:
        raise ImportError(
            "widget: anywidget: expected it to be installed (fix: pip install '.[notebooks]')"
        ) from error

    class Stepping(anywidget.AnyWidget):
        _esm = script() + _GLUE
        _css = source("view.css")
        data = traitlets.Dict().tag(sync=True)

        def __init__(self) -> None:
            self.edits = Edits(trace)
            super().__init__(data=self.edits.data())
            self.on_msg(self._on_change)

        def _on_change(self, _: Any, change: dict[str, Any], __: Any) -> None:
            self.edits.handle(change)
            self.data = self.edits.data()

    return Stepping()
