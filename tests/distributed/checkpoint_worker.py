"""Saves and resumes: ``checkpoint_worker.py ACTION ENGINE FOLDER [ACTION ENGINE FOLDER ...]``.

ACTION ``save`` trains half the steps, saves, trains on; ``resume`` loads and trains the other half; ``die`` saves every
step and is killed from outside; ``survive`` resumes from the last whole checkpoint of that run. ENGINE ``fsdp2`` (with
``_factored`` also the running means of that option), ``hsdp``, ``fsdp2_tp`` and ``fsdp1`` save with
torch.distributed.checkpoint, sharded and full; ``accelerate_*`` with accelerate's ``save_state``.
"""

# ruff: noqa: E402
import copy
import json
import os
import sys
import warnings
from pathlib import Path

import torch
import torch.distributed as dist

sys.modules["transformers"] = None  # not needed here, and most of a worker's time would be importing it
from common import (
    DDP_TYPE,
    DEVICE,
    OPTIONS,
    STEPS,
    Saver,
    build,
    counting,
    groups_of,
    gsnr_of,
    join,
    shard,
    tensor_parallel,
    train,
    write_result,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullOptimStateDictConfig, FullyShardedDataParallel

from hf_sai import SGDSaI

warnings.filterwarnings("ignore")
RANK, WORLD = join(alone="resume" in sys.argv)


class TorchRun:
    """Model and optimizer under FSDP1 or FSDP2, saved by torch.distributed.checkpoint."""

    def __init__(self, engine):
        self.model = build()
        self.data = (RANK, WORLD)
        if engine.startswith("fsdp1"):
            self.model = FullyShardedDataParallel(self.model, use_orig_params=True, device_id=torch.device(DEVICE))
        elif engine == "hsdp":
            shard(self.model, init_device_mesh(DEVICE, (2, WORLD // 2), mesh_dim_names=("dp", "shard")))
        elif engine == "fsdp2_tp":
            mesh = init_device_mesh(DEVICE, (2, WORLD // 2), mesh_dim_names=("dp", "tp"))
            shard(tensor_parallel(self.model, mesh["tp"]), mesh["dp"])
            self.data = (mesh.get_local_rank("dp"), 2)
        elif WORLD > 1:
            shard(self.model)
        how = "factored" if engine.endswith("factored") else "published"
        self.optimizer = self.sgd_sai = SGDSaI(groups_of(self.model), **OPTIONS, update=how)
        self.saver = Saver(self.model, self.optimizer)
        self.load, self.load_full = self.saver.load, self.saver.load_full

    def save(self, folder, **metadata):
        """Beside the final name first: a folder that has the final name is whole."""
        partial = folder.with_suffix(".partial")
        self.saver.save(partial)
        if RANK == 0:
            (partial / "metadata.json").write_text(json.dumps(metadata))
            partial.rename(folder)
        dist.barrier()


class AccelerateRun:
    """Model and optimizer under accelerate, saved by its ``save_state``."""

    def __init__(self, engine):
        import on_cpu  # noqa: F401
        from accelerate import Accelerator, FullyShardedDataParallelPlugin
        from accelerate.state import AcceleratorState

        AcceleratorState._reset_state(True)
        os.environ.pop("ACCELERATE_USE_FSDP", None)  # an earlier Accelerator has set it
        version = 1 if "fsdp1" in engine else 2
        plugin = FullyShardedDataParallelPlugin(
            fsdp_version=version,
            use_orig_params=True if version == 1 else None,
            auto_wrap_policy="TRANSFORMER_BASED_WRAP",
            transformer_cls_names_to_wrap=["Block"],
            cpu_ram_efficient_loading=False,
            state_dict_type="FULL_STATE_DICT" if engine.endswith("fsdp2_full") else "SHARDED_STATE_DICT",
        )
        self.accelerator = Accelerator(cpu=DEVICE == "cpu", fsdp_plugin=None if engine.endswith("ddp") else plugin)
        expected = DDP_TYPE if engine.endswith("ddp") else "FSDP"
        assert self.accelerator.distributed_type.name == expected, self.accelerator.distributed_type
        assert self.accelerator.num_processes == WORLD
        model = build()
        self.data = (RANK, WORLD)
        if version == 1:  # which wants the wrapped model's parameters
            for p in (model.odd.row, model.odd.gate):  # of tensors with fewer rows than ranks torch fails to load states
                p.requires_grad_(False)
            model = self.accelerator.prepare(model)
        self.sgd_sai = SGDSaI(groups_of(model), **OPTIONS, update="factored" if "factored" in engine else "published")
        self.model, self.optimizer = self.accelerator.prepare(model, self.sgd_sai)

        # FSDP1's whole weights crash on the CPU (SIGSEGV in torch 2.13), so that its whole state is saved by itself.
        self.whole = engine.endswith("fsdp1_full") or engine.endswith("fsdp1_factored_full")

    def save(self, folder):
        self.accelerator.save_state(str(folder))
        if self.whole:
            from accelerate.utils.fsdp_utils import save_fsdp_optimizer

            save_fsdp_optimizer(self.whole_plugin(), self.accelerator, self.sgd_sai, self.model, str(folder / "whole"))

    def load(self, folder):
        self.accelerator.load_state(str(folder))
        if self.whole:
            from accelerate.utils.fsdp_utils import load_fsdp_optimizer

            self.sgd_sai.state.clear()
            load_fsdp_optimizer(self.whole_plugin(), self.accelerator, self.sgd_sai, self.model, str(folder / "whole"))

    def whole_plugin(self):
        """As accelerate saves whole states by default, but that what lies on the CPU is not moved there."""
        plugin = copy.copy(self.accelerator.state.fsdp_plugin)
        plugin.state_dict_config = None
        plugin.set_state_dict_type("FULL_STATE_DICT")
        plugin.optim_state_dict_config = FullOptimStateDictConfig(offload_to_cpu=DEVICE != "cpu", rank0_only=True)
        return plugin


def make(engine):
    return AccelerateRun(engine) if engine.startswith("accelerate") else TorchRun(engine)


def goes_on(run):
    """The second half of the steps."""
    per_step = []
    before = gsnr_of(run.sgd_sai)
    with counting(run.sgd_sai, per_step):
        losses = train(run.model, run.optimizer, range(STEPS // 2, STEPS), *run.data)
    collectives = sum(map(len, per_step[1:]))
    return {"losses": losses, "before": before, "after": gsnr_of(run.sgd_sai), "collectives": collectives}


def save(engine, place):
    run = make(engine)
    train(run.model, run.optimizer, range(STEPS // 2), *run.data)
    run.save(place / f"{engine}_sharded")
    if isinstance(run, TorchRun) and engine != "fsdp2_tp":  # torch 2.13 fails to distribute its full state again
        run.saver.save_full(place / f"{engine}_full.pt")
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


def die(engine, place):
    run = make(engine)
    for step in range(10**6):
        train(run.model, run.optimizer, range(step, step + 1), RANK, WORLD)
        run.save(place / f"step_{step + 1}", step=step + 1)


def survive(engine, place):
    run = make(engine)
    last = max(place.glob("step_*[0-9]"), key=lambda folder: int(folder.name.split("_")[1]))
    step = json.loads((last / "metadata.json").read_text())["step"]
    run.load(last)
    losses = train(run.model, run.optimizer, range(step, step + 2), RANK, WORLD)
    run = make(engine)
    expected = train(run.model, run.optimizer, range(step + 2), RANK, WORLD)
    return {"step": step, "losses": losses, "expected": expected, "gsnr": gsnr_of(run.sgd_sai)}


ACTIONS = {"save": save, "resume": resume, "die": die, "survive": survive}
tasks = zip(sys.argv[1::3], sys.argv[2::3], sys.argv[3::3], strict=True)
results = {f"{action} {engine} {place}": ACTIONS[action](engine, Path(place)) for action, engine, place in tasks}
write_result({"world_size": dist.get_world_size(), **results})
