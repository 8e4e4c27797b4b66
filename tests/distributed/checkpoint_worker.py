"""Saves and resumes: ``checkpoint_worker.py ACTION ENGINE FOLDER [ACTION ENGINE FOLDER ...]``.

ACTION ``save`` trains half the steps, saves, trains on; ``resume`` loads and trains the rest. ENGINE ``fsdp2`` and
``fsdp1`` (also with ``_factored``, under that rule, and ``_rounded``, of bfloat16 weights that are rounded at random),
``fsdp1_hybrid``, ``hsdp`` and ``fsdp2_tp`` save with torch.distributed.checkpoint, sharded and full;
``accelerate_*`` with accelerate's ``save_state``.
"""

# ruff: noqa: E402
import sys
import warnings
from pathlib import Path

import torch.distributed as dist

sys.modules["transformers"] = None  # not needed here, and most of a worker's time would be importing it
from common import STEPS, counting, gsnr_of, join, write_result
from saved_runs import TorchRun, make

warnings.filterwarnings("ignore")
join(alone="resume" in sys.argv)


def goes_on(run):
    """The second half of the steps."""
    per_step = []
    before = gsnr_of(run.sgd_sai)
    with counting(run.sgd_sai, per_step):
        losses = run.train(range(STEPS // 2, STEPS))
    collectives = sum(map(len, per_step[1:]))
    return {"losses": losses, "before": before, "after": gsnr_of(run.sgd_sai), "collectives": collectives}


def save(engine, place):
    run = make(engine)
    run.train(range(STEPS // 2))
    run.save(place / f"{engine}_sharded")
    if isinstance(run, TorchRun) and engine != "fsdp2_tp":  # torch 2.13 fails to distribute its full state again
        run.save_full(place / f"{engine}_full.pt")
    return goes_on(run)


def resume(engine, place):
    results = {}
    for kind in ("sharded", "full.pt"):
        saved = place / f"{engine}_{kind}"
        if saved.exists():
            run = make(engine)
            (run.load_full if saved.is_file() else run.load)(saved)
            results[kind] = goes_on(run)
    return results


ACTIONS = {"save": save, "resume": resume}
tasks = zip(sys.argv[1::3], sys.argv[2::3], sys.argv[3::3], strict=True)
results = {f"{action} {engine} {place}": ACTIONS[action](engine, Path(place)) for action, engine, place in tasks}
write_result({"world_size": dist.get_world_size(), **results})
