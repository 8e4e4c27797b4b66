"""FSDP1 (``FullyShardedDataParallel``): measuring parameters that are slices of a flat one, and on some ranks empty."""

from __future__ import annotations

import gc
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from hf_sai.distributed.sharding import all_reduce_rows
from hf_sai.optim.gsnr import UNMEASURED, gsnr_from_moments

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = ["FlatSlices", "Home", "find_homes", "is_slice", "refuse_flat_parameter"]


def is_slice(parameter: Tensor) -> bool:
    """Whether FSDP1 (``use_orig_params=True``) has made this parameter a slice of its flat parameter."""
    return getattr(parameter, "_fsdp_flattened", False)


def refuse_flat_parameter(parameter: Tensor) -> None:
    """Raise ValueError for FSDP1's flat parameter itself, which has one g-SNR for many tensors.

    Args:
        parameter: Any parameter.

    Raises:
        ValueError: It is a flat parameter.
    """
    if getattr(parameter, "_is_flat_param", False):
        raise ValueError(
            "FSDP1 with use_orig_params=False hands the optimizer flat parameters, in which SGD-SaI cannot tell one "
            "tensor from the next. Set use_orig_params=True (accelerate and Trainer: fsdp_use_orig_params: true in "
            "the config file), or use FSDP2 (fsdp_version: 2)."
        )


class Home(NamedTuple):
    """Where a slice belongs.

    Attributes:
        shape: The whole parameter's shape.
        groups: The process group over which it is sharded; empty under ``NO_SHARD``.
        device: The device on which that group communicates.
    """

    shape: torch.Size
    groups: tuple[ProcessGroup, ...]
    device: torch.device


def find_homes() -> dict[int, Home]:
    """id of each live slice -> its home.

    A slice does not know its flat parameter and the optimizer does not know the model, so the handles that hold both
    are looked up among the live objects. Call it once, not once per step.
    """
    from torch.distributed.fsdp._flat_param import FlatParamHandle

    homes: dict[int, Home] = {}
    for handle in gc.get_objects():
        if type(handle) is FlatParamHandle:
            groups = (handle.process_group,) if handle.uses_sharded_strategy else ()
            flat = handle.flat_param
            for parameter, shape in zip(flat._params or (), flat._shapes, strict=False):
                homes[id(parameter)] = Home(shape, groups, handle.device)
    return homes


class FlatSlices:
    """The slices of one optimizer, and what all ranks know of their g-SNR.

    A rank that owns nothing of a parameter has neither its gradient nor its state, so it cannot see by itself when
    there is something to measure. Hence every rank takes part while any parameter is unmeasured, with a row of zeros
    for what it does not own; the rows also carry what some ranks have loaded from a checkpoint.
    """

    def __init__(self, parameters: Iterable[Tensor]) -> None:
        homes = find_homes()
        self.home = {p: homes[id(p)] for p in parameters if is_slice(p) and p.requires_grad}
        self.gsnr: dict[Tensor, float] = {}

    def measure(self, param_groups: Iterable[dict[str, Any]], state: dict[Tensor, dict[str, Any]]) -> None:
        """Measure what is unmeasured on all ranks together, and give this rank's slices their state.

        Args:
            param_groups: The optimizer's.
            state: The optimizer's; ``gsnr`` and ``momentum_buffer`` are written.
        """
        mine = [(p, group) for group in param_groups for p in group["params"] if p in self.home]
        unmeasured = [(p, group) for p, group in mine if p not in self.gsnr]
        if unmeasured:
            self._agree(unmeasured, state)
        for p, group in mine:
            if p.grad is not None:  # torch's optim_state_dict wants the same states on ranks that own nothing, too
                self._start(p, group, state[p])

    def _agree(self, unmeasured: list[tuple[Tensor, dict[str, Any]]], state: dict[Tensor, dict[str, Any]]) -> None:
        """One all_reduce per process group over (sum, sum of squares, stored g-SNR, number of ranks that have one)."""
        homes = [self.home[p] for p, _ in unmeasured]
        table = torch.stack([_local_row(p, state.get(p, {})).to(homes[0].device) for p, _ in unmeasured])
        table = all_reduce_rows(table, [home.groups for home in homes])
        for (p, group), home, row in zip(unmeasured, homes, table.tolist(), strict=True):
            total, total_of_squares, stored, holders = row
            if holders:
                gsnr = _stored(state.get(p, {})) or stored / holders
            else:
                gsnr = gsnr_from_moments(home.shape.numel(), total, total_of_squares, eps=group["eps"])
            if gsnr != UNMEASURED:
                self.gsnr[p] = gsnr

    def _start(self, p: Tensor, group: dict[str, Any], state: dict[str, Any]) -> None:
        if _stored(state) != UNMEASURED:
            return
        gradient = p.grad
        assert gradient is not None
        state["gsnr"] = self.gsnr.get(p, UNMEASURED)
        if group["momentum"] != 0:
            buffer = state.setdefault("momentum_buffer", torch.zeros_like(p))
            if state["gsnr"] != UNMEASURED:
                buffer.copy_(-gradient if group["maximize"] else gradient)


def _local_row(p: Tensor, state: dict[str, Any]) -> Tensor:
    stored = _stored(state)
    known = p.new_tensor([stored, float(stored != UNMEASURED)], dtype=torch.float64)
    if p.grad is None:
        return torch.cat([torch.zeros_like(known), known])
    total = p.grad.sum(dtype=torch.float64)
    norm = torch.linalg.vector_norm(p.grad, dtype=torch.float64)
    return torch.cat([torch.stack([total, norm.square()]), known])


def _stored(state: dict[str, Any]) -> float:
    return state.get("gsnr", UNMEASURED)
