"""Warns of parameters that are unfrozen in training, which the optimizer that Trainer has built does not hold."""

from __future__ import annotations

import logging
import weakref
from typing import Any

from torch import nn
from torch.optim import Optimizer

__all__ = ["watch_frozen"]

logger = logging.getLogger(__name__)


def watch_frozen(optimizer: Optimizer, model: nn.Module) -> None:
    """Warn once when parameters that are frozen now have a gradient after a step and are in no group.

    Args:
        optimizer: Whose steps to follow.
        model: Whose parameters to look at; it is not kept alive.
    """
    frozen = [(name, weakref.ref(p)) for name, p in model.named_parameters() if not p.requires_grad]

    def after(optimizer: Optimizer, *_: Any) -> None:
        there = [(name, p) for name, ref in frozen if (p := ref()) is not None]
        late = [(name, p) for name, p in there if p.requires_grad and p.grad is not None]
        if not late:
            return
        held = {id(p) for group in optimizer.param_groups for p in group["params"]}
        names = [name for name, p in late if id(p) not in held]
        frozen[:] = [(name, weakref.ref(p)) for name, p in there if id(p) not in held]
        if names:
            frozen.clear()
            logger.warning(
                "%d parameters were unfrozen in training, and the optimizer does not train them, as none that Trainer "
                "has built would: %s, ... Call train() once more after unfreezing them.", len(names), names[0]
            )  # fmt: skip

    optimizer.register_step_post_hook(after)
