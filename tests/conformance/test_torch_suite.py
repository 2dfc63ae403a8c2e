"""PyTorch's sample inputs and error inputs: none fails, nearly all pass, errors are refused."""

import pytest

from conformance import torch_layers, torch_suite


@pytest.fixture(scope="module")
def outcomes(torch):
    pytest.importorskip("expecttest", reason="expecttest, which PyTorch's tests import, is missing")
    return torch_suite.outcomes()


def test_no_sample_fails(outcomes):
    assert [o for o in outcomes if o.result == "failed"] == []


@pytest.mark.parametrize("kind", ["op", "layer"])
def test_at_least_95_of_100_pass(kind, outcomes):
    samples = [o for o in outcomes if o.kind == kind and not o.error]
    assert len(samples) > 300, "few samples found: has PyTorch's list moved?"
    assert sum(o.result == "passed" for o in samples) >= 0.95 * len(samples)


def test_every_optimizer_passes_what_it_has_arguments_for(outcomes):
    samples = [o for o in outcomes if o.kind == "optimizer" and not o.error]
    assert {o.name for o in samples if o.result == "passed"} == set(torch_layers.OPTIMIZERS)
    assert {o.detail for o in samples if o.result != "passed"} <= {
        "the argument maximize of optimisers"
    }


def test_all_error_inputs_are_refused_by_name(outcomes):
    errors = [o for o in outcomes if o.error]
    assert len(errors) > 50
    assert [o for o in errors if o.result == "failed"] == []
    # Parameter groups and tensors as hyper-parameters do not exist here.
    assert {o.kind for o in errors if o.result == "refused"} <= {"optimizer"}


def test_every_op_of_ours_is_in_the_suite(outcomes):
    """Pooling, losses, norms: whatever has a forward in `minicnn.ops`."""
    from minicnn import ops

    tested = {o.name.rpartition(".")[2] for o in outcomes if o.kind == "op"}
    renamed = {"bce_with_logits": "binary_cross_entropy_with_logits"}
    ours = [name.removesuffix("_forward") for name in ops.__all__ if name.endswith("_forward")]
    ours.remove("conv_block")  # three of them in one
    assert {renamed.get(name, name) for name in ours} <= tested
