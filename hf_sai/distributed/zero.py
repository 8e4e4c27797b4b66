"""DeepSpeed ZeRO-1, -2 and -3: measuring and updating the pieces of parameters inside DeepSpeed's flat tensors.

ZeRO hands the optimizer not the model's parameters but one flat float32 tensor per parameter group (stages 1 and 2)
or sub-group (stage 3), of which each rank holds a part, and calls ``step`` once for each. This module finds the
parameters again, through attributes of DeepSpeed's optimizer that are not public: each is checked before use.
"""

from __future__ import annotations

import gc
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from hf_sai.distributed.sharding import all_reduce_rows, full_shapes
from hf_sai.optim.gsnr import UNMEASURED, GSNRRow, gsnr_from_moments
from hf_sai.optim.update import sgd_sai

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

    from hf_sai.optim.sgd_sai import SGDSaI

__all__ = ["SUPPORTED_SERIES", "Zero", "find_zero"]

#: The DeepSpeed releases whose layout this module knows (tested: 0.19.8).
SUPPORTED_SERIES = "0.19"

# What each of DeepSpeed's optimizers must have for this module to read it.
_SHARED = ("optimizer", "clip_grad")
_ATTRIBUTES = {
    "DeepSpeedZeroOptimizer": (
        *_SHARED,
        "bit16_groups",
        "single_partition_of_fp32_groups",
        "real_dp_process_group",
        "averaged_gradients",
        "loss_scale",
        "cpu_offload",
    ),
    "DeepSpeedZeroOptimizer_Stage3": (
        *_SHARED,
        "fp16_groups",
        "fp32_partitioned_groups_flat",
        "sub_group_process_groups",
        "sub_group_to_group_id",
        "grad_position",
        "get_param_id",
        "averaged_gradients",
        "loss_scale",
        "offload_optimizer",
        "swap_optimizer",
    ),
    "BF16_Optimizer": (*_SHARED, "bf16_groups", "fp32_groups_flat_partition", "real_dp_process_group"),
}


def find_zero(optimizer: SGDSaI) -> Zero | None:
    """The ZeRO optimizer that drives this one, ready for use; None if there is none.

    Args:
        optimizer: An optimizer that may have been given to ``deepspeed.initialize``.

    Raises:
        ValueError: DeepSpeed flattens the parameters in a way that this module does not know.
    """
    from deepspeed.runtime.base_optimizer import ZeROOptimizer

    # The flat tensors do not know their owner and DeepSpeed's optimizer wraps this one, so the owner is looked up
    # among the live objects, once.
    for candidate in gc.get_objects():
        if issubclass(type(candidate), ZeROOptimizer) and getattr(candidate, "optimizer", None) is optimizer:
            return Zero(candidate)
    return None


@dataclass(frozen=True)
class _Piece:
    """What this rank's part of a flat tensor holds of one parameter."""

    parameter: Tensor
    numel: int  # of the whole parameter
    start: int  # in this rank's part of the flat tensor
    length: int  # 0: this rank holds nothing of the parameter
    early_gradient: Callable[[], Tensor]  # the piece of the gradient before DeepSpeed copies it to ``flat.grad``

    def of(self, flat: Tensor) -> Tensor:
        return flat.narrow(0, self.start, self.length)


@dataclass(frozen=True)
class _Flat:
    """One flat tensor, the parameters in it and the process group over which it is partitioned."""

    tensor: Tensor
    pieces: tuple[_Piece, ...]
    process_group: ProcessGroup
    group_index: int


class Zero:
    """The parameters behind DeepSpeed's flat tensors.

    State per flat tensor: ``gsnr``, a list of floats, one per parameter of the flat tensor on every rank (0.0 while
    unmeasured); ``momentum_buffer``, float32, as long as this rank's part.
    """

    def __init__(self, engine: Any) -> None:
        _check(engine)
        self._engine = engine  # holds this object's optimizer: garbage collection deals with the cycle
        self.flats = _layout(engine)
        self._index = {id(flat.tensor): index for index, flat in enumerate(self.flats)}
        # Measured in this step, not yet updated: their momentum starts at the gradient.
        self._fresh: set[tuple[int, int]] = set()

    def step(self, optimizer: SGDSaI) -> None:
        """Update the flat tensors in the optimizer's groups; in a step's first call, measure all that is unmeasured.

        Args:
            optimizer: The wrapped optimizer, whose groups hold what DeepSpeed wants updated now.
        """
        for group in optimizer.param_groups:
            for tensor in group["params"]:
                if tensor.grad is None:
                    continue
                index = self._index[id(tensor)]
                if index == 0:  # DeepSpeed goes through its flat tensors in order, on all ranks alike
                    for flat in self.flats:
                        optimizer.state[flat.tensor].setdefault("gsnr", [UNMEASURED] * len(flat.pieces))
                    self._measure(optimizer)
                self._update(optimizer, group, index)

    def group_of(self, optimizer: SGDSaI, index: int) -> dict[str, Any]:
        """The parameter group of a flat tensor, also while DeepSpeed shows the optimizer only one group."""
        return optimizer._all_groups[self.flats[index].group_index]

    def rows(self, optimizer: SGDSaI, names: dict[int, str]) -> Iterator[GSNRRow]:
        """The report's rows; ``names`` (id of a parameter -> name) goes before the names of the groups."""
        seen: dict[int, int] = {}  # a group's parameters are spread over its flat tensors in their order
        for index, flat in enumerate(self.flats):
            group = self.group_of(optimizer, index)
            stored = optimizer.state.get(flat.tensor, {}).get("gsnr", [UNMEASURED] * len(flat.pieces))
            shapes = full_shapes(piece.parameter for piece in flat.pieces)
            for piece, shape, gsnr in zip(flat.pieces, shapes, stored, strict=True):
                number = seen.get(flat.group_index, 0)
                seen[flat.group_index] = number + 1
                known = group["param_names"][number] if "param_names" in group else None
                yield GSNRRow(
                    name=names.get(id(piece.parameter)) or known or f"group {flat.group_index} parameter {number}",
                    group=str(group.get("name", flat.group_index)),
                    shape=tuple(shape),
                    gsnr=gsnr if gsnr != UNMEASURED else None,
                    ratio=gsnr / math.sqrt(piece.numel) if gsnr != UNMEASURED else None,
                )

    def largest_gsnr(self, optimizer: SGDSaI) -> dict[Any, float]:
        """The largest measured g-SNR of each ``normalize_over``, as all ranks know it."""
        largest: dict[Any, float] = {}
        for index, flat in enumerate(self.flats):
            group = self.group_of(optimizer, index)
            if group["normalize"]:
                key = group.get("normalize_over")
                largest[key] = max(largest.get(key, UNMEASURED), *optimizer.state[flat.tensor]["gsnr"])
        return largest

    def _measure(self, optimizer: SGDSaI) -> None:
        pending = [
            (index, number)
            for index, flat in enumerate(self.flats)
            for number, gsnr in enumerate(optimizer.state[flat.tensor]["gsnr"])
            if gsnr == UNMEASURED
        ]
        if not pending:
            return
        from deepspeed.accelerator import get_accelerator

        device = get_accelerator().current_device_name()  # offloaded gradients lie on the CPU, which NCCL cannot reduce
        rows = [self._moments(index, self.flats[index].pieces[number]).to(device) for index, number in pending]
        table = all_reduce_rows(torch.stack(rows), [(self.flats[index].process_group,) for index, _ in pending])
        self._fresh.clear()
        for (index, number), (total, total_of_squares) in zip(pending, table.tolist(), strict=True):
            flat = self.flats[index]
            eps = self.group_of(optimizer, index)["eps"]
            gsnr = gsnr_from_moments(flat.pieces[number].numel, total, total_of_squares, eps=eps)
            optimizer.state[flat.tensor]["gsnr"][number] = gsnr
            if gsnr != UNMEASURED:
                self._fresh.add((index, number))

    def _moments(self, index: int, piece: _Piece) -> Tensor:
        """(sum, sum of squares) of this rank's piece of a gradient as the update will see it, float64[2]."""
        flat = self.flats[index].tensor
        if piece.length == 0:
            return torch.zeros(2, dtype=torch.float64)
        # DeepSpeed unscales and clips one flat tensor after the other, each just before its own step.
        ready = flat.grad is not None and (index == 0 or type(self._engine).__name__ == "BF16_Optimizer")
        gradient = piece.early_gradient() if flat.grad is None else piece.of(flat.grad)
        norm = torch.linalg.vector_norm(gradient, dtype=torch.float64)
        moments = torch.stack([gradient.sum(dtype=torch.float64), norm])
        if not ready:
            moments /= self._scale()
        moments[1] *= moments[1].clone()
        return moments

    def _scale(self) -> float:
        """What DeepSpeed will divide this step's gradients by: the loss scale times the share clipped away."""
        norm = getattr(self._engine, "_global_grad_norm", None)
        clip = self._engine.clip_grad
        excess = (float(norm) + 1e-6) / clip if clip > 0 and norm is not None else 1.0
        return float(self._engine.loss_scale) * max(excess, 1.0)

    def _update(self, optimizer: SGDSaI, group: dict[str, Any], index: int) -> None:
        """Update the measured pieces of one flat tensor."""
        flat = self.flats[index]
        tensor, state = flat.tensor, optimizer.state[flat.tensor]
        gradient = tensor.grad
        assert gradient is not None
        is_new = "momentum_buffer" not in state
        if group["momentum"] != 0 and is_new:
            state["momentum_buffer"] = torch.zeros_like(tensor)
        largest = self.largest_gsnr(optimizer)[group.get("normalize_over")] if group["normalize"] else 1.0
        params, grads, buffers, scales = [], [], [], []
        for number, (piece, gsnr) in enumerate(zip(flat.pieces, state["gsnr"], strict=True)):
            if piece.length == 0 or gsnr == UNMEASURED:
                continue
            buffer = piece.of(state["momentum_buffer"]) if group["momentum"] != 0 else None
            if buffer is not None and (is_new or (index, number) in self._fresh):
                buffer.copy_(-piece.of(gradient) if group["maximize"] else piece.of(gradient))
            params.append(piece.of(tensor.detach()))
            grads.append(piece.of(gradient))
            buffers.append(buffer)
            scales.append(gsnr / largest)
        self._fresh -= {(index, number) for number in range(len(flat.pieces))}
        options = {key: group[key] for key in ("lr", "momentum", "weight_decay", "maximize", "foreach", "fused")}
        sgd_sai(params, grads, buffers, scales, **options)


def _check(engine: Any) -> None:
    """Raise ValueError unless this is a ZeRO optimizer whose layout this module knows."""
    import deepspeed

    cure = f"Install DeepSpeed {SUPPORTED_SERIES}.x (pip install 'hf-sai[deepspeed]'), or use FSDP2."
    name = type(engine).__name__
    if name not in _ATTRIBUTES:
        known = ", ".join(_ATTRIBUTES)
        raise ValueError(f"SGD-SaI does not know the layout of DeepSpeed's {name}, only of {known}. {cure}")
    if not deepspeed.__version__.startswith(f"{SUPPORTED_SERIES}."):
        raise ValueError(f"SGD-SaI does not know the layout of DeepSpeed {deepspeed.__version__}. {cure}")
    missing = [attribute for attribute in _ATTRIBUTES[name] if not hasattr(engine, attribute)]
    if missing:
        raise ValueError(f"DeepSpeed's {name} has no {', '.join(missing)}, which SGD-SaI reads. {cure}")
    if getattr(engine, "swap_optimizer", False):
        raise ValueError(
            "SGD-SaI does not support ZeRO-Infinity's optimizer states on NVMe. "
            'Set offload_optimizer.device to "cpu" or "none" in the DeepSpeed config.'
        )


def _layout(engine: Any) -> list[_Flat]:
    if type(engine).__name__ == "DeepSpeedZeroOptimizer_Stage3":
        return [_stage_3(engine, index) for index in range(len(engine.fp16_groups))]
    if type(engine).__name__ == "BF16_Optimizer":
        groups, flats = engine.bf16_groups, engine.fp32_groups_flat_partition
    else:
        groups, flats = engine.bit16_groups, engine.single_partition_of_fp32_groups
    return [
        _Flat(flat, tuple(map(_stage_1_or_2, parameters)), engine.real_dp_process_group[index], index)
        for index, (parameters, flat) in enumerate(zip(groups, flats, strict=True))
    ]


def _stage_1_or_2(parameter: Any) -> _Piece:
    mapping = parameter._hp_mapping
    if mapping is None:
        return _Piece(parameter, parameter.numel(), 0, 0, parameter.detach)
    address = mapping.get_hp_fragment_address()

    def early_gradient() -> Tensor:
        return mapping.get_lp_grad_fragment(parameter._index_in_param_group)

    return _Piece(parameter, parameter.numel(), address.start, address.numel, early_gradient)


def _stage_3(engine: Any, index: int) -> _Flat:
    process_group = engine.sub_group_process_groups[index]
    rank = dist.get_rank(process_group)
    pieces = []
    for number, parameter in enumerate(engine.fp16_groups[index]):
        sub_group, start, padded = engine.grad_position[engine.get_param_id(parameter)]
        assert sub_group == index
        length = min(max(parameter.ds_numel - rank * padded, 0), padded)

        def early_gradient(number: int = number, length: int = length) -> Tensor:
            return engine.averaged_gradients[index][number].view(-1)[:length]

        pieces.append(_Piece(parameter, parameter.ds_numel, start, length, early_gradient))
    flat = engine.fp32_partitioned_groups_flat[index]
    return _Flat(flat, tuple(pieces), process_group, engine.sub_group_to_group_id[index])
