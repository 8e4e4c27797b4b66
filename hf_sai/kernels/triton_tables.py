"""Tables of addresses for Triton's kernels, on the device and kept between steps: one launch works on all tensors.

A table is int64[rows, tensors]; the first row says which program is a tensor's first. A second tensor says to which
tensor each program belongs. Both stay as they are while nothing in them changes, so that a step copies nothing. They
are made on the CPU, whatever torch's default device is.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Table", "float_bits", "kept_table", "tensor_of_program"]

#: More tables are not kept: with ``gradient_release`` every parameter has one of its own.
_MOST = 4096


@dataclass(eq=False)
class Table:
    """What a launch looks up.

    Attributes:
        on_device: int64[1 + rows, tensors].
        owners: int32[programs], the tensor of each.
        content: The rows as they were given.
        programs: How many each tensor has.
        stream: On which it was copied. Another one gets a copy of its own, and need not wait for this one.
        spare: Room on the host and on the device for a table that is made while a CUDA graph is captured, when nothing
            may be allocated on the host.
    """

    on_device: Tensor
    owners: Tensor
    content: tuple[tuple[int, ...], ...]
    programs: tuple[int, ...]
    stream: int
    spare: tuple[Tensor, Tensor] | None


_KEPT: dict[tuple[str, torch.device, tuple[int, ...]], Table] = {}

#: A graph reads its tables whenever it is replayed, and nobody says when it is gone.
_CAPTURED: list[Table] = []


def kept_table(name: str, device: torch.device, rows: Sequence[Sequence[int]], programs: Sequence[int]) -> Table:
    """The table of these rows: the one of the last step if nothing has changed, else a new one.

    Args:
        name: The kernel's.
        device: Where the tensors are.
        rows: One number per tensor in each; the first row, of addresses, tells one optimizer's table from another's.
        programs: How many each tensor needs, 1 or more.

    Raises:
        ValueError: A CUDA graph is being captured and no step was made with these tensors before.
    """
    content, counts = tuple(map(tuple, rows)), tuple(programs)
    identity = (name, device, content[0])
    table = _KEPT.pop(identity, None)
    on_gpu = device.type == "cuda"
    stream = torch.cuda.current_stream(device).cuda_stream if on_gpu else 0
    same = table is not None and table.content == content and table.programs == counts
    if on_gpu and torch.cuda.is_current_stream_capturing():
        if table is None or table.programs != counts or not (same or table.spare):
            raise ValueError(
                "A CUDA graph captures a step of tensors that no step has updated before: make one step outside, then "
                "capture."
            )
        _KEPT[identity] = table
        _CAPTURED.append(table if same else _in_spare(table, content))
        return _CAPTURED[-1]
    if table is None or not same or table.stream != stream:
        table = _made(device, content, counts, stream, table)
    _KEPT[identity] = table  # now the last to be dropped
    if len(_KEPT) > _MOST:
        del _KEPT[next(iter(_KEPT))]
    return table


def tensor_of_program(programs: Sequence[int]) -> Tensor:
    """Which tensor each program belongs to, int32[programs]."""
    counts = torch.tensor(programs, dtype=torch.int64, device="cpu")
    return torch.repeat_interleave(torch.arange(len(programs), dtype=torch.int32, device="cpu"), counts)


def float_bits(numbers: Sequence[float]) -> list[int]:
    """Numbers as a row of a table: float64, seen as int64."""
    return torch.tensor(numbers, dtype=torch.float64, device="cpu").view(torch.int64).tolist()


def _on_host(content: tuple[tuple[int, ...], ...], programs: tuple[int, ...]) -> Tensor:
    firsts = (0, *itertools.accumulate(programs[:-1]))
    return torch.tensor((firsts, *content), dtype=torch.int64, device="cpu")


def _made(
    device: torch.device,
    content: tuple[tuple[int, ...], ...],
    programs: tuple[int, ...],
    stream: int,
    old: Table | None,
) -> Table:
    alike = old is not None and old.programs == programs
    owners = old.owners if old is not None and alike else tensor_of_program(programs).to(device)
    host = _on_host(content, programs)
    if device.type != "cuda":
        return Table(host, owners, content, programs, stream, None)
    spare = old.spare if old is not None and alike else None
    if spare is None:
        spare = (torch.empty_like(host, pin_memory=True), torch.empty_like(host, device=device))
    on_device = host.pin_memory().to(device, non_blocking=True)  # the host does not wait
    return Table(on_device, owners, content, programs, stream, spare)


def _in_spare(table: Table, content: tuple[tuple[int, ...], ...]) -> Table:
    """A table in the room that was kept for it; its copy to the device becomes part of the graph."""
    assert table.spare is not None
    (host, on_device), table.spare = table.spare, None
    host.copy_(_on_host(content, table.programs))
    on_device.copy_(host, non_blocking=True)
    return Table(on_device, table.owners, content, table.programs, table.stream, (host, on_device))
