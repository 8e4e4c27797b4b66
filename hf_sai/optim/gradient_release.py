"""Gradient release: each parameter is updated in the backward pass, as soon as its gradient is there to be freed.

The gradients of a model never all stand in memory then, only those of about one layer.
"""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Any

import torch.distributed as dist
from torch import Tensor

if TYPE_CHECKING:
    from hf_sai.optim.sgd_sai import SGDSaI

__all__ = ["refuse_normalize", "release_gradients"]


def release_gradients(optimizer: SGDSaI, group_index: int) -> None:
    """Let a group's parameters be updated in the backward pass; ``step()`` then finds no gradients of theirs.

    Args:
        optimizer: Its ``update_released`` is called with each parameter and its group, as long as it lives.
        group_index: The group, by its place in ``param_groups``, since loading a state replaces the groups.
    """
    reference = weakref.ref(optimizer)

    def update(p: Tensor) -> None:
        owner = reference()
        if owner is None:
            return
        _refuse_many_processes()
        owner.update_released(p, owner.param_groups[group_index])
        p.grad = None

    for p in optimizer.param_groups[group_index]["params"]:
        if p.requires_grad:
            p.register_post_accumulate_grad_hook(update)


def refuse_normalize(group: dict[str, Any]) -> None:
    """Raise ValueError for a group that needs all parameters' g-SNR before the first of them is updated."""
    if group["normalize"]:
        raise ValueError("gradient_release and normalize exclude each other: the largest g-SNR is not known in time.")


def _refuse_many_processes() -> None:
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        raise ValueError(
            f"gradient_release updates before the gradients of the {dist.get_world_size()} processes have been "
            "averaged. Leave it out, or train with one process; sharded gradients (FSDP2) save more."
        )
