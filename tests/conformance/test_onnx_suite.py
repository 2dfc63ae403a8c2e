"""ONNX's backend tests: what is in scope passes, the rest passes or is refused by name."""

import pytest

pytest.importorskip("onnx.checker", reason="onnx, which carries the tests, is not installed")

from conformance import onnx_suite


@pytest.fixture(scope="module")
def outcomes():
    return onnx_suite.outcomes()


@pytest.mark.parametrize("kind", onnx_suite.KINDS)
def test_every_case_in_scope_passes(kind, outcomes):
    scope = [o for o in outcomes if o.kind == kind and not o.why_not]
    assert scope, "no case found: has the suite moved?"
    assert [o for o in scope if o.result != "passed"] == []


def test_nothing_fails_and_every_refusal_is_explained(outcomes):
    assert [o for o in outcomes if o.result == "failed"] == []
    refused = [o for o in outcomes if o.result == "refused"]
    assert [o for o in refused if not o.why_not] == []
    assert [o for o in refused if not o.detail.startswith("onnx: ") or "expected" not in o.detail
            or "got" not in o.detail] == []  # fmt: skip


def test_the_suite_is_as_large_as_it_was(outcomes):
    """A scope that shrank by mistake would pass all the more easily."""
    scope = {kind: sum(o.kind == kind and not o.why_not for o in outcomes)
             for kind in onnx_suite.KINDS}  # fmt: skip
    assert scope["node"] >= 150
    assert scope["pytorch-converted"] >= 40
    assert scope["pytorch-operator"] >= 9
    covered = {op for o in outcomes if not o.why_not for op in o.operators}
    assert covered >= onnx_suite.OURS


@pytest.mark.parametrize("name", ["resnet50", "squeezenet", "densenet121"])
def test_a_well_known_network_with_made_up_weights(name):
    """The nine of onnx fill their weights with one number each, in operators that it computes."""
    from pathlib import Path

    from onnx.backend.test.runner import Runner

    import onnx
    from minicnn.onnx import Backend

    folder = Path(onnx.__file__).parent / "backend/test/data/light"
    model = onnx.load(folder / f"light_{name}.onnx")
    stored = {t.name for t in model.graph.initializer}
    inputs = [Runner.generate_dummy_data(i) for i in model.graph.input if i.name not in stored]
    expected = onnx.TensorProto()
    expected.ParseFromString((folder / f"light_{name}_output_0.pb").read_bytes())
    (y,) = Backend.run_model(model, inputs)
    Runner.assert_similar_outputs([onnx.numpy_helper.to_array(expected)], [y], 1e-3, 1e-5)
