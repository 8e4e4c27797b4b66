"""SinkGD (arXiv 2502.06742): gradients whose rows and columns have unit size, and no state."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

__all__ = ["SinkGD", "unit_rows_and_columns"]

ROUNDS = 5


class SinkGD(torch.optim.Optimizer):
    """Descent along each matrix's gradient, brought to rows and columns of root-mean-square 1; decay is decoupled.

    Args:
        params: Matrices.
        lr: Learning rate.
        weight_decay: Per unit of learning rate.
    """

    def __init__(self, params: Any, lr: float, weight_decay: float = 0.0) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    parameter.mul_(1 - group["lr"] * group["weight_decay"])
                    parameter.add_(unit_rows_and_columns(parameter.grad), alpha=-group["lr"])


def unit_rows_and_columns(gradient: Tensor) -> Tensor:
    """Divide rows and columns in turn by their root-mean-square, as Sinkhorn's algorithm does with sums."""
    for _ in range(ROUNDS):
        for dim in (1, 0):
            gradient = gradient / (gradient.square().mean(dim, keepdim=True).sqrt() + 1e-12)
    return gradient
