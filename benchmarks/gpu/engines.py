"""Part 6: FSDP2 in one process, with and without offload to the CPU, against the same training without it.

    python -m benchmarks.gpu.engines --output runs/gpu

GPT-2 small (124 million parameters), float32 weights, one batch over and over.
"""

from __future__ import annotations

import statistics
import tempfile
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, fully_shard

from benchmarks.gpu.contenders import ADAMW, RIVALS, Contender, sai
from benchmarks.gpu.models import causal_lm
from benchmarks.gpu.part import Part

ALONE, SHARDED, OFFLOADED = "none", "FSDP2", "FSDP2, CPU offload"
STEPS = 5


def built(part: Part, engine: str) -> Any:
    """The model in an engine."""
    device = part.device
    torch.manual_seed(0)
    model = causal_lm("gpt2", device.torch, tiny=part.rehearse)
    if engine == ALONE:
        return model
    mesh = init_device_mesh(device.torch.type, (1,))
    options: dict[str, Any] = {"mesh": mesh}
    if engine == OFFLOADED:
        options["offload_policy"] = CPUOffloadPolicy(pin_memory=device.cuda)
    for block in model.transformer.h:
        fully_shard(block, **options)
    return fully_shard(model, **options)


def measured(part: Part, engine: str, contender: Contender) -> dict[str, Any]:
    """Losses, seconds and bytes of some steps."""
    device = part.device
    device.free()
    before = device.allocated()
    device.reset_peak()
    model = built(part, engine)
    optimizer = contender.build(model, 1e-3, 0.01)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, model.config.vocab_size, (2, 32 if part.rehearse else 1024), generator=generator)
    ids = ids.to(device.torch)
    losses, seconds, of_optimizer = [], [], []
    for _ in range(STEPS):
        device.wait()
        loss = model(input_ids=ids, labels=ids).loss
        whole = device.timed(loss.backward)
        own = device.timed(optimizer.step)
        device.wait()
        optimizer.zero_grad()
        losses.append(loss.item())
        of_optimizer.append(own.seconds())
        seconds.append(whole.seconds() + own.seconds())
    return {
        "engine": engine,
        "optimizer": contender.name,
        "losses": losses,
        "backward_and_step_seconds": statistics.median(seconds[1:]),
        "optimizer_seconds": statistics.median(of_optimizer[1:]),
        "peak_bytes": device.peak() - before,
    }


def main() -> None:
    with Part("engines", __doc__) as part, tempfile.TemporaryDirectory() as folder:
        backend = "gloo" if part.rehearse else "cpu:gloo,cuda:nccl"
        dist.init_process_group(backend, store=dist.FileStore(f"{folder}/store", 1), rank=0, world_size=1)
        part.results["rows"] = []
        for contender in (sai("published"), sai("factored"), RIVALS[ADAMW]):
            for engine in (ALONE, SHARDED, OFFLOADED):
                with part.attempt(f"{contender.name}, {engine}"):
                    part.results["rows"].append(measured(part, engine, contender))
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
