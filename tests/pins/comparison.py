"""How far a training is from its pin, in units of what rounding may do."""

from dataclasses import dataclass

import torch
from cases import MODELS
from training import SAMPLED


@dataclass(frozen=True)
class Tolerance:
    """Parts of the pinned movement's or momentum's size: for each sample of elements, and for the norm of the whole."""

    movement: float
    size: float
    momentum: float
    momentum_size: float
    gsnr: float

    def __or__(self, other):
        return Tolerance(*map(max, vars(self).values(), vars(other).values()))


# At least twice what ``make_pins.py --spread`` finds between the paths, which round differently, and above what was
# found between processors: AMD EPYC made the pins, Intel's AMX sums otherwise. In half precision that is much for
# single elements, but little for norms: these are what a wrong scale of a few percent shows in.
_OF_DTYPE = {
    torch.float32: Tolerance(movement=2e-4, size=1e-4, momentum=1e-4, momentum_size=1e-4, gsnr=1e-5),
    torch.float16: Tolerance(movement=0.012, size=0.01, momentum=0.015, momentum_size=0.01, gsnr=5e-3),
    torch.bfloat16: Tolerance(movement=0.07, size=0.025, momentum=0.06, momentum_size=0.045, gsnr=5e-3),
}

# Quantising makes steps of rounding differences: a code more or less.
_OF_MOMENTUM = {
    torch.bfloat16: Tolerance(movement=3e-3, size=3e-4, momentum=0.01, momentum_size=3e-3, gsnr=0.0),
    "8bit": Tolerance(movement=0.02, size=2e-3, momentum=0.06, momentum_size=0.01, gsnr=0.0),
    "4bit": Tolerance(movement=0.03, size=5e-3, momentum=0.25, momentum_size=0.02, gsnr=0.0),
}

# Of an adapter in bfloat16, by its rule. The published step has moved B by few roundings so far, and A's gradient is
# made of these.
_OF_NEW_LORA = {
    "published": Tolerance(movement=0.15, size=0.025, momentum=0.8, momentum_size=0.3, gsnr=5e-3),
    "factored": Tolerance(movement=0.07, size=0.025, momentum=0.13, momentum_size=0.06, gsnr=5e-3),
}


def tolerance_of(case):
    own = _OF_DTYPE[case.dtype]
    if case.model == "llama_lora" and case.dtype == torch.bfloat16:
        own |= _OF_NEW_LORA.get(case.rule, own)
    return own | _OF_MOMENTUM.get(case.options.get("momentum_dtype"), own)


def excesses(outcome, pinned, case):
    """Parameter and quantity -> its distance from the pinned one, divided by what is allowed: above 1 is too far."""
    tolerance = tolerance_of(case)
    far, at = {}, {"movement": 0, "momentum": 0}
    for i, (name, p) in enumerate(trained_parameters(case)):
        far[f"{name}: g-SNR"] = _ratio(outcome.gsnr[i] - pinned.gsnr[i], tolerance.gsnr * pinned.gsnr[i])
        # A weight of 1 moves by few roundings of half precision, of which one more or less tells nothing.
        rounding = 0.0 if case.dtype == torch.float32 else torch.finfo(case.dtype).eps * p.norm().item()
        kinds = [("movement", 0, tolerance.movement, tolerance.size, rounding)]
        if len(pinned.momentum):
            kinds.append(("momentum", 1, tolerance.momentum, tolerance.momentum_size, 0.0))
        for kind, column, of_sample, of_size, floor in kinds:
            size = pinned.norms[i, column].item()
            difference = outcome.norms[i, column] - pinned.norms[i, column]
            far[f"{name}: size of the {kind}"] = _ratio(difference, of_size * size + floor)
            count = min(SAMPLED, p.numel())
            ours, theirs = (getattr(x, kind)[at[kind] : at[kind] + count].double() for x in (outcome, pinned))
            at[kind] += count
            # Where the sample happens to be small beside the whole, its share of the whole is what counts.
            share = (count / p.numel()) ** 0.5
            allowed = of_sample * max(theirs.norm().item(), share * size) + share * floor
            far[f"{name}: {kind}"] = _ratio((ours - theirs).norm(), allowed)
    return far


def trained_parameters(case):
    """Names and initial values in the order of an outcome."""
    model, _ = MODELS[case.model]()
    groups = case.optimizer(model).param_groups
    return [pair for group in groups for pair in zip(group["param_names"], group["params"], strict=True)]


def _ratio(difference, allowed):
    difference, allowed = abs(float(difference)), float(allowed)
    if difference == 0:
        return 0.0
    return difference / allowed if allowed > 0 and difference < float("inf") else float("inf")
