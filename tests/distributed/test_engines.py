"""Under torch's engines every rank sees the same g-SNR as one process, with one all_reduce, and trains the same."""

import pytest
from launch import run_ranks

TWO = [
    "ddp",
    "fsdp2",
    "tp",
    "fsdp1",
    "fsdp2_fused",
    "fsdp2_foreach",
    "fsdp2_normalize",
    "fsdp1_leaves",
    "fsdp1_fused",
    "fsdp1_normalize",
    "fsdp2_offload",
    "bf16",
    "late_and_broken",
    "late_ddp",
    "late_fsdp2",
    "late_fsdp1",
    "shapes_fsdp1",
    "shapes_fsdp2",
    "low_bit_refused",
    "flat_parameters_refused",
    "scaler_ddp",
    "scaler_fsdp2",
    "scaler_fsdp1",
    "hf_tp",
]
FOUR = ["hsdp", "fsdp2_tp", "fsdp2", "fsdp1", "late_fsdp2", "late_fsdp1", "shapes_fsdp1"]
PARAMETERS = 23
#: Process groups over which something is sharded: the most all_reduces that the measuring step may run.
GROUPS = {"ddp": 0, "fsdp2_tp": 2}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """World size -> what each rank reports; one launch per world size, for its time is mostly imports."""
    return {
        2: run_ranks("engines_worker.py", 2, tmp_path_factory.mktemp("two"), *TWO),
        4: run_ranks("engines_worker.py", 4, tmp_path_factory.mktemp("four"), *FOUR),
    }


MODES = [(2, mode) for mode in TWO[:11]] + [(4, mode) for mode in FOUR[:4]]


@pytest.mark.parametrize(("world_size", "mode"), MODES)
def test_gsnr_and_loss_equal_those_of_one_process(runs, world_size, mode):
    for result in runs[world_size]:
        assert result["world_size"] == world_size
        assert result[mode]["gsnr"] <= 1e-6
        assert result[mode]["loss"] <= 1e-5


@pytest.mark.parametrize(("world_size", "mode"), MODES)
def test_at_most_one_all_reduce_per_group_while_measuring_and_no_collective_later(runs, world_size, mode):
    for result in runs[world_size]:
        first, second, *later = result[mode]["collectives"]
        assert set(first) | set(second) <= {"allreduce_"}
        for sizes in (*first.values(), *second.values()):  # in the second the A matrices, whose first gradient is zero
            assert len(sizes) <= GROUPS.get(mode, 1)
            assert max(sizes) <= 4 * PARAMETERS  # never a gradient: the largest has 432 elements
        assert not any(later)


@pytest.mark.parametrize(("world_size", "mode"), MODES)
def test_momentum_has_the_parameters_placements(runs, world_size, mode):
    for result in runs[world_size]:
        assert result[mode]["same_placements"]
        assert (result[mode]["sharded"] > 0) == ("fsdp2" in mode or mode in ("hsdp", "tp"))


def test_transformers_tensor_parallelism_equals_one_process(runs):
    for result in runs[2]:
        assert result["hf_tp"]["gsnr"] <= 1e-6
        assert result["hf_tp"]["loss"] <= 1e-5
        assert result["hf_tp"]["same_placements"]
        assert result["hf_tp"]["sharded"] == 16


def test_empty_shards_were_among_what_was_tried(runs):
    assert any(result["fsdp2"]["empty"] for result in runs[2])
    assert all(result["fsdp2"]["empty"] for result in runs[4][1:])
    assert all(result["fsdp1"]["empty"] for result in runs[4])


def test_bf16_gradients_give_an_exact_gsnr(runs):
    for result in runs[2]:
        assert result["bf16"]["measured"] >= 15
        assert result["bf16"]["gsnr"] <= 1e-9


def test_a_gradient_that_is_non_zero_or_nan_on_one_rank_is_judged_alike_on_all(runs):
    histories = [result["late_and_broken"]["history"] for result in runs[2]]
    assert histories[0] == histories[1]
    zero, broken, usable = histories[0]
    assert zero == [0.0, True]
    assert broken == [0.0, True]
    assert usable[0] > 0.0


@pytest.mark.parametrize(("world_size", "mode"), [(2, "ddp"), (2, "fsdp2"), (2, "fsdp1"), (4, "fsdp2"), (4, "fsdp1")])
def test_what_becomes_measurable_later_on_one_rank_first_is_measured_as_in_one_process(runs, world_size, mode):
    for result in runs[world_size]:
        assert result[f"late_{mode}"]["same_step"]
        assert result[f"late_{mode}"]["gsnr"] <= 1e-6
        assert result[f"late_{mode}"]["loss"] <= 1e-5


@pytest.mark.parametrize(("world_size", "mode"), [(2, "fsdp1"), (2, "fsdp2"), (4, "fsdp1")])
def test_grouping_goes_by_the_whole_parameters_shapes(runs, world_size, mode):
    for result in runs[world_size]:
        assert result[f"shapes_{mode}"]["names"]
        assert result[f"shapes_{mode}"]["shapes"]
    assert any(result[f"shapes_{mode}"]["cut"] for result in runs[world_size]) == (mode == "fsdp1")


def test_low_bit_momentum_and_stochastic_rounding_are_refused_for_slices_before_the_first_update(runs):
    for result in runs[2]:
        messages = result["low_bit_refused"]["messages"]
        assert len(messages) == 3
        assert all("use FSDP2" in message for message in messages)


def test_flat_parameters_are_refused_before_the_first_update_with_the_cure(runs):
    for result in runs[2]:
        refused = result["flat_parameters_refused"]
        assert "use_orig_params=True" in refused["made"]
        assert refused["stepped"] == refused["made"]
        assert refused["same"]


@pytest.mark.parametrize("mode", ["ddp", "fsdp2", "fsdp1"])
def test_overflow_on_one_rank_in_the_first_steps_is_skipped_on_all(runs, mode):
    for result in runs[2]:
        assert result[f"scaler_{mode}"]["untouched"] == [True, True]
        assert result[f"scaler_{mode}"]["scale"] == 256.0
        assert result[f"scaler_{mode}"]["gsnr"] <= 1e-6
        assert result[f"scaler_{mode}"]["loss"] <= 1e-5
