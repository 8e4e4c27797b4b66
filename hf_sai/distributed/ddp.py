"""DDP (``DistributedDataParallel``): whole parameters, the same on all processes of a group.

Nothing needs to be known of it but where work can be shared out instead of repeated, which somebody must ask for: it
makes the optimizer's step communicate, and so all ranks must take every step together. The modules are noted when they
are made, from the moment that hf_sai is imported, or when :func:`hf_sai.param_groups` is given them.
"""

from __future__ import annotations

import os
import weakref
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

from hf_sai.distributed.copies import agree, shared_out
from hf_sai.distributed.instances import instances_of
from hf_sai.optim.layout import Copies, Part, register_part

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = ["ASKED", "Replica"]

#: "1" in this variable of the environment of all processes asks for it.
ASKED = "HF_SAI_SHARE_UNDER_DDP"

#: Parameter -> its module, by a weak reference, and its name in there.
_HOMES = WeakIdKeyDictionary()


def _note(module: Any) -> None:
    for name, p in module.module.named_parameters():
        if p.ndim > 1 and p.requires_grad and name not in module.parameters_to_ignore:
            _HOMES[p] = weakref.ref(module), name
            p._hf_sai_replica = True  # which torch.compile can trace


instances_of("torch.nn.parallel.distributed", "DistributedDataParallel", _note)


@register_part
class Replica(Part):
    """A whole parameter that other processes have, too."""

    __slots__ = ()

    @staticmethod
    def recognises(p: Tensor) -> bool:
        return getattr(p, "_hf_sai_replica", False)

    @classmethod
    def look_at(cls, model: nn.Module) -> None:
        if isinstance(model, nn.parallel.DistributedDataParallel):
            _note(model)

    @classmethod
    def copied(cls, parts: Sequence[Part]) -> Sequence[tuple[list[Part], Copies | None]]:
        return shared_out(parts, _group_of, _all_have)


def _group_of(part: Part) -> ProcessGroup | None:
    """The processes with the same gradient; None if nobody asks, in ``no_sync`` and under post-local SGD."""
    if os.environ.get(ASKED) != "1":
        return None
    module = _HOMES[part.param][0]() if part.param in _HOMES else None  # of a copy nobody knows
    if module is None or not module.require_backward_grad_sync:
        return None
    hooks = [getattr(hook, "__name__", "") for hook, _ in getattr(module, "_comm_hooks", ())]
    return None if "post_localSGD_hook" in hooks else module.process_group


def _all_have(parts: Sequence[Part], group: ProcessGroup) -> bool:
    return agree([(_HOMES[part.param][1], part.group["matrices"]) for part in parts], group, parts[0].table_device)
