r"""Gradients with unit rows: each row over its root-mean-square, before the momentum. SCALE, arXiv 2506.16659.

.. math::
    \hat g_{ij} = g_{ij} \Big/ \sqrt{\tfrac{1}{k} \textstyle\sum_l g_{il}^2}, \qquad
    \theta_t = (1 - \gamma\lambda)\, \theta_{t-1} - \gamma\, \frac{G}{\sqrt n}\, m_t

The columns in that paper are the rows of ``nn.Linear.weight`` here: the weights of one output.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from hf_sai.optim.layout import Part, sum_over_holders
from hf_sai.optim.rules.published import Published

__all__ = ["Rows", "applied_to_boxes", "mean_squares", "reciprocal_roots", "sum_of_squares", "sums_of_squares"]


class Rows(Published):
    """Every row (all that belongs to one index of the first dimension) to unit size, vectors as a whole."""

    name = "rows"

    def factors(self, parts: Sequence[Part]) -> list[Sequence[Tensor]]:
        """One tensor each, with as many dimensions as the parameter; rows of zeros stay zeros."""
        if not parts:
            return []
        kept = [((0,) if len(part.shape) > 1 else (),) for part in parts]
        sums = [sums_of_squares(part, dims) for part, dims in zip(parts, kept, strict=True)]
        roots = reciprocal_roots(list(itertools.chain(*mean_squares(parts, kept, sums))))
        for root in roots:  # of a row with a NaN the other elements rest, as they do beside an infinity
            root.nan_to_num_(nan=0.0)
        return [applied_to_boxes(part, (root,)) for part, root in zip(parts, roots, strict=True)]

    def scale(self, gsnr: float, numel: int) -> float:
        return gsnr / math.sqrt(numel)


def sum_of_squares(gradient: Tensor, kept: Sequence[int]) -> Tensor:
    """Sums of a gradient's squares over all dimensions but these, which stay with length 1; float32 or better."""
    dims = tuple(d for d in range(gradient.ndim) if d not in kept)
    dtype = torch.promote_types(gradient.dtype, torch.float32)
    if not dims:
        return gradient.to(dtype).square()
    # torch's norm of a strided tensor adds in one running sum on CPU: 41 % off at 2^25 elements.
    return torch.linalg.vector_norm(gradient.contiguous(), dim=dims, keepdim=True, dtype=dtype).square()


def sums_of_squares(part: Part, kept: Sequence[tuple[int, ...]]) -> list[Tensor]:
    """For each set of kept dimensions a part's sums of squares over the others; zeros of a part without a gradient."""
    if part.grad is not None and (part.boxes(part.grad) is None or len(part.shape) < 2):
        return [sum_of_squares(part.grad, dims) for dims in kept]
    dtype = torch.promote_types((part.param if part.grad is None else part.grad).dtype, torch.float32)
    sums = [part.zeros(dtype, dims) for dims in kept]
    for box, rows, columns in () if part.grad is None else part.boxes(part.grad):  # type: ignore[union-attr]
        for total, dims in zip(sums, kept, strict=True):
            # As a matrix: rows are the first dimension, columns all others.
            here = total.view(total.shape[0], -1)[rows if 0 in dims else slice(1), columns if 1 in dims else slice(1)]
            here += sum_of_squares(box, tuple(d for d in dims if d < 2))
    return sums


def applied_to_boxes(part: Part, factors: Sequence[Tensor]) -> Sequence[Tensor]:
    """Factors as they are, where a gradient has its parameter's dimensions; else multiplies it, and returns none."""
    if part.grad is None or len(part.shape) < 2 or part.boxes(part.grad) is None:
        return factors
    for box, rows, columns in part.boxes(part.grad) or ():
        for factor in factors:
            matrix = factor.view(factor.shape[0], -1)
            box.mul_(matrix[rows if len(matrix) > 1 else slice(1), columns if matrix.shape[1] > 1 else slice(1)])
    return ()


def mean_squares(
    parts: Sequence[Part], kept: Sequence[Sequence[tuple[int, ...]]], sums: Sequence[Sequence[Tensor]]
) -> list[list[Tensor]]:
    """Mean squares of whole gradients from sums over their parts; the sums are changed in place.

    Args:
        parts: Each with its gradient.
        kept: For each part the dimensions over which is not averaged, one set for each of its sums.
        sums: For each part its sums of squares.
    """
    owners = [(part, dims) for part, of_part in zip(parts, kept, strict=True) for dims in of_part]
    flat = list(itertools.chain(*sums))
    sum_over_holders(
        (total, part.holders(dims), part.table_device) for total, (part, dims) in zip(flat, owners, strict=True)
    )
    torch._foreach_mul_(flat, [_kept_share(part.shape, dims) for part, dims in owners])
    rest = iter(flat)
    return [[next(rest) for _ in of_part] for of_part in kept]


def _kept_share(shape: torch.Size, dims: Sequence[int]) -> float:
    """What a sum over all other dimensions is multiplied by to be a mean; 0 where there are no elements."""
    # By itself: torch 2.11 with Python 3.12 does not compile a list whose items hold a generator over its variable.
    return math.prod(shape[d] for d in dims) / max(1, shape.numel())


def reciprocal_roots(means: list[Tensor]) -> list[Tensor]:
    """One over the root of each mean square, in place. What has been zero at all times is zero, whatever it is over."""
    torch._foreach_clamp_min_(means, torch.finfo(torch.float32).tiny)
    torch._foreach_sqrt_(means)
    torch._foreach_reciprocal_(means)
    return means
