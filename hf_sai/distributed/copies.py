"""Work on parts of which several processes hold the same, shared out: each part is worked on once, then sent to all."""

from __future__ import annotations

import hashlib
import logging
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch import Tensor

from hf_sai.distributed.exchange import ROOM, owners_of
from hf_sai.optim.layout import Part

__all__ = ["WORTH", "Gathered", "agree", "shared_out"]

logger = logging.getLogger(__name__)

#: The least short side of a matrix whose orthogonalisation is shared out. It costs some 20 operations an element for
#: each unit of the short side; its result is 2 bytes an element in bfloat16. With 150 operations a picosecond and 100
#: bytes a nanosecond, an A100's and its NVLink's, both take as long from here on; docs/scaling.md.
WORTH = 128

# Elements of a tensor begin at multiples of so many bytes.
_ALIGNED = 16

#: Process group -> what its members are to share -> whether they all named the same. By the group itself, for another
#: one may bear its name when it has been destroyed.
_AGREED: WeakKeyDictionary[dist.ProcessGroup, dict[bytes, bool]] = WeakKeyDictionary()


class Gathered:
    """A :class:`hf_sai.optim.layout.Copies` by one all_gather.

    Args:
        parts: The same on all members of the group.
        group: The processes that hold the same of these parts.
    """

    def __init__(self, parts: Sequence[Part], group: dist.ProcessGroup) -> None:
        self._group, self._rank, self._size = group, dist.get_rank(group), dist.get_world_size(group)
        self._owners = owners_of([part.shape for part in parts], self._size)

    def mine(self, index: int) -> bool:
        return self._owners[index] == self._rank

    def spread(self, tensors: Sequence[Sequence[Tensor]]) -> None:
        device = tensors[0][0].device
        of: dict[int, list[Tensor]] = defaultdict(list)
        for owner, own in zip(self._owners, tensors, strict=True):
            of[owner] += own
        longest = max(sum(map(_room, own)) for own in of.values())
        sent = torch.zeros(longest, dtype=torch.uint8, device=device)
        for tensor, place in _places(of[self._rank], sent):
            place.copy_(tensor)
        received = torch.empty(self._size * longest, dtype=torch.uint8, device=device)
        dist.all_gather_into_tensor(received, sent, group=self._group)
        for owner, came in enumerate(received.split(longest)):
            if owner != self._rank:
                for tensor, place in _places(of[owner], came):
                    tensor.copy_(place)


def _room(tensor: Tensor) -> int:
    return -(-tensor.numel() * tensor.element_size() // _ALIGNED) * _ALIGNED


def _places(tensors: Sequence[Tensor], flat: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Tensors, and where they lie one after the other in a flat one of bytes, as tensors of their shapes."""
    begin = 0
    for tensor in tensors:
        size = tensor.numel() * tensor.element_size()
        yield tensor, flat[begin : begin + size].view(tensor.dtype).view(tensor.shape)
        begin += _room(tensor)


def shared_out(
    parts: Sequence[Part],
    group_of: Callable[[Part], dist.ProcessGroup | None],
    agreed: Callable[[Sequence[Part], dist.ProcessGroup], bool] = lambda parts, group: True,
) -> list[tuple[list[Part], Gathered | None]]:
    """Parts in rounds that fit into memory, each with what shares the work on them; None where nobody should.

    Args:
        parts: Of one kind.
        group_of: The processes that hold the same of a part.
        agreed: Whether they all have these parts to work on.
    """
    alone: list[Part] = []
    shared: dict[str, tuple[dist.ProcessGroup, list[Part]]] = {}
    for part in parts:
        group = group_of(part)
        if group is not None and group.size() > 1 and _worth_sharing(part):
            shared.setdefault(group.group_name, (group, []))[1].append(part)
        else:
            alone.append(part)
    found: list[tuple[list[Part], Gathered | None]] = []
    for group, own in shared.values():
        if agreed(own, group):
            found += _rounds(own, group)
        else:
            alone += own
    return [*found, (alone, None)] if alone else found


def _worth_sharing(part: Part) -> bool:
    """Whether this part's matrices cost more to be made orthogonal than to be sent."""
    shape = part.shape[1:] if str(part.group.get("matrices")).startswith("experts") else part.shape
    return len(shape) > 1 and min(shape[0], shape[1:].numel()) >= WORTH


def _rounds(parts: Sequence[Part], group: dist.ProcessGroup) -> Iterator[tuple[list[Part], Gathered]]:
    together: list[Part] = []
    for part in parts:
        if together and sum(other.param.numel() for other in together) + part.param.numel() > ROOM:
            yield together, Gathered(together, group)
            together = []
        together.append(part)
    if together:
        yield together, Gathered(together, group)


def agree(work: Sequence[Any], group: dist.ProcessGroup, device: torch.device) -> bool:
    """Whether all members of a group have the same to do; asked once, with one all_reduce.

    Optimizers that give each process some of the parameters have not.

    Args:
        work: What all members call alike.
        group: The processes.
        device: Where they communicate.
    """
    key = hashlib.blake2b(repr(list(work)).encode(), digest_size=7).digest()
    known = _AGREED.setdefault(group, {})
    if key not in known:
        number = int.from_bytes(key, "little")
        both = torch.tensor([number, -number], device=device)
        dist.all_reduce(both, dist.ReduceOp.MIN, group=group)
        known[key] = both[0].item() == -both[1].item()
        if not known[key]:
            logger.warning(
                "The processes of a DistributedDataParallel model do not optimize the same parameters, so each makes "
                "all of its own matrices orthogonal."
            )
    return known[key]
