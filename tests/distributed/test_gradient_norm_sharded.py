"""Sharded gradients are normalised like whole ones, however they are placed, with at most one all_reduce a group."""

import pytest
from launch import run_ranks

ONE_MESH_DIMENSION = ["rows", "columns", "replicated", "replicated gradient", "partial gradient"]
TWO_MESH_DIMENSIONS = ["rows and columns", "rows twice", "replicated rows"]


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """World size -> what each rank reports."""
    return {
        size: run_ranks("gradient_norm_worker.py", size, tmp_path_factory.mktemp(f"ranks{size}")) for size in (2, 4)
    }


@pytest.mark.parametrize("how", ["rows", "factored"])
@pytest.mark.parametrize("case", ONE_MESH_DIMENSION + TWO_MESH_DIMENSIONS)
def test_sharded_gradients_are_normalised_like_whole_ones(results, case, how):
    for result in results[2 if case in ONE_MESH_DIMENSION else 4]:
        assert result[f"{case}, {how}"]["error"] <= 1e-6


@pytest.mark.parametrize(
    ("case", "how", "expected"),
    [
        ("rows", "rows", 1),  # for the vectors alone
        ("columns", "rows", 1),
        ("replicated", "rows", 0),
        ("rows", "factored", 1),
        ("replicated", "factored", 0),
        ("rows and columns", "factored", 2),
    ],
)
def test_one_all_reduce_a_process_group_serves_all_gradients(results, case, how, expected):
    for result in results[2 if case in ONE_MESH_DIMENSION else 4]:
        assert result[f"{case}, {how}"]["all_reduces"] == expected
