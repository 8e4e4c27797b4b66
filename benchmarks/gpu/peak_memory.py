"""Part 3: the most memory that training steps of GPT-2 XL need, and how long they take, optimizer by optimizer.

    python -m benchmarks.gpu.peak_memory --output runs/gpu

In each of two settings, float32 weights under bfloat16 autocast and bfloat16 weights, with gradient checkpointing and
one sequence a step. A row is the largest sum of tensors since the model stood there; weights are part of it.
"""

from __future__ import annotations

import statistics
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.gpu.contenders import ADAMW, MUON, RIVALS, SGD, Contender, sai
from benchmarks.gpu.models import causal_lm
from benchmarks.gpu.part import Part
from hf_sai.runs.meters import state_bytes

MODEL = "gpt2-xl"
LR, WEIGHT_DECAY = 1e-6, 0.01
STEPS = 4
RELEASE = {"gradient_release": True}
EIGHT = {"momentum_dtype": "8bit"}
ROUNDING = {"stochastic_rounding": True}


def contenders(dtype: torch.dtype) -> list[Contender]:
    """In the order of their worth. bfloat16 weights are rounded at random, AdamW's aside, which torch cannot."""
    rounding = ROUNDING if dtype == torch.bfloat16 else {}
    return [
        RIVALS[ADAMW],
        sai("published", **rounding),
        sai("factored", **rounding),
        sai("orthogonal", **rounding),
        sai("published", "8-bit momentum", **EIGHT, **rounding),
        sai("published", "gradient release", **RELEASE, **rounding),
        sai("published", "8-bit momentum, gradient release", **EIGHT, **RELEASE, **rounding),
        sai("factored", "8-bit momentum, gradient release", **EIGHT, **RELEASE, **rounding),
        RIVALS[SGD],
        RIVALS[MUON],
    ]


def measured(part: Part, model: nn.Module, ids: Tensor, autocast: bool, contender: Contender) -> dict[str, Any]:
    """Some steps with one optimizer."""
    device = part.device

    def backward() -> None:
        with torch.autocast(device.torch.type, torch.bfloat16, enabled=autocast):
            loss = model(input_ids=ids, labels=ids).loss
        loss.backward()

    gradients = 0

    def train() -> None:
        nonlocal gradients
        backward()
        gradients = sum(p.grad.nbytes for p in model.parameters() if p.grad is not None)
        optimizer.step()
        optimizer.zero_grad()

    device.reset_peak()
    weights = device.allocated()
    optimizer = contender.build(model, LR, WEIGHT_DECAY)
    seconds = [device.seconds(train) for _ in range(STEPS)]
    return {
        "optimizer": contender.name,
        "rule": contender.rule,
        "weight_bytes": sum(p.nbytes for p in model.parameters()),
        "bytes_before": weights,
        "gradient_bytes": gradients,
        "state_bytes": state_bytes(optimizer),
        "peak_bytes": device.peak(),
        "step_seconds": statistics.median(seconds[1:]),
    }


def main() -> None:
    with Part("peak_memory", __doc__) as part:
        device = part.device
        part.results |= {"model": MODEL, "tokens": 32 if part.rehearse else 1024, "rows": []}
        part.save()
        for setting, dtype in (("bfloat16 autocast", torch.float32), ("bfloat16 weights", torch.bfloat16)):
            torch.manual_seed(0)
            model = causal_lm(MODEL, device.torch, tiny=part.rehearse, dtype=dtype)
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
            model.train()
            ids = torch.randint(0, model.config.vocab_size, (1, part.results["tokens"]), device=device.torch)
            device.free()
            for contender in contenders(dtype):
                with part.attempt(f"{setting}: {contender.name}"):
                    found = measured(part, model, ids, dtype == torch.float32, contender)
                    part.results["rows"].append({"setting": setting, **found})
                model.zero_grad()  # of one that failed
            del model
            device.free()


if __name__ == "__main__":
    main()
