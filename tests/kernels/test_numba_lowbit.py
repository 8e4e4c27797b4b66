"""numba's kernels for momenta in fewer bits equal the plain path: parameters, codes and scales, and at the edges."""

import copy

import numpy as np
import pytest
import torch

from hf_sai.kernels import choice, numba_lowbit, numba_plain
from hf_sai.optim.layout import Part
from hf_sai.optim.momentum import QuantizedMomentum, allocate, load, momentum_of, store
from hf_sai.optim.update import sgd_sai

FORMATS = [torch.bfloat16, "8bit", "4bit"]
SIZES = [4096, 4098, 5000, 70_000]  # whole blocks, and blocks that end early


def example(size, momentum_dtype, seed=0):
    """(parameter, gradient, momentum) whose blocks have sizes far apart, one of them zero."""
    generator = torch.Generator().manual_seed(seed)
    p, g, m = (torch.randn(size, generator=generator) for _ in range(3))
    sizes = torch.logspace(-6, 3, -(-size // 128)).repeat_interleave(128)[:size]
    g, m = g * sizes, m * sizes
    g[256:512] = m[256:512] = 0.0
    kept = empty_momentum(p, momentum_dtype)
    store(kept, m)
    return p, g, kept


def empty_momentum(p, momentum_dtype):
    part = Part(p, {"momentum_dtype": momentum_dtype}, {})
    allocate(part)
    return momentum_of(part)


def step(p, g, m, **options):
    settings = {"lr": 1e-2, "momentum": 0.9, "weight_decay": 0.1} | options
    sgd_sai([p], [g], [m], [3.0], **settings)


def parts(m):
    return [m.codes, m.scales] if isinstance(m, QuantizedMomentum) else [m]


def value(m):
    return load(m).float()


@pytest.mark.parametrize("momentum_dtype", FORMATS, ids=str)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(
    "options",
    [{}, {"maximize": True, "weight_decay": 0.0}, {"lr": torch.tensor(0.1)}, {"nesterov": True}],
    ids=str,
)
def test_three_steps_are_those_of_the_plain_path(momentum_dtype, size, options):
    p, g, m = example(size, momentum_dtype)
    q, n = p.clone(), copy.deepcopy(m)
    assert numba_lowbit.can_update(p, g, m)
    for _ in range(3):
        step(p, g, m, **options)
        step(q, g, n, foreach=False, **options)
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)
        for ours, theirs in zip(parts(m), parts(n), strict=True):
            if ours.dtype == torch.uint8:
                # bitsandbytes takes the farther neighbour, too, next to a midpoint; the codes of zeros mean nothing.
                differ = ours != theirs
                differ[256:512] = False
                differ[128:256] &= momentum_dtype == "8bit"
                assert differ.float().mean() <= 5e-3
            else:
                torch.testing.assert_close(ours, theirs, rtol=8e-3 if ours.dtype == torch.bfloat16 else 1e-6, atol=0.0)
        q.copy_(p)  # what rounding decided differently does not add up
        for ours, theirs in zip(parts(m), parts(n), strict=True):
            theirs.copy_(ours)


@pytest.mark.parametrize("momentum_dtype", FORMATS, ids=str)
def test_the_number_of_threads_changes_no_bit(momentum_dtype, monkeypatch):
    monkeypatch.setattr(numba_plain, "_MIN_ELEMENTS_FOR_THREADS", 0)
    results = []
    for threads in (1, 2, 3, 7):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        p, g, m = example(5000, momentum_dtype)
        step(p, g, m)
        results.append([p, *parts(m)])
    for other in results[1:]:
        assert all(map(torch.equal, results[0], other))


@pytest.mark.parametrize("kind", ["8bit", "4bit"])
def test_no_two_midpoints_begin_with_the_same_16_bits(kind):
    values, first, midpoints = numba_lowbit.nearest_code_tables(kind)
    beginnings = midpoints[:-1].view(np.uint32) >> 16
    assert len(set(beginnings.tolist())) == len(midpoints) - 1 == len(values) - 1
    assert len(first) == 65536


@pytest.mark.parametrize("momentum_dtype", ["8bit", "4bit"])
def test_every_value_gets_its_nearest_code(momentum_dtype):
    """With momentum next to 0 the new momentum is the gradient."""
    g = torch.linspace(-1, 1, 8192)
    g[::128] = 1.0  # the scale of every block
    p = torch.zeros_like(g)
    m = empty_momentum(p, momentum_dtype)
    step(p, g, m, momentum=1e-30)
    codes = torch.from_numpy(numba_lowbit.nearest_code_tables(momentum_dtype)[0])
    nearest = (g[:, None] - codes).abs().min(1).values
    torch.testing.assert_close((value(m) - g).abs(), nearest, rtol=0.0, atol=1e-6)


@pytest.mark.parametrize("momentum_dtype", FORMATS, ids=str)
@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
def test_what_is_not_finite_does_not_pass_for_a_number(momentum_dtype, bad):
    p, g, m = example(5000, momentum_dtype)
    g[1000] = bad
    step(p, g, m)
    assert not p[1000].isfinite()
    assert p.isfinite().sum() == p.numel() - 1
    assert not value(m)[1000].isfinite()
    assert value(m)[:768].isfinite().all()


def test_bfloat16_rounds_to_the_nearest_and_ties_to_even():
    below, above = torch.tensor([1.0, 1.0078125]).bfloat16()
    g = torch.tensor([1.001, 1.00390625, 1.007, -1.001, 1.01171875], dtype=torch.float32)
    m = torch.zeros(5, dtype=torch.bfloat16)
    step(torch.zeros(5), g, m, momentum=1e-30, fused=True)
    assert torch.equal(m, g.bfloat16())
    assert torch.equal(m[:3], torch.stack([below, below, above]))


@pytest.mark.parametrize("momentum_dtype", FORMATS, ids=str)
@pytest.mark.parametrize(
    ("asked", "used"),
    [
        ({}, True),
        ({"fused": True}, True),
        ({"fused": False}, False),
        ({"foreach": True}, False),
        ({"foreach": False}, False),
    ],
    ids=str,
)
def test_when_the_kernels_are_used(momentum_dtype, asked, used, monkeypatch):
    calls = []
    monkeypatch.setattr(numba_lowbit, "update", lambda *args, **kwargs: calls.append(args))
    step(*example(4096, momentum_dtype), **asked)
    assert bool(calls) == used


@pytest.mark.parametrize("momentum_dtype", FORMATS, ids=str)
def test_without_numba_and_for_what_no_kernel_takes_the_plain_path_does_it(momentum_dtype, monkeypatch):
    p, g, m = example(5000, momentum_dtype)
    assert not numba_lowbit.can_update(p.double(), g.double(), m)
    assert not numba_lowbit.can_update(p, g.bfloat16(), m)
    assert not numba_lowbit.can_update(p, g, p)
    q, n = p.clone(), copy.deepcopy(m)
    monkeypatch.setattr(choice, "_imported", lambda name: None)
    step(p, g, m)
    step(q, g, n, foreach=False)
    torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)
