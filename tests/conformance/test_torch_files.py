"""Weights to and from ``torch.nn.Sequential``: a network trained there predicts the same here."""

import numpy as np
import pytest

import minicnn as mc
from minicnn import BatchNorm2d, Conv2d, Dropout, Flatten, Linear, MaxPool2d, ReLU, Sequential


def ours(rng=0):
    rng = np.random.default_rng(rng)
    return Sequential(
        Sequential(Conv2d(1, 8, 5, 2, rng=rng), BatchNorm2d(8), ReLU(), MaxPool2d(2)),
        Flatten(), Dropout(0.1, rng=rng), Linear(288, 10, rng=rng),
    )  # fmt: skip


def theirs(torch):
    nn = torch.nn
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Sequential(nn.Conv2d(1, 8, 5, 2), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2)),
        nn.Flatten(), nn.Dropout(0.1), nn.Linear(288, 10),
    )  # fmt: skip


def test_a_sequential_trained_in_pytorch_loads_and_predicts_the_same(tmp_path, torch):
    st = pytest.importorskip("safetensors.torch")
    train, test = mc.data.load("digits", "train"), mc.data.load("digits", "test")
    model = theirs(torch)
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    for i in range(0, 4992, 64):
        x, y = torch.tensor(train.x[i : i + 64]), torch.tensor(train.y[i : i + 64])
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
    st.save_file(model.state_dict(), tmp_path / "theirs.safetensors")
    network = mc.load(ours(), tmp_path / "theirs.safetensors")
    expected = model.eval()(torch.tensor(test.x)).detach().numpy()
    y = mc.predict(network, test.x)
    np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-5)
    assert (y.argmax(1) == test.y).mean() > 0.8  # it was trained


def test_a_network_trained_here_loads_there_strictly(tmp_path, torch):
    st = pytest.importorskip("safetensors.torch")
    train = mc.data.load("digits", "train")
    network = ours()
    trainer = mc.Trainer(network, mc.optim.Adam(network, lr=5e-3))
    for i in range(0, 640, 64):
        trainer.step(train.x[i : i + 64], train.y[i : i + 64])
    mc.save(network, tmp_path / "ours.safetensors")
    model = theirs(torch)
    model.load_state_dict(st.load_file(tmp_path / "ours.safetensors"), strict=True)
    x = train.x[:50]
    y = model.eval()(torch.tensor(x)).detach().numpy()
    np.testing.assert_allclose(network(x), y, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda s: s.pop("3.bias"), r"1 missing \['3.bias'\] and 0 unexpected"),
        (
            lambda s: s.update(extra=s["3.bias"].clone()),
            r"0 missing \[\] and 1 unexpected \['extra'\]",
        ),
        (lambda s: s.update({"3.bias": s["3.bias"][:9]}),
         r"3.bias: expected shape \(10,\), got \(9,\)"),
    ],
    ids=["missing", "unexpected", "shape"],
)  # fmt: skip
def test_keys_and_shapes_are_strict(change, words, tmp_path, torch):
    st = pytest.importorskip("safetensors.torch")
    state = {name: t.clone() for name, t in theirs(torch).state_dict().items()}
    change(state)
    st.save_file(state, tmp_path / "w.safetensors")
    network = ours()
    before = network.state_dict()
    with pytest.raises(ValueError, match=words):
        mc.load(network, tmp_path / "w.safetensors")
    for name, a in network.state_dict().items():
        np.testing.assert_array_equal(a, before[name])
