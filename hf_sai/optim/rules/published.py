r"""The published rule: the gradient as it is, scaled by its g-SNR. arXiv 2412.11768, Algorithm 1, lines 10 to 16.

.. math::
    m_t = \mu m_{t-1} + (1 - \mu) g_t, \qquad \theta_t = (1 - \gamma\lambda)\, \theta_{t-1} - \gamma\, G\, m_t
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hf_sai.optim.layout import Part
from hf_sai.optim.momentum import Momentum, drop, momentum_of, start

__all__ = ["Portion", "Published"]


class Portion(NamedTuple):
    """Parts of a group that are updated at once.

    Attributes:
        parts: The parts.
        gradients: What comes into the momentum of each; without a momentum what the step goes along.
        momenta: Their momenta, None without one.
        momentum: The momentum's coefficient.
        factors: What each gradient is still to be multiplied by, one factor after the other; none for 1.
        whole: The gradients are steps already: rate, scale, decay and sign are in them.
    """

    parts: Sequence[Part]
    gradients: Sequence[Any]
    momenta: Sequence[Momentum | None]
    momentum: float
    factors: Sequence[Sequence[Tensor]] = ()
    whole: bool = False


class Published:
    """What every rule answers; here for the published one."""

    name = "published"

    #: Keys of what the rule keeps in a parameter's state beside ``gsnr`` and the momentum.
    keys: tuple[str, ...] = ()

    #: Whether the weights that are trained are others than the mean ones, which are to be evaluated.
    averages = False

    def check(self, group: dict[str, Any], shapes: Sequence[torch.Size]) -> None:
        """Raise ValueError for a group that the rule cannot update.

        Args:
            group: With all options.
            shapes: Of its whole parameters.
        """

    def kept(self, part: Part) -> dict[str, tuple[int, ...]]:
        """The tensors that the rule keeps for a part: key -> the dimensions they have in full, the others being 1."""
        return {}

    def allocate(self, part: Part) -> None:
        """Give a part's state what the rule keeps, unless it is there."""

    def leave(self, part: Part, rule: Published) -> None:
        """Forget of a part what another rule, which takes it over, cannot use: the momentum, too, has another size."""
        related = isinstance(rule, type(self)) or isinstance(self, type(rule))
        for key in set(self.keys) - set(rule.keys if related else ()):
            part.state.pop(key, None)
        drop(part)

    def taken_up(self, part: Part, saved: dict[str, Tensor]) -> dict[str, Tensor]:
        """What the rule keeps of a part, from tensors that may have been saved in another form."""
        return saved

    def factors(self, parts: Sequence[Part]) -> list[Sequence[Tensor]]:
        """What each gradient is to be multiplied by before the momentum, one factor after the other; none for 1.

        All processes that hold some of these parameters must call this with the same parts in the same order.

        Args:
            parts: Each with its gradient.
        """
        return [()] * len(parts)

    def scale(self, gsnr: float, numel: int) -> float:
        """The factor of the step, beside the learning rate.

        Args:
            gsnr: The parameter's g-SNR.
            numel: The whole parameter's number of elements.
        """
        return gsnr

    def start(self, part: Part) -> None:
        """Start a part's momentum in its first step, with the gradient that goes into it."""
        start(part)

    def portions(self, parts: Sequence[Part], factors: Mapping[int, Sequence[Tensor]]) -> Iterable[Portion]:
        """What a group's parts are updated with, in as many portions as the rule has use for.

        Args:
            parts: Of one group, measured, their momenta started.
            factors: What :meth:`factors` said, by the parts' numbers.
        """
        momentum = parts[0].group["momentum"]
        momenta = [momentum_of(part) if momentum != 0 else None for part in parts]
        own = [factors[part.number] for part in parts]
        yield Portion(parts, [part.grad for part in parts], momenta, momentum, own)
