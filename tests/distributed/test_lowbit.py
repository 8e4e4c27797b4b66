"""A momentum of 8 or 4 bits lies in pieces like its parameter, trains like one process's, and can be sharded anew."""

import pytest
from launch import run_ranks

pytest.importorskip("bitsandbytes", reason="pip install 'hf-sai[quant]'")

#: Engine -> ranks, and the matrices whose momentum is in blocks on each of them; the others' shards are too small.
ENGINES = {
    "ddp": (2, {"0.weight", "1.weight", "2.weight"}),
    "fsdp2": (2, {"0.weight", "1.weight", "2.weight"}),
    "fsdp1": (2, {"0.weight", "1.weight"}),
    "hsdp": (4, {"0.weight", "1.weight", "2.weight"}),
    "fsdp2_tp": (4, {"0.weight", "1.weight"}),
}
KINDS = ["8bit", "4bit", "8bit_factored", "8bit_orthogonal", "8bit_rounded"]
#: Of FSDP1.
REFUSED = {("fsdp1", "8bit_orthogonal")}
#: What is saved by some ranks and taken up by others.
SAVED = ["8bit", "4bit", "8bit_orthogonal"]
#: Bytes of state an element: of blocks, their scales, and what small tensors and the factored rule keep in float32.
BYTES = {"8bit": 1.06, "4bit": 0.58, "8bit_factored": 1.15, "8bit_orthogonal": 1.15, "8bit_rounded": 1.06}
#: (ranks that save, ranks that resume) -> the matrices that lie in other blocks then, or in blocks where they did not.
CUT = {
    (2, 2): set(),
    (2, 1): {"0.weight"},
    (1, 2): {"0.weight"},
    (2, 4): set(),
    (4, 2): {"0.weight", "2.weight"},
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """(ranks, what was asked) -> what each rank reports; a launch is mostly imports, so there are few."""
    place = tmp_path_factory.mktemp("saved")
    found = {}

    def launch(world_size, *tasks):
        words = [word for task in tasks for word in task]
        results = run_ranks("lowbit_worker.py", world_size, tmp_path_factory.mktemp("ranks"), *words)
        assert all(result["world_size"] == world_size for result in results)
        for task in tasks:
            key = " ".join([*task[:3], task[3].rpartition("/")[2]])
            found[world_size, key] = [result[key] for result in results]

    def train(world_size):
        return [
            ("train", engine, kind, "-")
            for engine, (size, _) in ENGINES.items()
            if size == world_size
            for kind in KINDS
            if (engine, kind) not in REFUSED
        ]

    def save(*kinds):
        return [("save", "fsdp2", kind, f"{place}") for kind in kinds]

    def resume(size, *kinds, engine="fsdp2", saved="fsdp2"):
        return [("resume", engine, kind, f"{place}/{saved}_{kind}_{size}") for kind in kinds]

    fsdp1 = [("save", "fsdp1", "8bit", f"{place}"), *resume(2, "8bit", engine="fsdp1", saved="fsdp1")]
    launch(2, *train(2), *save(*SAVED), *fsdp1)
    launch(1, *save(*SAVED), *resume(2, *SAVED), *resume(2, "8bit", engine="alone"))
    hsdp = [("save", "hsdp", "8bit", f"{place}"), *resume(4, "8bit", engine="hsdp", saved="hsdp")]
    launch(4, *train(4), *save(*SAVED), *resume(2, *SAVED), *hsdp)
    launch(2, *(task for size in (1, 2, 4) for task in resume(size, *SAVED)))
    return found


@pytest.mark.parametrize(
    ("engine", "kind"),
    [(engine, kind) for engine in ENGINES for kind in KINDS if (engine, kind) not in REFUSED],
)
def test_it_trains_as_in_one_process_and_replicas_are_equal_bit_for_bit(runs, engine, kind):
    ranks, blocks = ENGINES[engine]
    for result in runs[ranks, f"train {engine} {kind} -"]:
        if engine != "fsdp1":  # of which each rank has other parameters
            assert {name for name, quantised in result["quantised"].items() if quantised} == blocks
        assert any(result["quantised"].values())
        assert result["same"]
        assert result["gsnr"] <= (1e-4 if kind == "8bit_rounded" else 1e-6)  # of sums of bfloat16 gradients
        # Blocks that end elsewhere round differently; both stay as near to a momentum in float32.
        assert result["loss"] <= max(1e-3, 2 * result["loss of float32"])
        assert result["loss of float32"] <= 0.02
        if blocks == ENGINES["ddp"][1]:
            assert result["bytes"] <= BYTES[kind]


@pytest.mark.parametrize("kind", SAVED)
@pytest.mark.parametrize(("before", "after"), CUT)
def test_what_is_saved_can_be_sharded_anew_and_only_blocks_that_are_cut_are_rounded_again(runs, kind, before, after):
    uninterrupted = runs[before, f"save fsdp2 {kind} {saved_in(runs)}"][0]
    for result in runs[after, f"resume fsdp2 {kind} fsdp2_{kind}_{before}"]:
        assert result.keys() == {"sharded", "full"}
        for resumed in result.values():
            check(resumed, uninterrupted, CUT[before, after], kind)
            if before == after:
                assert resumed["losses"] == uninterrupted["losses"]


@pytest.mark.parametrize(("ranks", "engine"), [(2, "fsdp1"), (4, "hsdp")])
def test_other_engines_resume_bit_for_bit(runs, ranks, engine):
    uninterrupted = runs[ranks, f"save {engine} 8bit {saved_in(runs)}"][0]
    for result in runs[ranks, f"resume {engine} 8bit {engine}_8bit_{ranks}"]:
        for resumed in result.values():
            check(resumed, uninterrupted, set(), "8bit")
            assert resumed["losses"] == uninterrupted["losses"]


def test_one_process_without_shards_takes_up_the_full_state(runs):
    uninterrupted = runs[2, f"save fsdp2 8bit {saved_in(runs)}"][0]
    (result,) = runs[1, "resume alone 8bit fsdp2_8bit_2"]
    check(result["full"], uninterrupted, CUT[2, 1], "8bit")


def saved_in(runs):
    return next(key for _, key in runs if key.startswith("save")).split()[-1]


def check(resumed, uninterrupted, cut, kind):
    assert resumed["gsnr"] == uninterrupted["gsnr"]
    assert resumed["losses"] == pytest.approx(uninterrupted["losses"], rel=5e-3)
    assert {name for name, share in resumed["lost"].items() if share > 0} == cut
    # As much as rounding to blocks costs anyway; of docs/distributed.md.
    assert all(share <= {"8bit": 0.015, "4bit": 0.12}[kind[:4]] for share in resumed["lost"].values())
