"""The measurement itself: right at any size and dtype, bounded, and refusing what is no measurement."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import reference_gsnr

from hf_sai.optim.gsnr import MAX_EPS_SHARE, MAX_GSNR_RATIO, UNMEASURED, gsnr_from_moments, measure_gsnr


def gradient(shape=(37, 11), mean=0.0, seed=0, dtype=torch.float64):
    return (torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) + mean).to(dtype)


@pytest.mark.parametrize("mean", [0.0, 0.5, 3.0])
def test_equals_the_two_pass_definition(mean):
    g = gradient(mean=mean, dtype=torch.float32)
    assert measure_gsnr([g], eps=0.0)[0] == pytest.approx(reference_gsnr(g), rel=1e-12)


@pytest.mark.parametrize("scale", [1e-20, 1e-9, 1e-3, 1.0, 1e6, 1e15])
def test_float32_gradients_of_any_size_measure_within_one_percent_of_eps_zero(scale):
    g = gradient(mean=0.2)
    assert measure_gsnr([(g * scale).float()])[0] == pytest.approx(reference_gsnr(g), rel=1e-2)


@pytest.mark.parametrize(
    ("dtype", "scale"),
    [(torch.float16, 1e-4), (torch.float16, 1e4), (torch.bfloat16, 1e-20), (torch.bfloat16, 1e15)],
)
def test_half_precision_gradients_measure_within_one_percent(dtype, scale):
    g = gradient(mean=0.2)
    assert measure_gsnr([(g * scale).to(dtype)])[0] == pytest.approx(reference_gsnr(g), rel=1e-2)


def test_a_million_float16_elements_do_not_overflow():
    g = gradient((1000, 1000), dtype=torch.float16) * 1000
    assert measure_gsnr([g])[0] == pytest.approx(1000.0, rel=1e-2)


@settings(deadline=None, max_examples=50)
@given(st.integers(2, 200), st.floats(-5, 5), st.floats(1e-12, 1e12), st.integers(0, 1000))
def test_gsnr_does_not_depend_on_the_gradients_size(n, mean, scale, seed):
    g = gradient((n,), mean=mean, seed=seed)
    one, other = measure_gsnr([g.float(), (g * scale).float()])
    assert other == pytest.approx(one, rel=1e-2)
    assert math.sqrt(n - 1) / (1 + MAX_EPS_SHARE) * (1 - 1e-6) <= one <= MAX_GSNR_RATIO * math.sqrt(n)


def test_one_element_has_gsnr_one():
    assert measure_gsnr([torch.tensor([1e-3]), torch.tensor(-7.0)]) == [1.0, 1.0]


@pytest.mark.parametrize("noise", [0.0, 1e-9, 1e-4])
def test_constant_and_nearly_constant_gradients_are_bounded(noise):
    g = 2.5 + noise * gradient((400,))
    assert measure_gsnr([g])[0] == pytest.approx(MAX_GSNR_RATIO * math.sqrt(400))
    assert measure_gsnr([g], eps=0.0)[0] == pytest.approx(MAX_GSNR_RATIO * math.sqrt(400))


@pytest.mark.parametrize(
    "unusable",
    [torch.zeros(3), torch.empty(0), torch.tensor([1.0, math.inf]), torch.tensor([math.nan, 1.0])],
    ids=["zero", "empty", "inf", "nan"],
)
def test_unusable_gradients_stay_unmeasured_and_do_not_disturb_others(unusable):
    g = gradient(dtype=torch.float32)
    assert measure_gsnr([unusable, g, unusable]) == [UNMEASURED, measure_gsnr([g])[0], UNMEASURED]


def test_each_gradient_may_have_its_own_eps():
    g = gradient(dtype=torch.float32)
    with_eps, limited, without = measure_gsnr([g, g, g], eps=[1e-3, 1.0, 0.0])
    assert with_eps == pytest.approx(reference_gsnr(g, eps=1e-3))
    assert limited == pytest.approx(reference_gsnr(g) / (1 + MAX_EPS_SHARE))
    assert without == pytest.approx(reference_gsnr(g))


def test_a_large_mean_loses_no_digits():
    g = gradient((1_000_000,), mean=8.0, dtype=torch.float32)
    assert measure_gsnr([g], eps=0.0)[0] == pytest.approx(reference_gsnr(g), rel=1e-9)


def test_rounding_below_zero_variance_is_the_bound_not_an_error():
    assert gsnr_from_moments(4, 4.0, math.nextafter(4.0, 0.0), eps=0.0) == MAX_GSNR_RATIO * 2
