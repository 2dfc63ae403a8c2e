import math
import re

import numpy as np
import pytest

from minicnn.schedules import (
    SCHEDULES,
    ConstantLR,
    CosineLR,
    OneCycleLR,
    StepLR,
    Warmup,
    make_schedule,
)

EXAMPLES = [
    ConstantLR(0.1),
    StepLR(0.1, 3),
    CosineLR(0.1, 10, 0.01),
    OneCycleLR(0.1, 10),
    Warmup(3, CosineLR(0.1, 10)),
]


def rates(schedule, steps):
    return [schedule(step) for step in range(steps)]


def pytorch_rates(torch, lr, make, steps):
    """Rates that PyTorch's scheduler ``make(optimizer)`` uses for the first `steps` updates."""
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=lr)
    scheduler = make(optimizer)
    out = []
    for step in range(steps):
        out.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        if step < steps - 1:
            scheduler.step()
    return out


@pytest.mark.parametrize(("step_size", "gamma"), [(1, 0.9), (3, 0.5), (50, 0.1)])
def test_step_equals_pytorch(torch, step_size, gamma):
    expected = pytorch_rates(
        torch, 0.3, lambda o: torch.optim.lr_scheduler.StepLR(o, step_size, gamma), 20
    )
    np.testing.assert_allclose(rates(StepLR(0.3, step_size, gamma), 20), expected, rtol=1e-12)


@pytest.mark.parametrize("min_lr", [0.0, 0.02])
@pytest.mark.parametrize("total_steps", [1, 2, 25])
def test_cosine_equals_pytorch(torch, total_steps, min_lr):
    expected = pytorch_rates(
        torch,
        0.3,
        lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, total_steps, min_lr),
        total_steps + 1,
    )
    got = rates(CosineLR(0.3, total_steps, min_lr), total_steps + 1)
    np.testing.assert_allclose(got, expected, rtol=1e-10, atol=1e-15)


@pytest.mark.parametrize("factors", [{}, {"div_factor": 4.0, "final_div_factor": 10.0}])
@pytest.mark.parametrize("pct_start", [0.0, 0.3, 0.55, 1.0])
@pytest.mark.parametrize("total_steps", [2, 7, 100])
def test_one_cycle_equals_pytorch(torch, total_steps, pct_start, factors):
    expected = pytorch_rates(
        torch,
        0.3,
        lambda o: torch.optim.lr_scheduler.OneCycleLR(
            o, 0.3, total_steps, pct_start=pct_start, cycle_momentum=False, **factors
        ),
        total_steps,
    )
    got = rates(OneCycleLR(0.3, total_steps, pct_start, **factors), total_steps)
    np.testing.assert_allclose(got, expected, rtol=1e-10, atol=1e-15)


def test_warmup_equals_pytorch(torch):
    def make(optimizer):
        lrs = torch.optim.lr_scheduler
        rise = lrs.LinearLR(optimizer, start_factor=1 / 6, total_iters=5)
        return lrs.SequentialLR(optimizer, [rise, lrs.CosineAnnealingLR(optimizer, 20)], [5])

    expected = pytorch_rates(torch, 0.3, make, 25)
    np.testing.assert_allclose(rates(Warmup(5, CosineLR(0.3, 20)), 25), expected, rtol=1e-10)


def test_constant():
    assert rates(ConstantLR(0.1), 3) == [0.1, 0.1, 0.1]


def test_step_by_hand():
    assert rates(StepLR(1.0, 2, gamma=0.5), 6) == [1, 1, 0.5, 0.5, 0.25, 0.25]


def test_cosine_by_hand():
    got = rates(CosineLR(1.0, 4, min_lr=0.2), 5)
    fall = math.cos(math.pi / 4)
    np.testing.assert_allclose(got, [1, 0.6 + 0.4 * fall, 0.6, 0.6 - 0.4 * fall, 0.2], rtol=1e-15)


def test_one_cycle_by_hand():
    # The peak is at step 0.5 * 6 - 1 = 2, the end at step 5.
    got = rates(OneCycleLR(8.0, 6, pct_start=0.5, div_factor=4, final_div_factor=2), 6)
    np.testing.assert_allclose(got, [2, 5, 8, 8 - 7 / 4, 1 + 7 / 4, 1], rtol=1e-15)


@pytest.mark.parametrize("pct_start", [0.1, 1.0])  # where PyTorch divides by zero
def test_one_cycle_with_its_peak_at_an_end(pct_start):
    got = rates(OneCycleLR(1.0, 10, pct_start), 10)
    assert got[0 if pct_start == 0.1 else 9] == 1
    assert max(got) == 1
    assert OneCycleLR(1.0, 1, pct_start=1.0)(0) == 1


def test_warmup_by_hand():
    assert rates(Warmup(3, StepLR(1.0, 2, 0.5)), 7) == [0.25, 0.5, 0.75, 1, 1, 0.5, 0.5]
    assert rates(Warmup(0, StepLR(1.0, 2, 0.5)), 3) == [1, 1, 0.5]


def test_warmup_takes_any_function_of_the_step():
    assert rates(Warmup(1, lambda step: 2.0 - step), 3) == [1, 2, 1]


@pytest.mark.parametrize("schedule", EXAMPLES, ids=repr)
def test_rate_depends_on_the_step_alone(schedule):
    forwards = rates(schedule, 15)
    assert [schedule(step) for step in reversed(range(15))] == forwards[::-1]


@pytest.mark.parametrize(
    ("schedule", "end", "last"),
    [
        (CosineLR(0.1, 10, 0.01), 10, 0.01),
        (OneCycleLR(0.1, 10), 9, 0.1 / 25 / 1e4),
        (OneCycleLR(0.1, 10, pct_start=1), 9, 0.1),
        (Warmup(3, CosineLR(0.1, 10, 0.01)), 13, 0.01),
    ],
    ids=repr,
)
def test_last_rate_is_held(schedule, end, last):
    assert schedule(end - 1) != pytest.approx(last)
    assert [schedule(step) for step in (end, end + 1, 1000)] == pytest.approx([last] * 3)


@pytest.mark.parametrize("schedule", EXAMPLES, ids=repr)
@pytest.mark.parametrize(("step", "error"), [(-1, ValueError), (1.5, TypeError), (None, TypeError)])
def test_bad_step(schedule, step, error):
    name = type(schedule).__name__
    with pytest.raises(error, match=f"^{name}: step: expected an integer >= 0, got {step}$"):
        schedule(step)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ConstantLR(-1), "ConstantLR: lr: expected a number >= 0, got -1"),
        (lambda: StepLR(-1, 3), "StepLR: lr: expected a number >= 0, got -1"),
        (lambda: StepLR(1, 0), "StepLR: step_size: expected an integer >= 1, got 0"),
        (lambda: StepLR(1, 3, 1.5), "StepLR: gamma: expected a number >= 0 and <= 1, got 1.5"),
        (lambda: CosineLR(math.inf, 3), "CosineLR: lr: expected a finite number >= 0, got inf"),
        (lambda: CosineLR(1, 0), "CosineLR: total_steps: expected an integer >= 1, got 0"),
        (lambda: CosineLR(1, 3, 2), "CosineLR: min_lr: expected a number >= 0 and <= 1, got 2"),
        (
            lambda: OneCycleLR(math.nan, 3),
            "OneCycleLR: max_lr: expected a finite number >= 0, got nan",
        ),
        (lambda: OneCycleLR(1, 0), "OneCycleLR: total_steps: expected an integer >= 1, got 0"),
        (
            lambda: OneCycleLR(1, 3, 1.1),
            "OneCycleLR: pct_start: expected a number >= 0 and <= 1, got 1.1",
        ),
        (
            lambda: OneCycleLR(1, 3, div_factor=0),
            "OneCycleLR: div_factor: expected a number > 0, got 0",
        ),
        (
            lambda: OneCycleLR(1, 3, final_div_factor=-2),
            "OneCycleLR: final_div_factor: expected a number > 0, got -2",
        ),
        (lambda: Warmup(-1, ConstantLR(1)), "Warmup: steps: expected an integer >= 0, got -1"),
        (
            lambda: make_schedule("linear", 1, 3),
            "make_schedule: name: expected one of constant, step, cosine, onecycle, got 'linear'",
        ),
        (
            lambda: make_schedule("cosine", -1, 3),
            "make_schedule: lr: expected a number >= 0, got -1",
        ),
        (
            lambda: make_schedule("constant", 1, 0),
            "make_schedule: total_steps: expected an integer >= 1, got 0",
        ),
        (
            lambda: make_schedule("cosine", 1, 3, -1),
            "make_schedule: warmup: expected an integer >= 0, got -1",
        ),
        (
            lambda: make_schedule("cosine", 1, 3, 3),
            "make_schedule: warmup: expected fewer than total_steps=3, got 3",
        ),
        (
            lambda: make_schedule("onecycle", 1, 3, 1),
            "make_schedule: warmup: expected 0 with 'onecycle', got 1; "
            "this schedule has a warm-up of its own",
        ),
    ],
)
def test_bad_values(make, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        make()


def test_warmup_needs_a_schedule():
    with pytest.raises(TypeError, match=r"^Warmup: then: expected a schedule, got 0\.1$"):
        Warmup(3, 0.1)


@pytest.mark.parametrize(
    ("name", "warmup", "expected"),
    [
        ("constant", 0, ConstantLR(0.1)),
        ("constant", 5, Warmup(5, ConstantLR(0.1))),
        ("step", 0, StepLR(0.1, 7, 0.1)),
        ("step", 5, Warmup(5, StepLR(0.1, 5, 0.1))),
        ("cosine", 0, CosineLR(0.1, 20)),
        ("cosine", 5, Warmup(5, CosineLR(0.1, 15))),
        ("onecycle", 0, OneCycleLR(0.1, 20)),
    ],
)
def test_make_schedule(name, warmup, expected):
    assert make_schedule(name, 0.1, 20, warmup) == expected


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("total_steps", [1, 2, 7])
def test_short_runs(name, total_steps):
    got = rates(make_schedule(name, 0.1, total_steps), total_steps)
    assert all(0 < lr <= 0.1 for lr in got)
