"""How the momentum is kept: in its parameter's dtype, in another one, or in blocks of 8 or 4 bits with a scale each.

The blocks are bitsandbytes' formats, and where it is installed its kernels for CPU and CUDA write and read them, else
torch's operations (:mod:`hf_sai.optim.codes`). Codes and scales are plain tensors, which every way of copying and
saving a state handles. torchao's quantised optimizer states are tensor subclasses, which ``copy.deepcopy`` refuses.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from importlib.util import find_spec

import torch
from torch import Tensor

from hf_sai.optim.codes import QUANTIZED, code_values, dequantized, quantized
from hf_sai.optim.layout import Part, local

__all__ = [
    "MIN_QUANTIZED",
    "MOMENTUM_KEYS",
    "QUANTIZED",
    "Momentum",
    "QuantizedMomentum",
    "allocate",
    "convert",
    "drop",
    "form",
    "has_bitsandbytes",
    "load",
    "momentum_of",
    "start",
    "store",
]

#: What of a parameter's state is its momentum; the scales are there for a quantised one.
MOMENTUM_KEYS = ("momentum_buffer", "momentum_scales")

#: A tensor with fewer elements keeps its momentum in full precision.
MIN_QUANTIZED = 4096


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

    @property
    def kind(self) -> str:
        """``"8bit"`` or ``"4bit"``."""
        return "8bit" if self.is_8bit else "4bit"

    def fits(self, p: Tensor) -> bool:
        """Whether codes and scales are as many as a parameter of this shape needs."""
        blocks = math.ceil(p.numel() / QUANTIZED[self.kind])
        codes = p.numel() if self.is_8bit else p.numel() // 2
        return self.shape == p.shape and self.codes.numel() == codes and self.scales.numel() == blocks

    def load(self) -> Tensor:
        """The momentum, float32."""
        if not has_bitsandbytes():
            return dequantized(self.codes, self.scales, self.kind).view(self.shape)
        from bitsandbytes import functional

        values, blocksize = code_values(self.kind, self.codes.device), QUANTIZED[self.kind]
        if self.is_8bit:
            return functional.dequantize_blockwise(self.codes, absmax=self.scales, code=values, blocksize=blocksize)
        # Flat: bitsandbytes 0.50 on CPU ends blocks of 4 bits at the rows' ends when it reads, not when it writes.
        flat = torch.Size([self.shape.numel()])
        state = functional.QuantState(
            absmax=self.scales, shape=flat, blocksize=blocksize, quant_type="nf4", dtype=torch.float32
        )
        state.code = values
        return functional.dequantize_4bit(self.codes, state).view(self.shape)

    def store(self, value: Tensor) -> None:
        """Quantise a momentum of any float dtype."""
        if has_bitsandbytes():
            from bitsandbytes import functional

            value, blocksize = value.float().flatten(), QUANTIZED[self.kind]
            if self.is_8bit:
                table = code_values(self.kind, value.device)
                codes, state = functional.quantize_blockwise(value, table, blocksize=blocksize)
            else:
                codes, state = functional.quantize_4bit(value, blocksize=blocksize, quant_type="nf4")
            scales = state.absmax
        else:
            codes, scales = quantized(value, self.kind)
        self.codes.copy_(codes.view_as(self.codes))
        self.scales.copy_(scales)


@functools.cache
def has_bitsandbytes() -> bool:
    """Whether bitsandbytes is installed."""
    return find_spec("bitsandbytes") is not None


#: A momentum as the update takes it: a tensor of any float dtype, or codes with scales.
Momentum = Tensor | QuantizedMomentum


def load(momentum: Momentum) -> Tensor:
    """A momentum's values, in the dtype in which it is kept or, if it is quantised, in float32."""
    return momentum.load() if isinstance(momentum, QuantizedMomentum) else momentum


def store(momentum: Momentum, value: Tensor) -> None:
    """Overwrite a momentum with a value of any float dtype."""
    momentum.store(value) if isinstance(momentum, QuantizedMomentum) else momentum.copy_(value)


def form(part: Part) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Shape and dtype of what a part's group keeps of its momentum in this process, by the state's key."""
    momentum_dtype, p = part.group["momentum_dtype"], part.param
    numel = p.numel()
    if not isinstance(momentum_dtype, str):
        return {"momentum_buffer": (tuple(p.shape), momentum_dtype or p.dtype)}
    if numel < MIN_QUANTIZED or numel % 2:
        return {"momentum_buffer": (tuple(p.shape), p.dtype)}
    codes = tuple(p.shape) if momentum_dtype == "8bit" else (numel // 2, 1)
    scales = math.ceil(numel / QUANTIZED[momentum_dtype])
    return {"momentum_buffer": (codes, torch.uint8), "momentum_scales": ((scales,), torch.float32)}


def allocate(part: Part) -> None:
    """Give a parameter's state a momentum of zeros in its group's :func:`form`, unless it has one."""
    if "momentum_buffer" in part.state:
        return
    for key, (shape, dtype) in form(part).items():
        like_parameter = shape == tuple(part.param.shape) and dtype.is_floating_point
        part.state[key] = (
            part.zeros(dtype) if like_parameter else torch.zeros(shape, dtype=dtype, device=part.param.device)
        )


def momentum_of(part: Part) -> Momentum:
    """What this process holds of a parameter's momentum, ready for :func:`hf_sai.sgd_sai`."""
    buffer = local(part.state["momentum_buffer"])
    if "momentum_scales" in part.state:
        return QuantizedMomentum(buffer, local(part.state["momentum_scales"]), part.param.shape)
    return buffer


def start(part: Part) -> None:
    """Start the momentum at the gradient (Algorithm 1, :math:`m_1 = g_1`), which must be normalised if it is to be."""
    assert part.grad is not None
    allocate(part)
    store(momentum_of(part), -part.grad if part.group["maximize"] else part.grad)
    part.fresh = False


def drop(part: Part) -> None:
    """Forget the momentum, of a group whose coefficient is 0 now; a later one starts anew."""
    for key in MOMENTUM_KEYS:
        part.state.pop(key, None)


def convert(saved: dict[str, Tensor], part: Part) -> dict[str, Tensor] | None:
    """A saved momentum as a part's group keeps it: as it is where the forms agree, else converted.

    Args:
        saved: ``momentum_buffer`` and perhaps ``momentum_scales``, of any device.
        part: Where it is to be loaded. Its own state is left alone.

    Returns:
        The same keys as :func:`allocate` writes, on the parameter's device; None if it is the momentum of a parameter
        of another shape.
    """
    saved = {key: value.to(part.param.device) for key, value in saved.items()}
    found = {key: (tuple(local(value).shape), value.dtype) for key, value in saved.items()}
    if found == form(part):
        return saved
    kept_as = next((name for name in (None, *QUANTIZED) if _fits(found, part, name)), "nothing")
    if kept_as == "nothing":
        return None
    if kept_as is None and not isinstance(form(part).get("momentum_scales"), tuple):
        return {"momentum_buffer": saved["momentum_buffer"].to(form(part)["momentum_buffer"][1])}
    return _converted(saved, part)


def _fits(found: dict[str, tuple[tuple[int, ...], torch.dtype]], part: Part, momentum_dtype: str | None) -> bool:
    expected = form(part.alike({**part.group, "momentum_dtype": momentum_dtype}))
    shapes = {key: shape for key, (shape, _) in expected.items()}
    return shapes == {key: shape for key, (shape, _) in found.items()}


def _converted(saved: dict[str, Tensor], part: Part) -> dict[str, Tensor]:
    source, target = part.alike(part.group), part.alike(part.group)
    source.state.update(saved)
    allocate(target)
    store(momentum_of(target), load(momentum_of(source)))
    return target.state
