"""Sharded gradients are normalised like whole ones, however they are placed, with at most one all_reduce."""

import pytest
from launch import run_ranks


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """What each of two ranks reports."""
    return run_ranks("gradient_norm_worker.py", 2, tmp_path_factory.mktemp("two"))


@pytest.mark.parametrize("how", ["rows", "tensor"])
@pytest.mark.parametrize("case", ["rows", "columns", "replicated", "replicated gradient", "partial gradient"])
def test_sharded_gradients_are_normalised_like_whole_ones(results, case, how):
    for result in results:
        assert result[f"{case}, {how}"]["error"] <= 1e-6


@pytest.mark.parametrize(("case", "expected"), [("rows", 1), ("columns", 1), ("replicated", 0)])
def test_one_all_reduce_serves_all_gradients(results, case, expected):
    """``rows``: for the vectors alone."""
    for result in results:
        assert result[f"{case}, rows"]["all_reduces"] == expected
