"""A training loop with what real ones have: accumulation, clipping, tied and frozen weights, experts without tokens."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch
from common import DEVICE, Block, batch, mean
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from hf_sai import SGDSaI, param_groups

MICRO_BATCHES = 2
CLIP = 0.3
LR = 3e-3


class Habits(nn.Module):
    """Head and embedding are one tensor, a layer is frozen, a block is recomputed, experts are chosen by the token."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(23, 12)
        self.frozen = nn.Linear(12, 12).requires_grad_(False)
        self.blocks = nn.ModuleList([Block(12)])
        self.experts = nn.Parameter(torch.randn(3, 12, 12) / 4)
        self.head = nn.Linear(12, 23, bias=False)
        self.head.weight = self.embed.weight
        self.to(DEVICE)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        x = checkpoint(self.blocks[0], x + self.frozen(x), use_reentrant=False)
        x = x + torch.tanh((self.experts[tokens % 3] @ x.unsqueeze(-1)).squeeze(-1))
        return self.head(x)


def data(step: int) -> Tensor:
    """A global batch whose first half gives the last expert no token."""
    tokens = batch(step)
    first = tokens[: len(tokens) // 2]
    first -= (first % 3 == 2).to(first.dtype)
    return tokens


def optimizer_of(model: nn.Module, update: str) -> SGDSaI:
    groups = param_groups(model, lr=LR, weight_decay=0.1, update=update)
    return SGDSaI(groups, lr=LR, update=update)


def loss_of(model: Callable[[Tensor], Tensor], tokens: Tensor) -> Tensor:
    logits = model(tokens[:, :-1])
    return nn.functional.cross_entropy(logits.flatten(0, 1).float(), tokens[:, 1:].flatten())


def train(
    model: Any,
    steps: int,
    advance: Callable[[], None],
    rank: int = 0,
    world_size: int = 1,
    without_sync: Callable[[], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext,
    backward: Callable[[Tensor], None] | None = None,
) -> list[float]:
    """Accumulate, of which only the last backward pass synchronises; returns losses on two global batches."""
    for step in range(steps):
        mine = data(step).chunk(world_size)[rank].chunk(MICRO_BATCHES)
        for number, micro in enumerate(mine):
            last = number == MICRO_BATCHES - 1
            with contextlib.nullcontext() if last else without_sync():
                loss = loss_of(model, micro)
                backward(loss) if backward else (loss / MICRO_BATCHES).backward()
                if backward:
                    advance()  # the engine counts by itself
        if not backward:
            advance()
    with torch.no_grad():
        return [mean(loss_of(model, data(step).chunk(world_size)[rank])) for step in range(2)]
