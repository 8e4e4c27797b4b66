"""Measuring the gradient signal-to-noise ratio (g-SNR) of tensors, and reporting it."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hf_sai.optim.html_table import html_table
from hf_sai.optim.layout import UNMEASURED, Layout, Part, kind_of, sum_over_holders

__all__ = [
    "MAX_EPS_SHARE",
    "MAX_GSNR_RATIO",
    "UNMEASURED",
    "GSNRReport",
    "GSNRRow",
    "gsnr_from_moments",
    "measure",
    "measure_gsnr",
    "refuse_sparse",
    "report",
    "rows",
]

#: The g-SNR of ``n`` elements is capped at this multiple of ``sqrt(n)``. A gradient without a mean has a ratio of 1;
#: real gradients reach about 5; a (nearly) constant one has no noise to divide by and would grow without bound.
MAX_GSNR_RATIO = 10.0

#: The part of the standard deviation that ``eps`` may add at most.
MAX_EPS_SHARE = 0.005

#: Sums run over pieces of at most this many elements, whose float64 copy takes 32 MB.
PIECE = 1 << 22


def measure(parts: Sequence[Part]) -> None:
    r"""Give each part its parameter's g-SNR, :math:`\|g\|_2 / \sigma(g)` (arXiv 2412.11768, Algorithm 1 at t = 1).

    One all_reduce per process group, and one transfer to the host per device, serve all parts together. Where a process
    knows a parameter's g-SNR already, from a checkpoint that had nothing for the others, that one counts.

    Args:
        parts: Unmeasured, with dense gradients, and the same on all processes that hold some of these parameters; a
            part without a gradient counts as zeros. What cannot be measured yet stays ``UNMEASURED``, all others are
            ``fresh`` afterwards.
    """
    if not parts:
        return
    table = [_row(part) for part in parts]
    sum_over_holders((row, part.holders(), part.table_device) for row, part in zip(table, parts, strict=True))
    for part, (total, total_of_squares, known, holders) in zip(parts, _to_host(table), strict=True):
        value = part.gsnr
        part.fresh = False
        if value == UNMEASURED:
            n, eps = part.shape.numel(), part.group["eps"]
            value = known / holders if holders else gsnr_from_moments(n, total, total_of_squares, eps=eps)
            part.fresh = value != UNMEASURED
        part.gsnr = value


def measure_gsnr(gradients: Sequence[Tensor], *, eps: float | Sequence[float] = 1e-8) -> list[float]:
    r"""Measure the g-SNR of each gradient: :math:`\|g\|_2 / \sigma(g)` (arXiv 2412.11768, Algorithm 1).

    The sums run in float64 whatever the gradient's dtype, so the result does not depend on the gradient's size: it
    neither overflows nor underflows for float32, float16 and bfloat16. All results of one device come to the host in
    one transfer.

    Args:
        gradients: Tensors of any floating dtype, shape and device. DTensors are measured as a whole, by one all_reduce
            per process group in all: every rank must call this with the same gradients in the same order.
        eps: Added to the standard deviation (in units of the gradient, >= 0), but at most ``MAX_EPS_SHARE`` of it; one
            value for all gradients or one each. The paper and the official code have no such limit, which falsifies
            the g-SNR of gradients not far above ``eps``.

    Returns:
        One float per gradient; ``UNMEASURED`` (0.0) where nothing can be measured yet: the gradient is empty, all
        zero, or holds inf or NaN.

    Raises:
        ValueError: A gradient is sparse.

    Example:
        >>> import torch
        >>> [round(value, 6) for value in measure_gsnr([torch.tensor([3.0, -3.0, 3.0, -3.0]), torch.zeros(2)])]
        [1.732051, 0.0]
    """
    floors = [eps] * len(gradients) if isinstance(eps, (int, float)) else eps
    parts = [kind_of(g).of_gradient(g, {"eps": floor}) for g, floor in zip(gradients, floors, strict=True)]
    refuse_sparse(parts)
    measure(parts)
    return [part.gsnr for part in parts]


def gsnr_from_moments(n: int, total: float, total_of_squares: float, *, eps: float = 1e-8) -> float:
    r"""The g-SNR of ``n`` elements from their sum and their sum of squares.

    The variance is the unbiased one (as in the official code), :math:`(S_2 - S_1^2 / n) / (n - 1)`. One element has no
    variance; its g-SNR is 1, the value of :math:`\sqrt{n}` that mean-free gradients have at any ``n`` (the official
    code divides by ``eps`` instead, which makes the parameter explode).

    Args:
        n: Number of elements.
        total: Their sum :math:`S_1`.
        total_of_squares: Their sum of squares :math:`S_2`.
        eps: Addition to the standard deviation, see :func:`measure_gsnr`.

    Returns:
        The g-SNR, at most ``MAX_GSNR_RATIO * sqrt(n)``; ``UNMEASURED`` (0.0) if the moments are zero or not finite.
    """
    if n == 0 or not math.isfinite(total) or not math.isfinite(total_of_squares) or total_of_squares <= 0.0:
        return UNMEASURED
    if n == 1:
        return 1.0
    norm = math.sqrt(total_of_squares)
    variance = max(total_of_squares - total * total / n, 0.0) / (n - 1)
    deviation = math.sqrt(variance)
    noise = deviation + min(eps, MAX_EPS_SHARE * deviation)
    largest = MAX_GSNR_RATIO * math.sqrt(n)
    return min(norm / noise, largest) if noise > 0.0 else largest


@dataclass(frozen=True)
class GSNRRow:
    """One parameter of a :class:`GSNRReport`.

    Attributes:
        name: The parameter's name, or ``group G parameter I`` where no name is known.
        group: The parameter group's ``name``, or its index.
        shape: The parameter's shape.
        gsnr: The measured g-SNR as stored, before any normalisation; None while it is unmeasured.
        ratio: ``gsnr / sqrt(numel)``: 1 for a gradient without a mean, more the more its elements agree.
    """

    name: str
    group: str
    shape: tuple[int, ...]
    gsnr: float | None
    ratio: float | None

    @property
    def measured(self) -> bool:
        """Whether the g-SNR is known, that is, whether the parameter trains."""
        return self.gsnr is not None


@dataclass(frozen=True)
class GSNRReport:
    """The g-SNR of every parameter of an optimizer; ``str(report)`` is a table, unmeasured parameters first."""

    rows: tuple[GSNRRow, ...]

    @property
    def unmeasured(self) -> tuple[GSNRRow, ...]:
        """The parameters whose gradient was never finite and non-zero so far; they are not being trained."""
        return tuple(row for row in self.rows if not row.measured)

    def __iter__(self) -> Iterator[GSNRRow]:
        return iter(self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    def __str__(self) -> str:
        table = self._table()
        widths = [max(map(len, column)) for column in zip(*table, strict=True)]
        lines = ["  ".join(map(str.ljust, line, widths)).rstrip() for line in table]
        return "\n".join([*lines, self._summary()])

    def _repr_html_(self) -> str:
        """The same table in a notebook."""
        return html_table(self._table(), self._summary())

    def _table(self) -> list[tuple[str, ...]]:
        table: list[tuple[str, ...]] = [("parameter", "group", "shape", "g-SNR", "g-SNR/sqrt(n)")]
        for row in sorted(self.rows, key=lambda row: row.measured):
            values = ("UNMEASURED", "-") if row.gsnr is None else (f"{row.gsnr:.4g}", f"{row.ratio:.3f}")
            table.append((row.name, row.group, "x".join(map(str, row.shape)) or "scalar", *values))
        return table

    def _summary(self) -> str:
        return f"{len(self) - len(self.unmeasured)} of {len(self)} parameters measured"


def report(layout: Layout, names: dict[int, str] | None = None) -> GSNRReport:
    """The g-SNR of every non-empty parameter.

    Args:
        layout: The optimizer's.
        names: id of a parameter -> its name, where the optimizer does not know them.
    """
    return GSNRReport(tuple(row for row, _ in rows(layout, names)))


def rows(layout: Layout, names: dict[int, str] | None = None) -> Iterator[tuple[GSNRRow, Tensor]]:
    """The rows of :func:`report`, each with its parameter."""
    seen: dict[int, int] = defaultdict(int)
    for number, known, p, shape, gsnr, group in layout.measured():
        name = (names or {}).get(id(p)) or known or f"group {number} parameter {seen[number]}"
        seen[number] += 1
        if shape.numel() > 0:
            measured = gsnr != UNMEASURED
            ratio = gsnr / math.sqrt(shape.numel()) if measured else None
            yield GSNRRow(name, str(group.get("name", number)), tuple(shape), gsnr if measured else None, ratio), p


def refuse_sparse(parts: Sequence[Part]) -> None:
    """Raise ValueError for a sparse gradient; no rule can take it, whether its g-SNR is known or not."""
    for part in parts:
        if part.grad is not None and part.grad.layout is not torch.strided:
            raise ValueError(
                f"SGD-SaI does not support sparse gradients, and a parameter of shape {tuple(part.shape)} has one. "
                "Build its torch.nn.Embedding with sparse=False."
            )


def _row(part: Part) -> Tensor:
    """(sum, sum of squares, g-SNR if known, whether it is known) of a part, float64[4] on its table's device."""
    known = torch.tensor([part.gsnr, float(part.gsnr != UNMEASURED)], dtype=torch.float64)
    if part.grad is None:
        return torch.cat([torch.zeros_like(known), known]).to(part.table_device)
    return torch.cat([_moments(part.grad).to(part.table_device), known.to(part.table_device)])


def _moments(gradient: Tensor) -> Tensor:
    """(sum, sum of squares) of an ordinary tensor, float64[2] on its device."""
    if gradient.device.type == "mps":  # has no float64
        gradient = gradient.cpu()
    moments = torch.zeros(2, dtype=torch.float64, device=gradient.device)
    for piece in _pieces(gradient):
        # One after the other, so that only one float64 copy stands in memory.
        moments[0] += piece.sum(dtype=torch.float64)
        moments[1] += torch.linalg.vector_norm(piece, dtype=torch.float64).square()
    return moments


def _pieces(tensor: Tensor) -> Iterator[Tensor]:
    """Parts that together are the whole tensor, none of more than ``PIECE`` elements, in any order."""
    if tensor.numel() <= PIECE:
        yield tensor
        return
    dense = tensor.permute(sorted(range(tensor.ndim), key=tensor.stride, reverse=True))
    if dense.is_contiguous():
        yield from dense.view(-1).split(PIECE)
        return
    longest = max(range(tensor.ndim), key=lambda d: tensor.shape[d])
    for piece in tensor.split(max(1, PIECE * tensor.shape[longest] // tensor.numel()), longest):
        yield from _pieces(piece)


def _to_host(table: Sequence[Tensor]) -> list[list[float]]:
    """The rows as numbers, by one transfer for each device."""
    by_device: dict[torch.device, list[int]] = defaultdict(list)
    for index, row in enumerate(table):
        by_device[row.device].append(index)
    result: list[list[float]] = [[]] * len(table)
    for indices in by_device.values():
        for index, numbers in zip(indices, torch.stack([table[i] for i in indices]).tolist(), strict=True):
            result[index] = numbers
    return result
