"""numba's kernels for normalised gradients: sums and steps as torch's, for any shape, with any number of threads."""

import itertools

import pytest
import torch
from torch import nn

from hf_sai import SGDSaI
from hf_sai.kernels import compiled, numba_factored, numba_kernel
from hf_sai.optim import update as functional
from hf_sai.optim.gradient_norm import gradient_factors
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


def factors_of(g, how):
    p = nn.Parameter(torch.zeros_like(g))
    p.grad = g
    optimizer = SGDSaI([p], update=how)
    optimizer.step()  # allocates
    p.grad = g
    return gradient_factors([p], how, optimizer.state)[p]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("piece", [1 << 20, 7], ids=["one piece", "pieces"])
@pytest.mark.parametrize("shape", [shape for shape in SHAPES if len(shape) > 1], ids=str)
def test_sums_of_rows_and_columns_are_torchs(shape, piece, dtype, monkeypatch):
    monkeypatch.setattr(numba_factored, "_PIECE", piece)
    _, g, _ = example(shape, dtype)
    ((rows, columns),) = numba_factored.sums_of_squares([g])
    squares = g.double().square()
    expected = squares.sum(tuple(range(1, g.ndim)), keepdim=True), squares.sum(0, keepdim=True)
    for ours, theirs in zip((rows, columns), expected, strict=True):
        assert ours.dtype == dtype
        torch.testing.assert_close(ours.double(), theirs, rtol=1e-6, atol=0.0)


def test_long_columns_are_summed_as_exactly_as_float32_allows():
    g = torch.rand(200_000, 8, generator=torch.Generator().manual_seed(0))
    ((_, columns),) = numba_factored.sums_of_squares([g])
    torch.testing.assert_close(columns.double(), g.double().square().sum(0, keepdim=True), rtol=1e-4, atol=0.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("how", ["rows", "tensor", "factored"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_step_is_that_of_the_plain_path_on_the_normalised_gradient(shape, how, dtype):
    p, g, m = example(shape, dtype)
    factors = factors_of(g.clone(), how)
    q, n, unit, before = p.clone(), m.clone(), g.clone(), g.clone()
    for factor in factors:
        unit.mul_(factor)
    options = {"lr": 0.1, "momentum": 0.8, "weight_decay": 0.1, "maximize": True}
    assert numba_factored.can_update(p, g, m)
    sgd_sai([p], [g], [m], [2.0], grad_factors=[factors], fused=True, **options)
    sgd_sai([q], [unit], [n], [2.0], foreach=False, **options)
    assert torch.equal(g, before)  # the kernel does not write it
    torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(m, n, rtol=1e-5, atol=1e-6)


def test_the_number_of_threads_changes_no_bit(monkeypatch):
    monkeypatch.setattr(numba_kernel, "_MIN_ELEMENTS_FOR_THREADS", 0)
    monkeypatch.setattr(numba_factored, "_PIECE", 500)
    results = []
    for threads in (1, 2, 3, 7):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        lists = list(zip(*(example(shape) for shape in SHAPES[:4]), strict=True))
        sums = numba_factored.sums_of_squares(lists[1])
        sgd_sai(
            *lists,
            [1.0, 2.0, 3.0, 4.0],
            grad_factors=sums,
            lr=0.1,
            momentum=0.9,
            weight_decay=0.1,
            fused=True,
        )
        results.append([*itertools.chain(*sums), *lists[0], *lists[2]])
    for other in results[1:]:
        assert all(map(torch.equal, results[0], other))


@pytest.mark.parametrize(
    ("options", "used"),
    [
        ({"fused": True}, True),
        ({"fused": True, "momentum": 0.0}, False),
        ({"fused": True, "momentum_dtype": torch.bfloat16}, False),
        ({}, False),  # so few elements do not wait for numba
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


def test_many_elements_wait_for_numba(monkeypatch):
    monkeypatch.setattr(compiled, "MIN_ELEMENTS_TO_COMPILE", 5000)
    monkeypatch.setattr(compiled, "MIN_AVERAGE_TO_COMPILE", 5000)
    calls = []
    monkeypatch.setattr(functional, "_factored", lambda *args, **kwargs: calls.append(args))
    p = nn.Parameter(torch.randn(40, 130))
    optimizer = SGDSaI([p], update="factored")
    for _ in range(2):
        p.grad = torch.randn(40, 130)
        optimizer.step()
    assert len(calls) == 1


def test_a_momentum_that_is_switched_on_starts_at_the_normalised_gradient():
    p = nn.Parameter(torch.zeros(4, 4))
    optimizer = SGDSaI([p], update="rows", momentum=0.0)
    for _ in range(2):
        p.grad = 100 * torch.rand(4, 4)
        optimizer.step()
        optimizer.param_groups[0]["momentum"] = 0.9
    rows = optimizer.state[p]["momentum_buffer"].square().mean(1)
    torch.testing.assert_close(rows, torch.ones(4))
