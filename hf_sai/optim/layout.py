"""What each parameter is to this process: here whole tensors; other floors register parameters that lie in pieces.

The optimizer asks its layout for parts and never for the engine behind them. A layout for parameters in pieces
subclasses :class:`Part` (and :class:`Layout`, where the optimizer's tensors are not the model's) and registers itself:
:func:`register_part` for a kind of tensor, :func:`register_layout` for an engine that changes the optimizer's groups.
"""

from __future__ import annotations

import copy
import itertools
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

import torch
from torch import Tensor

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

    from hf_sai.optim.sgd_sai import SGDSaI

__all__ = [
    "ORDINARY",
    "UNMEASURED",
    "Copies",
    "Layout",
    "Part",
    "Sharing",
    "admit",
    "find_layout",
    "kind_of",
    "local",
    "look_at",
    "name_of",
    "refuse",
    "register_layout",
    "register_part",
    "sum_over_holders",
    "whole_shapes",
]

#: What is no subclass of Tensor, such as a DTensor or a quantised weight. Asked several times for each parameter in a
#: step, so that the usual answer comes first.
ORDINARY = (Tensor, torch.nn.Parameter)

#: What ``state["gsnr"]`` holds while no usable gradient has come. No measured g-SNR can be 0: it is at least
#: ``sqrt(n - 1) / (1 + MAX_EPS_SHARE)``, and 1 for one element.
UNMEASURED = 0.0


class Part:
    """What this process holds of one parameter, and its state: here all of it.

    Attributes:
        group: The parameter group, with the options.
        state: What is kept for the parameter; ``state["gsnr"]`` is its g-SNR.
        shape: The whole parameter's.
        param: What is updated here.
        grad: Its gradient, of the same shape; None if there is none now.
        number: The parameter's place among all of the optimizer's, the same on every process.
        fresh: Whether it has been measured and its momentum has not started yet.
    """

    __slots__ = ("fresh", "grad", "group", "number", "param", "shape", "state")

    grad: Any  # a Tensor wherever there is something to do
    param: Tensor
    shape: torch.Size
    group: dict[str, Any]
    state: Any
    number: int
    fresh: bool

    #: Option -> the values of it that do not work for parts of this kind, and the cure.
    refused: ClassVar[dict[str, tuple[tuple[Any, ...], str]]] = {}

    #: What parts of this kind are called in a refusal.
    kind = "whole parameters"

    #: Whether a later run may part the parameter in other ways, so that what is saved must not depend on this one.
    parted = False

    #: Whether what is saved must have a state of each parameter that is trained, also before its training begins.
    always_saved = False

    @staticmethod
    def recognises(p: Tensor) -> bool:
        """Whether an optimizer's parameter has parts of this kind."""
        return False

    @classmethod
    def local(cls, tensor: Tensor) -> Tensor | None:
        """What this process stores of a tensor of this kind, None for others."""
        return None

    @classmethod
    def admit(cls, p: Tensor) -> None:
        """Raise ValueError for a tensor of this kind that cannot be trained whatever the options."""

    @classmethod
    def look_at(cls, model: torch.nn.Module) -> None:
        """Note what a model says about tensors of this kind, which do not know by themselves whose they are."""

    @classmethod
    def whole_shape(cls, p: Tensor) -> torch.Size | None:
        """The whole shape of a parameter that lies in pieces of this kind, None for others."""
        return None

    def __init__(self, p: Tensor, group: dict[str, Any], state: Any, number: int = 0) -> None:
        self.group, self.state, self.number = group, state, number
        self.shape, self.param, self.grad = p.shape, p, p.grad
        self.fresh = False

    @classmethod
    def at_rest(cls, p: Tensor, group: dict[str, Any], state: Any) -> Part:
        """A part whose state is looked at, not its gradient, which need not be brought into the parameter's form."""
        return cls(p.detach(), group, state)

    @classmethod
    def of_gradient(cls, gradient: Tensor, group: dict[str, Any]) -> Part:
        """A part that is only measured: of a gradient whose parameter is not known."""
        part = cls(gradient, group, {})
        part.grad = part.param
        return part

    def alike(self, group: dict[str, Any]) -> Part:
        """The same part with other options and a state of its own, empty."""
        part = copy.copy(self)
        part.group, part.state = group, {}
        return part

    @property
    def gsnr(self) -> float:
        """The g-SNR of the whole parameter, ``UNMEASURED`` (0.0) before it is measured."""
        return self.state.get("gsnr", UNMEASURED)

    @gsnr.setter
    def gsnr(self, value: float) -> None:
        self.state["gsnr"] = value

    @property
    def place(self) -> int:
        """What tells this part from other processes' parts of the same parameter that are rounded by themselves."""
        return 0

    def holders(self, kept: Sequence[int] = ()) -> tuple[ProcessGroup, ...]:
        """The process groups over which sums over this part add up to sums over the whole parameter.

        Args:
            kept: Dimensions over which is not summed: each of their indices has a sum of its own.
        """
        return ()

    @classmethod
    def sharing(cls, parts: Sequence[Part]) -> Sequence[tuple[list[Part], Sharing]]:
        """What brings the tensors of these parts, which other processes hold, too, to one process each and back."""
        raise NotImplementedError

    @classmethod
    def copied(cls, parts: Sequence[Part]) -> Sequence[tuple[list[Part], Copies | None]]:
        """Parts of which other processes hold the same, and what lets them share the work; None where nobody does."""
        return [(list(parts), None)]

    @property
    def table_device(self) -> torch.device:
        """Where a table of this part's sums must lie: where its holders communicate, and where float64 exists."""
        return torch.device("cpu") if self.param.device.type == "mps" else self.param.device

    def lying(self, tensor: Tensor) -> Tensor:
        """A tensor of the shape that this process has of the parameter, as state of it that can be parted anew."""
        return tensor

    def zeros(self, dtype: torch.dtype | None = None, kept: Sequence[int] | None = None) -> Tensor:
        """A new state tensor of zeros that lies as the parameter does.

        Args:
            dtype: Default: the parameter's.
            kept: The dimensions that it has in full; length 1 in the others. Default: all.
        """
        if kept is None:
            return torch.zeros_like(self.param, dtype=dtype)
        return torch.zeros(self.shape_of(kept), dtype=dtype or self.param.dtype, device=self.param.device)

    def shape_of(self, kept: Sequence[int]) -> tuple[int, ...]:
        """The shape that :meth:`zeros` gives in this process a tensor with these dimensions in full."""
        return tuple(length if d in kept else 1 for d, length in enumerate(self.param.shape))

    def fits(self, shape: Sequence[int], kept: Sequence[int]) -> bool:
        """Whether a saved tensor of this shape is one with these dimensions in full."""
        return tuple(shape) == self.shape_of(kept)

    def boxes(self, tensor: Tensor) -> Iterator[tuple[Tensor, slice, slice]] | None:
        """For a part that has not its parameter's dimensions: how it lies in the whole as a matrix. None for others."""
        return None

    def as_saved(self, state: dict[str, Any]) -> dict[str, Any]:
        """The part's state as a state dict holds it."""
        return state


class Sharing(Protocol):
    """Brings tensors of parts in pieces together, all of one part on the same process, and back into pieces.

    All processes that hold some of these parts must call its methods alike. A tensor is named by what of it lies here,
    by the dimensions it has in full (the others have length 1), and by the place of its part.
    """

    def collect(self, pieces: Sequence[tuple[int, Tensor, Sequence[int]]]) -> Callable[[], list[Tensor | None]]:
        """Begin to bring pieces together, which goes on beside other work.

        Returns:
            What waits for it: whole tensors where their part is this process's to work on, None elsewhere.
        """

    def hand_out(self, wholes: Sequence[tuple[int, Tensor | None, Sequence[int], torch.dtype]]) -> list[Tensor]:
        """What lies here of tensors that are whole on one process, None on the others."""


class Copies(Protocol):
    """Shares work on parts of which several processes hold the same: each is one process's to work on.

    All processes that hold them must call its methods alike.
    """

    def mine(self, index: int) -> bool:
        """Whether a part is this process's."""

    def spread(self, tensors: Sequence[Sequence[Tensor]]) -> None:
        """Overwrite each part's tensors by those of the process whose part it is."""


class Layout:
    """The parts of one optimizer's parameters, each of which knows by itself how it lies.

    Args:
        optimizer: Its groups and its state are read anew whenever they are asked for.
    """

    #: Whether the optimizer's tensors are parameters, so that a process can judge by itself what it sees of them.
    whole = True

    def __init__(self, optimizer: SGDSaI) -> None:
        # The optimizer holds this object; a strong reference back would leave both to the garbage collector.
        self._optimizer = weakref.ref(optimizer)

    @property
    def optimizer(self) -> SGDSaI:
        optimizer = self._optimizer()
        assert optimizer is not None
        return optimizer

    def parts(self) -> list[Part]:
        """The parts that have a gradient, in the order of the groups."""
        numbered, part = _numbered(self.optimizer), self.part
        return [part(p, group, number) for number, p, group in numbered if p.grad is not None and p.numel() > 0]

    def part(self, p: Tensor, group: dict[str, Any], number: int = 0) -> Part:
        """One parameter's part."""
        return kind_of(p)(p, group, self.optimizer.state[p], number)

    def together(self, parts: Sequence[Part]) -> Sequence[Part]:
        """These and those without a gradient here of which other processes may have one, in an order all agree on."""
        return parts

    def unmeasured(self, parts: Iterable[Part]) -> list[Part]:
        """Those to be measured now; where other processes hold some, too, the same on all of them."""
        new = [part for part in parts if part.gsnr == UNMEASURED and not part.param.is_meta]
        if new and self.whole:  # what came into the groups since the layout was found has no g-SNR yet
            _refuse_flattened(self.optimizer)
        return new

    def check(self) -> None:
        """Refuse options that do not work here, before anything is updated.

        Raises:
            ValueError: With the cure.
        """
        for group in self.optimizer.param_groups:
            for kind in {kind_of(p) for p in group["params"]}:
                refuse(kind, group)

    def measured(self) -> Iterator[tuple[int, str | None, Tensor, torch.Size, float, dict[str, Any]]]:
        """Of every parameter its group's number, its name, itself, its whole shape, its g-SNR and its group."""
        for number, group in enumerate(self.optimizer.param_groups):
            for index, (p, shape) in enumerate(zip(group["params"], whole_shapes(group["params"]), strict=True)):
                yield number, name_of(group, index), p, shape, self.gsnr(p), group

    def gsnr(self, p: Tensor) -> float:
        """A parameter's g-SNR, also where this process holds nothing of it."""
        return self.optimizer.state[p].get("gsnr", UNMEASURED) if p in self.optimizer.state else UNMEASURED


def name_of(group: dict[str, Any], index: int) -> str | None:
    """The name of a group's parameter, None if the optimizer was built without names."""
    return group["param_names"][index] if "param_names" in group else None


def sum_over_holders(sums: Iterable[tuple[Tensor, Sequence[ProcessGroup], torch.device]]) -> None:
    """Add up each sum over its process groups, in place, with one all_reduce a group for all sums together.

    All processes of a group must call this with the same sums for it, in the same order.

    Args:
        sums: Each with its groups, none where it is complete, and the device on which they communicate.
    """
    shared: dict[str, tuple[ProcessGroup, torch.device, list[Tensor]]] = {}
    for total, groups, device in sums:
        for group in groups:
            shared.setdefault(group.group_name, (group, device, []))[2].append(total)
    for group, device, totals in shared.values():
        flat = torch.cat([total.flatten() for total in totals]).to(device)
        torch.distributed.all_reduce(flat, group=group)
        for total, part in zip(totals, flat.split([total.numel() for total in totals]), strict=True):
            total.copy_(part.view_as(total))


# --- kinds of tensors and engines, filled by the floors above

_KINDS: list[type[Part]] = []
_LAYOUTS: list[Callable[[SGDSaI], Layout | None]] = []


def register_part(kind: type[Part]) -> type[Part]:
    """Let a kind of tensor have parts of its own; a decorator."""
    _KINDS.append(kind)
    return kind


def register_layout(find: Callable[[SGDSaI], Layout | None]) -> Callable[[SGDSaI], Layout | None]:
    """Let an engine be found that puts tensors of its own into the optimizer's groups; a decorator.

    Args:
        find: The layout of an optimizer, None if the engine has nothing to do with it.
    """
    _LAYOUTS.append(find)
    return find


def find_layout(optimizer: SGDSaI) -> Layout:
    """The layout of an optimizer's parameters as they are now.

    Raises:
        ValueError: A group holds a tensor that it was not built with, of another shape, and no engine is known to have
            put it there: many parameters flattened into one, of which only one g-SNR could be measured.
    """
    for group in optimizer.param_groups:
        for p in group["params"]:  # an engine may have exchanged them
            admit(p)
    layout = next(filter(None, (find(optimizer) for find in _LAYOUTS)), None)
    if layout is None:
        layout = Layout(optimizer)
        _refuse_flattened(optimizer)
    layout.check()
    return layout


def kind_of(p: Tensor) -> type[Part]:
    """The kind of part that a parameter has."""
    for kind in _KINDS:
        if kind.recognises(p):
            return kind
    return Part


def admit(p: Tensor) -> None:
    """Raise ValueError for a tensor that cannot be trained."""
    for kind in _KINDS:
        kind.admit(p)


def look_at(model: torch.nn.Module) -> None:
    """Let every kind of part look at a model whose parameters are going to be trained."""
    for kind in _KINDS:
        kind.look_at(model)


def local(tensor: Tensor) -> Tensor:
    """What this process stores of a tensor, sharing its memory; any ordinary tensor as it is."""
    if type(tensor) in ORDINARY:
        return tensor
    return next((mine for mine in (kind.local(tensor) for kind in _KINDS) if mine is not None), tensor)


def whole_shapes(parameters: Iterable[Tensor]) -> list[torch.Size]:
    """The shapes of the whole parameters, also where an engine has left a slice or an empty placeholder of them."""
    return [
        next((shape for shape in (kind.whole_shape(p) for kind in _KINDS) if shape is not None), p.shape)
        for p in parameters
    ]


def refuse(kind: type[Part], group: dict[str, Any]) -> None:
    """Raise ValueError for an option of a group that does not work for parts of this kind."""
    for option, (values, cure) in kind.refused.items():
        if group[option] in values:
            raise ValueError(f"{option}={group[option]!r} does not work on {kind.kind}. {cure}")


def _numbered(optimizer: SGDSaI) -> Iterator[tuple[int, Tensor, dict[str, Any]]]:
    number = 0
    for group in optimizer.param_groups:
        for p in group["params"]:
            yield number, p, group
            number += 1


def _refuse_flattened(optimizer: SGDSaI) -> None:
    """Raise ValueError for a tensor that the optimizer was not given, where its group had none of that shape."""
    given = {id(known()) for built in optimizer.built_with for known, _ in built}
    # Groups may have been removed since, or put there by somebody else.
    every = itertools.chain(optimizer.built_with, itertools.repeat(()))
    for group, built in zip(optimizer.param_groups, every, strict=False):
        params, shapes = group["params"], [shape for _, shape in built]
        if [p.shape for p in params] != shapes and not all(id(p) in given for p in params):
            raise ValueError(
                f"A parameter group was built with {len(shapes)} parameters and now holds {len(params)} tensors of "
                f"other shapes, such as {tuple(params[0].shape)}. Something has flattened them, and SGD-SaI cannot "
                "tell one from the next in there. It knows FSDP2, FSDP1 with use_orig_params=True and DeepSpeed ZeRO: "
                "use one of these."
            )
