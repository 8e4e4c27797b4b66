"""Gradient release: each parameter is updated in the backward pass, as soon as its gradient is there to be freed.

The gradients of a model never all stand in memory then, only those of about one layer.
"""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from hf_sai.optim.stochastic import in_many_processes

if TYPE_CHECKING:
    from hf_sai.optim.sgd_sai import SGDSaI

__all__ = ["Releases", "refuse_normalize"]


class Releases:
    """Which parameters of an optimizer have been updated since its last step, and the hooks that do it.

    Args:
        optimizer: Its ``update_released`` is called with each parameter and its group, as long as it lives.
    """

    def __init__(self, optimizer: SGDSaI) -> None:
        self._optimizer = weakref.ref(optimizer)
        self._done: set[int] = set()
        self._backward = -1  # torch's number of the backward pass that was seen last
        self._finished = True  # whether that one came to its end
        _ALIVE.add(self)
        _watch_grad_scaler()

    def watch(self, group_index: int) -> None:
        """Update a group's parameters in the backward pass; ``step()`` then finds no gradients of theirs.

        Args:
            group_index: The group, by its place in ``param_groups``, since loading a state replaces the groups.
        """
        optimizer = self._optimizer()
        assert optimizer is not None
        me = weakref.ref(self)

        def update(p: Tensor) -> None:
            releases = me()
            owner = None if releases is None else releases._optimizer()
            if releases is not None and owner is not None:
                releases._admit(p)
                owner.update_released(p, owner.param_groups[group_index])
                p.grad = None

        for p in optimizer.param_groups[group_index]["params"]:
            if p.requires_grad:
                p.register_post_accumulate_grad_hook(update)

    def clear(self) -> None:
        """A step is over, or its gradients are given up: every parameter may be updated again."""
        self._done.clear()

    def reach(self, outputs: Any) -> bool:
        """Whether the gradients of these outputs flow into the optimizer's parameters."""
        optimizer = self._optimizer()
        mine = set() if optimizer is None else {id(p) for group in optimizer.param_groups for p in group["params"]}
        todo = [t.grad_fn for t in _tensors(outputs) if t.grad_fn is not None]
        seen = set(todo)
        while todo:
            node = todo.pop()
            if id(getattr(node, "variable", None)) in mine:
                return True
            following = {following for following, _ in node.next_functions if following is not None} - seen
            seen |= following
            todo += following
        return False

    def _admit(self, p: Tensor) -> None:
        """Raise ValueError for a parameter that may not be updated now."""
        _refuse_many_processes()
        current = torch._C._current_graph_task_id()
        if current != self._backward:
            if not self._finished:  # the last pass was interrupted, and its gradients with it
                self.clear()
            self._backward, self._finished = current, False
            torch.autograd.Variable._execution_engine.queue_callback(self._finish)
        if id(p) in self._done:
            raise ValueError(
                "gradient_release: a parameter was given a second gradient before optimizer.step(). Gradients cannot "
                "be accumulated (gradient_accumulation_steps=1), nor come in parts (use_reentrant=False in "
                "gradient checkpointing), since the first has been applied and freed."
            )
        self._done.add(id(p))

    def _finish(self) -> None:
        self._finished = True


#: Of every optimizer that releases gradients, for GradScaler to ask.
_ALIVE: weakref.WeakSet[Releases] = weakref.WeakSet()


def refuse_normalize(group: dict[str, Any]) -> None:
    """Raise ValueError for a group that needs all parameters' g-SNR before the first of them is updated."""
    if group["normalize"]:
        raise ValueError("gradient_release and normalize exclude each other: the largest g-SNR is not known in time.")


def _refuse_many_processes() -> None:
    if in_many_processes():
        raise ValueError(
            f"gradient_release updates before the gradients of the {dist.get_world_size()} processes have been "
            "averaged. Leave it out, or train with one process; sharded gradients (FSDP2) save more."
        )


def _watch_grad_scaler() -> None:
    """Let GradScaler refuse to scale a loss whose gradients are released; later would be after the first update.

    The optimizer cannot see it by itself: it learns of the scaler in ``step()``, after the backward pass.
    """
    scaler = torch.amp.GradScaler
    original = scaler.scale
    if getattr(original, "_hf_sai", False):
        return

    def scale(self: Any, outputs: Any) -> Any:
        if self.is_enabled() and any(releases.reach(outputs) for releases in list(_ALIVE)):
            raise ValueError(
                "gradient_release updates with gradients that GradScaler has not unscaled. Use bfloat16, which needs "
                "no GradScaler, or leave gradient_release out."
            )
        return original(self, outputs)

    scale._hf_sai = True  # type: ignore[attr-defined]
    scaler.scale = scale  # type: ignore[method-assign]


def _tensors(outputs: Any) -> list[Tensor]:
    if isinstance(outputs, Tensor):
        return [outputs]
    return [t for output in outputs for t in _tensors(output)] if isinstance(outputs, (list, tuple)) else []
