"""An experiment: SGD-SaI that measures one g-SNR over several tensors together, such as LoRA's A and B of a layer."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import Tensor, nn

from hf_sai import SGDSaI
from hf_sai.optim.gsnr import UNMEASURED, gsnr_from_moments

__all__ = ["PooledSGDSaI", "by_module"]


class PooledSGDSaI(SGDSaI):
    """SGD-SaI in which all tensors of a pool get the g-SNR of their gradients laid end to end.

    A tensor whose gradient is zero, as A's at the start, counts with its zeros, and gets the pool's g-SNR once it has
    a gradient; the pool is measured again then, for all of its tensors.

    Args:
        model: Its trainable parameters are optimized.
        pool: Names the pool of a parameter from the parameter's name.
        **options: As for `SGDSaI`.
    """

    def __init__(self, model: nn.Module, pool: Callable[[str], Hashable], **options: Any) -> None:
        named = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
        super().__init__(named, **options)
        self._pools: dict[Hashable, list[Tensor]] = defaultdict(list)
        for name, parameter in named:
            self._pools[pool(name)].append(parameter)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        if closure is not None:
            raise ValueError("PooledSGDSaI takes no closure; call backward before step.")
        for tensors in self._pools.values():
            self._measure_pool(tensors)
        return super().step()

    def _measure_pool(self, tensors: list[Tensor]) -> None:
        """Write the state that `SGDSaI` would have written, with the pool's g-SNR, before it looks."""
        ready = [p for p in tensors if p.grad is not None and p.grad.any()]
        if all(self.state[p].get("gsnr", UNMEASURED) != UNMEASURED for p in ready):
            return
        gradients = torch.cat([p.grad.double().flatten() for p in tensors if p.grad is not None])
        gsnr = gsnr_from_moments(gradients.numel(), gradients.sum().item(), gradients.square().sum().item())
        for p in ready:
            if "momentum_buffer" not in self.state[p] or self.state[p].get("gsnr", UNMEASURED) == UNMEASURED:
                self.state[p]["momentum_buffer"] = p.grad.clone()
            self.state[p]["gsnr"] = gsnr


def by_module(name: str) -> str:
    """The LoRA layer of a parameter: its name up to `.lora_`."""
    return name.partition(".lora_")[0]
