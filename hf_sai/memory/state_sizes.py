"""How many bytes each optimizer keeps for the tensors that it updates.

Each rule is written from what the implementation named beside it allocates; the tests compare it with real ones.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial

__all__ = ["OPTIMIZERS", "Weight"]


@dataclass(frozen=True)
class Weight:
    """A parameter, or the part of it (or of several) that an optimizer is given on one device."""

    shape: tuple[int, ...]
    itemsize: int
    dtype: str = "float32"
    name: str = ""
    trained: bool = True
    is_embedding: bool = False
    row_dims: tuple[int, ...] = ()  # of a hidden matrix, or of a stack of them: the dimensions that number the rows
    packed: int = 0  # bytes, of a weight in 4 bits

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def matrix_rows(self) -> int:
        return math.prod(self.shape[d] for d in self.row_dims) if self.row_dims else 0

    @property
    def nbytes(self) -> int:
        return self.packed or self.numel * self.itemsize


def _sgd(weights: Iterable[Weight]) -> int:
    """One momentum of the weights' shape and dtype: ``hf_sai.SGDSaI`` (its g-SNR is a Python number), torch's SGD."""
    return sum(weight.numel * weight.itemsize for weight in weights)


def _sgd_sai_bf16(weights: Iterable[Weight]) -> int:
    """A momentum of two bytes an element: ``hf_sai.SGDSaI(momentum_dtype=torch.bfloat16)``."""
    return sum(2 * weight.numel for weight in weights)


def _sgd_sai_quantized(bits: int, block: int, weights: Iterable[Weight]) -> int:
    """A momentum of 8 or 4 bits with a float32 scale per block: ``hf_sai.SGDSaI(momentum_dtype="8bit")``.

    Tensors below 4096 elements and of an odd number of elements keep one of the weights' dtype.
    """
    total = 0
    for weight in weights:
        if weight.numel < 4096 or weight.numel % 2:
            total += weight.numel * weight.itemsize
        else:
            total += weight.numel * bits // 8 + 4 * math.ceil(weight.numel / block)
    return total


def _float32(weights: Iterable[Weight]) -> int:
    """A mean of the weights' shape, in float32 or better: ``SGDSaI(update="averaged")``."""
    return sum(weight.numel * max(4, weight.itemsize) for weight in weights)


def _factored(momentum: Callable[[Iterable[Weight]], int], weights: Iterable[Weight]) -> int:
    """A momentum, and float32 running mean squares of rows, columns and the whole: ``SGDSaI(update="factored")``.

    A vector has one of each element.
    """
    weights = list(weights)
    means = sum(
        1 + weight.shape[0] + math.prod(weight.shape[1:]) if len(weight.shape) > 1 else weight.numel
        for weight in weights
    )
    return momentum(weights) + 4 * means


def _orthogonal(momentum: Callable[[Iterable[Weight]], int], weights: Iterable[Weight]) -> int:
    """A momentum, and a float32 mean square of each hidden matrix's rows; :func:`_factored` elsewhere."""
    weights = list(weights)
    matrices = [weight for weight in weights if weight.matrix_rows]
    others = [weight for weight in weights if not weight.matrix_rows]
    return momentum(matrices) + 4 * sum(weight.matrix_rows for weight in matrices) + _factored(momentum, others)


def _adamw(weights: Iterable[Weight]) -> int:
    """Two moments of the weights' shape and dtype and a float32 step count each: torch's AdamW."""
    return sum(2 * weight.numel * weight.itemsize + 4 for weight in weights)


def _adamw_8bit(weights: Iterable[Weight]) -> int:
    """Two moments of bytes with a float32 scale per 256, and two shared tables: bitsandbytes' AdamW8bit.

    Tensors below 4096 elements stay in float32, and so do embeddings, which transformers' Trainer exempts.
    """
    total, tables = 0, 0
    for weight in weights:
        if weight.numel < 4096 or weight.is_embedding:
            total += 2 * 4 * weight.numel
        else:
            total += 2 * (weight.numel + 4 * math.ceil(weight.numel / 256))
            tables = 2 * 4 * 256
    return total + tables


def _adafactor(weights: Iterable[Weight]) -> int:
    """A row and a column of the second moment, at least float32, and one number each: transformers' Adafactor.

    Vectors keep the whole second moment; there is no first one unless ``beta1`` is given.
    """
    total = 0
    for weight in weights:
        shape, itemsize = weight.shape, max(4, weight.itemsize)
        kept = math.prod(shape[:-1]) + math.prod(shape[:-2] + shape[-1:]) if len(shape) >= 2 else weight.numel
        total += itemsize * (kept + 1)
    return total


def _adam_mini(weights: Iterable[Weight]) -> int:
    """One float32 moment, a second of embeddings and output layer alone, and two numbers each: pytorch-optimizer's.

    It goes by the parameters' names. Where they say query or key it keeps a number per attention head instead of two.
    """
    total = 0
    for weight in weights:
        whole = any(part in weight.name for part in ("embed", "embd", "wte", "lm_head.weight", "output.weight"))
        total += 4 * (2 * weight.numel if whole else weight.numel + 2)
    return total


#: Names, Trainer's where it has the optimizer, and the rule by which each keeps its state.
OPTIMIZERS: dict[str, Callable[[Iterable[Weight]], int]] = {
    "sgd_sai": _sgd,
    "sgd_sai_bf16": _sgd_sai_bf16,
    "sgd_sai_8bit": partial(_sgd_sai_quantized, 8, 256),
    "sgd_sai_4bit": partial(_sgd_sai_quantized, 4, 128),
    "sgd_sai_factored": partial(_factored, _sgd),
    "sgd_sai_factored_8bit": partial(_factored, partial(_sgd_sai_quantized, 8, 256)),
    "sgd_sai_factored_4bit": partial(_factored, partial(_sgd_sai_quantized, 4, 128)),
    "sgd_sai_averaged": partial(_factored, _float32),
    "sgd_sai_orthogonal": partial(_orthogonal, _sgd),
    "sgd_sai_orthogonal_8bit": partial(_orthogonal, partial(_sgd_sai_quantized, 8, 256)),
    "sgd_sai_orthogonal_4bit": partial(_orthogonal, partial(_sgd_sai_quantized, 4, 128)),
    "sgd_momentum": _sgd,
    "adamw_torch": _adamw,
    "adamw_bnb_8bit": _adamw_8bit,
    "adafactor": _adafactor,
    "adam_mini": _adam_mini,
}
