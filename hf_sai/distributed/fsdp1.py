"""FSDP1 (``FullyShardedDataParallel``): parameters that are slices of a flat one, and on some ranks empty.

A slice does not know its flat parameter and the optimizer does not know the model. So the handles that hold both are
noted when FSDP1 makes them, from the moment that hf_sai is imported; those made before are told by the model, which
:func:`hf_sai.param_groups` is given.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from hf_sai.distributed.instances import instances_of
from hf_sai.distributed.stretch import NOT_WHOLE, Stretch
from hf_sai.optim.layout import UNMEASURED, Layout, Part, register_layout, register_part
from hf_sai.optim.rules import factored

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

    from hf_sai.optim.sgd_sai import SGDSaI

__all__ = ["Slice", "Slices"]

logger = logging.getLogger(__name__)


class Home(NamedTuple):
    """Where a slice belongs.

    Attributes:
        shape: The whole parameter's shape.
        start: The element of it with which the slice begins; 0 if it is empty.
        groups: The process group over which it is sharded; empty under ``NO_SHARD``.
        device: The device on which that group communicates.
    """

    shape: torch.Size
    start: int
    groups: tuple[ProcessGroup, ...]
    device: torch.device


#: In a state dict numbers are tensors without dimensions: torch moves all of it between devices.
_OF_NUMBERS = {float: torch.float64, int: torch.int64}

#: The handles of all flat parameters that are alive.
_HANDLES = instances_of("torch.distributed.fsdp._flat_param", "FlatParamHandle")


def _homes() -> dict[int, Home]:
    """id of each live slice -> its home."""
    homes: dict[int, Home] = {}
    for handle in _HANDLES:
        groups = (handle.process_group,) if handle.uses_sharded_strategy else ()
        flat = handle.flat_param
        for parameter, shape, here in zip(flat._params or (), flat._shapes, flat._shard_param_infos, strict=False):
            homes[id(parameter)] = Home(shape, here.intra_param_start_idx or 0, groups, handle.device)
    return homes


def _is_slice(p: Tensor) -> bool:
    """Whether FSDP1 (``use_orig_params=True``) has made this parameter a slice of its flat parameter."""
    return getattr(p, "_fsdp_flattened", False)


@register_part
class Slice(Stretch):
    """This rank's slice of a parameter."""

    __slots__ = ("_layout", "_parameter")

    kind = "the slices of parameters that FSDP1 hands the optimizer"
    refused: ClassVar = {"update": NOT_WHOLE}
    parted = True
    always_saved = True  # loaded is what the state dict before loading has, and by accelerate that of a new optimizer

    recognises = staticmethod(_is_slice)

    @classmethod
    def admit(cls, p: Tensor) -> None:
        if getattr(p, "_is_flat_param", False):
            raise ValueError(
                "FSDP1 with use_orig_params=False hands the optimizer flat parameters, in which SGD-SaI cannot tell "
                "one tensor from the next. Set use_orig_params=True (accelerate and Trainer: fsdp_use_orig_params: "
                "true in the config file), or use FSDP2 (fsdp_version: 2)."
            )

    @classmethod
    def look_at(cls, model: nn.Module) -> None:
        """Note the flat parameters of a model that may have been wrapped before hf_sai was imported."""
        for module in model.modules():
            handle = getattr(module, "_handle", None)
            if hasattr(handle, "flat_param"):
                _HANDLES.add(handle)

    @classmethod
    def whole_shape(cls, p: Tensor) -> torch.Size | None:
        return _homes()[id(p)].shape if _is_slice(p) and id(p) in _homes() else None

    def __init__(self, p: Tensor, group: dict[str, Any], state: Any, number: int = 0) -> None:
        super().__init__(p, group, state, number)
        self._parameter = p
        self._layout: Any = None

    @classmethod
    def at_rest(cls, p: Tensor, group: dict[str, Any], state: Any) -> Slice:
        part = cls(p, group, state)
        part.shape, part.start = _homes()[id(p)][:2]
        return part

    def within(self, layout: Slices) -> Slice:
        """The slice as a layout knows it: with the shape of the whole, and with what all ranks know of its g-SNR."""
        self._layout = layout
        self.shape, self.start = layout.home[self._parameter][:2]
        return self

    @property
    def gsnr(self) -> float:
        stored = self.state.get("gsnr", UNMEASURED)
        return stored or (self._layout.agreed.get(self._parameter, UNMEASURED) if self._layout is not None else stored)

    @gsnr.setter
    def gsnr(self, value: float) -> None:
        if value != UNMEASURED and self._layout is not None:
            self._layout.agreed[self._parameter] = value
        if self.grad is not None:  # torch's optim_state_dict wants no state on ranks that own nothing
            self.state["gsnr"] = value

    def holders(self, kept: Sequence[int] = ()) -> tuple[ProcessGroup, ...]:
        return () if kept and len(kept) == len(self.shape) else self._layout.home[self._parameter].groups

    def boxes(self, tensor: Tensor) -> Iterator[tuple[Tensor, slice, slice]] | None:
        return super().boxes(tensor) if tensor.ndim == 1 else None  # of NO_SHARD

    @property
    def place(self) -> int:
        return self.start

    def fits(self, shape: Sequence[int], kept: Sequence[int]) -> bool:
        """Also a mean square of each element: the layout makes rows and columns of it in the next step."""
        return super().fits(shape, kept) or (not kept and tuple(shape) == tuple(self.param.shape))

    def as_saved(self, state: dict[str, Any]) -> dict[str, Any]:
        """As torch can gather and share out states: tensors alone, without dimensions or with one value an element.

        Those with a value an element must have one dtype, and all parameters must have the same of them. So the mean
        squares of rows and columns are saved as those of each element, as AdamW has them.
        """
        saved = {
            key: value if isinstance(value, Tensor) else torch.tensor(value, dtype=_OF_NUMBERS[type(value)])
            for key, value in state.items()
        }
        if "column_mean_square" in saved:
            rows, columns = saved.pop("row_mean_square"), saved.pop("column_mean_square")
            means = {"mean_square": saved["mean_square"], "row_mean_square": rows, "column_mean_square": columns}
            saved["mean_square"] = self._each_element(means)
        if "mean_square" in saved and "momentum_buffer" in saved:
            saved["momentum_buffer"] = saved["momentum_buffer"].to(torch.float32)
        return saved

    def _each_element(self, means: dict[str, Tensor]) -> Tensor:
        values = torch.empty(self.param.shape, device=self.param.device)
        boxes = self.boxes(values)
        if boxes is None:
            return factored.product(means)
        as_matrices = {key: value.view(value.shape[0], -1) for key, value in means.items()}
        for box, rows, columns in boxes:
            here = {"row_mean_square": as_matrices["row_mean_square"][rows]}
            here["column_mean_square"] = as_matrices["column_mean_square"][:, columns]
            box.copy_(factored.product({**as_matrices, **here}))
        return values

    @property
    def table_device(self) -> torch.device:
        return self._layout.home[self._parameter].device


class Slices(Layout):
    """The slices of one optimizer, and what all ranks know of their g-SNR.

    A rank that owns nothing of a parameter has neither its gradient nor its state, so it cannot see by itself when
    there is something to measure. Hence every rank takes part while any parameter is unmeasured, with zeros for what it
    does not own.
    """

    whole = False

    def __init__(self, optimizer: SGDSaI, slices: Iterable[Tensor]) -> None:
        super().__init__(optimizer)
        homes = _homes()
        unknown = sum(id(p) not in homes for p in slices)
        if unknown:
            raise ValueError(
                f"{unknown} parameters are slices of FSDP1's flat parameters, and hf_sai was imported too late to see "
                "of which. Import it before the model is wrapped, build the optimizer by "
                "hf_sai.create_sgd_sai_optimizer(model, lr=...), or use FSDP2 (fsdp_version: 2)."
            )
        self.home = {p: homes[id(p)] for p in slices}
        self.agreed: dict[Tensor, float] = {}
        self._may_be_loaded = True  # the state, since the last step

    def check(self) -> None:
        super().check()
        if len({(group["update"] == "factored", group["momentum"] == 0) for group in self.optimizer.param_groups}) > 1:
            logger.warning(
                "FSDP1 cannot save a flat parameter whose tensors have different states. Give all groups update="
                "'factored' or none of them, and all a momentum or none; or use FSDP2 (fsdp_version: 2)."
            )

    def parts(self) -> list[Part]:
        if self._may_be_loaded:
            factored.factor(
                [
                    self.part(p, group)
                    for group in self.optimizer.param_groups
                    for p in group["params"]
                    if group["update"] == "factored" and p in self.home and len(self.home[p].shape) > 1
                ]
            )
            self._may_be_loaded = False
        return super().parts()

    def part(self, p: Tensor, group: dict[str, Any], number: int = 0) -> Part:
        if p not in self.home:
            return super().part(p, group, number)
        state = self.optimizer.state[p] if p.grad is not None else self.optimizer.state.get(p, {})
        return Slice(p, group, state, number).within(self)

    def together(self, parts: Sequence[Part]) -> Sequence[Part]:
        mine = {part.number: part for part in parts}
        numbered = (
            (number, p, group)
            for number, (p, group) in enumerate(
                (p, group) for group in self.optimizer.param_groups for p in group["params"]
            )
        )
        return [
            mine.get(number) or self.part(p, group, number)
            for number, p, group in numbered
            if number in mine or (p in self.home and p.requires_grad)
        ]

    def unmeasured(self, parts: Iterable[Part]) -> list[Part]:
        mine = {part._parameter: part for part in parts if isinstance(part, Slice)}
        waiting = [
            mine.get(p) or self.part(p, group)
            for group in self.optimizer.param_groups
            for p in group["params"]
            if p in self.home and p not in self.agreed and p.requires_grad
        ]
        return super().unmeasured(part for part in parts if not isinstance(part, Slice)) + waiting

    def gsnr(self, p: Tensor) -> float:
        return super().gsnr(p) or self.agreed.get(p, UNMEASURED)


@register_layout
def _find(optimizer: SGDSaI) -> Layout | None:
    slices = [p for group in optimizer.param_groups for p in group["params"] if _is_slice(p)]
    return Slices(optimizer, slices) if slices else None
