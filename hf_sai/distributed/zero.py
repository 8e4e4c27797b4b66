"""DeepSpeed ZeRO-1, -2 and -3: the pieces of parameters inside DeepSpeed's flat tensors.

ZeRO hands the optimizer not the model's parameters but one flat float32 tensor per parameter group (stages 1 and 2)
or sub-group (stage 3), of which each rank holds a part, and calls ``step`` once for each. This module finds the
parameters again, through attributes of DeepSpeed's optimizer, which wraps this one and was noted when it was made. They
are not public: each is checked before use.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, MutableMapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

import torch
import torch.distributed as dist
from torch import Tensor

from hf_sai.distributed.instances import instances_of
from hf_sai.distributed.stretch import NOT_WHOLE, Stretch
from hf_sai.optim.layout import UNMEASURED, Layout, Part, name_of, refuse, register_layout, register_part, whole_shapes

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

    from hf_sai.optim.sgd_sai import SGDSaI

__all__ = ["SUPPORTED_SERIES", "Zero"]

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


@register_part
class Piece(Stretch):
    """What this rank's part of a flat tensor holds of one parameter; nothing, if its length is 0."""

    __slots__ = ("_early_gradient", "_flat", "_place", "parameter")

    kind = "the flat tensors that DeepSpeed ZeRO hands the optimizer"
    refused: ClassVar = {
        "stochastic_rounding": (
            (True,),
            "DeepSpeed's copies of the parameters are float32: leave it out, or use FSDP2.",
        ),
        "update": NOT_WHOLE,
    }

    @classmethod
    def whole_shape(cls, p: Any) -> torch.Size | None:
        return getattr(p, "ds_shape", None)  # of an empty placeholder under ZeRO-3

    def __init__(
        self, parameter: Tensor, start: int, place: tuple[int, int], early_gradient: Callable[[], Tensor]
    ) -> None:
        (self.shape,) = whole_shapes([parameter])
        self.parameter, self.start, self._place = parameter, start, place
        self._early_gradient = early_gradient
        self.fresh = False

    def within(self, flat: _Flat, group: dict[str, Any], state: dict[str, Any], number: int) -> None:
        """Take the piece of a flat tensor as it is now."""
        self._flat, self.group, self.number = flat, group, number
        self.state = _PieceState(state, number - flat.first, self)
        self.param = self.of(flat.tensor.detach())
        self.grad = None

    def of(self, flat: Tensor) -> Tensor:
        return flat.narrow(0, *self._place)

    @property
    def length(self) -> int:
        return self._place[1]

    def holders(self, kept: Sequence[int] = ()) -> tuple[ProcessGroup, ...]:
        return () if kept and len(kept) == len(self.shape) else (self._flat.process_group,)

    @property
    def table_device(self) -> torch.device:
        from deepspeed.accelerator import get_accelerator

        # Offloaded gradients lie on the CPU, which NCCL cannot reduce.
        return torch.device(get_accelerator().current_device_name())


class _PieceState(MutableMapping[str, Any]):
    """A piece's share of the state of its flat tensor.

    State per flat tensor: ``gsnr``, a list of floats, one per parameter of the flat tensor on every rank (0.0 while
    unmeasured); ``momentum_buffer``, as long as this rank's part, unless it is quantised. All else, and codes and
    scales, is each parameter's own, with its number behind the key: ``row_mean_square/3``.
    """

    def __init__(self, state: dict[str, Any], number: int, piece: Piece) -> None:
        self._state, self._number, self._piece = state, number, piece

    def __getitem__(self, key: str) -> Any:
        if key == "gsnr":
            return self._state[key][self._number]
        return self._piece.of(self._state[key]) if key in self._state else self._state[self._own(key)]

    def __setitem__(self, key: str, value: Any) -> None:
        if key == "gsnr":
            self._state[key][self._number] = value
        elif key == "momentum_buffer" and not isinstance(self._piece.group["momentum_dtype"], str):
            if key not in self._state:  # of all pieces together, which start by themselves
                self._state[key] = torch.zeros_like(self._piece._flat.tensor, dtype=value.dtype)
        else:
            self._state[self._own(key)] = value

    def __delitem__(self, key: str) -> None:
        del self._state[key if key in self._state else self._own(key)]

    def _own(self, key: str) -> str:
        return f"{key}/{self._number}"

    def __iter__(self) -> Iterator[str]:
        return iter(self._state)

    def __len__(self) -> int:
        return len(self._state)


@dataclass(frozen=True)
class _Flat:
    """One flat tensor, the parameters in it, the place of the first, and the process group over which it is parted."""

    tensor: Tensor
    pieces: tuple[Piece, ...]
    process_group: ProcessGroup
    group_index: int
    first: int = 0


class Zero(Layout):
    """The parameters behind DeepSpeed's flat tensors."""

    whole = False

    def __init__(self, optimizer: SGDSaI, engine: Any) -> None:
        super().__init__(optimizer)
        _check(engine)
        self._engine = engine  # holds this object's optimizer: garbage collection deals with the cycle
        self.flats: list[_Flat] = []
        for flat in _flats(engine):
            first = sum(len(other.pieces) for other in self.flats)
            self.flats.append(replace(flat, first=first))
        self._index = {id(flat.tensor): index for index, flat in enumerate(self.flats)}

    def check(self) -> None:
        for group in self.optimizer.all_groups:
            refuse(Piece, group)

    def parts(self) -> list[Part]:
        """Those in the flat tensors that DeepSpeed wants updated now."""
        optimizer = self.optimizer
        shown = [
            (self._index[id(tensor)], tensor, group)
            for group in optimizer.param_groups
            for tensor in group["params"]
            if tensor.grad is not None
        ]
        self._begins = any(index == 0 for index, *_ in shown)  # it goes through them in order, on all ranks alike
        if self._begins:
            for flat in self.flats:
                state = optimizer.state[flat.tensor]
                state.setdefault("gsnr", [UNMEASURED] * len(flat.pieces))
                for number, piece in enumerate(flat.pieces, flat.first):
                    piece.within(flat, self._group(flat), state, number)
        parts: list[Part] = []
        for index, tensor, group in shown:
            for piece in self.flats[index].pieces:
                piece.group = group
                if piece.length:
                    piece.grad, piece.param = piece.of(tensor.grad), piece.of(tensor.detach())
                    piece.fresh |= "momentum_buffer" not in piece.state and piece.gsnr != UNMEASURED
                    parts.append(piece)
        self._shown = [piece for index, *_ in shown for piece in self.flats[index].pieces]
        return parts

    def together(self, parts: Sequence[Part]) -> Sequence[Part]:
        """All pieces in the flat tensors of this call, which DeepSpeed makes on all ranks alike."""
        return list(self._shown)

    def unmeasured(self, parts: Iterable[Part]) -> list[Part]:
        """In a step's first call all that are unmeasured, whatever this rank holds of them."""
        if not self._begins:
            return []
        waiting = [piece for flat in self.flats for piece in flat.pieces if piece.gsnr == UNMEASURED]
        for piece in waiting:
            self._look_at_gradient(piece)
        return list(waiting)

    def measured(self) -> Iterator[tuple[int, str | None, Tensor, torch.Size, float, dict[str, Any]]]:
        seen: dict[int, int] = {}  # a group's parameters are spread over its flat tensors in their order
        for flat in self.flats:
            group = self._group(flat)
            stored = self.optimizer.state.get(flat.tensor, {}).get("gsnr", [UNMEASURED] * len(flat.pieces))
            shapes = whole_shapes(piece.parameter for piece in flat.pieces)
            for piece, shape, gsnr in zip(flat.pieces, shapes, stored, strict=True):
                number = seen[flat.group_index] = seen.get(flat.group_index, -1) + 1
                yield flat.group_index, name_of(group, number), piece.parameter, shape, gsnr, group

    def _group(self, flat: _Flat) -> dict[str, Any]:
        """The parameter group of a flat tensor, also while DeepSpeed shows the optimizer only one group."""
        return self.optimizer.all_groups[flat.group_index]

    def _look_at_gradient(self, piece: Piece) -> None:
        """Give a piece its gradient as the update will see it, for measuring."""
        if not piece.length:
            return
        flat = piece._flat.tensor
        # DeepSpeed unscales and clips one flat tensor after the other, each just before its own step.
        ready = flat.grad is not None and (
            piece._flat is self.flats[0] or type(self._engine).__name__ == "BF16_Optimizer"
        )
        gradient = piece._early_gradient() if flat.grad is None else piece.of(flat.grad)
        piece.grad = gradient if ready else gradient / self._scale()

    def _scale(self) -> float:
        """What DeepSpeed will divide this step's gradients by: the loss scale times the share clipped away."""
        norm = getattr(self._engine, "_global_grad_norm", None)
        clip = self._engine.clip_grad
        excess = (float(norm) + 1e-6) / clip if clip > 0 and norm is not None else 1.0
        return float(self._engine.loss_scale) * max(excess, 1.0)


#: All of DeepSpeed's optimizers that are alive. Each is made after the one it wraps, so after this module.
_ENGINES = instances_of("deepspeed.runtime.base_optimizer", "ZeROOptimizer")


@register_layout
def _find(optimizer: SGDSaI) -> Layout | None:
    engine = next((engine for engine in _ENGINES if getattr(engine, "optimizer", None) is optimizer), None)
    return None if engine is None else Zero(optimizer, engine)


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


def _flats(engine: Any) -> list[_Flat]:
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


def _stage_1_or_2(parameter: Any) -> Piece:
    mapping = parameter._hp_mapping
    if mapping is None:
        return Piece(parameter, 0, (0, 0), parameter.detach)
    address = mapping.get_hp_fragment_address()

    def early_gradient() -> Tensor:
        return mapping.get_lp_grad_fragment(parameter._index_in_param_group)

    return Piece(parameter, mapping.lp_fragment_address.start, (address.start, address.numel), early_gradient)


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

        pieces.append(Piece(parameter, rank * padded, (start, length), early_gradient))
    flat = engine.fp32_partitioned_groups_flat[index]
    return _Flat(flat, tuple(pieces), process_group, engine.sub_group_to_group_id[index])
