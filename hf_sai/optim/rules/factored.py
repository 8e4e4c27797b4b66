r"""Gradients over a running estimate of their size, from running means of rows and columns, before the momentum.

.. math::
    \hat g_{ij} = g_{ij} \Big/ \sqrt{r_i c_j / w}, \qquad
    \theta_t = (1 - \gamma\lambda)\, \theta_{t-1} - \gamma\, \frac{G}{\sqrt n}\, m_t

where r, c and w are running mean squares of the gradient's rows, of its columns and of the whole: Adafactor's factored
second moment (arXiv 1804.04235, equation 6) with AdamW's decay and correction of the start at zero. A column is all
that belongs to one index of the other dimensions than the first. A vector has a running mean square of each element, as
in AdamW. Dividing before the momentum instead of after it is what LaProp does (arXiv 2002.04839).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from hf_sai.optim.layout import Part, local
from hf_sai.optim.rules.rows import Rows, applied_to_boxes, mean_squares, sum_of_squares, sums_of_squares

__all__ = ["FASTER", "KEPT", "MEAN_SQUARES", "Factored", "factor", "product"]

#: Keys of the running mean squares: of the whole (of each element of a vector), of rows, of columns. All float32.
MEAN_SQUARES = ("mean_square", "row_mean_square", "column_mean_square")

#: How much a running mean keeps from step to step: AdamW's beta2.
KEPT = 0.999

#: Faster ways to the factors of some parts: index -> factors. :mod:`hf_sai.kernels` fills it.
FASTER: list[Callable[[Sequence[Part]], dict[int, Sequence[Tensor]]]] = []

# So many squares of elements fit into the cache of a CPU's core.
_PIECE = 1 << 18


class Factored(Rows):
    """State: ``MEAN_SQUARES``, with as many dimensions as the parameter, and ``averaged_steps``, an int."""

    name = "factored"
    keys: tuple[str, ...] = (*MEAN_SQUARES, "averaged_steps")

    def kept(self, part: Part) -> dict[str, tuple[int, ...]]:
        dims = tuple(range(len(part.shape)))
        return dict(zip(MEAN_SQUARES, (dims,) if len(dims) < 2 else ((), dims[:1], dims[1:]), strict=False))

    def allocate(self, part: Part) -> None:
        if "averaged_steps" not in part.state:
            part.state["averaged_steps"] = 0
            for key, dims in self.kept(part).items():  # a comprehension would be traced wrongly by torch.compile
                part.state[key] = part.zeros(torch.float32, dims)

    def taken_up(self, part: Part, saved: dict[str, Tensor]) -> dict[str, Tensor]:
        estimate = saved.get(MEAN_SQUARES[0])
        if part.parted or estimate is None or estimate.shape != part.shape or len(part.shape) < 2:
            return saved
        part = part.alike(part.group)
        part.state.update(saved)
        factor([part])
        return part.state

    def factors(self, parts: Sequence[Part]) -> list[Sequence[Tensor]]:
        """One tensor for a vector; for others one of the rows and one of the columns. Counts a step in the state.

        A gradient whose mean square is not finite leaves the running means as they are, and they divide it: NaN and
        infinities stay where they are, and do not spread over the tensor or stay for later steps.
        """
        on_gpu = not torch.compiler.is_compiling() and any(part.param.is_cuda for part in parts)
        if on_gpu and torch.cuda.is_current_stream_capturing():
            raise ValueError(
                f"update={self.name!r} counts its steps on the host, and a CUDA graph would replay one count for ever: "
                "leave the optimizer's step out of the graph, or use update='published'."
            )
        for part in parts:
            if part.grad is not None and "averaged_steps" not in part.state:  # measured before the rule was switched on
                self.allocate(part)
        found: dict[int, Sequence[Tensor]] = {}
        for faster in FASTER:
            found |= faster(parts)
        rest = [index for index in range(len(parts)) if index not in found]
        if rest:
            found |= zip(rest, self._plain_factors([parts[index] for index in rest]), strict=True)
        return [found[index] for index in range(len(parts))]

    def _plain_factors(self, parts: Sequence[Part]) -> list[Sequence[Tensor]]:
        kept = [tuple(self.kept(part).values()) for part in parts]
        sums = [_sums(part, dims) for part, dims in zip(parts, kept, strict=True)]
        of_all = mean_squares(parts, kept, sums)
        here = [index for index, part in enumerate(parts) if part.grad is not None]
        means = _running_means([parts[index] for index in here], [of_all[index] for index in here])
        flat = list(itertools.chain(*means))
        torch._foreach_clamp_min_(flat, torch.finfo(torch.float32).tiny)
        torch._foreach_sqrt_(flat)
        for roots in means:
            if len(roots) > 1:
                roots[1].div_(roots.pop(0))
        torch._foreach_reciprocal_(list(itertools.chain(*means)))
        found = dict(zip(here, means, strict=True))
        return [applied_to_boxes(part, tuple(found.get(index, ()))) for index, part in enumerate(parts)]


def product(state: dict[str, Tensor]) -> Tensor:
    """The mean square of each element that those of the whole, of rows and of columns stand for."""
    whole, rows, columns = (state[key] for key in MEAN_SQUARES)
    return rows * (columns / whole.clamp(min=torch.finfo(torch.float32).tiny))


def factor(parts: Sequence[Part]) -> None:
    """Bring states whose ``mean_square`` is that of each element (:func:`product`) into the form that the rule keeps.

    All processes that hold some of these parameters must call this with the same parts in the same order.
    """
    if not parts:
        return
    for part in parts:
        whole = "row_mean_square" not in part.state and part.state.get("mean_square")
        part.grad = whole.sqrt() if isinstance(whole, Tensor) else None
    kept = [tuple(Factored().kept(part).values()) for part in parts]
    sums = [sums_of_squares(part, dims) for part, dims in zip(parts, kept, strict=True)]
    for part, means in zip(parts, mean_squares(parts, kept, sums), strict=True):
        if part.grad is not None:
            part.state.update(zip(MEAN_SQUARES, means, strict=True))


def _sums(part: Part, kept: Sequence[tuple[int, ...]]) -> list[Tensor]:
    """For each set of kept dimensions the sum of squares over the others."""
    gradient = part.grad
    if len(kept) == 1 or gradient is None or part.boxes(gradient) is not None:
        return sums_of_squares(part, kept)
    rows, columns = _rows_and_columns(gradient, *kept[1:])
    return [rows.sum(tuple(range(gradient.ndim)), keepdim=True), rows, columns]


def _rows_and_columns(gradient: Tensor, *kept: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    if not gradient.is_cpu or gradient.numel() == 0:
        rows, columns = (sum_of_squares(gradient, dims) for dims in kept)
        return rows, columns
    # In pieces that stay in the cache; torch's norm over the first dimension takes 20 times as long there.
    dtype = torch.promote_types(gradient.dtype, torch.float32)
    squares = (piece.to(dtype).square() for piece in gradient.split(max(1, _PIECE // gradient[0].numel())))
    others = [tuple(d for d in range(gradient.ndim) if d not in dims) for dims in kept]
    parts = [[piece.sum(dims, keepdim=True) for dims in others] for piece in squares]
    return torch.cat([rows for rows, _ in parts]), torch.stack([columns for _, columns in parts]).sum(0)


def _running_means(parts: Sequence[Part], means: Sequence[Sequence[Tensor]]) -> list[list[Tensor]]:
    """Add a step's mean squares to the running ones; returns these without the share that their start at 0 has."""
    running, taken, shares = [], [], []
    for part, of_part in zip(parts, means, strict=True):
        state = part.state
        before = 1 - KEPT ** state["averaged_steps"]
        state["averaged_steps"] += 1
        own = [local(state[key]) for key in MEAN_SQUARES if key in state]
        running += own
        shares += [1 - KEPT ** state["averaged_steps"]] * len(own)
        of_part = [mean.to(torch.float32) for mean in of_part]
        # What is not finite counts as what the running mean expects; no step of the host waits for the answer.
        usable = of_part[0].isfinite()  # of the whole, or of each element of a vector
        expected = torch._foreach_div(own, before) if before else [torch.ones_like(mean) for mean in own]
        taken += [torch.where(usable, *pair) for pair in zip(of_part, expected, strict=True)]
    torch._foreach_lerp_(running, taken, 1 - KEPT)
    rest = iter(torch._foreach_div(running, shares))
    return [[next(rest) for _ in of_part] for of_part in means]
