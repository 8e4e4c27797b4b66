"""Stochastic rounding to bfloat16, and the same random numbers on all processes that hold replicas."""

from __future__ import annotations

import contextlib
import hashlib
import struct
from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import Tensor

__all__ = ["draw_alike", "in_many_processes", "stochastically_rounded"]


def stochastically_rounded(value: Tensor) -> Tensor:
    """float32 to bfloat16, up with a probability of the distance from the lower neighbour; inf and NaN stay."""
    bits = value.view(torch.int32)
    rounded = (bits + torch.randint_like(bits, 1 << 16)) & -(1 << 16)
    return torch.where(value.isfinite(), rounded.view(torch.float32), value).to(torch.bfloat16)


def in_many_processes() -> bool:
    """Whether this process is one of several that train together."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


@contextlib.contextmanager
def draw_alike(device: torch.device, gsnr: float, number: int, step: int, place: int = 0) -> Iterator[None]:
    """The same random numbers on all ranks, whatever their own random states, which are left as they were.

    Args:
        device: Where numbers will be drawn.
        gsnr: The parameter's, which every rank knows and which follows from the run's own seed.
        number: The parameter's place among all of the optimizer's.
        step: The steps that were rounded so far, as resume goes on with them.
        place: Where in the parameter the part begins that is rounded; others draw other numbers.
    """
    key = struct.pack("<dqq", gsnr, number, step) + (struct.pack("<q", place) if place else b"")
    seed = int.from_bytes(hashlib.blake2b(key, digest_size=7).digest(), "little")
    on_cpu = device.type == "cpu"
    with torch.random.fork_rng([] if on_cpu else [device], device_type="cuda" if on_cpu else device.type):
        if on_cpu:
            torch.default_generator.manual_seed(seed)
        else:  # torch.manual_seed would seed all devices, and only this one is restored
            module = getattr(torch, device.type)
            with module.device(device):
                module.manual_seed(seed)
        yield
