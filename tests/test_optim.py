import copy
import re

import numpy as np
import pytest

import minicnn as mc
from minicnn import optim, to_cpu, to_gpu
from minicnn.backend import prefer
from strategies import LAYOUTS, laid_out

WRITABLE = [layout for layout in LAYOUTS if layout not in ("read-only", "big-endian")]

CASES = [
    (optim.SGD, {"lr": 0.1}),
    (optim.SGD, {"lr": 0.1, "weight_decay": 0.05}),
    (optim.SGD, {"lr": 0.1, "momentum": 0.9}),
    (optim.SGD, {"lr": 0.1, "momentum": 0.9, "dampening": 0.3, "weight_decay": 0.05}),
    (optim.SGD, {"lr": 0.1, "momentum": 0.9, "nesterov": True}),
    (optim.SGD, {"lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 0.05}),
    (optim.Adam, {}),
    (optim.Adam, {"lr": 0.02, "betas": (0.8, 0.95), "eps": 1e-3}),
    (optim.Adam, {"lr": 0.02, "weight_decay": 0.05}),
    (optim.Adam, {"lr": 0.02, "amsgrad": True, "weight_decay": 0.05, "betas": (0.8, 0.5)}),
    (optim.AdamW, {}),
    (optim.AdamW, {"lr": 0.02, "weight_decay": 0.2}),
    (optim.AdamW, {"lr": 0.02, "weight_decay": 0.0}),
    (optim.AdamW, {"lr": 0.02, "amsgrad": True, "betas": (0.8, 0.5)}),
    (optim.RMSprop, {}),
    (optim.RMSprop, {"lr": 0.02, "alpha": 0.9, "eps": 1e-3, "weight_decay": 0.05}),
    (optim.RMSprop, {"lr": 0.02, "momentum": 0.9}),
    (optim.RMSprop, {"lr": 0.02, "centered": True}),
    (optim.RMSprop, {"lr": 0.02, "centered": True, "momentum": 0.9, "weight_decay": 0.05}),
]
every_case = pytest.mark.parametrize(("make", "kwargs"), CASES)


class Model:
    """Parameters with gradients, and nothing else."""

    def __init__(self, **params):
        self.params = params
        self.grads = {name: np.zeros_like(p) for name, p in params.items()}

    def named_params(self):
        for name, p in self.params.items():
            yield name, p, self.grads[name]

    def map_arrays(self, convert):
        self.params = {name: convert(p) for name, p in self.params.items()}
        self.grads = {name: convert(g) for name, g in self.grads.items()}


def random_model(dtype=np.float64):
    rng = np.random.default_rng(0)
    return Model(
        **{"0.weight": rng.standard_normal((3, 4)).astype(dtype), "0.bias": np.ones(4, dtype)}
    )


def draw_gradients(model, step):
    """Gradients of step `step`: each has its own scale, and one element is zero."""
    for k, (_, _, g) in enumerate(model.named_params()):
        rng = np.random.default_rng([step, k])
        values = rng.standard_normal(g.shape) * 10.0 ** rng.integers(-3, 2, g.shape)
        values.flat[0] = 0
        g[...] = values


def train(model, optimizer, steps):
    for step in steps:
        draw_gradients(model, step)
        optimizer.step()


def values(model):
    return {name: p.copy() for name, p, _ in model.named_params()}


def assert_equal(got, expected):
    assert got.keys() == expected.keys()
    for name in expected:
        np.testing.assert_array_equal(got[name], expected[name], strict=True)


@pytest.mark.parametrize(("dtype", "tolerance"), [("float64", 1e-12), ("float32", 2e-5)])
@every_case
def test_steps_equal_pytorch(torch, make, kwargs, dtype, tolerance):
    model = random_model(dtype)
    optimizer = make(model, **kwargs)
    theirs = {name: torch.tensor(p, requires_grad=True) for name, p, _ in model.named_params()}
    oracle = getattr(torch.optim, make.__name__)(theirs.values(), **kwargs)
    for step in range(20):
        if step == 10:
            optimizer.lr = oracle.param_groups[0]["lr"] = 0.005
        draw_gradients(model, step)
        for name, _, g in model.named_params():
            theirs[name].grad = torch.tensor(g)
        optimizer.step()
        oracle.step()
        state = optimizer.state_dict()
        assert state.pop("step") == step + 1
        for name, p, _ in model.named_params():
            t = theirs[name]
            np.testing.assert_allclose(p, t.detach().numpy(), rtol=tolerance, atol=tolerance / 10)
            for slot, a in oracle.state[t].items():
                if slot != "step" and a is not None:
                    ours = state.pop(f"{name}.{slot}")
                    np.testing.assert_allclose(ours, a, rtol=tolerance, atol=tolerance / 10)
        assert not state, "slots that PyTorch lacks"


# One parameter that starts at 1; its values after each gradient, worked out by hand.
@pytest.mark.parametrize(
    ("make", "kwargs", "gradients", "expected"),
    [
        # 1 - 0.1 * 0.5
        (optim.SGD, {"lr": 0.1}, [0.5], [0.95]),
        # g = 0.5 + 0.2 * 1
        (optim.SGD, {"lr": 0.1, "weight_decay": 0.2}, [0.5], [0.93]),
        # b = 0.5, then 0.9 * 0.5 + 0.5
        (optim.SGD, {"lr": 0.1, "momentum": 0.9}, [0.5, 0.5], [0.95, 0.855]),
        # b = 0.5, then 0.9 * 0.5 + 0.6 * 0.5
        (
            optim.SGD,
            {"lr": 0.1, "momentum": 0.9, "dampening": 0.4},
            [0.5, 0.5],
            [0.95, 0.875],
        ),
        # 0.5 + 0.9 * 0.5
        (optim.SGD, {"lr": 0.1, "momentum": 0.9, "nesterov": True}, [0.5], [0.905]),
        # m = 0.05, v = 0.00025; then m = -0.005, v = 0.00049975, so lr * (-0.005 / 0.19) / 0.5
        (optim.Adam, {"lr": 0.1, "eps": 0}, [0.5, -0.5], [0.9, 0.9 + 0.1 / 19]),
        # eps is added outside of the root: 1e-8 / (1e-8 + 1e-8)
        (optim.Adam, {"lr": 0.1}, [1e-8], [0.95]),
        # The decay is all there is to the gradient, so its size does not matter.
        (optim.Adam, {"lr": 0.5, "weight_decay": 0.1, "eps": 0}, [0.0], [0.5]),
        (optim.AdamW, {"lr": 0.5, "weight_decay": 0.1}, [0.0], [0.95]),
        # v = 4, then 1, of which amsgrad keeps 4
        (optim.Adam, {"lr": 0.1, "betas": (0, 0), "eps": 0}, [2, 1], [0.9, 0.8]),
        (optim.Adam, {"lr": 0.1, "betas": (0, 0), "eps": 0, "amsgrad": True}, [2, 1], [0.9, 0.85]),
        # v = 0.25 * 4
        (optim.RMSprop, {"lr": 0.1, "alpha": 0.75, "eps": 1}, [2], [0.9]),
        # m = 0.2 * 2, v = 0.2 * 4, v - m**2 = 0.64
        (optim.RMSprop, {"lr": 0.1, "alpha": 0.8, "eps": 0, "centered": True}, [2], [0.75]),
        # b = 2, then 0.5 * 2 + 0
        (
            optim.RMSprop,
            {"lr": 0.1, "alpha": 0.75, "eps": 0, "momentum": 0.5},
            [2, 0],
            [0.8, 0.7],
        ),
    ],
)
def test_first_steps_by_hand(make, kwargs, gradients, expected):
    model = Model(w=np.array([1.0]))
    optimizer = make(model, **kwargs)
    for g, p in zip(gradients, expected):
        model.grads["w"][...] = g
        optimizer.step()
        np.testing.assert_allclose(model.params["w"], p, rtol=1e-12)


@every_case
def test_only_parameters_change_and_only_in_place(make, kwargs):
    model = random_model(np.float32)
    before = values(model)
    arrays = [a for _, p, g in model.named_params() for a in (p, g)]
    optimizer = make(model, **kwargs)
    train(model, optimizer, range(2))
    assert all(a is b for a, b in zip(arrays, (a for _, *pg in model.named_params() for a in pg)))
    for name, p, g in model.named_params():
        assert p.dtype == np.float32
        assert (p != before[name]).any()
        gradient = g.copy()
        draw_gradients(model, 1)
        np.testing.assert_array_equal(g, gradient)
    slots = {a.dtype for key, a in optimizer.state_dict().items() if key != "step"}
    assert slots <= {np.dtype(np.float32)}


@every_case
def test_numpy_hyperparameters_leave_float32_arithmetic_float32(make, kwargs):
    plain, numpy = random_model(np.float32), random_model(np.float32)
    strong = {k: np.float64(v) if isinstance(v, float) else v for k, v in kwargs.items()}
    with_numpy = make(numpy, **strong)
    with_numpy.lr = np.float64(with_numpy.lr)
    train(plain, make(plain, **kwargs), range(5))
    train(numpy, with_numpy, range(5))
    assert_equal(values(numpy), values(plain))


@pytest.mark.parametrize("layout", WRITABLE)
@every_case
def test_memory_layout_does_not_matter(make, kwargs, layout):
    plain = random_model()
    odd = Model(**{name: laid_out(p, layout) for name, p, _ in plain.named_params()})
    train(plain, make(plain, **kwargs), range(3))
    optimizer = make(odd, **kwargs)
    train(odd, optimizer, range(3))
    assert_equal(values(odd), values(plain))
    assert all(a.flags.c_contiguous for a in optimizer.state_dict().values())


@pytest.mark.parametrize("shape", [(), (0,), (0, 3)])
@every_case
def test_scalar_and_empty_parameters(make, kwargs, shape):
    model = Model(w=np.ones(shape))
    model.grads["w"][...] = 1.0
    make(model, **kwargs).step()
    assert model.params["w"].shape == shape
    assert (model.params["w"] < 1).all()


@every_case
def test_nan_gradient_reaches_its_own_element_only(make, kwargs):
    model = random_model()
    optimizer = make(model, **kwargs)
    train(model, optimizer, range(2))
    model.grads["0.weight"][1, 2] = np.nan
    optimizer.step()
    expected = np.zeros((3, 4), bool)
    expected[1, 2] = True
    np.testing.assert_array_equal(np.isnan(model.params["0.weight"]), expected)
    assert np.isfinite(model.params["0.bias"]).all()


def test_centered_rmsprop_stays_finite_under_a_constant_gradient():
    # v - m**2 tends to zero, and rounding takes it below.
    model = Model(w=np.zeros(1000, np.float32))
    model.grads["w"][...] = np.random.default_rng(0).standard_normal(1000)
    optimizer = optim.RMSprop(model, lr=1e-6, alpha=0.5, centered=True)
    for _ in range(40):
        optimizer.step()
    state = optimizer.state_dict()
    assert (state["w.square_avg"] < state["w.grad_avg"] ** 2).any(), "case not reached"
    assert np.isfinite(model.params["w"]).all()


def test_zero_grad_clears_in_place():
    model = random_model()
    draw_gradients(model, 0)
    arrays = dict(model.grads)
    optim.SGD(model, lr=0.1).zero_grad()
    for name, g in arrays.items():
        assert model.grads[name] is g
        assert not g.any()


def test_frozen_parameters_may_leave_but_none_may_join():
    model = random_model()
    optimizer = optim.Adam(model)
    bias = model.params.pop("0.bias")
    train(model, optimizer, range(1))
    np.testing.assert_array_equal(bias, 1)
    model.params["1.weight"] = model.grads["1.weight"] = np.ones(2)
    before = values(model)
    with pytest.raises(
        ValueError,
        match=r"^Adam: 1\.weight: expected no such parameter as when .*, got numpy float64 \(2,\)",
    ):
        optimizer.step()
    assert_equal(values(model), before)
    assert optimizer.step_count == 1


@pytest.mark.parametrize("changed", [np.ones((3, 5)), np.ones((3, 4), np.float32)])
def test_changed_parameter_is_refused(changed):
    model = random_model()
    optimizer = optim.SGD(model, lr=0.1)
    model.params["0.weight"] = changed
    message = (
        f"SGD: 0.weight: expected numpy float64 (3, 4) as when the optimiser was built, "
        f"got numpy {changed.dtype} {changed.shape}"
    )
    with pytest.raises(ValueError, match=re.escape(message)):
        optimizer.step()


@pytest.mark.parametrize(
    ("make", "kwargs", "keys"),
    [
        (optim.SGD, {"lr": 0.1}, []),
        (optim.SGD, {"lr": 0.1, "momentum": 0.9}, ["momentum_buffer"]),
        (optim.Adam, {}, ["exp_avg", "exp_avg_sq"]),
        (optim.AdamW, {"amsgrad": True}, ["exp_avg", "exp_avg_sq", "max_exp_avg_sq"]),
        (optim.RMSprop, {}, ["square_avg"]),
        (
            optim.RMSprop,
            {"centered": True, "momentum": 0.9},
            ["square_avg", "grad_avg", "momentum_buffer"],
        ),
    ],
)
def test_state_dict_keys(make, kwargs, keys):
    model = random_model()
    state = make(model, **kwargs).state_dict()
    assert list(state) == [
        "step",
        *(f"{name}.{key}" for name in ("0.weight", "0.bias") for key in keys),
    ]
    assert state["step"].dtype == np.int64
    assert state["step"].shape == ()


@every_case
def test_resumed_run_is_bit_identical(tmp_path, make, kwargs):
    safetensors = pytest.importorskip("safetensors.numpy")
    whole, resumed = random_model(np.float32), random_model(np.float32)
    optimizer = make(whole, **kwargs)
    train(whole, optimizer, range(4))
    safetensors.save_file(optimizer.state_dict(), tmp_path / "state")
    for name, p, _ in whole.named_params():
        resumed.params[name][...] = p
    train(whole, optimizer, range(4, 8))

    second = make(resumed, **kwargs)
    second.load_state_dict(safetensors.load_file(tmp_path / "state"))
    train(resumed, second, range(4, 8))
    assert_equal(values(resumed), values(whole))
    assert_equal(second.state_dict(), optimizer.state_dict())


def test_state_dict_shares_no_memory():
    model = random_model()
    optimizer = optim.Adam(model)
    train(model, optimizer, range(1))
    state = optimizer.state_dict()
    saved = {key: a.copy() for key, a in state.items()}
    train(model, optimizer, range(1, 2))
    assert_equal(state, saved)
    optimizer.load_state_dict(state)
    assert_equal(optimizer.state_dict(), saved)
    train(model, optimizer, range(1, 2))
    assert_equal(state, saved)


def test_load_state_dict_keeps_the_dtype_of_the_parameter():
    model = random_model(np.float32)
    optimizer = optim.Adam(model)
    state = {k: a.astype(">f8") + 0.1 for k, a in optimizer.state_dict().items() if k != "step"}
    optimizer.load_state_dict({**state, "step": np.array(3, np.uint8)})
    loaded = optimizer.state_dict()
    assert loaded["step"] == 3
    np.testing.assert_array_equal(
        loaded["0.bias.exp_avg"], np.full(4, 0.1, np.float32), strict=True
    )


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        (
            {"0.bias.exp_avg": None},
            ValueError,
            r"state: expected the keys of state_dict\(\), got missing \['0\.bias\.exp_avg'\] and",
        ),
        ({"step": None}, ValueError, r"state: .* got missing \['step'\]"),
        ({"7.w": np.ones(1)}, ValueError, r"state: .* got missing \[\] and unexpected \['7\.w'\]"),
        (
            {"0.weight.exp_avg": np.ones((4, 3))},
            ValueError,
            r"0\.weight\.exp_avg: expected shape \(3, 4\), got \(4, 3\)",
        ),
        (
            {"0.bias.exp_avg_sq": np.ones(4, int)},
            TypeError,
            r"0\.bias\.exp_avg_sq: expected a float array, got int64",
        ),
        ({"step": np.array(-1)}, ValueError, "step: expected an integer >= 0, got -1"),
        ({"step": np.array(1.5)}, TypeError, "step: expected an integer, got float64"),
        ({"step": np.array([1])}, ValueError, r"step: expected shape \(\), got \(1,\)"),
    ],
)
def test_bad_state_is_refused_and_changes_nothing(changes, error, message):
    model = random_model()
    optimizer = optim.Adam(model)
    train(model, optimizer, range(2))
    before = optimizer.state_dict()
    bad = {key: a + 1 for key, a in before.items()} | changes
    with pytest.raises(error, match=rf"^Adam\.load_state_dict: {message}"):
        optimizer.load_state_dict({key: a for key, a in bad.items() if a is not None})
    assert_equal(optimizer.state_dict(), before)


NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("make", "kwargs", "error", "message"),
    [
        (optim.SGD, {"lr": -1}, ValueError, "SGD: lr: expected a number >= 0, got -1"),
        (optim.SGD, {"lr": NAN}, ValueError, "SGD: lr: expected a finite number >= 0, got nan"),
        (optim.SGD, {"lr": "0.1"}, TypeError, "SGD: lr: expected a number >= 0, got '0.1'"),
        (optim.SGD, {"lr": True}, TypeError, "SGD: lr: expected a number >= 0, got True"),
        (
            optim.SGD,
            {"lr": 1, "momentum": -0.1},
            ValueError,
            "SGD: momentum: expected a number >= 0, got -0.1",
        ),
        (
            optim.SGD,
            {"lr": 1, "dampening": 1.5},
            ValueError,
            "SGD: dampening: expected a number >= 0 and <= 1, got 1.5",
        ),
        (
            optim.SGD,
            {"lr": 1, "weight_decay": INF},
            ValueError,
            "SGD: weight_decay: expected a finite number >= 0, got inf",
        ),
        (
            optim.SGD,
            {"lr": 1, "nesterov": True},
            ValueError,
            "SGD: nesterov: expected momentum > 0 and dampening == 0 with it, "
            "got momentum=0.0 and dampening=0.0",
        ),
        (
            optim.SGD,
            {"lr": 1, "momentum": 0.9, "dampening": 0.1, "nesterov": True},
            ValueError,
            "SGD: nesterov: expected momentum > 0 and dampening == 0 with it, "
            "got momentum=0.9 and dampening=0.1",
        ),
        (optim.Adam, {"lr": -1}, ValueError, "Adam: lr: expected a number >= 0, got -1"),
        (
            optim.Adam,
            {"betas": (1, 0.9)},
            ValueError,
            "Adam: betas[0]: expected a number >= 0 and < 1, got 1",
        ),
        (
            optim.AdamW,
            {"betas": (0.9, -0.5)},
            ValueError,
            "AdamW: betas[1]: expected a number >= 0 and < 1, got -0.5",
        ),
        (optim.Adam, {"betas": 0.9}, ValueError, "Adam: betas: expected two numbers, got 0.9"),
        (optim.Adam, {"eps": -1}, ValueError, "Adam: eps: expected a number >= 0, got -1"),
        (
            optim.AdamW,
            {"weight_decay": -1},
            ValueError,
            "AdamW: weight_decay: expected a number >= 0, got -1",
        ),
        (
            optim.RMSprop,
            {"alpha": 1},
            ValueError,
            "RMSprop: alpha: expected a number >= 0 and < 1, got 1",
        ),
        (optim.RMSprop, {"eps": -1}, ValueError, "RMSprop: eps: expected a number >= 0, got -1"),
        (
            optim.RMSprop,
            {"momentum": NAN},
            ValueError,
            "RMSprop: momentum: expected a finite number >= 0, got nan",
        ),
        (
            optim.RMSprop,
            {"weight_decay": -1},
            ValueError,
            "RMSprop: weight_decay: expected a number >= 0, got -1",
        ),
    ],
)
def test_bad_hyperparameters(make, kwargs, error, message):
    with pytest.raises(error, match=f"^{re.escape(message)}$"):
        make(random_model(), **kwargs)


def test_lr_is_checked_when_set():
    optimizer = optim.AdamW(random_model(), lr=0.1)
    with pytest.raises(ValueError, match="AdamW: lr: expected a finite number >= 0, got inf"):
        optimizer.lr = INF
    assert optimizer.lr == 0.1


def test_model_needs_named_params():
    with pytest.raises(TypeError, match="Adam: model: expected a layer or a model, got list"):
        optim.Adam([np.ones(2)])


def test_map_arrays_moves_the_whole_state():
    model = random_model()
    optimizer = optim.Adam(model, amsgrad=True)
    train(model, optimizer, range(1))
    before = optimizer.state_dict()
    assert to_cpu(optimizer) is optimizer
    assert_equal(optimizer.state_dict(), before)

    for moved in (model, optimizer):
        moved.map_arrays(lambda a: a.astype(np.float32))
    train(model, optimizer, range(1, 2))
    state = optimizer.state_dict()
    assert {a.dtype for key, a in state.items() if key != "step"} == {np.dtype(np.float32)}


@every_case
def test_cupy_equals_numpy(cupy, make, kwargs):
    cpu, gpu = random_model(), to_gpu(random_model())
    on_cpu, on_gpu = make(cpu, **kwargs), make(gpu, **kwargs)
    for step in range(5):
        draw_gradients(cpu, step)
        for name, g in cpu.grads.items():
            gpu.grads[name] = to_gpu(g)
        assert optim.clip_grad_norm(gpu, 1.0) == pytest.approx(optim.clip_grad_norm(cpu, 1.0))
        on_cpu.step()
        on_gpu.step()
    for name, p in cpu.params.items():
        np.testing.assert_allclose(to_cpu(gpu.params[name]), p, rtol=1e-10)
    on_cpu.load_state_dict(on_gpu.state_dict())
    on_gpu.load_state_dict(on_cpu.state_dict())
    assert_equal(on_gpu.state_dict(), on_cpu.state_dict())


@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("max_norm", [1e-3, 1.0, 1e3])
def test_clip_grad_norm_equals_pytorch(torch, max_norm, dtype):
    model = random_model(dtype)
    draw_gradients(model, 0)
    theirs = [torch.zeros(g.shape, requires_grad=True) for _, _, g in model.named_params()]
    for t, (_, _, g) in zip(theirs, model.named_params()):
        t.data = t.data.to(getattr(torch, dtype))
        t.grad = torch.tensor(g)
    expected = torch.nn.utils.clip_grad_norm_(theirs, max_norm)
    norm = optim.clip_grad_norm(model, max_norm)
    assert isinstance(norm, float)
    tolerance = 1e-12 if dtype == "float64" else 1e-6
    assert norm == pytest.approx(expected.item(), rel=tolerance)
    for t, (_, _, g) in zip(theirs, model.named_params()):
        np.testing.assert_allclose(g, t.grad.numpy(), rtol=tolerance)


def test_clip_grad_norm_by_hand():
    model = Model(a=np.zeros(2), b=np.zeros(1, np.float32))
    model.grads["a"][...] = 2, 3
    model.grads["b"][...] = 6
    assert optim.clip_grad_norm(model, 7.5) == 7
    np.testing.assert_array_equal(model.grads["a"], [2, 3])
    assert optim.clip_grad_norm(model, 1) == 7
    np.testing.assert_allclose(model.grads["a"], np.array([2, 3]) / (7 + 1e-6), rtol=1e-15)
    np.testing.assert_allclose(model.grads["b"], 6 / 7, rtol=1e-6)
    assert model.grads["b"].dtype == np.float32


def test_clip_grad_norm_sums_float32_in_float64():
    model = Model(w=np.zeros(4, np.float32))
    model.grads["w"][...] = 1e30  # its square overflows float32
    assert optim.clip_grad_norm(model, 1) == pytest.approx(2e30, rel=1e-6)
    np.testing.assert_allclose(model.grads["w"], 0.5, rtol=1e-6)


@pytest.mark.parametrize("bad", [NAN, INF, -INF])
def test_clip_grad_norm_leaves_non_finite_gradients_alone(bad):
    model = random_model()
    draw_gradients(model, 0)
    model.grads["0.bias"][1] = bad
    before = {name: g.copy() for name, g in model.grads.items()}
    norm = optim.clip_grad_norm(model, 1)
    np.testing.assert_equal(norm, abs(bad))
    assert_equal(model.grads, before)


def test_clip_grad_norm_without_parameters():
    assert optim.clip_grad_norm(Model(), 1) == 0


def test_clip_grad_value():
    model = Model(w=np.zeros(6, np.float32))
    g = model.grads["w"]
    g[...] = [-3, -0.5, 0.5, 3, NAN, INF]
    optim.clip_grad_value(model, 2)
    assert model.grads["w"] is g
    np.testing.assert_array_equal(g, np.array([-2, -0.5, 0.5, 2, NAN, 2], np.float32), strict=True)


@pytest.mark.parametrize("clip", [optim.clip_grad_norm, optim.clip_grad_value])
@pytest.mark.parametrize("limit", [0, -1, NAN, INF])
def test_clip_refuses_a_bad_limit(clip, limit):
    model = random_model()
    draw_gradients(model, 0)
    before = {name: g.copy() for name, g in model.grads.items()}
    with pytest.raises(ValueError, match=rf"^{clip.__name__}: \w+: expected a .*number > 0, got"):
        clip(model, limit)
    assert_equal(model.grads, before)


@pytest.mark.parametrize("dtype", ["f4", "f8"])
@pytest.mark.parametrize(
    "make",
    [
        lambda m: optim.SGD(m, lr=0.1),
        lambda m: optim.SGD(m, lr=0.1, momentum=0.9, dampening=0.1, weight_decay=0.01),
        lambda m: optim.SGD(m, lr=0.1, momentum=0.9, weight_decay=0.01, nesterov=True),
        lambda m: optim.Adam(m, weight_decay=0.1),
        lambda m: optim.Adam(m, amsgrad=True),
        lambda m: optim.AdamW(m),
        lambda m: optim.RMSprop(m, weight_decay=0.1),
        lambda m: optim.RMSprop(m, centered=True, momentum=0.9),
    ],
)
def test_numba_updates_are_those_of_numpy_to_the_last_bit(make, dtype):
    pytest.importorskip("numba", reason="Numba is not installed")
    pairs = []
    for version in ("numpy", "numba"):
        model = mc.Sequential(
            mc.Linear(130, 150, rng=0, dtype=dtype), mc.Linear(3, 5, rng=1, dtype=dtype)
        )
        optimizer = make(model)
        rng = np.random.default_rng(0)
        for _ in range(3):
            for _, _, g in model.named_params():
                g[...] = rng.standard_normal(g.shape)
            with prefer(version):
                optimizer.step()
        pairs.append(model.state_dict() | optimizer.state_dict())
    for name, a in pairs[0].items():
        np.testing.assert_array_equal(pairs[1][name], a, err_msg=name)


@pytest.mark.parametrize("dtype", ["f4", "f8"])
@pytest.mark.parametrize("version", ["numpy", "numba"])
@pytest.mark.parametrize(
    ("make", "slots"),
    [
        (lambda m: optim.SGD(m, lr=0.1, momentum=0.9), ["momentum_buffer"]),
        (
            lambda m: optim.SGD(m, lr=0.1, momentum=0.9, weight_decay=0.1, nesterov=True),
            ["momentum_buffer"],
        ),
        (lambda m: optim.Adam(m, amsgrad=True), ["exp_avg"]),
        (lambda m: optim.AdamW(m), ["exp_avg"]),
        (
            lambda m: optim.RMSprop(m, centered=True, momentum=0.9),
            ["grad_avg", "momentum_buffer"],
        ),
    ],
)
def test_denormal_means_and_buffers_become_zero(make, slots, version, dtype):
    if version == "numba":
        pytest.importorskip("numba", reason="Numba is not installed")
    tiny = np.finfo(dtype).tiny
    kept = np.tile(np.array([4 * tiny, -4 * tiny, 1.0, np.nan, np.inf], dtype), 7)  # normal
    lost = np.tile(np.array([tiny, -tiny, tiny / 4, -tiny / 4, 0.0], dtype), 7)  # after a step
    model = Model(w=np.zeros(70, dtype))
    optimizer = make(model)
    for slot in slots:
        optimizer.state_of("w")[slot][:] = np.concatenate([kept, lost])
    model.grads["w"][:] = 0
    with np.errstate(invalid="ignore"), prefer(version):
        optimizer.step()
    for slot in slots:
        a = optimizer.state_of("w")[slot]
        assert (a[:35] != 0).all()
        np.testing.assert_array_equal(np.isnan(a[:35]), np.isnan(kept))
        np.testing.assert_array_equal(a[35:], 0)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("size", [1, 15, 40_000])
@pytest.mark.parametrize("version", ["numpy", "numba"])
def test_no_step_where_a_gradient_is_not_finite(version, size, bad):
    pytest.importorskip("numba", reason="Numba is not installed")
    model = Model(w=np.ones(3, np.float32), v=np.ones(size, np.float32), u=np.ones(2))
    optimizer = optim.SGD(model, lr=0.5, momentum=0.9)
    before, params = values(model), list(model.named_params())
    with prefer(version):
        for name, at in (("v", 0), ("v", size // 2), ("v", size - 1), ("w", 2), ("u", 0)):
            for g in model.grads.values():
                g[...] = 1
            model.grads[name][at] = bad
            assert not optimizer.step_if_finite(params)
            assert not optim.all_finite(*model.grads.values())
            model.grads[name][at] = 1
        assert_equal(values(model), before)
        assert optimizer.step_count == 0
        assert optim.all_finite(*model.grads.values())
        assert optimizer.step_if_finite(params)
    assert optimizer.step_count == 1
    assert all((p == 0.5).all() for p in model.params.values())


def test_a_step_of_ones_own_is_made_where_gradients_are_finite():
    class Twice(optim.SGD):
        def step(self):
            super().step()
            super().step()

    model = Model(w=np.zeros(2, np.float32))
    optimizer = Twice(model, lr=1)
    model.grads["w"][...] = [1, np.nan]
    assert not optimizer.step_if_finite(list(model.named_params()))
    assert optimizer.step_count == 0
    model.grads["w"][1] = 1
    assert optimizer.step_if_finite(list(model.named_params()))
    np.testing.assert_array_equal(model.params["w"], [-2, -2])


def test_a_step_in_numba_takes_arrays_as_they_are_now():
    """Other arrays in the place of a parameter, of a gradient, of what the optimiser keeps."""
    pytest.importorskip("numba", reason="Numba is not installed")
    whole, parts = random_model(np.float32), random_model(np.float32)
    calm, moved = optim.Adam(whole), optim.Adam(parts)
    for k in range(6):
        for optimizer, model in ((calm, whole), (moved, parts)):
            draw_gradients(model, k)
            with prefer("numba"):
                optimizer.step()
        old = list(parts.params.values()) + list(parts.grads.values())
        if k == 0:
            parts.params["0.weight"] = parts.params["0.weight"].copy()
        elif k == 1:
            parts.grads["0.bias"] = parts.grads["0.bias"].copy()
        elif k == 2:
            parts.grads["0.weight"] = np.asfortranarray(parts.grads["0.weight"])
        elif k == 3:
            moved.map_arrays(np.copy)
        elif k == 4:
            parts, moved = copy.deepcopy((parts, moved))
        for a in old:  # what is not used any more
            if not any(a is b for b in (*parts.params.values(), *parts.grads.values())):
                a[...] = np.nan
    assert_equal(values(parts), values(whole))
