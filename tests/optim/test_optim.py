"""Each optimizer against an independent reference, and what all have in common."""

from __future__ import annotations

import json
import math
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from kvstore import optim
from kvstore.errors import DtypeError, OptimizerError
from kvstore.optim import schedules
from tests.kernels.forms import form
from tests.optim.cases import CASES

__all__ = ["form"]

REFERENCE = json.loads(Path(__file__).with_name("reference.json").read_text())
ALL = [kind() for kind in optim.OPTIMIZERS.values()]


def run(rule, weights, gradients):
    value, state = np.array(weights), rule.create_state(np.array(weights))
    steps = []
    for step, gradient in enumerate(gradients, 1):
        gradient = np.asarray(gradient, value.dtype)
        before = gradient.copy()
        rule.update(value, [gradient], state, step)
        np.testing.assert_array_equal(gradient, before)
        steps.append(value.copy())
    return steps


@pytest.mark.parametrize("result", REFERENCE["results"], ids=lambda r: f"{r['name']} {r['options']}")
def test_agrees_with_pytorch(form, result):
    assert (result["name"], result["options"]) in CASES
    rule = getattr(optim, result["name"])(**result["options"])
    steps = run(rule, REFERENCE["weights"], REFERENCE["gradients"])
    np.testing.assert_allclose(steps, result["steps"], rtol=1e-10, atol=1e-12)
    single = run(rule, np.array(REFERENCE["weights"], np.float32), REFERENCE["gradients"])
    np.testing.assert_allclose(single, result["steps"], rtol=2e-4, atol=2e-5)


def ftrl_oracle(weights, gradients, lr, beta, l1, l2):
    """McMahan et al. 2013, algorithm 1, one coordinate at a time."""
    out = []
    for i, w in enumerate(weights):
        n, z = 0.0, -w * (beta / lr + l2) - math.copysign(l1, w)
        for gradient in gradients:
            g = gradient[i]
            sigma = (math.sqrt(n + g * g) - math.sqrt(n)) / lr
            z += g - sigma * w
            n += g * g
            w = 0.0 if abs(z) <= l1 else -(z - math.copysign(l1, z)) / ((beta + math.sqrt(n)) / lr + l2)
        out.append(w)
    return out


def length(vector):
    return math.sqrt(sum(x * x for x in vector))


def lars_oracle(weights, gradients, lr, momentum, decay, trust, eps):
    """You et al. 2017, algorithm 1."""
    w, v = list(weights), [0.0] * len(weights)
    for g in gradients:
        local = trust * length(w) / (length(g) + decay * length(w) + eps)
        v = [momentum * vi + lr * local * (gi + decay * wi) for vi, gi, wi in zip(v, g, w, strict=True)]
        w = [wi - vi for wi, vi in zip(w, v, strict=True)]
    return w


def lamb_oracle(weights, gradients, lr, b1, b2, eps, decay):
    """You et al. 2020, algorithm 2."""
    w, m, v = list(weights), [0.0] * len(weights), [0.0] * len(weights)
    for t, g in enumerate(gradients, 1):
        m = [b1 * mi + (1 - b1) * gi for mi, gi in zip(m, g, strict=True)]
        v = [b2 * vi + (1 - b2) * gi * gi for vi, gi in zip(v, g, strict=True)]
        r = [mi / (1 - b1**t) / (math.sqrt(vi / (1 - b2**t)) + eps) for mi, vi in zip(m, v, strict=True)]
        u = [ri + decay * wi for ri, wi in zip(r, w, strict=True)]
        ratio = length(w) / length(u)
        w = [wi - lr * ratio * ui for wi, ui in zip(w, u, strict=True)]
    return w


def test_ftrl_lars_and_lamb_agree_with_the_papers(form):
    weights, gradients = REFERENCE["weights"], REFERENCE["gradients"]
    ftrl = optim.FTRL(lr=0.2, beta=0.7, l1=0.6, l2=0.1)
    expected = ftrl_oracle(weights, gradients, 0.2, 0.7, 0.6, 0.1)
    np.testing.assert_allclose(run(ftrl, weights, gradients)[-1], expected, rtol=1e-10, atol=1e-15)
    lars = optim.LARS(lr=0.5, momentum=0.8, weight_decay=0.01, trust_coefficient=0.02)
    expected = lars_oracle(weights, gradients, 0.5, 0.8, 0.01, 0.02, 1e-8)
    np.testing.assert_allclose(run(lars, weights, gradients)[-1], expected, rtol=1e-10)
    lamb = optim.LAMB(lr=0.05, weight_decay=0.1)
    expected = lamb_oracle(weights, gradients, 0.05, 0.9, 0.999, 1e-6, 0.1)
    np.testing.assert_allclose(run(lamb, weights, gradients)[-1], expected, rtol=1e-10)


def test_ftrl_keeps_zeros():
    value = np.zeros(3)
    rule = optim.FTRL(l1=10.0)
    rule.update(value, [np.ones(3)], rule.create_state(value), 1)
    assert value.tolist() == [0, 0, 0]


@pytest.mark.parametrize("rule", ALL, ids=lambda r: r.name)
def test_travels_as_a_name_and_numbers(rule):
    described = json.loads(json.dumps(rule.to_wire()))
    assert optim.from_wire(described) == rule
    scheduled = rule.with_hyperparameters(lr=schedules.Cosine(0.1, total=10, warmup=2))
    assert optim.from_wire(json.loads(json.dumps(scheduled.to_wire()))) == scheduled
    assert rule.with_hyperparameters(lr=0.5).lr == 0.5
    with pytest.raises(OptimizerError, match="'learning_rate'"):
        rule.with_hyperparameters(learning_rate=1.0)


@pytest.mark.parametrize(
    "described",
    [
        {},
        {"name": "os.system"},
        {"name": ["sgd"]},
        {"name": "sgd", "lr": "0.1"},
        {"name": "sgd", "lr": float("nan")},
        {"name": "sgd", "lr": -1.0},
        {"name": "sgd", "lr": True},
        {"name": "sgd", "momentum": [1]},
        {"name": "sgd", "__class__": 1},
        {"name": "sgd", "nesterov": True},
        {"name": "adam", "betas": [0.9, 1.0]},
        {"name": "adam", "betas": [0.9]},
        {"name": "adam", "lr": {"schedule": "exec"}},
        {"name": "adam", "lr": {"schedule": "step", "base": 1.0, "sizes": 3}},
        {"name": "adam", "clip_norm": 0},
        [],
    ],
    ids=str,
)
def test_hostile_descriptions_are_refused(described):
    with pytest.raises(OptimizerError):
        optim.from_wire(described)


def test_an_unknown_name_lists_the_known_ones():
    with pytest.raises(OptimizerError, match=r"sgd, adam.*'sdg'"):
        optim.from_wire({"name": "sdg"})


@pytest.mark.parametrize("rule", [r for r in ALL if not r.whole_tensor], ids=lambda r: r.name)
def test_pieces_give_the_same_bits_as_the_whole(rule):
    rng = np.random.default_rng(3)
    value, gradients = rng.standard_normal(100_000), rng.standard_normal((3, 100_000))
    whole = run(rule, value, gradients)[-1]
    cut = [
        run(rule, part, g)
        for part, g in zip(
            np.split(value, [33_333]), zip(*(np.split(g, [33_333]) for g in gradients), strict=True), strict=True
        )
    ]
    np.testing.assert_array_equal(np.concatenate([steps[-1] for steps in cut]), whole)


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16], ids=str)
def test_half_precision_keeps_float32_masters(form, dtype):
    """Updates far below the value's own precision are not lost."""
    rule = optim.SGD(lr=1e-4)
    value = np.ones(4, dtype)
    state = rule.create_state(value)
    assert state["master"].dtype == np.float32
    for step in range(1, 101):
        rule.update(value, [np.ones(4, dtype)], state, step)
    np.testing.assert_allclose(value.astype(np.float32), 0.99, atol=0.004)
    np.testing.assert_allclose(state["master"], 0.99, rtol=1e-5)


def test_dtypes():
    with pytest.raises(DtypeError, match=r"adam.*int32"):
        optim.Adam().check_dtype(np.dtype(np.int32))
    optim.Accumulate().check_dtype(np.dtype(np.int32))
    with pytest.raises(DtypeError, match=r"accumulate.*int32"):
        optim.Accumulate(clip_norm=1.0).check_dtype(np.dtype(np.int32))
    value = np.array([250], np.uint8)
    optim.Accumulate().update(value, [np.array([10], np.uint8)], {}, 1)
    assert value.tolist() == [4]


def test_clipping(form):
    value = np.zeros(2)
    optim.SGD(lr=1.0, clip_gradient=0.5).update(value, [np.array([3.0, -0.1])], {}, 1)
    assert value.tolist() == [-0.5, 0.1]
    rule = optim.SGD(lr=1.0, clip_norm=1.0)
    assert rule.whole_tensor
    value = np.zeros(2)
    rule.update(value, [np.array([3.0, 4.0])], {}, 1)
    np.testing.assert_allclose(value, [-0.6, -0.8], rtol=1e-6)


def test_schedules():
    step = schedules.Step(1.0, size=2, gamma=0.5)
    assert [step.at(n) for n in range(1, 6)] == [1, 1, 0.5, 0.5, 0.25]
    warm = schedules.Constant(1.0, warmup=4)
    assert [warm.at(n) for n in range(1, 7)] == [0.25, 0.5, 0.75, 1, 1, 1]
    cosine = schedules.Cosine(2.0, total=4, final=1.0)
    np.testing.assert_allclose([cosine.at(n) for n in (1, 3, 5, 9)], [2, 1.5, 1, 1])
    linear = schedules.Polynomial(1.0, total=2)
    assert [linear.at(n) for n in (1, 2, 3)] == [1, 0.5, 0]
    multi = schedules.MultiStep(1.0, milestones=(1, 3), gamma=0.1)
    np.testing.assert_allclose([multi.at(n) for n in (1, 2, 4)], [1, 0.1, 0.01])
    assert schedules.Exponential(1.0, gamma=0.5).at(3) == 0.25
    value = np.zeros(1)
    optim.SGD(lr=step).update(value, [np.ones(1)], {}, 5)
    assert value[0] == -0.25
