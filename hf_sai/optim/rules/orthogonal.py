r"""Hidden matrices move along their momentum made orthogonal: Muon's step, its rows of equal size as in NorMuon.

.. math::
    d_t = \mu m_t + (1 - \mu) g_t, \qquad O_t = \operatorname{rows}(\operatorname{orth}(d_t)), \qquad
    \theta_t = (1 - \gamma\lambda)\, \theta_{t-1} - \gamma\, \frac{G}{\sqrt n}\, 0.2 \sqrt{\max(r, c)}\, O_t

where orth replaces every singular value of an r by c matrix by about 1, by Newton-Schulz iteration (Muon, Keller Jordan
and others, 2024), and rows divides each output's row by a running root-mean-square of its own and then gives the matrix
its norm back (NorMuon, arXiv 2510.05491). The factor gives the elements of the step a root-mean-square of 0.2, so that
AdamW's learning rates hold (arXiv 2502.16982, equation 4).

Which tensors are hidden matrices is not for the optimizer to guess: :func:`hf_sai.param_groups` reads it from the model
and writes the group's key ``matrices``; it gives all other tensors ``update="factored"``.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hf_sai.optim.layout import Copies, Part, Sharing, local, sum_over_holders
from hf_sai.optim.momentum import load, momentum_of, store
from hf_sai.optim.rules.published import Portion, Published

__all__ = ["FORMS", "ROW_MEAN_SQUARE", "Orthogonal", "form_of", "newton_schulz"]

#: What a group's tensors are, its key ``matrices`` -> the dimensions that number the matrices' rows, an output each.
FORMS: dict[str, tuple[int, ...]] = {
    "linear": (0,),
    "linear_transposed": (1,),  # GPT-2's Conv1D
    "convolution": (0,),  # all that one output sees is a row
    "experts": (0, 1),  # each a matrix of its own
    "experts_transposed": (0, 2),
}

#: Key of the running mean square of each row of what is orthogonal; float32.
ROW_MEAN_SQUARE = "row_mean_square"

#: How much of it stays from step to step, as in NorMuon.
KEPT = 0.95

#: Root-mean-square of a step's elements per unit of learning rate, as AdamW's steps have it in training.
STEP_SIZE = 0.2

# Muon's: they lead singular values from 0.005 on into 0.7 to 1.2 within five rounds, which is near enough.
_COEFFICIENTS = (3.4445, -4.7750, 2.0315)
_ROUNDS = 5

# Norm below which a matrix is no more brought to size, as in Muon: one that gets no gradient comes to rest.
_EPS = 1e-7

# Elements of the matrices that are made orthogonal in one batch: bounds the temporary memory of a step.
_BATCH = 1 << 25


class Orthogonal(Published):
    """State: a momentum and ``ROW_MEAN_SQUARE``."""

    name = "orthogonal"
    keys = (ROW_MEAN_SQUARE,)

    def check(self, group: dict[str, Any], shapes: Sequence[torch.Size]) -> None:
        form = group.get("matrices")
        if form not in FORMS:
            raise ValueError(
                f"update='orthogonal' is for hidden matrices, and a group says with matrices={form!r} that it does not "
                "know whether its tensors are some; let hf_sai.create_sgd_sai_optimizer(model, update='orthogonal') or "
                "hf_sai.param_groups(model, update='orthogonal') read it from the model."
            )
        fitting = {"linear": 2, "experts": 3}.get(form.removesuffix("_transposed"))
        wrong = next((shape for shape in shapes if len(shape) != (fitting or max(3, len(shape)))), None)
        if wrong is not None:
            raise ValueError(f"matrices={form!r} does not fit a tensor of shape {tuple(wrong)}.")

    def kept(self, part: Part) -> dict[str, tuple[int, ...]]:
        return {ROW_MEAN_SQUARE: FORMS[part.group["matrices"]]}

    def allocate(self, part: Part) -> None:
        for key, dims in self.kept(part).items():
            if key not in part.state:
                part.state[key] = part.zeros(torch.float32, dims)

    def leave(self, part: Part, rule: Published) -> None:
        super().leave(part, rule)
        part.state.pop(ROW_MEAN_SQUARE, None)  # also where the form has changed: its rows are others

    def scale(self, gsnr: float, numel: int) -> float:
        return gsnr / math.sqrt(numel)

    def portions(self, parts: Sequence[Part], factors: Mapping[int, Sequence[Tensor]]) -> Iterator[Portion]:
        """Matrices of one size in batches: what each moves along, its momentum being advanced already."""
        for part in parts:
            self.allocate(part)
        usable = _usable(parts)
        by_kind: dict[type[Part], list[Part]] = defaultdict(list)
        for part in parts:
            by_kind[type(part)].append(part)
        for kind, of_kind in by_kind.items():
            for own, copies in kind.copied(of_kind):
                if copies is None:
                    yield from (_portion(made, found) for made, found in self._made(own, usable))
                else:
                    yield _portion(own, self._made_once(own, usable, copies))

    def _made_once(
        self, parts: Sequence[Part], usable: dict[int, Tensor], copies: Copies
    ) -> list[tuple[Tensor, Tensor]]:
        """What :meth:`_made` makes, each part's on one process."""
        mine = [part for index, part in enumerate(parts) if copies.mine(index)]
        found: dict[int, tuple[Tensor, Tensor]] = {}
        for made, results in self._made(mine, usable):
            found |= zip((part.number for part in made), results, strict=True)
        for part in parts:
            if part.number not in found:
                _advanced(part, usable)  # the momentum, which every process keeps
                matrices = torch.empty(part.param.shape, dtype=_dtype(part.param.device), device=part.param.device)
                found[part.number] = matrices, torch.empty_like(_running(part)[0])
        copies.spread([(*found[part.number], _running(part)[0]) for part in parts])
        return [found[part.number] for part in parts]

    def _made(
        self, parts: Sequence[Part], usable: dict[int, Tensor]
    ) -> Iterator[tuple[list[Part], list[tuple[Tensor, Tensor]]]]:
        """Parts of one size at a time, each with its matrices made orthogonal and a factor for each of their rows."""
        # Of a stack of experts that is sharded by expert every process has whole matrices.
        cut: list[Part] = []
        rest: list[Part] = []
        for part in parts:
            in_pieces = part.holders((0,) if part.group["matrices"].startswith("experts") else ())
            (cut if in_pieces else rest).append(part)
        for batch in _batches([(part.param, part.group["matrices"]) for part in rest]):
            own = [rest[index] for index in batch]
            matrices = [Matrices(_advanced(part, usable), *_running(part)) for part in own]
            yield own, _orthogonal(matrices)
        rounds = (_Round(own, sharing, usable) for own, sharing in (type(cut[0]).sharing(cut) if cut else ()))
        current = next(rounds, None)
        while current is not None:
            following = next(rounds, None)  # its pieces travel while this one's matrices are made orthogonal
            yield current.parts, current.orthogonal()
            current = following


def form_of(group: Mapping[str, Any]) -> str | None:
    """What a group's tensors are, a key of ``FORMS``, where its rule asks; None for other rules."""
    return group.get("matrices") if group["update"] == Orthogonal.name else None


class Matrices(NamedTuple):
    """A tensor of whole matrices, the running mean squares of their rows, and their form."""

    tensor: Tensor
    running: Tensor
    form: str


def newton_schulz(matrices: Tensor) -> Tensor:
    """Replace the singular values of matrices by about 1 (0.7 to 1.2), those near 0 by something between.

    Args:
        matrices: Of shape (number, rows, columns), rows <= columns. Those of a norm far below 1e-7 come near zero, and
            zeros stay zeros. Computed in their dtype, for which bfloat16 suffices.
    """
    norms = torch.linalg.vector_norm(matrices, dim=(1, 2), keepdim=True, dtype=torch.float32)
    x = matrices / norms.clamp(min=_EPS).to(matrices.dtype)
    if x.dtype == torch.float32 and x.shape[2] >= 2 * x.shape[1]:
        return _by_gram(x)
    a, b, c = _COEFFICIENTS
    for _ in range(_ROUNDS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x


def _by_gram(x: Tensor) -> Tensor:
    """The same rounds on the small x x^T alone: of four times as many columns in half the time, but not in bfloat16."""
    a, b, c = _COEFFICIENTS
    gram = x @ x.mT
    product = None
    for last in (*[False] * (_ROUNDS - 1), True):
        factor = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        factor.diagonal(dim1=1, dim2=2).add_(a)
        product = factor if product is None else factor @ product
        if not last:
            gram = factor @ (gram @ factor)
    assert product is not None
    return product @ x


def _portion(parts: Sequence[Part], found: Sequence[tuple[Tensor, Tensor]]) -> Portion:
    # With maximize the momentum has the other sign already, and the update changes it once more.
    directions = [
        matrices * (-factors if part.group["maximize"] else factors)
        for part, (matrices, factors) in zip(parts, found, strict=True)
    ]
    return Portion(parts, directions, [None] * len(parts), 0.0)


def _running(part: Part) -> tuple[Tensor, str]:
    return local(part.state[ROW_MEAN_SQUARE]), part.group["matrices"]


def _batches(tensors: Sequence[tuple[Tensor, str]]) -> Iterator[list[int]]:
    """Numbers of tensors whose matrices are of one size, lying or standing, and together not too large."""
    alike: dict[Any, list[int]] = defaultdict(list)
    for index, (tensor, form) in enumerate(tensors):
        alike[tuple(sorted(_as_matrices(tensor, form).shape[1:])), tensor.device].append(index)
    for (size, _), indices in alike.items():
        room = max(1, _BATCH // max(1, math.prod(size)))
        batch: list[int] = []
        count = 0
        for index in indices:
            number = tensors[index][0].numel() // max(1, math.prod(size))
            if batch and count + number > room:
                yield batch
                batch, count = [], 0
            batch.append(index)
            count += number
        yield batch


def _orthogonal(own: Sequence[Matrices]) -> list[tuple[Tensor, Tensor]]:
    """Matrices of one size, orthogonal, and a factor for each of their rows. Brings the running means up to date."""
    dtype = _dtype(own[0].tensor.device)
    stacks = [_as_matrices(of.tensor, of.form) for of in own]
    flips = [stack.shape[1] > stack.shape[2] for stack in stacks]
    batch = torch.cat([(s.mT if flip else s).to(dtype) for s, flip in zip(stacks, flips, strict=True)])
    results = []
    for of, flip, result in zip(own, flips, newton_schulz(batch).split([len(stack) for stack in stacks]), strict=True):
        result = result.mT if flip else result
        matrices = torch.empty(of.tensor.shape, dtype=dtype, device=of.tensor.device)
        _as_matrices(matrices, of.form).copy_(result)
        factors = torch.empty_like(of.running)
        _as_matrices(factors, of.form).copy_(_row_factors(result, _as_matrices(of.running, of.form)))
        results.append((matrices, factors))
    return results


class _Round:
    """Matrices in pieces that are made whole and orthogonal at once, each on one process, and handed out again.

    Args:
        parts: Their parts.
        sharing: What brings them together, which begins here.
        usable: See :func:`_usable`; their momenta are advanced.
    """

    def __init__(self, parts: list[Part], sharing: Sharing, usable: dict[int, Tensor]) -> None:
        self.parts, self._sharing = parts, sharing
        advanced = [_advanced(part, usable) for part in parts]
        self._dtype = _dtype(advanced[0].device)
        self._every = [tuple(range(len(part.shape))) for part in parts]
        self._rows = [FORMS[part.group["matrices"]] for part in parts]
        self._running = [_running(part)[0] for part in parts]
        self._collected = sharing.collect(
            [(i, tensor.to(self._dtype), self._every[i]) for i, tensor in enumerate(advanced)]
            + [(i, running, self._rows[i]) for i, running in enumerate(self._running)]
        )

    def orthogonal(self) -> list[tuple[Tensor, Tensor]]:
        """What :func:`_orthogonal` says, of what lies here of each part."""
        wholes, places = self._collected(), range(len(self.parts))
        mine: dict[int, Matrices] = {}
        for i in places:
            tensor, means = wholes[i], wholes[i + len(places)]
            if tensor is not None and means is not None:
                mine[i] = Matrices(tensor, means, self.parts[i].group["matrices"])
        numbers, found = list(mine), dict[int, tuple[Tensor, Tensor]]()
        for batch in _batches([(mine[i].tensor, mine[i].form) for i in numbers]):
            own = [numbers[index] for index in batch]
            found |= zip(own, _orthogonal([mine[i] for i in own]), strict=True)
        handed = self._sharing.hand_out(
            [(i, found[i][0] if i in found else None, self._every[i], self._dtype) for i in places]
            + [(i, found[i][1] if i in found else None, self._rows[i], torch.float32) for i in places]
            + [(i, mine[i].running if i in mine else None, self._rows[i], torch.float32) for i in places]
        )
        for i in places:
            self._running[i].copy_(handed[i + 2 * len(places)])
        return [(handed[i], handed[i + len(places)]) for i in places]


def _dtype(device: torch.device) -> torch.dtype:
    # Of accelerators bfloat16 is the fast dtype; on CPU it is the slow one.
    return torch.float32 if device.type == "cpu" else torch.bfloat16


def _row_factors(orthogonal: Tensor, running: Tensor) -> Tensor:
    """What gives all rows about the same size, and the elements a root-mean-square of ``STEP_SIZE``."""
    squares = orthogonal.float().square().mean(2, keepdim=True)
    running.lerp_(squares, 1 - KEPT)
    tiny = torch.finfo(torch.float32).tiny
    roots = running.clamp(min=tiny).rsqrt()
    sizes = (squares * roots.square()).mean(1, keepdim=True)
    before = squares.mean(1, keepdim=True)
    return roots * (before / sizes.clamp(min=tiny)).sqrt() * STEP_SIZE * math.sqrt(max(orthogonal.shape[1:]))


def _usable(parts: Sequence[Part]) -> dict[int, Tensor]:
    """For each part whether its whole gradient is finite, by its number; one all_reduce a process group."""
    lost = {part.number: (~_norm(part.grad).isfinite()).float().reshape(1) for part in parts}
    sum_over_holders((lost[part.number], part.holders(), part.table_device) for part in parts)
    return {number: count == 0 for number, count in lost.items()}


def _norm(gradient: Tensor) -> Tensor:
    """In float32 at least: in float16 the sum of squares would not be finite where all that it sums is."""
    return torch.linalg.vector_norm(gradient, dtype=torch.promote_types(gradient.dtype, torch.float32))


def _advanced(part: Part, usable: dict[int, Tensor]) -> Tensor:
    """Advance the momentum; returns what is to be made orthogonal, float32 or better.

    A gradient that is not finite leaves the momentum as it is: within a matrix it would not stay where it is.
    """
    g = -part.grad if part.group["maximize"] else part.grad
    g = g.to(torch.promote_types(g.dtype, torch.float32))
    mu, whole_is_finite = part.group["momentum"], usable[part.number]
    if mu == 0:
        return torch.where(whole_is_finite, g, 0.0)
    kept = momentum_of(part)
    m = load(kept).to(g.dtype)
    g = torch.where(whole_is_finite, g, m)
    m = m.lerp(g, 1 - mu)
    store(kept, m)
    return m.lerp(g, 1 - mu)  # Nesterov


def _as_matrices(tensor: Tensor, form: str) -> Tensor:
    """A tensor as (number, rows, columns), sharing its memory if it is contiguous; also one with a size per row."""
    if form == "convolution":
        return tensor.flatten(1).unsqueeze(0)
    matrices = tensor if form.startswith("experts") else tensor.unsqueeze(0)
    return matrices.mT if form.endswith("transposed") else matrices
