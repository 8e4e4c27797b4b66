"""A stretch of a parameter laid out in one row of elements: what FSDP1 and DeepSpeed ZeRO leave to a process."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from hf_sai.optim.layout import Part

__all__ = ["NOT_WHOLE", "Stretch"]

NOT_WHOLE = (
    ("orthogonal", "averaged"),
    "It needs tensors with their dimensions, which lie in stretches here: use FSDP2 (fsdp_version: 2) or DDP, or "
    "update='factored'.",
)


class Stretch(Part):
    """One-dimensional; it knows the whole's shape, and which of its elements it begins with. It may be empty.

    Running means of rows and of columns are kept whole by every process that has some element of the parameter: which
    rows lie in a stretch follows from the number of processes, and all of them together are small.
    """

    __slots__ = ("start",)

    start: int

    def shape_of(self, kept: Sequence[int]) -> tuple[int, ...]:
        if len(kept) == len(self.shape):
            return tuple(self.param.shape)
        return tuple(length if d in kept else 1 for d, length in enumerate(self.shape))

    def zeros(self, dtype: torch.dtype | None = None, kept: Sequence[int] | None = None) -> Tensor:
        shape = self.param.shape if kept is None else self.shape_of(kept)
        return torch.zeros(shape, dtype=dtype or self.param.dtype, device=self.param.device)

    def boxes(self, tensor: Tensor) -> Iterator[tuple[Tensor, slice, slice]] | None:
        """Parts of a tensor of the stretch's shape that are matrices, and the rows and columns where they lie.

        A row that is not all here, some that are, and again one that is not; all but the first dimension are columns.
        """
        return self._boxes(tensor)

    def _boxes(self, tensor: Tensor) -> Iterator[tuple[Tensor, slice, slice]]:
        width = self.shape[1:].numel()
        begin, end = self.start, self.start + tensor.numel()
        first, last = -(-begin // width), end // width  # rows that are all here
        if first > last:  # within one row
            yield tensor[None], slice(last, first), slice(begin - last * width, end - last * width)
            return
        head, body = first * width - begin, (last - first) * width
        if head:
            yield tensor[None, :head], slice(first - 1, first), slice(width - head, width)
        if body:
            yield tensor[head : head + body].view(-1, width), slice(first, last), slice(0, width)
        if tail := end - last * width:
            yield tensor[None, head + body :], slice(last, last + 1), slice(0, tail)
