"""Whole tensors put together from the shards of DTensors, each on one rank, and cut into shards again.

Each rank sends every owner its shards of the tensors that are the owner's: one all_to_all per mesh dimension over which
they are sharded, for all tensors together, and one back. Nothing is gathered on more than one rank, unless the mesh
replicates it.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from hf_sai.optim.layout import Part

__all__ = ["Exchange", "exchanges", "owners_of"]

#: About so many elements one rank puts together at a time, while as many are on their way: bounds temporary memory.
ROOM = 1 << 26


def exchanges(parts: Sequence[Any]) -> list[tuple[list[Part], Exchange]]:
    """Shares the work on DTensors' parts out among the ranks, by its cost, in rounds that fit into memory."""
    alike: dict[Any, list[Any]] = defaultdict(list)
    for part in parts:
        alike[part._dtensor.device_mesh, _applied(part._dtensor.placements)].append(part)
    result: list[tuple[list[Part], Exchange]] = []
    for (mesh, applied), of_mesh in alike.items():
        owners = owners_of([part.shape for part in of_mesh], math.prod(mesh.size(dim) for dim in applied))
        load: dict[int, int] = defaultdict(int)  # owner -> elements
        rounds: dict[int, list[int]] = defaultdict(list)
        for index, part in enumerate(of_mesh):
            rounds[load[owners[index]] // ROOM].append(index)
            load[owners[index]] += part.shape.numel()
        for _, indices in sorted(rounds.items()):
            own = [of_mesh[index] for index in indices]
            result.append((own, Exchange(own, mesh, applied, [owners[index] for index in indices])))
    return result


class Exchange:
    """A :class:`hf_sai.optim.layout.Sharing` of DTensors on one mesh.

    Args:
        parts: The parts, sharded over the same mesh dimensions.
        mesh: The mesh.
        applied: The mesh dimensions over which they are sharded, in the order in which they were cut.
        owners: The rank of each part's owner among the ranks along these.
    """

    def __init__(self, parts: Sequence[Any], mesh: Any, applied: Sequence[int], owners: Sequence[int]) -> None:
        self._parts, self._mesh, self._applied = parts, mesh, applied
        self._here = {dim: mesh.get_local_rank(dim) for dim in applied}
        # Mesh dimension -> the coordinate of each part's owner.
        self._at: dict[int, list[int]] = {}
        for dim in applied:
            self._at[dim] = [owner % mesh.size(dim) for owner in owners]
            owners = [owner // mesh.size(dim) for owner in owners]

    def collect(self, pieces: Sequence[tuple[int, Tensor, Sequence[int]]]) -> Callable[[], list[Tensor | None]]:
        collecting = self._collecting(pieces)
        next(collecting)
        return lambda: next(collecting)

    def _collecting(self, pieces: Sequence[tuple[int, Tensor, Sequence[int]]]) -> Iterator[Any]:
        """Yields None when the pieces are on their way along the first mesh dimension, then the whole tensors."""
        found: list[Tensor | None] = [tensor for _, tensor, _ in pieces]
        cuts = [self._cuts(index, kept) for index, _, kept in pieces]
        for place, (_, tensor, _) in enumerate(pieces):
            if tuple(tensor.shape) != cuts[place][-1][1]:
                raise ValueError(
                    f"A parameter's shard has shape {tuple(tensor.shape)} where {cuts[place][-1][1]} was expected of "
                    f"the placements {self._parts[pieces[place][0]]._dtensor.placements}, so that update='orthogonal' "
                    "cannot put it together. Use update='factored'."
                )
        for depth in reversed(range(len(self._applied))):
            dim = self._applied[depth]
            there, ranks = self._at[dim], range(self._mesh.size(dim))
            sent: list[list[Tensor]] = [[] for _ in ranks]
            expected: list[list[tuple[int, tuple[int, ...], torch.dtype]]] = [[] for _ in ranks]
            for place, (index, tensor, _) in enumerate(pieces):
                whole, _, along = cuts[place][depth]
                value = found[place]
                if value is None or along is None:
                    continue
                sent[there[index]].append(value)
                if there[index] == self._here[dim]:
                    for rank in ranks:
                        expected[rank].append((place, _piece(whole, along, len(ranks), rank), tensor.dtype))
            received = _all_to_all(sent, expected, self._mesh.get_group(dim), pieces[0][1].device)
            if depth == len(self._applied) - 1:
                yield None
            came: dict[int, list[Tensor]] = defaultdict(list)
            for place, piece in received():
                came[place].append(piece)
            for place, (index, _, _) in enumerate(pieces):
                if there[index] != self._here[dim]:
                    found[place] = None
                elif place in came:
                    found[place] = torch.cat(came[place], cuts[place][depth][2] or 0)
        yield found

    def hand_out(self, wholes: Sequence[tuple[int, Tensor | None, Sequence[int], torch.dtype]]) -> list[Tensor]:
        found = [tensor for _, tensor, _, _ in wholes]
        device = self._parts[0].param.device
        for depth, dim in enumerate(self._applied):
            there, ranks = self._at[dim], range(self._mesh.size(dim))
            sent: list[list[Tensor]] = [[] for _ in ranks]
            expected: list[list[tuple[int, tuple[int, ...], torch.dtype]]] = [[] for _ in ranks]
            for place, (index, _, kept, dtype) in enumerate(wholes):
                _, mine, along = self._cuts(index, kept)[depth]
                value = found[place]
                if value is not None:
                    for rank in ranks:
                        sent[rank].append(value if along is None else _cut(value, along, len(ranks), rank))
                # Only where the later cuts' owner is this one, too: those along them have something to hand on.
                if all(self._at[later][index] == self._here[later] for later in self._applied[depth + 1 :]):
                    expected[there[index]].append((place, mine, dtype))
            for place, piece in _all_to_all(sent, expected, self._mesh.get_group(dim), device)():
                found[place] = piece
        return found  # type: ignore[return-value]

    def _cuts(self, index: int, kept: Sequence[int]) -> list[tuple[tuple[int, ...], tuple[int, ...], int | None]]:
        """For each mesh dimension the shape before it cuts, that of the piece here, and the dimension that it cuts."""
        part = self._parts[index]
        shape = tuple(length if d in kept else 1 for d, length in enumerate(part.shape))
        cuts = []
        for dim in self._applied:
            along = part._dtensor.placements[dim].dim
            if along in kept:
                piece = _piece(shape, along, self._mesh.size(dim), self._here[dim])
                cuts.append((shape, piece, along))
                shape = piece
            else:
                cuts.append((shape, shape, None))
        return cuts


def _applied(placements: Sequence[Any]) -> tuple[int, ...]:
    """The mesh dimensions that shard a tensor, in the order in which they have cut it.

    FSDP2 cuts what tensor parallelism has left, though its mesh dimension comes first: a strided shard, if both cut the
    same dimension. Where none is cut twice any order is right, and this one lets all of a model go together.
    """
    dims = [dim for dim, placement in enumerate(placements) if not placement.is_replicate()]
    strided = [dim for dim in dims if type(placements[dim]).__name__ == "_StridedShard"]
    plain = [dim for dim in dims if dim not in strided]
    if len({placements[dim].dim for dim in plain}) == len(plain):
        return tuple(reversed(dims))
    return (*plain, *strided)


def owners_of(shapes: Sequence[torch.Size], ranks: int) -> list[int]:
    """The owner of each tensor: the dearest first, each to who has least to do."""
    costs = [shape.numel() * min(shape[0], shape[1:].numel()) for shape in shapes]
    owners, work = [0] * len(shapes), [0] * ranks
    for index in sorted(range(len(shapes)), key=lambda index: -costs[index]):
        owners[index] = min(range(ranks), key=lambda rank: work[rank])
        work[owners[index]] += costs[index]
    return owners


def _piece(shape: tuple[int, ...], along: int, parts: int, number: int) -> tuple[int, ...]:
    """The shape of one piece, as ``torch.chunk`` cuts, empty ones included."""
    length = shape[along]
    size = -(-length // parts)
    return (*shape[:along], max(0, min(size, length - size * number)), *shape[along + 1 :])


def _cut(tensor: Tensor, along: int, parts: int, number: int) -> Tensor:
    size = -(-tensor.shape[along] // parts)
    start = min(size * number, tensor.shape[along])
    return tensor.narrow(along, start, _piece(tuple(tensor.shape), along, parts, number)[along])


def _all_to_all(
    sent: Sequence[Sequence[Tensor]],
    expected: Sequence[Sequence[tuple[int, tuple[int, ...], torch.dtype]]],
    group: dist.ProcessGroup,
    device: torch.device,
) -> Callable[[], Iterator[tuple[int, Tensor]]]:
    """Begin one all_to_all a dtype.

    Returns:
        What waits for them, and then yields (what was expected under this number, its tensor), ordered by sender.
    """
    begun: list[tuple[Any, Tensor, Tensor, list[list[tuple[int, tuple[int, ...]]]]]] = []
    dtypes = {t.dtype for of in sent for t in of} | {dtype for of in expected for _, _, dtype in of}
    for dtype in sorted(dtypes, key=str):
        flat = [
            torch.cat([t.reshape(-1) for t in of if t.dtype == dtype] or [torch.empty(0, dtype=dtype, device=device)])
            for of in sent
        ]
        mine = [[(number, shape) for number, shape, of in wanted if of == dtype] for wanted in expected]
        sizes = [sum(math.prod(shape) for _, shape in wanted) for wanted in mine]
        outgoing, incoming = torch.cat(flat), torch.empty(sum(sizes), dtype=dtype, device=device)
        work = dist.all_to_all_single(
            incoming, outgoing, sizes, [of.numel() for of in flat], group=group, async_op=True
        )
        begun.append((work, outgoing, incoming, mine))  # what goes out must live until it has gone

    def received() -> Iterator[tuple[int, Tensor]]:
        for work, _, incoming, mine in begun:
            work.wait()
            rest = iter(incoming.split([math.prod(shape) for wanted in mine for _, shape in wanted]))
            for wanted in mine:
                for number, shape in wanted:
                    yield number, next(rest).view(shape)

    return received
