"""Cheap ideas that can be laid over a rule: each changes the step that an optimizer is about to make.

The rule's update and the weight decay are told apart by letting the optimizer step with a learning rate of 1 and no
decay: what it then takes from a parameter is the update alone, G / sqrt(n) m. The idea changes that, and the learning
rate and the decay come back afterwards.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from hf_sai.optim.rules import factored, orthogonal

__all__ = ["IDEAS", "laid_over", "with_beta2", "with_qkv_apart"]

Build = Callable[[nn.Module, Mapping[str, float]], list[Optimizer]]
#: Takes the rule's update, the parameter before it, the gradient, the momentum's coefficient and what the idea has kept
#: of the parameter; gives the update that is made, and the share of each element's decay.
Idea = Callable[[Tensor, Tensor, Tensor, float, dict[str, Tensor]], tuple[Tensor, Tensor | float]]


def cautious_mask(update: Tensor, before: Tensor, grad: Tensor, mu: float, kept: dict[str, Tensor]) -> Any:
    """Only elements that the gradient of this step agrees with, made up for in size: arXiv 2411.16085, Algorithm 1."""
    agrees = (update * grad > 0).to(update.dtype)
    return update * agrees / agrees.mean().clamp(min=1e-3), 1.0


def cautious_decay(update: Tensor, before: Tensor, grad: Tensor, mu: float, kept: dict[str, Tensor]) -> Any:
    """Decay only where the update, too, brings the element nearer to 0: arXiv 2510.12402, Algorithm 1."""
    return update, (update * before >= 0).to(update.dtype)


def nesterov(update: Tensor, before: Tensor, grad: Tensor, mu: float, kept: dict[str, Tensor]) -> Any:
    """mu m + (1 - mu) g, the momentum a step ahead."""
    last = kept.get("last")
    kept["last"] = update
    return (update, 1.0) if last is None else ((1 + mu) * update - mu * last, 1.0)


def clipped(update: Tensor, before: Tensor, grad: Tensor, mu: float, kept: dict[str, Tensor]) -> Any:
    """The rule's gradient at a root mean square of 1 at most, before the momentum: Adafactor's clipping, 1804.04235."""
    last, mine = kept.get("last"), kept.get("mine")
    unit = update if last is None else (update - mu * last) / (1 - mu)
    unit = unit / unit.square().mean().sqrt().clamp(min=1.0)
    kept["last"] = update
    kept["mine"] = unit if mine is None else mu * mine + (1 - mu) * unit
    return kept["mine"], 1.0


def live(update: Tensor, before: Tensor, grad: Tensor, mu: float, kept: dict[str, Tensor]) -> Any:
    """Times the momentum's root mean square over that of pure noise: a g-SNR of the last steps, without a state."""
    return update * update.square().mean().sqrt() * ((1 + mu) / (1 - mu)) ** 0.5, 1.0


#: What each idea is called.
IDEAS: dict[str, Idea] = {
    "cautious_mask": cautious_mask,
    "cautious_decay": cautious_decay,
    "nesterov": nesterov,
    "clipped": clipped,
    "live_gsnr": live,
}


def laid_over(build: Build, idea: Idea) -> Build:
    """The same optimizers, whose updates the idea changes."""

    def built(model: nn.Module, settings: Mapping[str, float]) -> list[Optimizer]:
        optimizers = build(model, settings)
        for optimizer in optimizers:
            _lay_over(optimizer, idea)
        return optimizers

    return built


def _lay_over(optimizer: Optimizer, idea: Idea) -> None:
    before: dict[Tensor, tuple[Tensor, Tensor]] = {}
    asked: list[tuple[float, float]] = []
    kept: dict[Tensor, dict[str, Tensor]] = defaultdict(dict)

    def ahead(*_: Any) -> None:
        before.clear()
        asked[:] = [(group["lr"], group["weight_decay"]) for group in optimizer.param_groups]
        for group in optimizer.param_groups:
            group["lr"], group["weight_decay"] = 1.0, 0.0
            before.update({p: (p.detach().clone(), p.grad.clone()) for p in group["params"] if p.grad is not None})

    @torch.no_grad()
    def afterwards(*_: Any) -> None:
        for group, (lr, decay) in zip(optimizer.param_groups, asked, strict=True):
            group["lr"], group["weight_decay"] = lr, decay
            for p in group["params"]:
                if p in before:
                    old, grad = before[p]
                    update, share = idea(old - p, old, grad, group["momentum"], kept[p])
                    p.copy_(old - lr * decay * share * old - lr * update)

    optimizer.register_step_pre_hook(ahead)
    optimizer.register_step_post_hook(afterwards)


def with_beta2(build: Build, beta2: float) -> Build:
    """The factored rule with another share of its running means kept from step to step; build it with torch's path."""

    def built(model: nn.Module, settings: Mapping[str, float]) -> list[Optimizer]:
        optimizers = build(model, settings)
        usual = factored.KEPT
        for optimizer in optimizers:
            optimizer.register_step_pre_hook(lambda *_: setattr(factored, "KEPT", beta2))
            optimizer.register_step_post_hook(lambda *_: setattr(factored, "KEPT", usual))
        return optimizers

    return built


def with_qkv_apart(build: Build) -> Build:
    """The orthogonal rule with queries, keys and values made orthogonal each alone, where one matrix holds the three.

    That is what three times as many columns as rows means here, as in GPT-2.
    """
    usual = orthogonal.newton_schulz

    def in_thirds(matrices: Tensor) -> Tensor:
        count, rows, columns = matrices.shape
        if columns != 3 * rows:
            return usual(matrices)
        thirds = matrices.view(count, rows, 3, rows).transpose(1, 2).reshape(3 * count, rows, rows)
        whole = usual(thirds).view(count, 3, rows, rows).transpose(1, 2).reshape(matrices.shape)
        return whole / 3**0.5  # the size that the whole would have

    def built(model: nn.Module, settings: Mapping[str, float]) -> list[Optimizer]:
        optimizers = build(model, settings)
        for optimizer in optimizers:
            optimizer.register_step_pre_hook(lambda *_: setattr(orthogonal, "newton_schulz", in_thirds))
            optimizer.register_step_post_hook(lambda *_: setattr(orthogonal, "newton_schulz", usual))
        return optimizers

    return built
