"""Under torch's engines every rank sees the same g-SNR as one process, with one all_reduce, and trains the same."""

import pytest
import torch
from launch import run_ranks

BF16 = {2: ["bf16_ddp", "bf16_fsdp2", "bf16_mixed", "bf16_tp", "bf16_fsdp1"], 4: ["bf16_hsdp", "bf16_fsdp2_tp"]}
BF16_MOMENTUM = {2: ["bf16_momentum_fsdp2", "bf16_momentum_tp", "bf16_momentum_fsdp1"], 4: ["bf16_momentum_hsdp"]}
#: Compared with one process in float32.
EXACT = {
    2: [
        "ddp",
        "fsdp2",
        "tp",
        "fsdp1",
        "fsdp2_fused",
        "fsdp2_foreach",
        "fsdp2_normalize",
        "tp_fused",
        "fsdp1_leaves",
        "fsdp1_fused",
        "fsdp1_normalize",
        "fsdp2_offload",
    ],
    4: ["hsdp", "hsdp_fused", "fsdp2_tp", "fsdp2", "fsdp1", "fsdp1_hybrid"],
}
ROUNDING = {2: ["rounding_ddp", "rounding_tp"], 4: ["rounding_hsdp", "rounding_fsdp1_hybrid"]}
#: Rules that average over rows and columns in every step.
AVERAGING = {
    2: ["fsdp1_factored", "fsdp1_leaves_factored", "fsdp1_rows", "fsdp1_nesterov"],
    4: ["fsdp1_factored", "fsdp1_hybrid_factored"],
}
#: Modes of update="averaged", whose means are evaluated.
MEANS = {
    2: ["ddp_averaged", "fsdp2_averaged", "tp_averaged"],
    4: ["hsdp_averaged", "fsdp2_tp_averaged"],
}
#: Modes of update="factored" with nesterov, whose averages are DTensor's own or need none.
NESTEROV = {2: ["ddp_nesterov", "fsdp2_nesterov", "tp_nesterov"], 4: ["hsdp_nesterov"]}
#: Mode -> all_to_alls in a step: one per mesh dimension and back, for those on both dimensions and those on one.
ORTHOGONAL = {
    2: {"ddp_orthogonal": 0, "fsdp2_orthogonal": 2, "tp_orthogonal": 2},
    4: {"hsdp_orthogonal": 2, "fsdp2_orthogonal": 2, "fsdp2_tp_orthogonal": 6},
}
#: Modes with matrices in so many rounds as a rank has of them.
ROUNDS = {2: ["fsdp2_rounds"], 4: ["fsdp2_tp_rounds"]}
#: Modes whose ranks have copies of the hidden matrices -> collectives in a step: to share the work on these out.
SHARED = {
    2: {"ddp_shared": {"_allgather_base_": 1}},
    4: {
        "ddp_shared": {"_allgather_base_": 1},
        "hsdp_shared": {"allreduce_": 2, "alltoall_base_": 2, "_allgather_base_": 1},
    },
}
TWO = [
    *EXACT[2],
    *SHARED[2],
    *ORTHOGONAL[2],
    *ROUNDS[2],
    *AVERAGING[2],
    *MEANS[2],
    *NESTEROV[2],
    *BF16[2],
    *BF16_MOMENTUM[2],
    *ROUNDING[2],
    "disagree",
    "different_states",
    "late_and_broken",
    "broken_orthogonal",
    "late_ddp",
    "late_fsdp2",
    "late_fsdp1",
    "shapes_fsdp1",
    "shapes_fsdp2",
    "fsdp1_refused",
    "slices_are_rounded_apart",
    "flat_parameters_refused",
    "scaler_ddp",
    "scaler_fsdp2",
    "scaler_fsdp1",
]
FOUR = [
    *EXACT[4],
    *SHARED[4],
    *ORTHOGONAL[4],
    *ROUNDS[4],
    *AVERAGING[4],
    *MEANS[4],
    *NESTEROV[4],
    *BF16[4],
    *BF16_MOMENTUM[4],
    *ROUNDING[4],
    "late_fsdp2",
    "late_fsdp1",
    "shapes_fsdp1",
]
#: Models of transformers and PEFT -> how many of their trained parameters are DTensors.
MODELS = {"tensor_parallel": 16, "tensor_parallel_lora": 4, "fsdp1_lora": 0, "fsdp2_qlora": 8, "hsdp_lora": 8}
PARAMETERS = 23
#: Elements of the tiny model's hidden matrices.
HIDDEN = 2 * (432 + 432 + 36 + 36)
#: Process groups over which something is sharded: the most all_reduces that the measuring step may run.
GROUPS = {"ddp": 0, "fsdp2_tp": 2}


def by_size(modes):
    return [(world_size, mode) for world_size in modes for mode in modes[world_size]]


class Runs(dict):
    """World size -> what each rank reports; one launch per world size, for its time is mostly imports."""

    def __init__(self, factory):
        super().__init__()
        self.factory = factory

    def __missing__(self, world_size):
        folder = self.factory.mktemp(f"ranks_{world_size}")
        self[world_size] = run_ranks("engines_worker.py", world_size, folder, *{2: TWO, 4: FOUR}[world_size])
        return self[world_size]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    return Runs(tmp_path_factory)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """What each of two ranks reports."""
    modes = [*(mode for mode in MODELS if mode != "hsdp_lora"), "mixed_meshes"]
    return run_ranks("models_worker.py", 2, tmp_path_factory.mktemp("models"), *modes)


@pytest.fixture(scope="module")
def models_on_four(tmp_path_factory):
    return run_ranks("models_worker.py", 4, tmp_path_factory.mktemp("models"), "hsdp_lora")


@pytest.mark.parametrize(("world_size", "mode"), [*by_size(EXACT), *by_size(MEANS), *by_size(NESTEROV)])
def test_gsnr_and_loss_equal_those_of_one_process(runs, world_size, mode):
    for result in runs[world_size]:
        assert result["world_size"] == world_size
        assert result[mode]["gsnr"] <= 1e-6
        assert result[mode]["loss"] <= 1e-5


@pytest.mark.parametrize(("world_size", "mode"), by_size(AVERAGING))
def test_rules_that_average_over_slices_equal_one_process_with_one_all_reduce_a_step(runs, world_size, mode):
    for result in runs[world_size]:
        assert result["world_size"] == world_size
        assert result[mode]["gsnr"] <= 1e-6
        assert result[mode]["loss"] <= 1e-5
        for counts in result[mode]["collectives"][2:]:  # before, the A matrices are still to be measured
            assert counts.keys() == {"allreduce_"}
            assert len(counts["allreduce_"]) == 1


@pytest.mark.parametrize(("world_size", "mode"), by_size(ORTHOGONAL))
def test_whole_matrices_are_put_together_on_one_rank_each_and_train_as_in_one_process(runs, world_size, mode):
    for result in runs[world_size]:
        assert result["world_size"] == world_size
        assert result[mode]["gsnr"] <= 1e-6
        assert result[mode]["loss"] <= 1e-5
        assert result[mode]["same_placements"]
        for counts in result[mode]["collectives"][2:]:  # before, the A matrices are still to be measured
            assert counts.keys() <= {"allreduce_", "alltoall_base_"}
            sent = counts.get("alltoall_base_", [])
            assert len(sent) == ORTHOGONAL[world_size][mode]
            # Half of all elements, and sums over rows: nowhere is everything gathered.
            assert all(elements <= 0.6 * HIDDEN for elements in sent)
            groups = GROUPS.get(mode.removesuffix("_orthogonal"), 1)
            assert len(counts.get("allreduce_", [])) <= 2 * groups  # whether all is finite; the factored rule's sums


@pytest.mark.parametrize(("world_size", "mode"), by_size(ROUNDS))
def test_a_round_is_on_its_way_while_the_one_before_it_is_made_orthogonal(runs, world_size, mode):
    for result in runs[world_size]:
        assert result[mode]["gsnr"] <= 1e-6
        assert result[mode]["loss"] <= 1e-5
        order = result[mode]["order"]
        rounds = len(order) // 2
        if mode == "fsdp2_rounds":  # of the other each of two meshes has one round
            assert rounds > 2
            assert order == ["collect", *["collect", "hand_out"] * (rounds - 1), "hand_out"]


@pytest.mark.parametrize(("world_size", "mode"), by_size(SHARED))
def test_copies_of_matrices_are_worked_on_once_and_train_as_in_one_process(runs, world_size, mode):
    for result in runs[world_size]:
        assert result[mode]["gsnr"] <= 1e-6
        assert result[mode]["loss"] <= 1e-5
        assert result[mode]["same"]  # weights, momenta and running means, bit for bit
        for counts in result[mode]["collectives"][2:]:  # before, the A matrices are still to be measured
            assert {name: len(sizes) for name, sizes in counts.items()} == SHARED[world_size][mode]
            (received,) = counts["_allgather_base_"]
            assert received <= 1.6 * 4 * HIDDEN  # bytes: all matrices in float32, their rows' factors, and padding
    assert sum(result[mode]["worked_on"] for result in runs[world_size]) == 8


def test_ranks_that_optimize_different_parts_of_a_ddp_model_each_work_on_their_own(runs):
    for result in runs[2]:
        assert result["disagree"]["moved"]
        assert any("do not optimize the same parameters" in line for line in result["disagree"]["heard"])
        assert result["disagree"]["without_sync"] == [{}, {}]
        assert result["disagree"]["unasked"] == [{}, {}]


def test_states_that_torch_will_not_save_are_warned_of_in_the_first_step(runs):
    for result in runs[2]:
        (line,) = result["different_states"]["heard"]
        assert "different states" in line


@pytest.mark.parametrize(("world_size", "mode"), by_size(EXACT))
def test_at_most_one_all_reduce_per_group_while_measuring_and_no_collective_later(runs, world_size, mode):
    for result in runs[world_size]:
        first, second, *later = result[mode]["collectives"]
        assert set(first) | set(second) <= {"allreduce_"}
        for sizes in (*first.values(), *second.values()):  # in the second the A matrices, whose first gradient is zero
            assert len(sizes) <= GROUPS.get(mode, 1)
            assert max(sizes) <= 4 * PARAMETERS  # never a gradient: the largest has 432 elements
        assert not any(later)


@pytest.mark.parametrize(("world_size", "mode"), by_size(EXACT))
def test_momentum_has_the_parameters_placements(runs, world_size, mode):
    for result in runs[world_size]:
        assert result[mode]["same_placements"]
        assert (result[mode]["sharded"] > 0) == mode.startswith(("fsdp2", "hsdp", "tp"))


@pytest.mark.parametrize(
    "mode", [pytest.param(mode, marks=pytest.mark.slow if mode == "hsdp_lora" else ()) for mode in MODELS]
)
def test_models_of_transformers_and_peft_train_as_in_one_process(request, mode):
    on_four = mode == "hsdp_lora"
    for result in request.getfixturevalue("models_on_four" if on_four else "models"):
        assert result["world_size"] == (4 if on_four else 2)
        assert result[mode]["gsnr"] <= 1e-6
        assert result[mode]["loss"] <= 1e-5
        assert result[mode]["same_groups"]
        assert result[mode]["same_placements"]
        assert result[mode]["sharded"] == MODELS[mode]
        first, second, *later = result[mode]["collectives"]
        for counts in (first, second):  # in the second LoRA's A
            assert set(counts) <= {"allreduce_"}
            assert all(len(sizes) == 1 and sizes[0] <= 4 * 21 for sizes in counts.values())
        assert not any(later)


def test_groups_are_parted_by_device_mesh_as_trainer_does_it(models):
    for result in models:
        mixed = result["mixed_meshes"]
        assert mixed["names"] == ["base/decay", "base/decay 2", "base/no_decay", "base/no_decay 2"]
        assert mixed["meshes"] == [1, 1, 1, 1]
        assert mixed["same_decay"]
        assert mixed["gsnr"] <= 1e-6
        assert mixed["loss"] <= 1e-5


def test_weights_of_4_bits_were_sharded_as_such(models):
    assert all(result["fsdp2_qlora"]["quantized_shards"] for result in models)


def test_empty_shards_were_among_what_was_tried(runs):
    assert any(result["fsdp2"]["empty"] for result in runs[2])
    assert all(result["fsdp2"]["empty"] for result in runs[4][1:])
    assert all(result["fsdp1"]["empty"] for result in runs[4])


@pytest.mark.parametrize(("world_size", "mode"), by_size(BF16))
def test_bf16_gradients_give_an_exact_gsnr(runs, world_size, mode):
    for result in runs[world_size]:
        assert result[mode]["measured"] >= 15
        assert result[mode]["gsnr"] <= 1e-9
        assert result[mode]["loss"] <= 1e-2


@pytest.mark.parametrize(("world_size", "mode"), by_size(BF16_MOMENTUM))
def test_a_momentum_in_bf16_is_sharded_like_its_parameter_and_trains_alike(runs, world_size, mode):
    for result in runs[world_size]:
        assert result[mode]["dtypes"] == ["torch.bfloat16"]
        assert result[mode]["same_placements"]
        assert result[mode]["gsnr"] <= 1e-6
        assert result[mode]["loss"] <= 1e-3  # where a sum is rounded differently, momentum rounds to its neighbour


@pytest.mark.parametrize(("world_size", "mode"), by_size(ROUNDING))
def test_stochastic_rounding_keeps_replicas_equal_and_leaves_the_random_state_alone(runs, world_size, mode):
    assert all(result[mode]["same"] for result in runs[world_size])
    for rank, result in enumerate(runs[world_size]):
        torch.manual_seed(rank)
        assert result[mode]["drawn"] == torch.rand(1).item()


def test_the_slices_of_a_parameter_are_rounded_by_random_numbers_of_their_own(runs):
    for result in runs[2]:
        rounded = result["slices_are_rounded_apart"]
        assert all(0.4 < share < 0.6 for share in rounded["moved"])
        assert 0.4 < rounded["alike"] < 0.6


def test_a_gradient_that_is_non_zero_or_nan_on_one_rank_is_judged_alike_on_all(runs):
    histories = [result["late_and_broken"]["history"] for result in runs[2]]
    assert histories[0] == histories[1]
    zero, broken, usable = histories[0]
    assert zero == [0.0, True]
    assert broken == [0.0, True]
    assert usable[0] > 0.0


def test_nan_in_one_shard_of_a_hidden_matrix_leaves_all_of_it_to_its_momentum(runs):
    for result in runs[2]:
        assert result["broken_orthogonal"] == {"finite": True, "moved": True, "kept": True}


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


def test_what_slices_cannot_is_refused_with_the_cure(runs):
    for result in runs[2]:
        assert "use FSDP2" in result["fsdp1_refused"]["message"]


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
