"""Measuring the gradient signal-to-noise ratio (g-SNR) of tensors, and reporting it."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hf_sai.distributed.sharding import all_reduce_rows, local_shard, summing_groups, table_device, without_partial

__all__ = [
    "MAX_EPS_SHARE",
    "MAX_GSNR_RATIO",
    "UNMEASURED",
    "GSNRReport",
    "GSNRRow",
    "gsnr_from_moments",
    "measure_gsnr",
]

#: The g-SNR of ``n`` elements is capped at this multiple of ``sqrt(n)``. A gradient without a mean has a ratio of 1;
#: real gradients reach about 5; a (nearly) constant one has no noise to divide by and would grow without bound.
MAX_GSNR_RATIO = 10.0

#: The part of the standard deviation that ``eps`` may add at most.
MAX_EPS_SHARE = 0.005

#: What ``state["gsnr"]`` holds while no usable gradient has come. No measured g-SNR can be 0: it is at least
#: ``sqrt(n - 1) / (1 + MAX_EPS_SHARE)``, and 1 for one element.
UNMEASURED = 0.0


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

    Example:
        >>> import torch
        >>> [round(value, 6) for value in measure_gsnr([torch.tensor([3.0, -3.0, 3.0, -3.0]), torch.zeros(2)])]
        [1.732051, 0.0]
    """
    floors = [eps] * len(gradients) if isinstance(eps, (int, float)) else eps
    return [
        gsnr_from_moments(gradient.numel(), *moments, eps=floor)
        for gradient, moments, floor in zip(gradients, _moments(gradients), floors, strict=True)
    ]


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
        table = [("parameter", "group", "shape", "g-SNR", "g-SNR/sqrt(n)")]
        for row in sorted(self.rows, key=lambda row: row.measured):
            values = ("UNMEASURED", "-") if row.gsnr is None else (f"{row.gsnr:.4g}", f"{row.ratio:.3f}")
            table.append((row.name, row.group, "x".join(map(str, row.shape)) or "scalar", *values))
        widths = [max(map(len, column)) for column in zip(*table, strict=True)]
        lines = ["  ".join(map(str.ljust, line, widths)).rstrip() for line in table]
        return "\n".join([*lines, f"{len(self) - len(self.unmeasured)} of {len(self)} parameters measured"])


def _moments(gradients: Sequence[Tensor]) -> list[tuple[float, float]]:
    """(sum, sum of squares) of each gradient in float64.

    One device-to-host transfer per device. Gradients that are sharded (DTensor) are summed where they are; one
    all_reduce per process group then adds up the sums of all of them.
    """
    gradients = [without_partial(gradient) for gradient in gradients]
    by_device: dict[torch.device, list[int]] = defaultdict(list)
    for index, gradient in enumerate(gradients):
        by_device[table_device(gradient)].append(index)
    moments = [(0.0, 0.0)] * len(gradients)
    for device, indices in by_device.items():
        table = torch.stack([_local_moments(local_shard(gradients[i])).to(device) for i in indices])
        table = all_reduce_rows(table, [summing_groups(gradients[i]) for i in indices])
        for i, (total, total_of_squares) in zip(indices, table.tolist(), strict=True):
            moments[i] = (total, total_of_squares)
    return moments


def _local_moments(gradient: Tensor) -> Tensor:
    """(sum, sum of squares) of an ordinary tensor, float64[2] on its device."""
    if gradient.device.type == "mps":  # has no float64
        gradient = gradient.cpu()
    total = gradient.sum(dtype=torch.float64)
    norm = torch.linalg.vector_norm(gradient, dtype=torch.float64)
    return torch.stack([total, norm.square()])
