"""Saves and resumes with torch.distributed.checkpoint: ``checkpoint_worker.py ACTION ENGINE FOLDER``.

ACTION ``save`` trains half the steps, saves sharded and full, trains on; ``resume`` loads and trains the other half;
``die`` saves every step and is killed from outside; ``survive`` resumes from the last whole checkpoint of that run.
"""

# ruff: noqa: E402
import json
import os
import sys
import warnings
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp

sys.modules["transformers"] = None  # not needed here, and most of a worker's time would be importing it
from common import OPTIONS, STEPS, build, counting, groups_of, gsnr_of, join, train, write_result
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard

from hf_sai import SGDSaI

warnings.filterwarnings("ignore")
ACTION, ENGINE, PLACE = sys.argv[1], sys.argv[2], Path(sys.argv[3])
RANK, WORLD = join() if int(os.environ["WORLD_SIZE"]) > 1 else (0, 1)
# FSDP1 gives nested optimizer states whose groups only some ranks have, which dcp.load cannot match.
SHARDED = StateDictOptions(flatten_optimizer_state_dict=ENGINE == "fsdp1")
FULL = StateDictOptions(full_state_dict=True, cpu_offload=True)


def make():
    model = build()
    if ENGINE == "fsdp1" and WORLD > 1:
        model = FullyShardedDataParallel(model, use_orig_params=True, device_id=torch.device("cpu"))
    elif WORLD > 1:
        for block in model.blocks:
            fully_shard(block)
        fully_shard(model)
    return model, SGDSaI(groups_of(model), **OPTIONS)


def save(model, optimizer, folder, **metadata):
    """Beside the final name first: a folder that has the final name is whole."""
    weights, states = get_state_dict(model, optimizer, options=SHARDED)
    partial = folder.with_suffix(".partial")
    dcp.save({"model": weights, "optimizer": states}, checkpoint_id=str(partial))
    if RANK == 0:
        (partial / "metadata.json").write_text(json.dumps(metadata))
        partial.rename(folder)
    if WORLD > 1:
        dist.barrier()


def load(model, optimizer, folder):
    weights, states = get_state_dict(model, optimizer, options=SHARDED)
    dcp.load({"model": weights, "optimizer": states}, checkpoint_id=str(folder))
    set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=states, options=SHARDED)


def halves(optimizer, model, steps):
    per_step = []
    before = gsnr_of(optimizer)
    with counting(optimizer, per_step):
        losses = train(model, optimizer, steps, RANK, WORLD)
    return {"losses": losses, "before": before, "after": gsnr_of(optimizer), "collectives": sum(map(len, per_step[1:]))}


model, optimizer = make()
if ACTION == "save":
    train(model, optimizer, range(STEPS // 2), RANK, WORLD)
    save(model, optimizer, PLACE / "sharded")
    if ENGINE != "fsdp1":  # torch 2.13 crashes (SIGSEGV) in FSDP1's full state on the CPU, with any optimizer
        weights, states = get_state_dict(model, optimizer, options=FULL)
        if RANK == 0:
            torch.save({"model": weights, "optimizer": states}, PLACE / "full.pt")
    write_result(halves(optimizer, model, range(STEPS // 2, STEPS)))
elif ACTION == "resume":
    results = {}
    load(model, optimizer, PLACE / "sharded")
    results["sharded"] = halves(optimizer, model, range(STEPS // 2, STEPS))
    if (PLACE / "full.pt").exists():
        model, optimizer = make()
        whole = torch.load(PLACE / "full.pt", weights_only=True)
        set_state_dict(
            model,
            optimizer,
            model_state_dict=whole["model"],
            optim_state_dict=whole["optimizer"],
            options=StateDictOptions(full_state_dict=True),
        )
        results["full"] = halves(optimizer, model, range(STEPS // 2, STEPS))
    write_result(results)
elif ACTION == "die":
    for step in range(10**6):
        train(model, optimizer, range(step, step + 1), RANK, WORLD)
        save(model, optimizer, PLACE / f"step_{step + 1}", step=step + 1)
elif ACTION == "survive":
    last = max(PLACE.glob("step_*[0-9]"), key=lambda folder: int(folder.name.split("_")[1]))
    step = json.loads((last / "metadata.json").read_text())["step"]
    load(model, optimizer, last)
    losses = train(model, optimizer, range(step, step + 2), RANK, WORLD)
    model, optimizer = make()
    expected = train(model, optimizer, range(step + 2), RANK, WORLD)
    write_result({"step": step, "losses": losses, "expected": expected, "gsnr": gsnr_of(optimizer)})
