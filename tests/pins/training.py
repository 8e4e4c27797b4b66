"""Trains a case and says what came of it: movements, momentum, g-SNR and a hash of every bit."""

import contextlib
import hashlib
from dataclasses import dataclass

import torch
from cases import MODELS
from internals import momentum, momentum_tensors, without_numba

STEPS = 20
SAMPLED = 24


@dataclass
class Outcome:
    """Of one training.

    Attributes:
        movement: Samples of final minus initial value, of one parameter after the other, float32.
        momentum: Samples of the momentum, likewise; nothing where there is none.
        norms: Of the whole movement and the whole momentum (0 where there is none), float64[parameters, 2].
        gsnr: float64[parameters].
        sha256: Of all bits of parameters and momentum.
    """

    movement: torch.Tensor
    momentum: torch.Tensor
    norms: torch.Tensor
    gsnr: torch.Tensor
    sha256: str


def train(case, lr_factor=1.0, steps=STEPS):
    model, loss = MODELS[case.model]()
    model.to(case.dtype)
    with without_numba() if case.path == "torch" else contextlib.nullcontext():
        optimizer = case.optimizer(model, lr_factor)
        params = [p for group in optimizer.param_groups for p in group["params"]]
        initial = [p.detach().clone() for p in params]
        sign = -1 if case.options.get("maximize") else 1
        for step in range(steps):
            (sign * loss(step)).backward()
            optimizer.step()
            optimizer.zero_grad()
    movements = [(p.detach() - start).float() for p, start in zip(params, initial, strict=True)]
    momenta = [momentum(optimizer, p) if optimizer.state[p] else None for p in params]
    return Outcome(
        movement=torch.cat([sample(m) for m in movements]),
        momentum=torch.cat([torch.empty(0), *(sample(m.float()) for m in momenta if m is not None)]),
        norms=torch.tensor([[norm(a), norm(b)] for a, b in zip(movements, momenta, strict=True)]).double(),
        gsnr=torch.tensor([optimizer.state[p].get("gsnr", 0.0) for p in params], dtype=torch.float64),
        sha256=sha256([p.detach() for p in params] + [t for p in params for t in momentum_tensors(optimizer, p)]),
    )


def norm(tensor):
    return 0.0 if tensor is None else tensor.double().norm().item()


def sample(tensor):
    """At most ``SAMPLED`` elements, evenly spread."""
    places = torch.linspace(0, tensor.numel() - 1, min(SAMPLED, tensor.numel())).round().long()
    return tensor.flatten()[places]


def sha256(tensors):
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(tensor.contiguous().view(torch.uint8).numpy().tobytes() if tensor.ndim else b"%r" % tensor.item())
    return digest.hexdigest()
