"""How the momentum is kept: in its parameter's dtype, in another one, or in blocks of 8 or 4 bits with a scale each.

The blocks are quantised by bitsandbytes: it has kernels for CPU and CUDA, whoever trains QLoRA has it installed, and
its codes and scales are plain tensors, which every way of copying and saving a state handles. torchao's quantised
optimizer states are tensor subclasses, which ``copy.deepcopy`` refuses.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from hf_sai.distributed.sharding import is_dtensor, local_shard

__all__ = [
    "MIN_QUANTIZED",
    "QUANTIZED",
    "QuantizedMomentum",
    "allocate_momentum",
    "check_momentum_dtype",
    "convert_momentum",
    "momentum_of",
    "set_momentum",
]

#: Name of a quantised momentum -> elements that share a scale.
QUANTIZED = {"8bit": 256, "4bit": 128}

#: A tensor with fewer elements keeps its momentum in full precision.
MIN_QUANTIZED = 4096

_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@dataclass(frozen=True)
class QuantizedMomentum:
    """A momentum in blocks that share a scale.

    Attributes:
        codes: uint8; of the parameter's shape in 8 bits (bitsandbytes' dynamic map), of half as many elements in 4
            bits (NF4).
        scales: float32, the largest magnitude of each block.
        shape: The parameter's.
    """

    codes: Tensor
    scales: Tensor
    shape: torch.Size

    @property
    def is_8bit(self) -> bool:
        return self.codes.numel() == self.shape.numel()

    def load(self) -> Tensor:
        """The momentum, float32."""
        from bitsandbytes import functional

        if self.is_8bit:
            blocksize = QUANTIZED["8bit"]
            return functional.dequantize_blockwise(
                self.codes, absmax=self.scales, code=codes_table(self.codes.device), blocksize=blocksize
            )
        # Flat: bitsandbytes 0.50 on CPU ends blocks of 4 bits at the rows' ends when it reads, not when it writes.
        flat = torch.Size([self.shape.numel()])
        state = functional.QuantState(
            absmax=self.scales, shape=flat, blocksize=QUANTIZED["4bit"], quant_type="nf4", dtype=torch.float32
        )
        state.code = functional.get_4bit_type("nf4", device=self.codes.device, blocksize=QUANTIZED["4bit"])
        return functional.dequantize_4bit(self.codes, state).view(self.shape)

    def store(self, value: Tensor) -> None:
        """Quantise a momentum of any float dtype."""
        from bitsandbytes import functional

        value = value.float().flatten()
        if self.is_8bit:
            blocksize = QUANTIZED["8bit"]
            codes, state = functional.quantize_blockwise(value, codes_table(value.device), blocksize=blocksize)
        else:
            codes, state = functional.quantize_4bit(value, blocksize=QUANTIZED["4bit"], quant_type="nf4")
        self.codes.copy_(codes.view_as(self.codes))
        self.scales.copy_(state.absmax)


@functools.cache
def codes_table(device: torch.device) -> Tensor:
    """What the 256 codes of an 8-bit momentum stand for, float32[256] in [-1, 1]."""
    from bitsandbytes import functional

    return functional.create_dynamic_map(signed=True).to(device)


def check_momentum_dtype(momentum_dtype: Any) -> None:
    """Raise ValueError for what ``momentum_dtype`` cannot be, ImportError where bitsandbytes is missing for it."""
    if momentum_dtype is None or momentum_dtype in _DTYPES:
        return
    if not isinstance(momentum_dtype, str) or momentum_dtype not in QUANTIZED:
        allowed = ", ".join([*map(str, _DTYPES), *map(repr, QUANTIZED)])
        raise ValueError(f"momentum_dtype must be None or one of {allowed}, but is {momentum_dtype!r}.")
    if find_spec("bitsandbytes") is None:
        raise ImportError(f"momentum_dtype {momentum_dtype!r} needs bitsandbytes: pip install 'hf-sai[quant]'.")


def allocate_momentum(state: dict[str, Any], p: Tensor, momentum_dtype: torch.dtype | str | None) -> None:
    """Give a parameter's state a momentum of zeros, unless it has one.

    Args:
        state: ``momentum_buffer`` is written, and ``momentum_scales`` for a quantised one.
        p: The parameter.
        momentum_dtype: None for the parameter's own dtype, another one, ``"8bit"`` or ``"4bit"``.

    Raises:
        ValueError: A quantised momentum of a sharded parameter.
    """
    if "momentum_buffer" in state:
        return
    if not isinstance(momentum_dtype, str):
        state["momentum_buffer"] = torch.zeros_like(p, dtype=momentum_dtype)
    elif p.numel() < MIN_QUANTIZED or p.numel() % 2:
        state["momentum_buffer"] = torch.zeros_like(p)
    elif is_dtensor(p):
        raise ValueError(
            f"momentum_dtype {momentum_dtype!r} does not work on sharded parameters (DTensor: FSDP2, tensor "
            "parallelism), whose blocks would not be the same for another number of devices. Use torch.bfloat16."
        )
    else:
        shape = p.shape if momentum_dtype == "8bit" else (p.numel() // 2, 1)
        blocks = math.ceil(p.numel() / QUANTIZED[momentum_dtype])
        state["momentum_buffer"] = torch.zeros(shape, dtype=torch.uint8, device=p.device)
        state["momentum_scales"] = torch.zeros(blocks, dtype=torch.float32, device=p.device)


def momentum_of(state: dict[str, Any], p: Tensor) -> Tensor | QuantizedMomentum:
    """A parameter's momentum, ready for :func:`hf_sai.sgd_sai`: of a sharded one the local shard."""
    if "momentum_scales" in state:
        return QuantizedMomentum(state["momentum_buffer"], state["momentum_scales"], p.shape)
    return local_shard(state["momentum_buffer"])


def set_momentum(state: dict[str, Any], p: Tensor, value: Tensor) -> None:
    """Overwrite a parameter's momentum."""
    momentum = momentum_of(state, p)
    if isinstance(momentum, QuantizedMomentum):
        momentum.store(value)
    else:
        momentum.copy_(local_shard(value, like=state["momentum_buffer"]))


def convert_momentum(saved: dict[str, Any], p: Tensor, momentum_dtype: torch.dtype | str | None) -> dict[str, Any]:
    """A saved momentum as this optimizer keeps it: as it is where the formats agree, else converted.

    Args:
        saved: ``momentum_buffer`` and perhaps ``momentum_scales``, of any device.
        p: The parameter.
        momentum_dtype: How its group keeps the momentum.

    Returns:
        The same keys as :func:`allocate_momentum` writes.
    """
    saved = {key: value.to(p.device) for key, value in saved.items()}
    converted: dict[str, Any] = {}
    allocate_momentum(converted, p, momentum_dtype)
    if all(key in saved and saved[key].dtype == value.dtype for key, value in converted.items()):
        return saved
    momentum = momentum_of(saved, p)
    set_momentum(converted, p, momentum.load() if isinstance(momentum, QuantizedMomentum) else saved["momentum_buffer"])
    return converted
