"""Part 2: the time of a step, every rule and path beside torch's optimizers, and the least that memory allows.

    python -m benchmarks.gpu.step_times --output runs/gpu

A few optimizers at a time step the same parameters in turn, beside fused AdamW, each between two events on the device.
The limit is the bytes that a step must move over the bandwidth of a copy on the same card.
"""

from __future__ import annotations

import statistics
import time
from typing import Any

import torch
from torch import nn

from benchmarks.gpu.contenders import ADAMW, MUON, OFFICIAL, PATHS, RIVALS, RULES, SGD, Contender, kernels, sai
from benchmarks.gpu.models import causal_lm, layers_that_fit, with_gradients
from benchmarks.gpu.part import Part
from hf_sai.runs.meters import state_bytes
from recipes.common.comparison import step_time_ratio

#: (model, dtype): the second with as many layers as fit.
MODELS = (("gpt2-xl", torch.float32), ("llama-2-7b", torch.bfloat16))
#: So small that parameters which are updated many times stay what they are.
LR, WEIGHT_DECAY = 1e-6, 0.01
#: At least the first number of rounds and at most the second, of these as many as fit into the seconds.
ROUNDS, SECONDS = (3, 14), 2.0
#: Bytes of a model's element that must fit beside fused AdamW: parameter, gradient, its states, another's and a
#: temporary one, by the parameter's own bytes.
TENSORS_AT_ONCE = 7


def contenders(dtype: torch.dtype) -> list[Contender]:
    """In the order of their worth, since the part may be cut off."""
    paths = [
        sai("published", label="" if path == "default" else path, without=without, **options)
        for path, (options, without) in PATHS.items()
    ]
    rules = [rule for rule in RULES if rule != "published"]
    of_rules = [sai(rule) for rule in rules]
    of_rules += [sai(rule, "fused", fused=True) for rule in rules if rule != "averaged"]
    low = [
        sai("published", "8-bit momentum", momentum_dtype="8bit"),
        sai("factored", "8-bit momentum", momentum_dtype="8bit"),
        sai("published", "4-bit momentum", momentum_dtype="4bit"),
    ]
    if dtype == torch.bfloat16:
        low.append(sai("published", "stochastic rounding", stochastic_rounding=True))
        low.append(sai("published", "stochastic rounding, fused", stochastic_rounding=True, fused=True))
    else:
        low.append(sai("published", "bfloat16 momentum", momentum_dtype=torch.bfloat16))
        low.append(sai("published", "bfloat16 momentum, fused", momentum_dtype=torch.bfloat16, fused=True))
    return [RIVALS[SGD], *paths, *of_rules, RIVALS[MUON], *low, OFFICIAL]


def copy_bandwidth(part: Part) -> float:
    """Bytes read and written in a second by a copy on the device, the median of ten."""
    elements = 2**16 if part.rehearse else 2**29
    source = torch.randn(elements, device=part.device.torch)
    target = torch.empty_like(source)
    seconds = [part.device.seconds(lambda: target.copy_(source)) for _ in range(12)][2:]
    return 2 * source.nbytes / statistics.median(seconds)


def measure(part: Part, name: str, dtype: torch.dtype) -> None:
    """All contenders on one model, into the results as they come."""
    device = part.device
    layers = layers_that_fit(
        name, TENSORS_AT_ONCE * dtype.itemsize, int(0.92 * device.free_bytes()), tiny=part.rehearse
    )
    torch.manual_seed(0)
    model = with_gradients(causal_lm(name, device.torch, tiny=part.rehearse, layers=layers, dtype=dtype))
    device.free()
    found: dict[str, Any] = {
        "model": name,
        "dtype": str(dtype).removeprefix("torch."),
        "layers": layers,
        "parameters": sum(p.numel() for p in model.parameters()),
        "tensors": len(list(model.parameters())),
        "rows": [],
    }
    part.results["models"].append(found)
    baseline = RIVALS[ADAMW].build(model, LR, WEIGHT_DECAY)
    baseline.step()
    for contender in contenders(dtype):
        with part.attempt(f"{name}: {contender.name}"):
            with_gradients(model)  # anew: rules change them in place
            found["rows"].append(measured(part, model, contender, baseline))
    of_baseline = [row["baseline_seconds"] for row in found["rows"]]
    if of_baseline:
        limit = limit_seconds(model, baseline, RIVALS[ADAMW], part.results["copy_bytes_per_second"])
        found["baseline"] = {
            "optimizer": ADAMW,
            "median_seconds": statistics.median(of_baseline),
            "limit_seconds": limit,
            "state_bytes_per_parameter": state_bytes(baseline) / found["parameters"],
        }
    part.save()


def measured(part: Part, model: nn.Module, contender: Contender, baseline: Any) -> dict[str, Any]:
    """One contender and the baseline in turn, round after round."""
    device = part.device
    optimizer = contender.build(model, LR, WEIGHT_DECAY)
    first = device.seconds(optimizer.step)
    standing = device.allocated()
    device.reset_peak()
    with kernels() as used:
        device.seconds(optimizer.step)
    temporary = device.peak() - standing
    ours, theirs = [], []
    begun = time.monotonic()
    while len(ours) <= ROUNDS[0] or (
        len(ours) <= ROUNDS[1] and time.monotonic() - begun < SECONDS and not part.rehearse
    ):
        both = [(optimizer, ours), (baseline, theirs)]
        watches = [(device.timed(stepped.step), seconds) for stepped, seconds in both[:: 1 if len(ours) % 2 else -1]]
        device.wait()
        for watch, seconds in watches:
            seconds.append(watch.seconds())
    ours, theirs = ours[1:], theirs[1:]  # the first round warms up
    return {
        "optimizer": contender.name,
        "rule": contender.rule,
        "ratio": step_time_ratio(ours, theirs),
        "median_seconds": statistics.median(ours),
        "baseline_seconds": statistics.median(theirs),
        "first_step_seconds": first,
        "limit_seconds": limit_seconds(model, optimizer, contender, part.results["copy_bytes_per_second"]),
        "state_bytes_per_parameter": state_bytes(optimizer) / sum(p.numel() for p in model.parameters()),
        "temporary_bytes": temporary,
        "kernels": sorted(used) or ["torch's operations"],
    }


def limit_seconds(model: nn.Module, optimizer: Any, contender: Contender, bandwidth: float) -> float:
    """Parameters and states are read and written, gradients are read: once, or twice where the rule needs it."""
    parameters = sum(p.nbytes for p in model.parameters())
    gradients = parameters * (2 if contender.reads_gradient_twice else 1)
    return (2 * parameters + gradients + 2 * state_bytes(optimizer)) / bandwidth


def main() -> None:
    with Part("step_times", __doc__) as part:
        part.results["copy_bytes_per_second"] = copy_bandwidth(part)
        part.results["models"] = []
        part.save()
        for name, dtype in MODELS:
            with part.attempt(name):
                measure(part, name, dtype)


if __name__ == "__main__":
    main()
