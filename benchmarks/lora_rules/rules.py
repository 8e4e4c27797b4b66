"""Experimental rules for LoRA's A and B: what whitens them by each other, what gives the step its size."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from recipes.common.candidates import Build, adamw, sai

__all__ = ["CANDIDATES", "SIZES", "Candidate", "PairOptimizer", "Rule", "pairs_of"]


@dataclass(frozen=True)
class Rule:
    """How a factor moves. A lies on its side, so that both are n by r; "the other" is its partner's r by r Gram matrix.

    Attributes:
        size: What gives the step its size, a key of `SIZES`, before the momentum; or "orthogonal": singular values of
            1, after it.
        before: The gradient is divided by the other to this power.
        after: The step is, too.
        floor: Added to the other's eigenvalues, in units of the mean one of the larger factor.
        in_product: The other counts as it is, so that the learning rate is that of the product; else its shape alone
            counts, and it changes no norm.
        momentum_a: Of A.
        momentum_b: Of B.
        nesterov: The gradient comes in once more, after the momentum.
        ratio: B's learning rate over A's; the geometric mean of both is the learning rate.
        kept: How much a running mean keeps from step to step.
    """

    size: str = "factored"
    before: float = 0.0
    after: float = 0.0
    floor: float = 0.1
    in_product: bool = False
    momentum_a: float = 0.8
    momentum_b: float = 0.8
    nesterov: bool = False
    ratio: float = 1.0
    kept: float = 0.999


class PairOptimizer(torch.optim.Optimizer):
    """Trains LoRA's pairs by a rule, as plainly as it gets, without weight decay.

    Args:
        pairs: A and B of each layer.
        lr: Learning rate.
        rule: The rule.
    """

    def __init__(self, pairs: list[tuple[nn.Parameter, nn.Parameter]], lr: float, rule: Rule) -> None:
        self._pairs, self._rule = pairs, rule
        rates = (lr / math.sqrt(rule.ratio), lr * math.sqrt(rule.ratio))
        factors = zip(*pairs, strict=True)
        super().__init__([{"params": list(own), "lr": rate} for own, rate in zip(factors, rates, strict=True)], {})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:
        rate_a, rate_b = (group["lr"] for group in self.param_groups)
        for a, b in self._pairs:
            gram_a, gram_b = a @ a.mT, b.mT @ b  # both of before the step
            if a.grad is not None:
                along = self._step(self.state[a], a.grad.mT, gram_a, gram_b, self._rule.momentum_a)
                a.sub_(along.mT, alpha=rate_a)
            if b.grad is not None:
                b.sub_(self._step(self.state[b], b.grad, gram_b, gram_a, self._rule.momentum_b), alpha=rate_b)

    def _step(self, state: dict[str, Any], gradient: Tensor, own: Tensor, other: Tensor, momentum: float) -> Tensor:
        rule = self._rule
        if not gradient.any():  # A's first, as B is zero
            return gradient
        eye = torch.eye(len(other), dtype=other.dtype)
        other = other + rule.floor * torch.maximum(_mean(own), _mean(other)) * eye
        if not rule.in_product:
            other = other / _mean(other)
        step = gradient @ power(other, -rule.before) if rule.before else gradient
        if rule.size in SIZES:
            state["steps"] = state.get("steps", 0) + 1
            step = SIZES[rule.size](step, state, rule.kept)
        if momentum:
            average = state.setdefault("momentum", step.clone())
            average.lerp_(step, 1 - momentum)
            step = average.lerp(step, 1 - momentum) if rule.nesterov else average
        if rule.size == "orthogonal":
            step = step @ power(step.mT @ step, -0.5)
            if not rule.in_product:
                step = step * 0.2 * math.sqrt(len(step))  # as large as hf_sai's orthogonal rule has it
        if rule.after:
            norm = step.norm()
            step = step @ power(other, -rule.after)
            if not rule.in_product:
                step = step * norm / step.norm()
        return step


def pairs_of(model: nn.Module) -> list[tuple[nn.Parameter, nn.Parameter]]:
    """A and B of every LoRA layer."""
    layers = [module for module in model.modules() if isinstance(module, LoraLayer)]
    return [(layer.lora_A[name].weight, layer.lora_B[name].weight) for layer in layers for name in layer.lora_A]


def power(gram: Tensor, exponent: float) -> Tensor:
    """A positive matrix to a power; its smallest eigenvalues count as 1e-12 of its largest."""
    values, vectors = torch.linalg.eigh(gram.double())
    values = values.clamp(min=1e-12 * values[-1].item()).pow(exponent)
    return ((vectors * values) @ vectors.mT).to(gram.dtype)


def _mean(gram: Tensor) -> Tensor:
    return gram.diagonal().mean()  # of the eigenvalues


def _running(state: dict[str, Any], name: str, value: Tensor, kept: float) -> Tensor:
    mean = state.setdefault(name, torch.zeros_like(value)).lerp_(value, 1 - kept)
    return mean / (1 - kept ** state["steps"])


def _factored(gradient: Tensor, state: dict[str, Any], kept: float) -> Tensor:
    """As hf_sai's factored rule."""
    squares = gradient.square()
    rows = _running(state, "rows", squares.mean(1, keepdim=True), kept)
    columns = _running(state, "columns", squares.mean(0, keepdim=True), kept)
    return gradient / (rows * columns / rows.mean()).clamp(min=torch.finfo(rows.dtype).tiny).sqrt()


def _gram(gradient: Tensor, state: dict[str, Any], kept: float) -> Tensor:
    """Over the root of a running r by r second moment: Shampoo on one side, LoRA-RITE without its change of basis."""
    gram = _running(state, "gram", gradient.mT @ gradient / len(gradient), kept)
    return gradient @ power(gram + 1e-3 * _mean(gram) * torch.eye(len(gram), dtype=gram.dtype), -0.5)


#: What a gradient is divided by before the momentum.
SIZES: dict[str, Callable[[Tensor, dict[str, Any], float], Tensor]] = {"factored": _factored, "gram": _gram}


@dataclass(frozen=True)
class Candidate:
    """An optimizer, and the first two learning rates that are tried.

    Attributes:
        build: Makes it from a model and a learning rate.
        rates: In units of AdamW's usual one for the task.
        rule: Its rule, if it is one of those above.
        constant: Whether its learning rate stays after warmup, where the others follow the task's schedule.
    """

    build: Build
    rates: tuple[float, float] = (0.5, 1.0)
    rule: Rule | None = None
    constant: bool = False


def _ruled(rates: tuple[float, float] = (0.5, 1.0), **settings: Any) -> Candidate:
    rule = Rule(**settings)
    return Candidate(lambda model, lr: PairOptimizer(pairs_of(model), lr, rule), rates, rule)


def _schedule_free(model: nn.Module, lr: float) -> torch.optim.Optimizer:
    from schedulefree import AdamWScheduleFree

    return AdamWScheduleFree([p for p in model.parameters() if p.requires_grad], lr=lr, betas=(0.8, 0.999))


CANDIDATES: dict[str, Candidate] = {
    "adamw": Candidate(adamw(betas=(0.8, 0.999))),
    "adamw, constant rate": Candidate(adamw(betas=(0.8, 0.999)), constant=True),
    "adamw, schedule-free": Candidate(_schedule_free, constant=True),
    "averaged": Candidate(sai(update="averaged", momentum=0.8), constant=True),
    "averaged, momentum 0.6": Candidate(sai(update="averaged", momentum=0.6), constant=True),
    "averaged, decaying rate": Candidate(sai(update="averaged", momentum=0.8)),
    "factored": Candidate(sai(update="factored", momentum=0.8)),
    "factored, nesterov": Candidate(sai(update="factored", momentum=0.8, nesterov=True)),
    "factored, B x 4": _ruled(ratio=4.0),
    "factored, A x 4": _ruled(ratio=0.25),
    "factored, no momentum of A": _ruled(momentum_a=0.0),
    "factored, no momentum of B": _ruled(momentum_b=0.0),
    "whitened, factored": _ruled(before=1.0),
    "half whitened, factored, half whitened": _ruled(before=0.5, after=0.5),
    "half whitened, gram, half whitened": _ruled(size="gram", before=0.5, after=0.5),
    "orthogonal": _ruled((1.0, 2.0), size="orthogonal", momentum_a=0.9, momentum_b=0.9, nesterov=True),
    # LoRA-Muon (arXiv 2606.12921): the steepest step of B A by its largest singular value.
    "orthogonal in the product": _ruled((4.0, 8.0), size="orthogonal", before=0.5, after=0.5, in_product=True),
}
