"""Runs the loop of habits.py under torch's engines and alone: ``habits_worker.py ENGINE RULE [ENGINE RULE ...]``."""

# ruff: noqa: E402
import contextlib
import sys
import warnings

import torch
import torch.distributed as dist

sys.modules["transformers"] = None  # not needed here, and most of a worker's time would be importing it
from common import DEVICE, STEPS, gsnr_of, join, largest_difference, params_of, write_result
from habits import CLIP, Habits, optimizer_of, train
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import DTensor

warnings.filterwarnings("ignore")
RANK, WORLD = join()


@contextlib.contextmanager
def without_reducing(model):
    model.set_requires_gradient_sync(False)
    yield
    model.set_requires_gradient_sync(True)


def run(engine, rule):
    model, data, without_sync = Habits(), (RANK, WORLD), contextlib.nullcontext
    if engine == "alone":
        data = (0, 1)
    elif engine == "ddp":
        model = nn.parallel.DistributedDataParallel(model)
        without_sync = model.no_sync
    elif engine == "fsdp2":
        fully_shard(model.blocks[0])
        fully_shard(model)
        without_sync = lambda: without_reducing(model)  # noqa: E731
    elif engine == "fsdp1":
        model = FullyShardedDataParallel(model, use_orig_params=True, device_id=torch.device(DEVICE))
        without_sync = model.no_sync
    optimizer = optimizer_of(model, rule)
    before = [p.detach().clone() for p in model.parameters() if not p.requires_grad]
    clip = getattr(model, "clip_grad_norm_", None) or (lambda norm: nn.utils.clip_grad_norm_(model.parameters(), norm))
    norms = []

    def advance():
        norm = clip(CLIP)
        norms.append((norm.full_tensor() if isinstance(norm, DTensor) else norm).item())
        optimizer.step()
        optimizer.zero_grad()

    losses = train(model, STEPS, advance, *data, without_sync=without_sync)
    frozen = [p.detach() for p in model.parameters() if not p.requires_grad] if engine != "fsdp2" else before
    return {
        "gsnr": gsnr_of(optimizer),
        "losses": losses,
        "clipped": sum(norm > CLIP for norm in norms),
        "parameters": len(params_of(optimizer)),
        "frozen": all(torch.equal(a, b) for a, b in zip(before, frozen, strict=True)),
    }


results = {"world_size": dist.get_world_size()}
for engine, rule in zip(sys.argv[1::2], sys.argv[2::2], strict=True):
    alone, got = run("alone", rule), run(engine, rule)
    results[f"{engine} {rule}"] = {**got, **largest_difference(got, alone), "alone": alone["parameters"]}
write_result(results)
