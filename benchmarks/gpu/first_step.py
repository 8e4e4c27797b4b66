"""Part 5: what measuring costs, the first step of SGD-SaI beside the later ones, at the shapes of Llama 2 7B.

python -m benchmarks.gpu.first_step --output runs/gpu
"""

from __future__ import annotations

import statistics
from typing import Any

import torch
from torch import nn

from benchmarks.gpu.contenders import ADAMW, RIVALS, Contender, sai
from benchmarks.gpu.models import causal_lm, layers_that_fit, with_gradients
from benchmarks.gpu.part import Part

MODEL = "llama-2-7b"
#: Parameter, gradient, two states (AdamW's) and a temporary tensor.
TENSORS_AT_ONCE = 5
LATER = 4


def measured(part: Part, model: nn.Module, contender: Contender) -> dict[str, Any]:
    """Seconds and bytes of the first step and of later ones."""
    device = part.device
    optimizer = contender.build(model, 1e-6, 0.01)
    before = device.allocated()
    device.reset_peak()
    first = device.seconds(optimizer.step)
    first_peak, standing = device.peak(), device.allocated()
    device.reset_peak()
    later = [device.seconds(optimizer.step) for _ in range(LATER)]
    return {
        "optimizer": contender.name,
        "first_seconds": first,
        "later_seconds": statistics.median(later),
        "state_bytes": standing - before,
        "temporary_bytes_first": first_peak - standing,
        "temporary_bytes_later": device.peak() - standing,
    }


def main() -> None:
    with Part("first_step", __doc__) as part:
        free = int(0.92 * part.device.free_bytes())
        layers = layers_that_fit(MODEL, TENSORS_AT_ONCE * torch.bfloat16.itemsize, free, tiny=part.rehearse)
        torch.manual_seed(0)
        model = with_gradients(
            causal_lm(MODEL, part.device.torch, tiny=part.rehearse, layers=layers, dtype=torch.bfloat16)
        )
        part.device.free()
        parameters = sum(p.numel() for p in model.parameters())
        part.results |= {"model": MODEL, "layers": layers, "parameters": parameters, "rows": []}
        for contender in (sai("published"), sai("published", "fused", fused=True), sai("factored"), RIVALS[ADAMW]):
            with part.attempt(contender.name):
                part.results["rows"].append(measured(part, model, contender))


if __name__ == "__main__":
    main()
