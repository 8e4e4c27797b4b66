"""A resumed run equals the uninterrupted one, on as many ranks or on others."""

import pytest
from launch import run_ranks

DCP = ["fsdp2", "fsdp2_factored", "fsdp1", "fsdp1_factored"]
ACCELERATE = ["accelerate_ddp", "accelerate_fsdp2_sharded", "accelerate_fsdp2_full"]
#: Resumed on as many ranks only; see docs/distributed.md.
FSDP1 = ["accelerate_fsdp1_sharded", "accelerate_fsdp1_full", "accelerate_fsdp1_factored_full"]
#: bfloat16 gradients are not the same on another number of ranks.
ROUNDED = ["fsdp2_rounded", "fsdp1_rounded"]
ENGINES = [*DCP, *ACCELERATE, *FSDP1, *ROUNDED]
ELASTIC = [*DCP, *ACCELERATE]
#: Meshes of 2 x 2.
MESHES = ["hsdp", "fsdp2_tp", "fsdp1_hybrid", "fsdp1_hybrid_factored"]
#: Saved whole, too, by torch.distributed.checkpoint.
FULL = [*DCP, *ROUNDED, "hsdp", "fsdp1_hybrid", "fsdp1_hybrid_factored"]
#: Whose running means are saved to rounding.
TO_ROUNDING = ["fsdp1_factored", "fsdp1_hybrid_factored"]


def tasks(action, engines, place):
    return [word for engine in engines for word in (action, engine, str(place))]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """(ranks that saved, ranks that resume) -> (what each resuming rank reports, the uninterrupted run, the place).

    Four launches for all of it, for their time is mostly imports.
    """
    two, four = (tmp_path_factory.mktemp(name) for name in ("two", "four"))

    def launch(world_size, *words):
        results = run_ranks("checkpoint_worker.py", world_size, tmp_path_factory.mktemp("ranks"), *words)
        assert all(result["world_size"] == world_size for result in results)
        return results

    saved_2 = launch(2, *tasks("save", ENGINES, two))
    meshes = [*tasks("save", MESHES, four), *tasks("resume", MESHES, four)]
    at_4 = launch(4, *meshes, *tasks("save", ELASTIC, four), *tasks("resume", ELASTIC, two))
    at_2 = launch(2, *tasks("resume", ENGINES, two), *tasks("resume", ELASTIC, four))
    at_1 = launch(1, *tasks("resume", ELASTIC, two))
    return {
        (2, 2): (at_2, saved_2, two),
        (2, 1): (at_1, saved_2, two),
        (2, 4): (at_4, saved_2, two),
        (4, 2): (at_2, at_4, four),
        (4, 4): (at_4, at_4, four),
    }


@pytest.mark.parametrize(
    ("engine", "before", "after"),
    [(engine, 2, 2) for engine in ENGINES]
    + [(engine, 4, 4) for engine in MESHES]
    + [(engine, *sizes) for engine in ELASTIC for sizes in ((2, 1), (2, 4), (4, 2))],
)
def test_a_resumed_run_goes_on_as_the_uninterrupted_one(runs, engine, before, after):
    reports, saved, place = runs[before, after]
    uninterrupted = saved[0][f"save {engine} {place}"]
    assert None not in uninterrupted["after"].values()
    for report in reports:
        results = report[f"resume {engine} {place}"]
        assert results.keys() == ({"sharded", "full.pt"} if engine in FULL else {"sharded"})
        for resumed in results.values():
            assert resumed["after"] == uninterrupted["after"]  # never measured again
            if "factored" not in engine:  # which averages over rows and columns in every step
                assert resumed["collectives"] == 0
            if before == after and engine not in TO_ROUNDING:
                assert resumed["losses"] == uninterrupted["losses"]
            assert resumed["losses"] == pytest.approx(uninterrupted["losses"], rel=1e-5)
