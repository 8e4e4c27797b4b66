"""Under DeepSpeed ZeRO the g-SNR of every parameter is that of one process, though DeepSpeed flattens them."""

import pytest
from launch import run_ranks

pytest.importorskip("bitsandbytes", reason="pip install 'hf-sai[quant]'")
pytest.importorskip("deepspeed", reason="pip install 'hf-sai[deepspeed]' (see docs/distributed.md)")

EXACT = [
    "zero1",
    "zero2",
    "zero3",
    "zero3_sub_groups",
    "zero1_fused",
    "zero2_normalize",
    "zero3_normalize",
    "zero2_clipped",
    "zero3_clipped",
    "zero2_offload",
    "zero3_offload",
]
BF16 = {
    "zero1_bf16": "BF16_Optimizer",
    "zero2_bf16": "DeepSpeedZeroOptimizer",
    "zero3_bf16": "DeepSpeedZeroOptimizer_Stage3",
}
FP16 = ["zero2_fp16", "zero3_fp16"]
RESUME = [f"resume{stage}{kind}" for stage in (1, 2, 3) for kind in ("", "_8bit")]
ACCELERATE = ["accelerate1", "accelerate3"]
LATE = ["late1", "late2", "late3"]
HABITS = [f"habits{stage}_{rule}" for stage in (2, 3) for rule in ("published", "factored")]
FOUR = ["zero1", "zero3", "zero1_factored", "zero3_factored"]
#: Rules that average over rows and columns in every step.
AVERAGING = [
    *(f"zero{stage}_{rule}" for stage in (1, 2, 3) for rule in ("rows", "factored", "nesterov")),
    "zero3_sub_groups_factored",
    "zero2_factored_clipped",
]
#: Momenta in another form -> the dtypes in which they are kept.
FORMS = {
    **{f"zero{stage}_{bits}": {"torch.uint8", "torch.float32"} for stage in (1, 2, 3) for bits in ("8bit", "4bit")},
    "zero2_8bit_factored": {"torch.uint8", "torch.float32"},
    "zero3_8bit_factored": {"torch.uint8", "torch.float32"},
    "zero3_bf16_momentum": {"torch.bfloat16"},
}


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """Each rank's report, all checks in one launch."""
    others = ["whole_shapes", "rounding_refused", "unknown_layout_refused"]
    checks = [
        *EXACT,
        *AVERAGING,
        *FORMS,
        *BF16,
        *FP16,
        *HABITS,
        *RESUME,
        *LATE,
        *others,
        *ACCELERATE,
    ]  # the last, for it imports transformers
    return run_ranks("zero_worker.py", 2, tmp_path_factory.mktemp("two"), *checks)


@pytest.fixture(scope="module")
def four(tmp_path_factory):
    """The same in four processes, some of which own nothing of small parameters."""
    return run_ranks("zero_worker.py", 4, tmp_path_factory.mktemp("four"), *FOUR, *LATE)


@pytest.mark.parametrize(
    ("ranks", "mode"), [("two", mode) for mode in EXACT + AVERAGING] + [("four", mode) for mode in FOUR]
)
def test_gsnr_and_loss_equal_those_of_one_process(request, ranks, mode):
    for result in request.getfixturevalue(ranks):
        assert result["world_size"] == {"two": 2, "four": 4}[ranks]
        assert result[mode]["type"] == ("DeepSpeedZeroOptimizer_Stage3" if "3" in mode else "DeepSpeedZeroOptimizer")
        assert result[mode]["gsnr"] <= 1e-6
        assert result[mode]["loss"] <= 1e-5


@pytest.mark.parametrize("mode", EXACT)
def test_one_all_reduce_while_measuring_and_none_later_for_all_flat_tensors(two, mode):
    for result in two:
        assert result[mode]["flats"] == (7 if mode == "zero3_sub_groups" else 2)
        first, second, *later = result[mode]["collectives"]
        for ((name, sizes),) in (first, second):  # in the second the A matrices, whose first gradient is zero
            assert name == "allreduce_"
            assert len(sizes) == 1
            assert sizes[0] <= 4 * 23  # four sums each, never a gradient: the largest has 432 elements
        assert not any(later)


@pytest.mark.parametrize("mode", AVERAGING)
def test_averages_take_one_all_reduce_a_step_for_each_flat_tensor_that_has_matrices(two, mode):
    for result in two:
        for step in result[mode]["collectives"][2:]:  # before, the A matrices are still to be measured
            assert all(name == "allreduce_" and len(sizes) == 1 for name, sizes in step)
            assert 1 <= len(step) <= result[mode]["flats"]


@pytest.mark.parametrize("mode", BF16)
def test_bf16_gsnr_is_that_of_float32_to_rounding_and_the_same_on_all_ranks(two, mode):
    assert two[0][mode]["values"] == two[1][mode]["values"]
    for result in two:
        assert result[mode]["type"] == BF16[mode]
        assert result[mode]["gsnr"] < 5e-3
        assert result[mode]["falls"]


@pytest.mark.parametrize("mode", FP16)
def test_fp16_overflow_in_the_first_steps_delays_measuring_and_breaks_nothing(two, mode):
    assert two[0][mode]["values"] == two[1][mode]["values"]
    for result in two:
        assert result[mode]["skipped"] > 0
        assert None not in result[mode]["values"].values()
        assert result[mode]["falls"]


@pytest.mark.parametrize("mode", RESUME)
def test_a_resumed_run_equals_the_uninterrupted_one_bit_for_bit_and_measures_nothing(two, mode):
    for result in two:
        assert result[mode]["same"]
        assert result[mode]["unmeasured"] == 0
        assert mode.endswith("8bit") or not result[mode]["collectives"]  # with it, the rule averages in every step


@pytest.mark.parametrize("mode", ACCELERATE)
def test_accelerates_own_loop_trains_as_one_process_and_load_state_resumes_it(two, mode):
    for result in two:
        assert result[mode]["type"] == "DEEPSPEED"
        assert result[mode]["processes"] == 2
        assert result[mode]["gsnr"] <= 1e-6
        assert result[mode]["loss"] <= 1e-5
        assert result[mode]["same"]


@pytest.mark.parametrize("mode", LATE)
@pytest.mark.parametrize("ranks", ["two", "four"])
def test_what_becomes_measurable_later_on_one_rank_first_is_measured_as_in_one_process(request, ranks, mode):
    for result in request.getfixturevalue(ranks):
        assert result[mode]["same_step"]
        assert result[mode]["gsnr"] <= 1e-6
        assert result[mode]["loss"] <= 1e-5


def test_grouping_goes_by_the_shapes_that_zero_init_has_taken_away(two):
    for result in two:
        assert result["whole_shapes"] == {"names": True, "shapes": True, "cut": True}


def test_stochastic_rounding_is_refused_before_the_first_update(two):
    for result in two:
        assert "float32" in result["rounding_refused"]["message"]


@pytest.mark.parametrize("mode", HABITS)
def test_the_habits_of_real_loops_train_as_in_one_process(two, mode):
    for result in two:
        assert result["world_size"] == 2
        assert result[mode]["gsnr"] <= 1e-6
        assert result[mode]["loss"] <= 1e-5


@pytest.mark.parametrize("mode", FORMS)
def test_a_momentum_in_another_form_trains_as_in_one_process(two, mode):
    for result in two:
        assert set(result[mode]["dtypes"]) == FORMS[mode]
        assert result[mode]["gsnr"] <= 1e-3  # of the A matrices, measured after B has moved by such a momentum
        assert result[mode]["loss"] <= 2e-3


def test_a_layout_that_is_not_recognised_is_refused_with_the_cure(two):
    for result in two:
        version, nvme, attribute = result["unknown_layout_refused"]["messages"]
        assert "DeepSpeed 0.99.0" in version
        assert "0.19.x" in version
        assert "averaged_gradients" in attribute
        assert "NVMe" in nvme
