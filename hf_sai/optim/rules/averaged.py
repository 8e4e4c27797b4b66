r"""Factored gradients, and in the momentum's place the mean of all weights so far: Schedule-Free, arXiv 2405.15682.

.. math::
    u_t = \gamma_t \Big(\frac{G}{\sqrt n}\, \hat g_t + \lambda y_t\Big), \qquad z_{t+1} = z_t - u_t, \qquad
    x_{t+1} = (1 - c_{t+1})\, x_t + c_{t+1} z_{t+1}, \qquad y_{t+1} = (1 - \beta)\, z_{t+1} + \beta x_{t+1}

with the factored rule's gradient :math:`\hat g` at y, :math:`c_t = \gamma_t^2 / \sum_i \gamma_i^2` and the group's
``momentum`` as :math:`\beta`. The parameters are y in training and the mean x in evaluation (``optimizer.eval()``).
What is kept is :math:`e = x - z`, since then y, z and x follow from any one of them:

.. math::
    y_{t+1} = y_t - c\beta e_t - (1 - \beta (1 - c))\, u_t, \qquad e_{t+1} = (1 - c)(e_t + u_t), \qquad
    x = y + (1 - \beta)\, e

The mean takes the place of a decaying learning rate, which must stay constant after its warmup.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hf_sai.optim import momentum as momenta
from hf_sai.optim.layout import Part
from hf_sai.optim.rules.factored import Factored
from hf_sai.optim.rules.published import Portion
from hf_sai.optim.update import Choice, multiplied

__all__ = ["FASTER", "WEIGHT_SUM", "Averaged", "Numbers", "Step", "show_means"]

#: Key of the sum of the squares of all learning rates so far, a float.
WEIGHT_SUM = "weight_sum"


class Numbers(NamedTuple):
    """With u = scale g + decay y and e + u: y less own u and pull (e + u), and kept (e + u) as the next e."""

    scale: float
    decay: float
    own: float
    pull: float
    kept: float


class Step(NamedTuple):
    """A step that is still to be made: of a part, with its e and its gradient's factors."""

    part: Part
    e: Tensor
    factors: Sequence[Tensor]
    numbers: Numbers


#: Faster ways to make steps; each returns those that it has left. :mod:`hf_sai.kernels` fills it.
FASTER: list[Callable[[list[Step]], list[Step]]] = []


class Averaged(Factored):
    """State: the factored rule's, ``WEIGHT_SUM``, and x - z as ``momentum_buffer``."""

    name = "averaged"
    keys: tuple[str, ...] = (*Factored.keys, WEIGHT_SUM)
    averages = True

    def check(self, group: dict[str, Any], shapes: Sequence[torch.Size]) -> None:
        if group["momentum"] == 0:
            raise ValueError(
                "update='averaged' needs a momentum above 0: it is how near to their mean the weights are trained."
            )
        for p in group["params"]:
            _refuse_coarse(group, p)

    def allocate(self, part: Part) -> None:
        super().allocate(part)
        if WEIGHT_SUM not in part.state:  # it is new, or saved by another rule, with that one's momentum
            _refuse_coarse(part.group, part.param)
            momenta.drop(part)
            part.state[WEIGHT_SUM] = 0.0

    def factors(self, parts: Sequence[Part]) -> list[Sequence[Tensor]]:
        for part in parts:
            if WEIGHT_SUM not in part.state:
                self.allocate(part)
        return super().factors(parts)

    def start(self, part: Part) -> None:
        momenta.allocate(part)
        part.fresh = False

    def portions(self, parts: Sequence[Part], factors: Mapping[int, Sequence[Tensor]]) -> Iterator[Portion]:
        """Whole steps, in the gradients' memory where their dtype is the mean's; none where a kernel has made them."""
        if torch.compiler.is_compiling():
            raise ValueError("update='averaged' counts on the host, so that every step would be compiled anew.")
        group = parts[0].group
        lr, beta, sign = float(group["lr"]), group["momentum"], -1.0 if group["maximize"] else 1.0
        steps = []
        for part in parts:
            e = momenta.momentum_of(part)
            assert isinstance(e, Tensor)
            part.state[WEIGHT_SUM] += lr**2
            c = lr**2 / part.state[WEIGHT_SUM] if lr else 0.0
            scale = sign * lr * self.scale(part.gsnr, part.shape.numel())
            # 1 - beta (1 - c) of u is 1 - beta, and what is pulled towards the mean is taken of e + u.
            numbers = Numbers(scale, lr * group["weight_decay"], 1 - beta, c * beta, 1 - c)
            steps.append(Step(part, e, factors[part.number], numbers))
        for faster in FASTER:
            steps = faster(steps)
        for together in _buckets(steps):
            own, differences = [step.part for step in together], _differences(together)
            yield Portion(own, differences, [None] * len(own), 0.0, whole=True)


def _refuse_coarse(group: dict[str, Any], p: Tensor) -> None:
    kept = group["momentum_dtype"] or p.dtype
    if kept not in (torch.float32, torch.float64):
        raise ValueError(
            f"update='averaged' adds up small steps, which are lost in {kept}: "
            "use momentum_dtype=torch.float32 (optim_args: momentum_dtype=float32)."
        )


def _buckets(steps: Sequence[Step]) -> Iterable[list[Step]]:
    """Those that torch's multi-tensor operations work on together: in the gradients' memory, with the same numbers."""
    buckets: dict[Any, list[Step]] = defaultdict(list)
    for index, step in enumerate(steps):
        part, group = step.part, step.part.group
        many = Choice(group["foreach"], group["fused"]).together(part.param)
        in_place = part.grad.dtype == step.e.dtype
        buckets[(part.param.device, step.e.dtype, *step.numbers[1:]) if many and in_place else index].append(step)
    return buckets.values()


def _differences(steps: Sequence[Step]) -> list[Tensor]:
    """What is to be taken from y; brings e up to date."""
    numbers, means = steps[0].numbers, [step.e for step in steps]
    us = [multiplied(step.part.grad, step.factors).to(step.e.dtype) for step in steps]
    torch._foreach_mul_(us, [step.numbers.scale for step in steps])
    if numbers.decay:
        torch._foreach_add_(us, [step.part.param for step in steps], alpha=numbers.decay)
    torch._foreach_add_(means, us)
    torch._foreach_mul_(us, numbers.own)
    torch._foreach_add_(us, means, alpha=numbers.pull)
    torch._foreach_mul_(means, numbers.kept)
    return us


def show_means(part: Part, shown: bool) -> None:
    """Bring a parameter from y to the mean x, or back; one that has not started yet stays as it is."""
    if WEIGHT_SUM in part.state and "momentum_buffer" in part.state:  # no other rule's momentum
        e = momenta.momentum_of(part)
        assert isinstance(e, Tensor)
        part.param.add_(e.to(part.param.dtype), alpha=(1 if shown else -1) * (1 - part.group["momentum"]))
