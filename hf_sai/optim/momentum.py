"""How the momentum is kept: in its parameter's dtype, in another one, or in blocks of 8 or 4 bits with a scale each.

The blocks are bitsandbytes' formats, and where it is installed its kernels for CPU and CUDA write and read them, else
torch's operations (:mod:`hf_sai.optim.codes`). Codes and scales are plain tensors, which every way of copying and
saving a state handles. torchao's quantised optimizer states are tensor subclasses, which ``copy.deepcopy`` refuses.
"""

from __future__ import annotations

import functools
import logging
import math
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from hf_sai.optim.codes import QUANTIZED, code_values, dequantized, quantized
from hf_sai.optim.layout import Part, local

__all__ = [
    "BLOCK_KEY",
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
    "saved",
    "start",
    "store",
]

logger = logging.getLogger(__name__)

#: What of a parameter's state is its momentum; the scales are there for a quantised one.
MOMENTUM_KEYS = ("momentum_buffer", "momentum_scales")

#: In a state dict, beside a momentum that was quantised and is saved as values.
BLOCK_KEY = "momentum_block"

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

    def piece(self, start: int, shape: torch.Size) -> QuantizedMomentum:
        """So many elements of the flat momentum, sharing its memory; they begin where a block begins."""
        stop = start + shape.numel()
        if self.is_8bit:
            block, codes = QUANTIZED["8bit"], self.codes.view(-1)[start:stop].view(shape)
        else:
            block, codes = QUANTIZED["4bit"], self.codes.view(-1)[start // 2 : stop // 2]
        return QuantizedMomentum(codes, self.scales[start // block : -(-stop // block)], shape)

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
        value, blocksize = value.float().flatten(), QUANTIZED[self.kind]
        if value.numel() == 0:
            return
        if not has_bitsandbytes():
            codes, scales = quantized(value, self.kind)
        else:
            from bitsandbytes import functional

            if self.is_8bit:
                table = code_values(self.kind, value.device)
                codes, state = functional.quantize_blockwise(value, table, blocksize=blocksize)
            else:
                codes, state = functional.quantize_4bit(value, blocksize=blocksize, quant_type="nf4")
            scales = state.absmax
        self.codes.copy_(codes.view_as(self.codes))
        self.scales.copy_(scales)

    def store_loaded(self, value: Tensor) -> None:
        """Quantise what :meth:`load` gave, so that it gives the same again, unless blocks are cut differently now.

        4 bits do by themselves. In 8 bits no code stands for -1, so that a block whose largest element is negative
        would come back 0.7 % smaller each time.
        """
        if not self.is_8bit:
            return self.store(value)
        table, size = code_values("8bit", value.device), QUANTIZED["8bit"]
        value = value.float().flatten()
        blocks = torch.nn.functional.pad(value, (0, -value.numel() % size)).view(-1, size)
        lowest, largest = blocks.amin(1), blocks.amax(1)
        scales = torch.maximum(largest, lowest / table[0])
        codes, midpoints = torch.zeros_like(blocks, dtype=torch.uint8), (table[1:] + table[:-1]) / 2
        found = torch.zeros_like(scales, dtype=torch.bool)
        # Dividing by the lowest code may miss the scale by a rounding: of its neighbours one gives the very values.
        for scale in (torch.nextafter(scales, scales * 2), torch.nextafter(scales, scales * 0), scales):
            near = torch.bucketize(blocks / scale.clamp_min(torch.finfo(scale.dtype).tiny)[:, None], midpoints)
            same = (table[near] * scale[:, None] == blocks).all(1)
            better = ~found if scale is scales else same & ~found
            codes = torch.where(better[:, None], near.to(torch.uint8), codes)
            self.scales.copy_(torch.where(better, scale, self.scales))
            found |= same
        self.codes.copy_(codes.flatten()[: value.numel()].view_as(self.codes))


@functools.cache
def has_bitsandbytes() -> bool:
    """Whether bitsandbytes is installed, and works; a warning says where it does not."""
    if find_spec("bitsandbytes") is None:
        return False
    try:
        import bitsandbytes.functional  # noqa: F401
    except Exception as error:  # half installed, or for another CUDA: a training can do without it
        logger.warning(
            "bitsandbytes does not work here (%s: %s); torch's own operations, which are slower, keep the momentum. "
            "Mend it, or remove it.",
            type(error).__name__,
            error,
        )
        return False
    return True


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


def saved(part: Part) -> dict[str, Any]:
    """A part's state as a state dict holds it, where parameters are in pieces.

    Blocks of 8 or 4 bits are those of this process's share of the parameter, and another run may share it out
    differently. So they are saved as values, float32, which can be parted anew, and quantised again when they are
    loaded: to the same codes where the blocks are the same.
    """
    if not isinstance(part.group["momentum_dtype"], str) or "momentum_buffer" not in part.state:
        return part.as_saved(part.state)
    kept = part.as_saved({key: v for key, v in part.state.items() if key not in MOMENTUM_KEYS})
    values = load(momentum_of(part)).to(torch.float32)
    buffer = part.lying(values)
    if buffer is values:
        return {**kept, "momentum_buffer": buffer}
    # torch.distributed.checkpoint casts silently and would take the codes of whole parameters for values, or values for
    # codes. It misses this key in the one case, and the scales in the other. It is no number, for of these
    # set_state_dict cannot load those into a full state that it does not expect; nor has it no dimension.
    block = torch.tensor([QUANTIZED[part.group["momentum_dtype"]]], device=values.device)
    return {**kept, "momentum_buffer": buffer, BLOCK_KEY: block}


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
    if "momentum_buffer" in saved and saved["momentum_buffer"].is_floating_point():
        saved.pop("momentum_scales", None)  # of the state before: set_state_dict keeps what a full state does not have
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
    if momentum_dtype is None and not all(dtype.is_floating_point for _, dtype in found.values()):
        return False  # codes without their scales
    shapes = {key: shape for key, (shape, _) in expected.items()}
    return shapes == {key: shape for key, (shape, _) in found.items()}


def _converted(saved: dict[str, Tensor], part: Part) -> dict[str, Tensor]:
    source, target = part.alike(part.group), part.alike(part.group)
    source.state.update(saved)
    allocate(target)
    values, kept = load(momentum_of(source)), momentum_of(target)
    kept.store_loaded(values) if isinstance(kept, QuantizedMomentum) else store(kept, values)
    return target.state
