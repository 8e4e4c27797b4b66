"""Trains until it is killed, and goes on: ``killed_worker.py ACTION ENGINE FOLDER [ACTION ENGINE FOLDER ...]``.

ACTION ``die`` saves every step and is killed from outside; ``survive`` resumes from the last whole checkpoint of that
run. ENGINE is ``fsdp1``, ``fsdp2``, ``zero2`` or ``zero3``.
"""

# ruff: noqa: E402
import sys
import warnings
from pathlib import Path

import torch.distributed as dist

sys.modules["transformers"] = None  # not needed here, and most of a worker's time would be importing it
from common import gsnr_of, join, write_result
from saved_runs import make

warnings.filterwarnings("ignore")
RANK, _ = join()


def die(engine, place):
    """Each checkpoint gets another name first: a folder that has the final one is whole."""
    run = make(engine)
    for step in range(1, 10**6):
        run.train(range(step - 1, step))
        folder = place / f"step_{step}"
        partial = folder.with_suffix(".partial")
        run.save(partial)
        dist.barrier()
        if RANK == 0:
            partial.rename(folder)
        dist.barrier()


def survive(engine, place):
    run = make(engine)
    step = max(int(folder.name.split("_")[1]) for folder in place.glob("step_*[0-9]"))
    run.load(place / f"step_{step}")
    losses = run.train(range(step, step + 2))
    whole = make(engine)
    expected = whole.train(range(step + 2))
    gsnr = {"gsnr": gsnr_of(run.sgd_sai), "expected_gsnr": gsnr_of(whole.sgd_sai)}
    return {"step": step, "losses": losses, "expected": expected, **gsnr}


ACTIONS = {"die": die, "survive": survive}
tasks = zip(sys.argv[1::3], sys.argv[2::3], sys.argv[3::3], strict=True)
results = {f"{action} {engine} {place}": ACTIONS[action](engine, Path(place)) for action, engine, place in tasks}
write_result({"world_size": dist.get_world_size(), **results})
