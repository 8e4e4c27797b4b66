"""Momenta in 8 and 4 bits in pieces: ``lowbit_worker.py ACTION ENGINE KIND FOLDER [ACTION ENGINE KIND FOLDER ...]``.

ACTION ``train`` compares with one process; ``save`` trains half the steps, saves and trains on; ``resume`` loads and
trains the other half. KIND is ``8bit`` or ``4bit``, with ``_factored`` or ``_orthogonal`` behind it under
that rule, with ``_rounded`` of bfloat16 parameters that are rounded at random, of which each rank has its own state.
"""

# ruff: noqa: E402
import sys
import warnings
from pathlib import Path

import torch
import torch.distributed as dist

sys.modules["transformers"] = None  # not needed here, and most of a worker's time would be importing it
from common import DEVICE, OPTIONS, Saver, gsnr_of, join, params_of, same_on_all_ranks, train, write_result
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from hf_sai import SGDSaI, param_groups
from hf_sai.optim.layout import kind_of
from hf_sai.optim.momentum import load, momentum_of
from hf_sai.runs.meters import state_bytes

warnings.filterwarnings("ignore")
RANK, WORLD = join(alone=True)
STEPS = 10
#: On two ranks shards of 0 end within a block; on four those of 0 and 2 are too small for blocks. 1 is never cut.
MATRICES = ("0.weight", "1.weight", "2.weight")


def build():
    torch.manual_seed(0)
    return nn.Sequential(nn.Embedding(23, 650), nn.Linear(650, 512), nn.Linear(512, 23)).to(DEVICE)


def make(engine, dtype):
    """(model, data-parallel rank, data-parallel size)"""
    model = build().to(dtype)
    if engine == "alone":
        return model, 0, 1
    if engine == "ddp":
        return nn.parallel.DistributedDataParallel(model), RANK, WORLD
    if engine == "fsdp2":
        return fully_shard(model, mesh=init_device_mesh(DEVICE, (WORLD,))), RANK, WORLD
    if engine == "fsdp1":
        return FullyShardedDataParallel(model, use_orig_params=True, device_id=torch.device(DEVICE)), RANK, WORLD
    mesh = init_device_mesh(DEVICE, (2, WORLD // 2), mesh_dim_names=("dp", "in"))
    if engine == "hsdp":
        return fully_shard(model, mesh=mesh), RANK, WORLD
    plan = {"1": ColwiseParallel(), "2": RowwiseParallel()}
    model = fully_shard(parallelize_module(model, mesh["in"], plan), mesh=mesh["dp"])
    return model, mesh.get_local_rank("dp"), 2


class Run:
    def __init__(self, engine, kind):
        bits, _, rule = kind.partition("_")
        rounds, rule = rule == "rounded", "" if rule == "rounded" else rule
        self.options = {**OPTIONS, "lr": 3e-4, "momentum_dtype": bits, "update": rule or "published"}
        self.options["stochastic_rounding"] = rounds
        self.model, *self.data = make(engine, torch.bfloat16 if rounds else torch.float32)
        groups = self.model.named_parameters()
        if rule == "orthogonal":
            groups = param_groups(self.model, lr=3e-4, weight_decay=OPTIONS["weight_decay"], update=rule)
        self.optimizer = SGDSaI(groups, **self.options)
        self.saver = Saver(self.model, self.optimizer)
        self.ways = ["full"] if engine == "alone" else ["sharded", "full"]

    def train(self, *steps):
        return train(self.model, self.optimizer, range(*steps), *self.data)

    def momenta(self):
        """Name -> the whole momentum; under FSDP1 on the first rank alone."""
        if isinstance(self.model, FullyShardedDataParallel):
            states = get_state_dict(self.model, self.optimizer, options=StateDictOptions(full_state_dict=True))[1][
                "state"
            ]
            return {name: state["momentum_buffer"] for name, state in states.items()}
        found = {}
        for name, p, group in self.named():
            part = kind_of(p)(p, group, self.optimizer.state[p])
            values = part.lying(load(momentum_of(part)))
            found[name] = values.full_tensor() if isinstance(values, DTensor) else values.clone()
        return found

    def named(self):
        for group in self.optimizer.param_groups:
            for name, p in zip(group["param_names"], group["params"], strict=True):
                yield name.removeprefix("module."), p, group


def compare(engine, kind, _):
    run = Run(engine, kind)
    torch.manual_seed(RANK)
    losses = run.train(STEPS)
    alone, other = Run("alone", kind), Run("alone", kind.replace("_rounded", ""))
    for group in other.optimizer.param_groups:
        group["momentum_dtype"] = None
    expected, full = alone.train(STEPS), other.train(STEPS)
    here = [p.to_local() if isinstance(p, DTensor) else p for p in params_of(run.optimizer)]
    quantised = {name: "momentum_scales" in run.optimizer.state.get(p, {}) for name, p, _ in run.named()}
    wholes = [p.full_tensor() if isinstance(p, DTensor) else p for p in params_of(run.optimizer)]
    wholes = [] if engine == "fsdp1" else [*wholes, *run.momenta().values()]  # slices have no replicas here
    return {
        "loss": max(abs(a / b - 1) for a, b in zip(losses, expected, strict=True)),
        "loss of float32": max(abs(a / b - 1) for a, b in zip(losses, full, strict=True)),
        "bytes": state_bytes(run.optimizer) / sum(p.numel() for p in here),
        "quantised": quantised,
        "same": all(same_on_all_ranks(whole.detach()) for whole in wholes),
        "gsnr": max(
            abs(a / b - 1)
            for a, b in zip(gsnr_of(run.optimizer).values(), gsnr_of(alone.optimizer).values(), strict=True)
        ),
    }


def goes_on(run):
    return {"losses": run.train(STEPS, 2 * STEPS), "gsnr": gsnr_of(run.optimizer)}


def save(engine, kind, place):
    run = Run(engine, kind)
    run.train(STEPS)
    folder = place / f"{engine}_{kind}_{WORLD}"
    run.saver.save(folder)
    run.saver.save_full(folder / "full.pt", momenta=run.momenta())
    return goes_on(run)


def resume(engine, kind, place):
    """What is lost of the momentum, and how training goes on."""
    results = {}
    for way in Run(engine, kind).ways:
        run = Run(engine, kind)
        run.saver.load_full(place / "full.pt") if way == "full" else run.saver.load(place)
        before = torch.load(place / "full.pt", weights_only=True)["momenta"]
        after = run.momenta()
        lost = {
            name: ((after[name] - m).norm() / m.norm()).item()
            for name, m in before.items()
            if name in MATRICES and name in after
        }
        results[way] = {"lost": lost, **goes_on(run)}
    return results


ACTIONS = {"train": compare, "save": save, "resume": resume}
words = iter(sys.argv[1:])
results = {}
for action, engine, kind, place in zip(words, words, words, words, strict=True):
    results[f"{action} {engine} {kind} {Path(place).name}"] = ACTIONS[action](engine, kind, Path(place))
write_result({"world_size": dist.get_world_size(), **results})
