"""Weight files: they come back bit for bit, damage is noticed, PyTorch reads them."""

import json
import struct

import numpy as np
import pytest

from minicnn import BatchNorm2d, Conv2d, Linear, ReLU, Sequential, load, save
from minicnn.checkpoint import load_arrays


def network(rng=0):
    rng = np.random.default_rng(rng)
    return Sequential(Conv2d(1, 2, 3, rng=rng), BatchNorm2d(2), ReLU(), Linear(4, 3, rng=rng))


def test_bit_for_bit(tmp_path):
    model, other = network(), network(rng=1)
    model.forward(np.random.default_rng(0).random((2, 1, 5, 6), np.float32))
    save(model, tmp_path / "w.safetensors")
    assert load(other, tmp_path / "w.safetensors") is other
    for name, a in other.state_dict().items():
        expected = model.state_dict()[name]
        assert a.dtype == expected.dtype
        assert a.shape == expected.shape
        assert a.tobytes() == expected.tobytes()
    assert [p.name for p in tmp_path.iterdir()] == ["w.safetensors"]


def test_arrays_that_are_not_contiguous_are_saved_right(tmp_path):
    """safetensors itself writes wrong values for them."""
    layer = Linear(3, 2, rng=0)
    layer.params["weight"] = np.asfortranarray(layer.weight)
    save(layer, tmp_path / "w.safetensors")
    np.testing.assert_array_equal(load_arrays(tmp_path / "w.safetensors")["weight"], layer.weight)


def test_pytorch_reads_our_file_and_we_read_its(tmp_path, torch):
    st = pytest.importorskip("safetensors.torch")
    theirs = torch.nn.Sequential(
        torch.nn.Conv2d(1, 2, 3), torch.nn.BatchNorm2d(2), torch.nn.ReLU(), torch.nn.Linear(4, 3)
    )
    ours = network()
    save(ours, tmp_path / "ours.safetensors")
    theirs.load_state_dict(st.load_file(tmp_path / "ours.safetensors"), strict=True)
    for name, t in theirs.state_dict().items():
        np.testing.assert_array_equal(t.numpy(), ours.state_dict()[name])
    with torch.no_grad():
        theirs[0].weight += 1
    st.save_file(theirs.state_dict(), tmp_path / "theirs.safetensors")
    load(ours, tmp_path / "theirs.safetensors")
    x = np.random.default_rng(0).random((2, 1, 5, 6), np.float32)
    np.testing.assert_allclose(
        ours(x), theirs.eval()(torch.tensor(x)).detach().numpy(), rtol=1e-5, atol=1e-5
    )


def test_one_flipped_bit_in_any_tensor_is_noticed(tmp_path):
    path = tmp_path / "w.safetensors"
    save(network(), path)
    whole = bytearray(path.read_bytes())
    (header,) = struct.unpack("<Q", whole[:8])
    spans = json.loads(whole[8 : 8 + header])
    spans.pop("__metadata__")
    for name, entry in spans.items():
        damaged = whole.copy()
        damaged[8 + header + entry["data_offsets"][0]] ^= 1
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=rf"{name}: expected sha256 .* \(the file is damaged"):
            load(network(), path)


@pytest.mark.parametrize("keep", [0, 4, 20, -1])
def test_a_cut_file_is_refused(tmp_path, keep):
    path = tmp_path / "w.safetensors"
    save(network(), path)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ValueError, match=r"w.safetensors: expected a whole safetensors file"):
        load(network(), path)


def test_a_file_of_another_model_changes_nothing(tmp_path):
    save(Linear(4, 3, rng=0), tmp_path / "w.safetensors")
    model = network()
    before = model.state_dict()
    with pytest.raises(ValueError, match="expected the keys of this model"):
        load(model, tmp_path / "w.safetensors")
    for name, a in model.state_dict().items():
        np.testing.assert_array_equal(a, before[name])


def test_a_pickle_is_not_executed(tmp_path):
    import pickle

    class Bomb:
        def __reduce__(self):
            return open, (str(tmp_path / "executed"), "w")

    (tmp_path / "w.safetensors").write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(ValueError, match="expected a whole safetensors file"):
        load(network(), tmp_path / "w.safetensors")
    assert not (tmp_path / "executed").exists()


def test_missing_file_and_folder_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none.safetensors: expected a weight file"):
        load(network(), tmp_path / "none.safetensors")
    with pytest.raises(FileNotFoundError, match="expected a folder"):
        save(network(), tmp_path / "no" / "w.safetensors")


def test_a_failed_save_keeps_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "w.safetensors"
    save(network(), path)
    before = path.read_bytes()

    def no_space(fd):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", no_space)
    with pytest.raises(OSError, match="No space left"):
        save(network(rng=1), path)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["w.safetensors"]
