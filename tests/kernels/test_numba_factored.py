"""numba's kernels for normalised gradients: sums and steps as torch's, for any shape, with any number of threads."""

import itertools
import math

import pytest
import torch
from torch import nn

from hf_sai import SGDSaI
from hf_sai.kernels import numba_factored, numba_plain
from hf_sai.optim.rules import RULES, averaged, factored
from hf_sai.optim.update import sgd_sai

SHAPES = [(40, 130), (6, 3, 2, 2), (1, 70), (70, 1), (1, 1), (300,), (1,), ()]


def example(shape, dtype=torch.float32, seed=0):
    """(parameter, gradient, momentum); the gradient's rows are of very different sizes, one of them zero."""
    generator = torch.Generator().manual_seed(seed)
    p, g, m = (torch.randn(shape, generator=generator).to(dtype) for _ in range(3))
    if g.ndim > 1 and len(g) > 1:
        g *= torch.logspace(-3, 2, len(g)).view(-1, *[1] * (g.ndim - 1))
        g[0] = 0.0
    return p, g, m


def parts_of(*gradients, how="factored"):
    """Parts whose running means have seen one other gradient before."""
    params = [nn.Parameter(torch.zeros_like(g)) for g in gradients]
    optimizer = SGDSaI(params, update=how, foreach=False)
    for seed in range(2):
        for p, g in zip(params, gradients, strict=True):
            p.grad = example(g.shape, g.dtype, seed=10 + seed)[1] if seed == 0 else g.clone()
        if seed == 0:
            optimizer.step()
    return optimizer, optimizer.layout.parts()


def factors_of(g, how):
    _, parts = parts_of(g, how=how)
    return RULES[how].factors(parts)[0]


@pytest.mark.parametrize("shape", [(0,), (0, 3), (3, 0), (2, 0, 3)], ids=str)
def test_tensors_of_no_elements_are_updated_like_any_other(shape):
    p, g, m = (torch.ones(shape) for _ in range(3))
    ones = torch.ones([1] * len(shape))
    sgd_sai([p], [g], [m], [1.0], grad_factors=[(ones, ones)], lr=0.1, momentum=0.9, weight_decay=0.1)
    assert p.shape == m.shape == shape


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("piece", [1 << 20, 70], ids=["one piece", "pieces"])
@pytest.mark.parametrize("bad", [None, math.nan, math.inf, 1e30], ids=str)
def test_factors_and_running_means_are_the_plain_paths(dtype, piece, bad, monkeypatch):
    monkeypatch.setattr(numba_factored, "_PIECE", piece)
    gradients = [example(shape, dtype, seed)[1] for seed, shape in enumerate(SHAPES)]
    if bad is not None and dtype == torch.float32:
        for g in gradients:
            g.view(-1)[0] = bad
    _keep, ours = parts_of(*gradients)
    _kept, theirs = parts_of(*gradients)
    by_numba = numba_factored.factors(dict(enumerate(ours)))
    assert len(by_numba) == len(ours)  # it takes them all
    monkeypatch.setattr(factored, "FASTER", [])
    for index, (part, expected) in enumerate(zip(theirs, RULES["factored"].factors(theirs), strict=True)):
        assert [f.shape for f in by_numba[index]] == [f.shape for f in expected]
        for f, other in zip(by_numba[index], expected, strict=True):
            torch.testing.assert_close(f, other.to(f.dtype), rtol=2e-5, atol=0.0)
        assert ours[index].state["averaged_steps"] == part.state["averaged_steps"] == 2
        for key in factored.MEAN_SQUARES:
            if key in part.state:
                torch.testing.assert_close(ours[index].state[key], part.state[key], rtol=1e-5, atol=0.0)


def test_long_columns_are_summed_as_exactly_as_float32_allows():
    g = torch.rand(200_000, 8, generator=torch.Generator().manual_seed(0))
    _keep, parts = parts_of(g)
    before = parts[0].state["column_mean_square"].clone()
    numba_factored.factors({0: parts[0]})
    added = (parts[0].state["column_mean_square"] - 0.999 * before) / 0.001
    torch.testing.assert_close(added.double(), g.double().square().mean(0, keepdim=True), rtol=2e-3, atol=0.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("how", "nesterov"), [("rows", True), ("factored", False), ("factored", True)])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_step_is_that_of_the_plain_path_on_the_normalised_gradient(shape, how, nesterov, dtype):
    p, g, m = example(shape, dtype)
    factors = factors_of(g.clone(), how)
    q, n, unit, before = p.clone(), m.clone(), g.clone(), g.clone()
    for factor in factors:
        unit.mul_(factor)
    options = {"lr": 0.1, "momentum": 0.8, "nesterov": nesterov, "weight_decay": 0.1, "maximize": True}
    assert numba_factored.can_update(p, g, m)
    sgd_sai([p], [g], [m], [2.0], grad_factors=[factors], fused=True, **options)
    sgd_sai([q], [unit], [n], [2.0], foreach=False, **options)
    assert torch.equal(g, before)  # the kernel does not write it
    torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(m, n, rtol=1e-5, atol=1e-6)


def test_the_number_of_threads_changes_no_bit(monkeypatch):
    monkeypatch.setattr(numba_plain, "_MIN_ELEMENTS_FOR_THREADS", 0)
    monkeypatch.setattr(numba_factored, "_PIECE", 500)
    results = []
    for threads in (1, 2, 3, 7):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        lists = list(zip(*(example(shape) for shape in SHAPES[:4]), strict=True))
        _keep, parts = parts_of(*lists[1])
        made = numba_factored.factors(dict(enumerate(parts)))
        options = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.1, "fused": True}
        sgd_sai(*lists, [1.0, 2.0, 3.0, 4.0], grad_factors=[made[i] for i in range(4)], **options)
        results.append([*itertools.chain(*made.values()), *lists[0], *lists[2]])
    for other in results[1:]:
        assert all(map(torch.equal, results[0], other))


@pytest.mark.parametrize(
    ("options", "used"),
    [
        ({"fused": True}, True),
        ({"fused": True, "momentum": 0.0}, False),
        ({"fused": True, "momentum_dtype": torch.bfloat16}, False),
        ({}, True),
        ({"foreach": True}, False),
        ({"fused": False}, False),
    ],
    ids=str,
)
def test_when_the_step_is_the_kernels(options, used, monkeypatch):
    calls = []
    monkeypatch.setattr(numba_factored, "update", lambda *args, **kwargs: calls.append(args))
    p = nn.Parameter(torch.randn(40, 130))
    optimizer = SGDSaI([p], update="factored", **options)
    p.grad = torch.randn(40, 130)
    optimizer.step()
    assert not calls  # the momentum starts at the normalised gradient
    p.grad = torch.randn(40, 130)
    optimizer.step()
    assert bool(calls) == used


def test_a_momentum_that_is_switched_on_starts_at_the_normalised_gradient():
    p = nn.Parameter(torch.zeros(4, 4))
    optimizer = SGDSaI([p], update="rows", momentum=0.0)
    for _ in range(2):
        p.grad = 100 * torch.rand(4, 4)
        optimizer.step()
        optimizer.param_groups[0]["momentum"] = 0.9
    rows = optimizer.state[p]["momentum_buffer"].square().mean(1)
    torch.testing.assert_close(rows, torch.ones(4))


def test_it_makes_the_averaged_steps_of_all_that_it_can(monkeypatch):
    left = []
    monkeypatch.setattr(averaged, "FASTER", [*averaged.FASTER, lambda steps: left.extend(steps) or steps])
    params = [nn.Parameter(example(shape, torch.float32, 0)[0]) for shape in SHAPES]
    strided = nn.Parameter(torch.rand(5, 4).t())
    optimizer = SGDSaI([*params, strided], update="averaged")
    for p in (*params, strided):
        p.grad = torch.rand_like(p)
    optimizer.step()
    assert [step.part.param.shape for step in left] == [strided.shape]
